"""
What a sandboxed builder gets to see, as a value; its root directory; and whether sandboxes work on this machine.

The view is that of Nix (Nix 2.8, src/libstore/build/local-derivation-goal.cc:startBuilder): C{/nix/store} with the
input closure, C{/build}, C{/tmp}, C{/dev}, C{/proc}, three files in C{/etc}, and nothing else. The mounts are made
in L{nixserve.builder.child}; here are the directories and files on which they are made. These lie in the store's
directory, so that an output can be renamed into the store.

The directory above the root is closed to everybody but the server, whatever the builder does with modes inside.
"""

from __future__ import annotations

import functools
import os
import stat
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nixserve.builder import child, seccomp, spawn
from nixserve.builder.users import BuildUser
from nixserve.codec.buildresult import BuildStatus
from nixserve.errors import BuildError, FormatError
from nixserve.store.files import deletePath

__all__ = ["BUILD_DIR", "Sandbox", "SandboxPath", "findShell", "parseSandboxPath", "sandboxProblem"]

BUILD_DIR = "/build"
"""The build directory as the builder sees it: Nix's setting sandbox-build-dir."""

_DEVICES = ("full", "null", "random", "tty", "urandom", "zero")

# Where the sandbox mounts what hides what lies below.
_COVERED = ("/dev", "/proc", BUILD_DIR)

_PASSWD = """root:x:0:0:Nix build user:/build:/noshell
nixbld:x:1000:100:Nix build user:/build:/noshell
nobody:x:65534:65534:Nobody:/:/noshell
"""
_GROUP = """root:x:0:
nixbld:!:100:
nogroup:x:65534:
"""
_HOSTS = """127.0.0.1 localhost
::1 localhost
"""
# Of slirp4netns.
_HELPER_RESOLVER = "10.0.2.3"
_NSSWITCH = """hosts: files dns
services: files
"""

# Where Debian's and Alpine's packages put it.
_BUSYBOXES = ("/bin/busybox", "/usr/bin/busybox", "/bin/busybox.static")
_PT_INTERP = 3

# Seconds.
_PROBE_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class SandboxPath:
    """
    A path of the host that every sandbox has: an entry of Nix's setting sandbox-paths.

    @ivar target: where the builder sees it, absolute.
    @ivar source: where it is.
    @ivar optional: leave it out if it is missing.
    """

    target: str
    source: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Sandbox:
    """
    The sandbox of one build.

    @ivar chrootDir: the directory for it, on the file system of the store; nothing is there yet, or a leftover.
    @ivar buildDir: the build directory on the host, which belongs to the builder. It must be in a directory that only
        the server can enter.
    @ivar storeDir: the logical store directory.
    @ivar inputs: the paths of the input closure: where each is, and its logical path. Not the outputs.
    @ivar paths: further paths of the host.
    @ivar network: leave the builder in the network of the host, for types of derivations whose outputs are checked.
    @ivar networkHelper: with C{network}, the path of slirp4netns: the builder gets a network of its own, from which the
        helper reaches that of the host, but not its 127.0.0.1.
    @ivar kvm: give it /dev/kvm.
    @ivar caBundle: with C{network}, the certificates shown at /etc/ssl/certs/ca-certificates.crt, unless empty.
    @ivar shmSize: of /dev/shm, as C{mount} takes it: Nix's setting sandbox-dev-shm-size.
    """

    chrootDir: str
    buildDir: str
    storeDir: str = "/nix/store"
    inputs: Sequence[tuple[str, str]] = ()
    paths: Sequence[SandboxPath] = ()
    network: bool = False
    networkHelper: str = ""
    kvm: bool = False
    caBundle: str = ""
    shmSize: str = "50%"

    @property
    def root(self) -> str:
        """The directory that the builder sees as C{/}."""
        return os.path.join(self.chrootDir, "root")

    def realPath(self, path: str) -> str:
        """
        Where an absolute path of the sandbox is on the host, as long as it is not one of the mounts.
        """
        return self.root + path

    def prepare(self, user: BuildUser) -> None:
        """
        Make the root directory, deleting what was there. One system call or two for each input.

        @raise BuildError: a path is missing, or the file system refuses.
        """
        if any(self.storeDir.startswith(f"{path}/") for path in _COVERED):
            raise BuildError(
                BuildStatus.MISC_FAILURE,
                f"{spawn.SETUP_FAILED}: a sandbox cannot show the store directory '{self.storeDir}', since it has "
                f"something else at {' and '.join(_COVERED)}",
            )
        try:
            if os.path.lexists(self.chrootDir):
                deletePath(self.chrootDir)
            self._makeRoot(user)
            for source, target, _ in self._shown():
                # What is below /dev gets its place there, in a tmpfs.
                if not target.startswith("/dev/"):
                    self._makeRoom(source, target)
            os.chmod(self.realPath("/etc"), 0o555)
        except OSError as error:
            raise BuildError(
                BuildStatus.MISC_FAILURE, f"{spawn.SETUP_FAILED}: '{error.filename}': {error.strerror}"
            ) from error

    def remove(self) -> None:
        """
        Delete the root directory and what is in it. Nothing of the build may run any more. Safe to call twice.

        @raise nixserve.errors.StoreError: the file system refuses.
        """
        if os.path.lexists(self.chrootDir):
            deletePath(self.chrootDir)

    def mounts(self) -> child.Job:
        """What L{nixserve.builder.child} needs of this, after L{prepare}."""
        binds = [shown for shown in self._shown() if not os.path.islink(shown[0])]
        return {
            "root": self.root,
            "writable": [self.storeDir, "/tmp"],
            "binds": [*binds, (self.buildDir, BUILD_DIR, True)],
            "devices": [*_DEVICES, *(["kvm"] if self.kvm else [])],
            "network": self.network,
            "networkHelper": self.networkHelper if self.network else "",
            "shmSize": self.shmSize,
        }

    def _shown(self) -> Iterator[tuple[str, str, bool]]:
        """
        What the host shows to the builder: source, target, and whether mode bits alone protect it from writing, as
        they do for everything in Nix; some machines have a compiler's cache among such paths.
        """
        for source, target in self.inputs:
            yield source, target, False
        for path in self._hostPaths():
            if not path.optional or os.path.exists(path.source):
                yield os.path.realpath(path.source), path.target, True

    def _makeRoot(self, user: BuildUser) -> None:
        """
        The directories and files of our own. Modes are Nix's: through its group, not as their owner, the builder may
        add to the store directory, where the sticky bit protects what others put there, and cannot change the rest.
        """
        os.mkdir(self.chrootDir, 0o700)
        self._makeDirectory("", 0o750, user.gid)
        self._makeParents(self.storeDir)
        self._makeDirectory(self.storeDir, 0o1775, user.gid)
        self._makeDirectory("/tmp", 0o1777)
        for path in (BUILD_DIR, "/proc", "/dev", "/etc"):
            self._makeDirectory(path, 0o755)
        files = {"passwd": _PASSWD, "group": _GROUP}
        files |= {"nsswitch.conf": _NSSWITCH} if self.network else {"hosts": _HOSTS}
        if self.network and self.networkHelper:
            files["resolv.conf"] = _helpersResolver()
        for name, text in files.items():
            with open(self.realPath(f"/etc/{name}"), "x") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(text)

    def _makeDirectory(self, path: str, mode: int, gid: int = -1) -> None:
        """A directory with exactly this mode. It may be there: the store directory may lie below /tmp."""
        os.makedirs(self.realPath(path), exist_ok=True)
        os.chown(self.realPath(path), -1, gid)
        os.chmod(self.realPath(path), mode)

    def _makeParents(self, path: str) -> None:
        """The directories above C{path} that are missing."""
        parent = os.path.dirname(path)
        if parent != "/" and not os.path.lexists(self.realPath(parent)):
            self._makeParents(parent)
            self._makeDirectory(parent, 0o755)

    def _makeRoom(self, source: str, target: str) -> None:
        """
        Show a symbolic link by an equal one, and make an empty directory or file to mount anything else on.
        """
        mode = os.lstat(source).st_mode
        self._makeParents(target)
        real = self.realPath(target)
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(source), real)
        elif stat.S_ISDIR(mode):
            os.makedirs(real, exist_ok=True)
        else:
            os.close(os.open(real, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))

    def _hostPaths(self) -> list[SandboxPath]:
        """Those asked for, and those that come with the network."""
        if not self.network:
            return [*self.paths]
        resolver = () if self.networkHelper else ("/etc/resolv.conf",)
        files = [SandboxPath(path, path, True) for path in (*resolver, "/etc/services", "/etc/hosts")]
        if self.caBundle:
            files.append(SandboxPath("/etc/ssl/certs/ca-certificates.crt", self.caBundle, True))
        return [*self.paths, *files]


def _helpersResolver() -> str:
    """/etc/resolv.conf for a network with a helper: the host's, but for the address, where the helper asks for us."""
    try:
        with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.split()[:1] in (["search"], ["domain"], ["options"])]
    except OSError:
        lines = []
    return "".join([f"nameserver {_HELPER_RESOLVER}\n", *lines])


def parseSandboxPath(text: str) -> SandboxPath:
    """
    Read C{target[=source][?]}, an entry of Nix's setting sandbox-paths.

    @raise FormatError: a path is not absolute and normal.
    """
    optional = text.endswith("?")
    target, _, source = text.removesuffix("?").partition("=")
    for path in (target, source or target):
        if not path.startswith("/") or os.path.normpath(path) != path or path == "/":
            raise FormatError("bad sandbox path", expected="target[=source][?] with absolute paths", found=text)
    return SandboxPath(target, source or target, optional)


def findShell() -> SandboxPath | None:
    """
    A shell for /bin/sh, where recipes that start from nothing expect one: a busybox that needs no other file.
    """
    for path in _BUSYBOXES:
        if _isStatic(path):
            return SandboxPath("/bin/sh", os.path.realpath(path))
    return None


def _isStatic(path: str) -> bool:
    """Is this a 64-bit little-endian ELF program without an interpreter, that is without shared libraries?"""
    try:
        with open(path, "rb") as file:
            header = file.read(64)
            if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
                return False
            # e_phoff; e_phentsize, e_phnum
            (offset,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(offset)
            table = file.read(size * count)
    except OSError:
        return False
    types = [struct.unpack_from("<I", table, index)[0] for index in range(0, len(table) - 3, size or len(table))]
    return bool(types) and _PT_INTERP not in types


@functools.lru_cache(maxsize=2)
def sandboxProblem(networkHelper: str = "") -> str:
    """
    Try to enter a sandbox. Costs some 30 ms the first time; the answer is kept.

    @param networkHelper: try it with a network by way of this, see L{Sandbox}.
    @return: why that does not work on this machine, as a line for its operator; empty if it works.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="nixserve-probe-") as directory:
            buildDir = os.path.join(directory, "build")
            os.mkdir(buildDir)
            sandbox = Sandbox(
                os.path.join(directory, "probe.chroot"),
                buildDir,
                network=bool(networkHelper),
                networkHelper=networkHelper,
            )
            caller = BuildUser(os.geteuid(), os.getegid(), False)
            sandbox.prepare(caller)
            return _probe(sandbox, caller)
    except (OSError, BuildError) as error:
        return str(error)


def _probe(sandbox: Sandbox, user: BuildUser) -> str:
    """Do all that is done for a build, except for running a builder."""
    job: child.Job = {
        "action": "probe",
        "uid": user.uid,
        "gid": user.gid,
        "ownUid": False,
        "stdin": None,
        "module": "",
        "cwd": BUILD_DIR,
        "maxProcesses": 64,
        "filter": seccomp.filterProgram(),
        "personality": 0,
        "sandbox": sandbox.mounts(),
    }
    terminal = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        supervisor = spawn.startSupervisor(job, terminal)
    finally:
        os.close(terminal)
    supervisor.awaitReport(_PROBE_TIMEOUT)
    outcome, detail = supervisor.end()
    if outcome == "error":
        return detail
    return "" if (outcome, detail) == ("exit", "0") else f"trying it ended with {outcome} {detail}"

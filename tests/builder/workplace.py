"""Builds for tests: directories, a user, and a busybox for a shell."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from nixserve.builder.process import CancelToken, ProcessLimits, ProcessSpec, runBuilder
from nixserve.builder.sandbox import Sandbox, findShell, sandboxProblem
from nixserve.builder.users import BuildUser
from nixserve.store.files import deletePath

OUT = "/nix/store/" + 32 * "z" + "-out"
"""Where builders in a sandbox put their output."""

needsSandbox = pytest.mark.skipif(
    findShell() is None or bool(sandboxProblem()), reason=f"needs busybox-static; {sandboxProblem()}"
)


class Workplace:
    """
    One place to build in.

    @ivar log: what a watcher saw.
    @ivar raw: what the log on disk would have.
    @ivar buildDir: as the host sees it.
    @ivar store: a directory with two inputs and what is none of them.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self.user = BuildUser.acquire(str(self.directory / "state"))
        self.store = self.directory / "store"
        self.log = bytearray()
        self.raw = bytearray()
        self._populate()

    def _populate(self):
        """Make the directories."""
        closed = self.directory / "build-top"
        closed.mkdir(mode=0o700)
        self.buildDir = closed / "build"
        self.buildDir.mkdir(mode=0o700)
        os.chown(self.buildDir, self.user.uid, self.user.gid)
        (self.store / "in-directory").mkdir(parents=True)
        (self.store / "in-directory" / "text").write_text("input\n")
        (self.store / "in-file").write_text("file\n")
        (self.store / "in-link").symlink_to("in-directory")
        (self.store / "not-an-input").write_text("secret of another build\n")
        self.inputs = [(str(path), f"/nix/store/{path.name}") for path in self.store.glob("in-*")]

    @property
    def text(self):
        """What a watcher saw, as text."""
        return self.log.decode()

    def sandbox(self, **options):
        """A prepared sandbox."""
        options.setdefault("inputs", self.inputs)
        options.setdefault("paths", [findShell()])
        sandbox = Sandbox(str(self.directory / "x.drv.chroot"), str(self.buildDir), **options)
        sandbox.prepare(self.user)
        return sandbox

    def spec(self, script, sandbox=None, **options):
        """A shell script as a builder. Without a sandbox it must be able to reach its directory."""
        if sandbox is None:
            for path in (self.directory, self.buildDir.parent):
                path.chmod(0o711)
        options.setdefault("env", {"PATH": "/usr/bin:/bin", "out": OUT})
        options.setdefault("cwd", str(self.buildDir))
        options.setdefault("builder", "/bin/sh")
        options.setdefault("args", ["-c", script])
        return ProcessSpec(user=self.user, sandbox=sandbox, **options)

    def run(self, script, sandbox=None, cancel=None, log=None, limits=None, **options):
        """Run a shell script as a builder."""
        return runBuilder(
            self.spec(script, sandbox, **options),
            log or self.log.extend,
            limits or ProcessLimits(timeout=30),
            cancel or CancelToken(),
            self.raw.extend,
        )


@contextmanager
def workplace():
    """A L{Workplace}, removed afterwards. Its parent is closed to the build user, as a careful admin's store may be."""
    directory = tempfile.mkdtemp(prefix="nixserve-test-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    place = None
    try:
        place = Workplace(directory)
        yield place
    finally:
        if place:
            place.user.release()
        deletePath(directory)


def processesOf(user):
    """The processes of a build user; of anybody, those called sleep, when the user is not the build's own."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline") as file:
                command = file.read()
            uid = os.stat(f"/proc/{name}").st_uid
        except OSError:
            continue
        if command and uid == user.uid and (user.own or command.startswith("sleep\0")):
            found.append(command)
    return found

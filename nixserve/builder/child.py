"""
Runs beside each build: sets the builder up, watches it, and leaves no process behind. A script for C{python -I -S}.

A large server with threads must not fork, so L{nixserve.builder.spawn} starts this small program instead; it imports
the standard library only, and little of that, because every build waits for it. The job comes as a C{marshal} stream
on standard input: the reader is the interpreter that wrote it, and importing C{json} would double the start-up.

Two processes::

    server ── supervisor (this program; outside all namespaces; keeps no end of the builder's terminal)
                 ├── builder (process 1 of a PID namespace in a sandbox; set up here, then exec)
                 └── network helper, if there is one

The supervisor and the server share a socket. The supervisor writes one line to it, C{exit N}, C{signal N} or
C{error TEXT}; when the server shuts its side down, or dies, everything that the builder started is killed first. When
the supervisor is killed, the parent death signal kills the builder, and the kernel the rest of its PID namespace.

This makes the namespaces itself and does not call bubblewrap, for reasons found by trying:

  - bubblewrap's monitor keeps the terminal open, and Nix defines the end of a build as end of file on the terminal;
  - as root, the builder has a uid of its own; bubblewrap started under that uid cannot reach a store below a private
    directory, and started as root maps root into the sandbox;
  - it takes at most 9,000 arguments, and reads the table of mounts after each mount: a closure of 3,000 paths is too
    large, one of 1,000 slow.

What the builder sees is Nix's (Nix 2.8, src/libstore/build/local-derivation-goal.cc:runChild): uid 1000 and gid 100
in a user namespace without capabilities, process 1, host C{localhost}, a loopback device alone unless the type of
the derivation permits the network. Stricter than Nix: the inputs are read-only, and so is all but the store directory,
/build and /tmp; the number of processes is limited; the server's control groups are hidden. An unprivileged server
first makes a user namespace in which it is root, because only root may mount C{devpts}; from there on the steps are
those of root.

@var Job: what a job holds. C{action}: C{"build"}, C{"probe"} (set up, do not exec) or C{"kill"} (kill all processes of
    C{uid}). C{uid}, C{gid}: of the builder on the host. C{ownUid}: nobody else uses that uid. For a build also
    C{terminal} and C{control}, inherited file descriptors; C{builder}, C{argv}, C{env}, C{cwd}, C{stdin} (bytes, or
    None for /dev/null); C{module}, a Python module to run instead of C{builder}, or nothing, and C{path}, where to
    import from; C{maxProcesses}; C{openFiles}, the limits on descriptors, soft and hard; C{filter}, a seccomp program;
    C{personality}; and C{sandbox}, None or a dict of C{root}, C{writable} (directories below it), C{binds} (tuples of
    source, target below the root, and whether it may be written), C{devices}, C{network}, C{networkHelper}
    (slirp4netns, for a network of its own that reaches the host's; empty for that of the host itself), C{shmSize}.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import marshal
import os
import resource
import select
import struct
import sys

# As in typing, which takes longer to import than all the rest together.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Job = dict[str, Any]

SANDBOX_UID = 1000
SANDBOX_GID = 100

# <sched.h>, <sys/mount.h>, <sys/prctl.h>: the same on every architecture.
_CLONE_NEWNS, _CLONE_NEWCGROUP, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_LANDLOCK_SCOPES = 3  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, LANDLOCK_SCOPE_SIGNAL; Linux 6.12
_KEYCTL_JOIN_SESSION_KEYRING = 1
_SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8914, 0x41
_AF_INET, _SOCK_DGRAM = 2, 2
_SIGKILL = 9
# Not the host's 127.0.0.1. What comes from the network is read by a process without files and nearly without calls.
_HELPER_OPTIONS = ("--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp")
# Before the server and whatever else the machine is for: half of the machine's memory more than a process has counts
# (Linux, mm/oom_kill.c), since what a builder keeps in /dev/shm counts for nobody.
_OOM_SCORE = b"500"
# /proc/sys/user/max_NAME: how many a builder may have. They count for its uid on the host, which without root is that
# of the server. In a namespace of control groups of its own it could mount those of the server.
_NAMESPACES = {
    "cgroup_namespaces": b"0",
    "ipc_namespaces": b"512",
    "mnt_namespaces": b"512",
    "net_namespaces": b"512",
    "pid_namespaces": b"512",
    "time_namespaces": b"512",
    "user_namespaces": b"512",
    "uts_namespaces": b"512",
}
# What the builder says to the supervisor when it has its network namespace; anything else means its user namespace.
_WANTS_NETWORK = b"n"
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "loongarch64": 41, "ppc64le": 203, "s390x": 217}
_KEYCTL = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "loongarch64": 219, "ppc64le": 271, "s390x": 280}
_MOUNT_SETATTR, _LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 442, 444, 446

_libc = ctypes.CDLL(None, use_errno=True)


class SetupFailed(Exception):
    """What could not be done, as a line for the person whose build this is."""


def _check(result: int, what: str) -> int:
    """Pass on what a C function returned, unless that is -1."""
    if result == -1:
        raise SetupFailed(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(number: int, what: str, *arguments: Any) -> int:
    """A system call without a function of its own in every C library."""
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *longs), what)


def _unshare(flags: int, what: str) -> None:
    """Enter new namespaces."""
    _check(_libc.unshare(flags), f"creating {what}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    encoded = [os.fsencode(text) if text is not None else None for text in (source, target, kind, data)]
    result = _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(result, f"mounting '{source}' on '{target}'")


def _bind(source: str, target: str, attributes: int) -> None:
    """
    Show C{source} at C{target} too, with what is mounted below it.

    @param attributes: flags to add; those that the source has stay. Unlike a remount, mount_setattr(2) may be told so
        in a user namespace.
    """
    _mount(source, target, None, _MS_BIND | _MS_REC)
    _setAttributes(target, attributes, _AT_RECURSIVE)


def _setAttributes(target: str, attributes: int, flags: int) -> None:
    """Add flags to a mount."""
    request = struct.pack("=QQQQ", attributes, 0, 0, 0)
    what = f"setting mount attributes of '{target}'"
    _syscall(_MOUNT_SETATTR, what, _AT_FDCWD, os.fsencode(target), flags, request, len(request))


# ---- The supervisor


def supervise(job: Job) -> str:
    """
    Start the builder and wait for it, or for the server to lose interest.

    @return: what to tell the server.
    """
    sandboxed = job["sandbox"] is not None
    job["dropGroups"] = sandboxed or job["ownUid"]
    # Standard input, the job, is of no use to anybody later; the other two are /dev/null already.
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    _leaveKeyrings()
    if job["ownUid"]:
        killUser(job["uid"])
    network = None
    if sandboxed:
        _becomeNamespaceRoot(job)
        if job["sandbox"]["networkHelper"]:
            # Before the next namespace, which would be its own as well, and the builder's company.
            network = _Network(job)
        _unshare(_CLONE_NEWPID, "a PID namespace")
    else:
        _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "becoming a reaper")
    askToMap, mayMap = os.pipe()
    awaitMap, isMapped = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(askToMap)
        os.close(isMapped)
        _runBuilder(job, mayMap, awaitMap)
    for fd in (mayMap, awaitMap, job["terminal"]):
        os.close(fd)
    _watch(job, pid, network, askToMap, isMapped)
    outcome = _end(job, pid)
    if network is not None:
        network.end()
    return outcome


def _leaveKeyrings() -> None:
    """
    Keyrings go from parent to child: take an empty one in place of the server's, perhaps the operator's, whose keys
    the kernel uses for what this process and the builder do, for file systems with logins for instance. What a program
    may ask for itself is up to the filter.
    """
    number = _KEYCTL.get(os.uname().machine)
    if number is None or _libc.syscall(ctypes.c_long(number), _KEYCTL_JOIN_SESSION_KEYRING, None) != -1:
        return
    # A kernel without keyrings, or a container that forbids them to all that is in it.
    if ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM, errno.EACCES):
        raise SetupFailed(f"leaving the session keyring: {os.strerror(ctypes.get_errno())}")


def _becomeNamespaceRoot(job: Job) -> None:
    """
    Without privileges, become root of a new user namespace, which may then create all others, but not drop groups.

    The limit on processes has to be set inside: it is counted per namespace (Linux 5.14), so what else the
    user runs does not count, and it has to be there when the builder's own namespace is made.
    """
    if os.geteuid() != 0:
        uid, gid = os.geteuid(), os.getegid()
        _unshare(_CLONE_NEWUSER, "a user namespace")
        _writeMaps("self", f"0 {uid} 1", f"0 {gid} 1")
        job["uid"] = job["gid"] = 0
        job["dropGroups"] = False


def _writeMaps(process: int | str, uids: str, gids: str) -> None:
    """Map one user and one group into the new user namespace of a process."""
    for name, text in (("uid_map", uids), ("setgroups", "deny"), ("gid_map", gids)):
        fd = os.open(f"/proc/{process}/{name}", os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


class _Network:
    """
    The process between a builder's network namespace and that of the host. It ends when C{_alive} is closed, and is
    killed when the supervisor is.
    """

    def __init__(self, job: Job) -> None:
        """Start it; it waits for L{connect}."""
        awaitPid, self._tell = os.pipe()
        self._ready, sayReady = os.pipe()
        mustEnd, self._alive = os.pipe()
        self._pid = os.fork()
        if self._pid:
            for fd in (awaitPid, sayReady, mustEnd):
                os.close(fd)
            return
        try:
            # Of the supervisor's; whoever watches them waits for their end.
            for fd in (self._tell, self._alive, self._ready, job["control"], job["terminal"]):
                os.close(fd)
            _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "asking to die with the supervisor")
            if pid := os.read(awaitPid, 20).decode():
                for fd in (sayReady, mustEnd):
                    os.set_inheritable(fd, True)
                helper = job["sandbox"]["networkHelper"]
                fds = (f"--ready-fd={sayReady}", f"--exit-fd={mustEnd}")
                os.execv(helper, [helper, *_HELPER_OPTIONS, *fds, pid, "tap0"])
        finally:
            os._exit(1)

    def connect(self, pid: int, control: int) -> bool | None:
        """
        Connect the namespace of a process. Blocks until that has been done, or somebody has something on C{control}.

        @return: whether it has been done; C{None} if somebody has something on C{control} before that is known.
        """
        os.write(self._tell, str(pid).encode())
        poll = select.poll()
        for fd in (self._ready, control):
            poll.register(fd, select.POLLIN)
        return bool(os.read(self._ready, 1)) if self._ready in [fd for fd, _ in poll.poll()] else None

    def end(self) -> None:
        """Kill the network's helper and wait for its end."""
        os.kill(self._pid, _SIGKILL)
        os.waitpid(self._pid, 0)


def _watch(job: Job, pid: int, network: _Network | None, askToMap: int, isMapped: int) -> None:
    """
    Return when the server is no longer interested or, in a sandbox, when the builder has ended: what it leaves behind
    dies with it there, while elsewhere the build goes on for as long as somebody has the terminal.
    """
    control = job["control"]
    builder = os.pidfd_open(pid)
    poll = select.poll()
    for fd in (control, builder, askToMap):
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _events in poll.poll():
            if fd == askToMap:
                request = os.read(askToMap, 1)
                if request == _WANTS_NETWORK and network is not None:
                    connected = network.connect(pid, control)
                    # A builder that is to be killed is told nothing: it would report a failure before that.
                    if connected is not None:
                        os.write(isMapped, b"x" if connected else b"-")
                    continue
                poll.unregister(askToMap)
                if request:
                    maps = (f"{SANDBOX_UID} {job['uid']} 1", f"{SANDBOX_GID} {job['gid']} 1")
                    _writeMaps(pid, *maps)
                    os.write(isMapped, b"x")
            elif fd == builder:
                if job["sandbox"] is not None:
                    return
                poll.unregister(builder)
                # Whoever waits for a failed set-up must not wait for a terminal.
                os.close(builder)
            elif not os.read(control, 1):
                return


def _end(job: Job, pid: int) -> str:
    """
    Kill what is left and reap it.

    @return: how the builder ended.
    """
    # Before it is reaped, its number cannot be that of somebody else.
    for kill in (os.kill, os.killpg) if job["sandbox"] is None else (os.kill,):
        try:  # noqa: SIM105 - contextlib is slow to import
            kill(pid, _SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    _, status = os.waitpid(pid, 0)
    if job["sandbox"] is None:
        if job["ownUid"]:
            killUser(job["uid"])
        _killDescendants()
    code = os.waitstatus_to_exitcode(status)
    return f"exit {code}" if code >= 0 else f"signal {-code}"


def _killDescendants() -> None:
    """
    Kill and reap all that the builder left: being a reaper, this process is the parent of every orphan among them.

    Those whose parent is still alive get their turn when it is dead.
    """
    while True:
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                children = [int(word) for word in file.read().split()]
            for child in children:
                os.kill(child, _SIGKILL)
            os.waitpid(-1, 0)
        except ProcessLookupError:
            continue
        except ChildProcessError:
            return


def killUser(uid: int) -> None:
    """
    Kill all processes of a user. Only that user can do so without a race: C{kill(-1)} takes all at once.

    @raise SetupFailed: we may not become that user.
    """
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(uid, uid, uid)
            # With capabilities, which the service manager may have made to stay, this would be everybody.
            _dropCapabilities()
            os.kill(-1, _SIGKILL)
        except ProcessLookupError:
            pass
        except (OSError, SetupFailed):
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    # The killer is of that user as well; Linux spares the caller.
    if os.waitstatus_to_exitcode(status) not in (0, -_SIGKILL):
        raise SetupFailed(f"cannot kill the processes of uid {uid}")


# ---- The builder, until exec


def _runBuilder(job: Job, mayMap: int, awaitMap: int) -> None:
    """
    Become the builder. Does not return.
    """
    try:
        module = _load(job)
        _setUp(job, mayMap, awaitMap)
    except Exception as error:
        report(job, f"error {error}")
        os._exit(1)
    if job["action"] == "probe":
        os._exit(0)
    if module is not None:
        os._exit(_runModule(job, module))
    try:
        os.execve(job["builder"], job["argv"], job["env"])
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        os.write(2, f"error: executing '{os.fsdecode(job['builder'])}': {reason}\n".encode(errors="surrogateescape"))
    os._exit(1)


def _load(job: Job) -> Any:
    """
    Import the module that is the builder, while its files can be read: a build user may not reach an interpreter in
    somebody's home, and in a sandbox there is none.
    """
    if not job["module"]:
        return None
    sys.path[:] = job["path"]
    return __import__(job["module"], fromlist=["main"])


def _runModule(job: Job, module: Any) -> int:
    """
    Run C{main()} of a module with the environment and standard streams of a builder.

    @return: the exit status.
    """
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    os.environ.clear()
    os.environb.update(job["env"])
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.stdout
    try:
        status: int = module.main()
        sys.stdout.flush()
    except Exception as error:
        os.write(2, f"error: {error}\n".encode(errors="replace"))
        status = 1
    return status


def _setUp(job: Job, mayMap: int, awaitMap: int) -> None:
    """
    Everything between fork and exec, in this order: what needs privileges, then giving them up, then what is for good.
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "asking to die with the supervisor")
    os.setsid()
    os.dup2(_openInput(job["stdin"]), 0)
    os.dup2(job["terminal"], 1)
    os.dup2(job["terminal"], 2)
    sandbox = job["sandbox"]
    if sandbox is not None:
        _enterSandbox(sandbox)
        if sandbox["networkHelper"]:
            os.write(mayMap, _WANTS_NETWORK)
            if os.read(awaitMap, 1) != b"x":
                raise SetupFailed(
                    f"'{sandbox['networkHelper']}' does not connect the build to the network; it needs /dev/net/tun"
                )
    _limit(job)
    if job["dropGroups"]:
        os.setgroups([])
    if sandbox is not None:
        _becomeSandboxUser(mayMap, awaitMap)
    elif job["ownUid"]:
        os.setresgid(job["gid"], job["gid"], job["gid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    if os.geteuid() != 0:
        _dropCapabilities()
    # Changing the user has cleared it.
    _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "asking to die with the supervisor")
    os.chdir(job["cwd"])
    _check(_libc.personality(ctypes.c_ulong(job["personality"])), "setting the personality")
    for number in range(1, 65):
        _libc.signal(number, None)
    _libc.sigprocmask(2, bytes(128), None)
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "giving up new privileges")
    _enterScope()
    _installFilter(job["filter"])


def _openInput(data: bytes | None) -> int:
    """What the builder reads: C{data}, or what Nix gives it, /dev/null for reading and writing."""
    if data is None:
        return os.open("/dev/null", os.O_RDWR)
    fd = os.memfd_create("stdin")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _limit(job: Job) -> None:
    """
    umask, core dumps off for good, processes and threads limited, descriptors as they are for everybody, the first to
    be killed when memory is short.
    """
    os.umask(0o022)
    _writeTo("/proc/self/oom_score_adj", _OOM_SCORE)
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(job["openFiles"]))
    # With 0 the kernel would still start the program that the host may have for core dumps, as root and outside all
    # namespaces; 1 means neither file nor program (Linux, fs/coredump.c).
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    except ValueError:
        # It is 0 for good, and only a privilege could raise it.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where the uid is that of the server, its own processes would count.
    if job["ownUid"] or job["sandbox"] is not None:
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        limit = job["maxProcesses"] if hard == resource.RLIM_INFINITY else min(hard, job["maxProcesses"])
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))


def _writeTo(path: str, data: bytes) -> None:
    """Write to a file of the kernel's, if it has that."""
    try:
        fd = os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        return
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _becomeSandboxUser(mayMap: int, awaitMap: int) -> None:
    """Enter the user namespace in which the builder's host uid is 1000; the supervisor writes the maps."""
    _unshare(_CLONE_NEWUSER, "a user namespace")
    os.write(mayMap, b"x")
    if not os.read(awaitMap, 1):
        raise SetupFailed("the user namespace got no users")
    for name, most in _NAMESPACES.items():
        _writeTo(f"/proc/sys/user/max_{name}", most)
    os.setresgid(SANDBOX_GID, SANDBOX_GID, SANDBOX_GID)
    os.setresuid(SANDBOX_UID, SANDBOX_UID, SANDBOX_UID)


def _dropCapabilities() -> None:
    """
    Give up all capabilities. Most go with the user or with an exec, but for a module of ours there is none; those that
    a service manager gave to the server for ever (C{AmbientCapabilities}, C{SecureBits}) outlive both.
    """
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, bytes(24)), "giving up capabilities")


def _enterScope() -> None:
    """
    Where the kernel can (Landlock ABI 6), cut the builder off from abstract sockets of others, as Nix does since 2.34:
    they belong to the network namespace, which a fixed-output build shares with the host. Others still get at those of
    the builder. And from sending signals to others, which it could without a sandbox.
    """
    request = struct.pack("=QQQ", 0, 0, _LANDLOCK_SCOPES)
    ruleset = _libc.syscall(ctypes.c_long(_LANDLOCK_CREATE_RULESET), request, ctypes.c_long(len(request)), 0)
    if ruleset != -1:
        _syscall(_LANDLOCK_RESTRICT_SELF, "restricting sockets and signals", ruleset, 0)
        os.close(ruleset)


def _installFilter(program: bytes) -> None:
    """Install a seccomp program; an empty one means none."""
    if program:
        code = ctypes.create_string_buffer(program, len(program))
        filterProgram = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
        _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filterProgram, 0, 0), "installing the seccomp filter")


# ---- The sandbox


def _enterSandbox(sandbox: Job) -> None:
    """
    New namespaces, the mounts, and the change of root.

    All as root, of the host or of the namespace of L{_becomeNamespaceRoot}: directories above the store may be closed
    to the builder, and the builder cannot undo mounts that are not its own.
    """
    machine = os.uname().machine
    if machine not in _PIVOT_ROOT:
        raise SetupFailed(f"there is no sandbox for machines of type {machine}")
    flags = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWUTS
    ofHost = sandbox["network"] and not sandbox["networkHelper"]
    _unshare(flags | (0 if ofHost else _CLONE_NEWNET), "namespaces")
    # In a sandbox like this one there may be none (see _NAMESPACES), and then nobody inside gets at any control groups.
    if _libc.unshare(_CLONE_NEWCGROUP) == -1 and ctypes.get_errno() != errno.ENOSPC:
        _check(-1, "creating a namespace of control groups")
    root = sandbox["root"]
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    for path in ("", *sandbox["writable"]):
        _bind(root + path, root + path, _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV)
    # An unprivileged server's builder owns the directories: it must not move them, or names that the server looks up
    # in them afterwards would mean something else.
    _setAttributes(root, _MOUNT_ATTR_RDONLY, 0)
    _populateDev(root + "/dev", sandbox["devices"], sandbox["shmSize"])
    for source, target, writable in sandbox["binds"]:
        if target.startswith("/dev/"):
            _makeDevice(source, root + target)
        readOnly = 0 if writable else _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NODEV
        _bind(source, root + target, readOnly | _MOUNT_ATTR_NOSUID)
    _mount("proc", root + "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    os.chdir(root)
    # pivot_root(2): with both names the same, the old root ends up on top of the new one and can be taken away.
    _syscall(_PIVOT_ROOT[machine], "changing the root", b".", b".")
    _check(_libc.umount2(b".", _MNT_DETACH), "leaving the old root")
    os.chdir("/")
    _check(_libc.sethostname(b"localhost", 9), "setting the host name")
    _check(_libc.setdomainname(b"(none)", 6), "setting the domain name")
    if not ofHost:
        _raiseLoopback()


def _populateDev(dev: str, devices: list[str], shmSize: str) -> None:
    """
    The devices that Nix has there, in a tmpfs, so that nothing of them remains.

    @param devices: names below /dev; those that the host lacks are left out.
    """
    _mount("tmpfs", dev, "tmpfs", _MS_NOSUID, "mode=0755,size=64k")
    for name in devices:
        if os.path.exists(f"/dev/{name}"):
            _makeDevice(f"/dev/{name}", f"{dev}/{name}")
            _bind(f"/dev/{name}", f"{dev}/{name}", _MOUNT_ATTR_NOSUID)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{dev}/{name}")
    os.symlink("/dev/pts/ptmx", f"{dev}/ptmx")
    for name in ("pts", "shm"):
        os.mkdir(f"{dev}/{name}", 0o755)
    _mount("devpts", f"{dev}/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "newinstance,mode=0620,ptmxmode=0666")
    _mount("tmpfs", f"{dev}/shm", "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777,size={shmSize}")


def _makeDevice(source: str, target: str) -> None:
    """Make what C{source} can be mounted on, in the tmpfs."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT, 0o644))


def _raiseLoopback() -> None:
    """Switch on lo, so far the only network device there is; 127.0.0.1 and ::1 come by themselves."""
    fd = _check(_libc.socket(_AF_INET, _SOCK_DGRAM, 0), "opening a socket")
    fcntl.ioctl(fd, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP_RUNNING))
    os.close(fd)


# ---- Begin and end


def report(job: Job, line: str) -> None:
    """
    Tell the server. It may be gone.

    @param line: what; the server heeds the first one.
    """
    try:  # noqa: SIM105 - contextlib is slow to import
        os.write(job["control"], line.replace("\n", " ").encode(errors="surrogateescape") + b"\n")
    except OSError:
        pass


def main() -> None:
    """
    Do one job. Does not return: what an interpreter does at its end takes time and is of no use here.
    """
    job: Job = marshal.load(sys.stdin.buffer)
    if job["action"] == "kill":
        killUser(job["uid"])
        os._exit(0)
    for fd in (job["control"], job["terminal"]):
        os.set_inheritable(fd, False)
    try:
        report(job, supervise(job))
    except Exception as error:
        report(job, f"error {error}")
    os._exit(0)

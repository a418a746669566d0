"""
Where C{nixserve-hook} begins: it has a process that is loaded already do the work, and starts one if there is none.

Nix starts a hook process for each build, and to load Python's modules takes longer than a small build. So this imports
next to nothing. It hands its descriptors to L{nixserve.app.preloaded}, and remains for Nix to wait for and to kill. If
that fails, for whatever reason, this process does the work itself.

All hook processes of one Nix are alike but for their descriptors: so they share one preloaded process, which the first
of them starts, and no other Nix does. The conversation, on a unix socket that keeps messages apart: the process that
will do the work says L{TAKEN}, so nothing is handed to one that does not run, which would keep Nix's descriptors open.
The request is the argument from Nix and the numbers of the descriptors that come with it. At last the exit status comes
back, in one byte.
"""

from __future__ import annotations

import os
import sys

from nixserve.app.statedirs import hookStateDir, socketDirectory

TYPE_CHECKING = False

if TYPE_CHECKING:
    import signal
    import socket
    from collections.abc import Mapping
else:
    # The modules in front of these load enum, re and selectors, which takes longer than all the rest here.
    import _signal as signal
    import _socket as socket

__all__ = ["PERSIST_SECONDS", "READY", "SHARE", "TAKEN", "hand", "main"]

PERSIST_SECONDS = 60
"""How long what hook processes share stays without a build, if nobody says."""

SHARE = "NIXSERVE_HOOK_SHARE"
"""The variable that says it; with 0 every hook process does everything by itself."""

TAKEN = b"+"
"""What the process says first that does the work."""

READY = 3
"""The descriptor that a preloaded process closes when it listens."""

_FROM_NIX = (0, 1, 2, 4, 5)
"""The descriptors that Nix gives to a hook."""

_UNTIL_THE_END = (1, 4)
"""Those that stay open here: their end tells Nix that this process has ended, and is to come no sooner."""

_PATIENCE = 10.0
"""Seconds for a preloaded process to be loaded, and to make a child. That takes less than one, and milliseconds."""


def main() -> None:
    """The program C{nixserve-hook}. Ends the process."""
    words = sys.argv[1:]
    if len(words) == 1 and words[0].isdecimal():
        hand(words[0], os.environ)
    from nixserve.app.hookcommand import main as here

    sys.exit(here(words))


def hand(verbosity: str, environ: Mapping[str, str]) -> None:
    """
    Have a preloaded process answer Nix, and end as that does. Returns if there is none and can be none.

    @param verbosity: the argument from Nix.
    @param environ: the process's own.
    """
    seconds = environ.get(SHARE, str(PERSIST_SECONDS))
    if not seconds.isdecimal() or not int(seconds):
        return
    try:
        path = _socketPath(environ)
        control = _connect(path) or _start(path, seconds)
    except OSError:
        return
    if control is not None and _send(control, verbosity):
        os._exit(_result(control))


def _socketPath(environ: Mapping[str, str]) -> str:
    """
    Where the preloaded process of the Nix listens that has started this one.

    @raise OSError: there can be none: others may make sockets there, or it cannot be made.
    """
    directory = socketDirectory(hookStateDir(environ), "preloaded")
    os.makedirs(directory, 0o700, exist_ok=True)
    status = os.lstat(directory)
    if status.st_uid != os.geteuid() or status.st_mode != 0o040700:
        raise PermissionError
    parent = os.getppid()
    with open(f"/proc/{parent}/stat", "rb", buffering=0) as stream:
        # The name of the program, in parentheses, may hold anything. Its number may come again, at another time.
        started = int(stream.read().rpartition(b")")[2].split()[19])
    return f"{directory}/{parent}-{started:x}-{os.stat('/proc/self/ns/pid').st_ino:x}"


def _connect(path: str) -> socket.socket | None:
    """
    @return: a socket at whose other end a process waits for the request; C{None} if there is none.
    """
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.settimeout(_PATIENCE)
    try:
        control.connect(path)
        credentials = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if int.from_bytes(credentials[4:8], sys.byteorder) == os.geteuid() and control.recv(1) == TAKEN:
            return control
    except OSError:
        pass
    control.close()
    return None


def _start(path: str, seconds: str) -> socket.socket | None:
    """
    As L{_connect}, after having started the preloaded process, unless another hook just does.

    @param seconds: how long it stays without a build.
    @raise OSError: it cannot be started.
    """
    from fcntl import LOCK_EX, flock

    lock = os.open(f"{os.path.dirname(path)}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        flock(lock, LOCK_EX)
        control = _connect(path)
        if control is not None:
            return control
        ours, its = socket.socketpair()
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
        ready = (os.POSIX_SPAWN_DUP2, its.fileno(), READY)
        others = [(os.POSIX_SPAWN_CLOSE, int(fd)) for fd in os.listdir("/proc/self/fd") if int(fd) > READY]
        os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "nixserve.app.preloaded", path, str(os.getppid()), seconds],
            os.environb,
            file_actions=[*null, ready, *others],
            setsid=True,
        )
        its.close()
        ours.settimeout(_PATIENCE)
        ours.recv(1)
        ours.close()
        return _connect(path)
    finally:
        os.close(lock)


def _send(control: socket.socket, verbosity: str) -> bool:
    """
    Hand over the work.

    @return: whether it has been taken.
    """
    fds = [fd for fd in _FROM_NIX if fd != control.fileno() and os.path.exists(f"/proc/self/fd/{fd}")]
    rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    try:
        request = " ".join(map(str, [verbosity, *fds])).encode()
        control.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    except OSError:
        control.close()
        return False
    for fd in fds:
        if fd not in _UNTIL_THE_END:
            os.close(fd)
    return True


def _result(control: socket.socket) -> int:
    """
    Wait for the end of the work. Whatever kills this process meanwhile ends that too.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    control.settimeout(None)
    try:
        answer = control.recv(1)
    except OSError:
        answer = b""
    return answer[0] if answer else 1

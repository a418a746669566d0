"""
How a hook process hands its work to one that has everything loaded (L{nixserve.app.preloaded}), and has such a process
started for those that come after it.

All hook processes of one Nix are alike but for their descriptors: so they share one preloaded process, and no other Nix
does. The conversation, on a unix socket that keeps messages apart::

    child                                        hook process
    TAKEN: there is one                          the argument from Nix, the numbers of descriptors, and these
    TAKEN: it has them; nothing was read yet     closes most of its own
    the exit status, in one byte
    once more, when it has ended: this comes from the preloaded process

Imports next to nothing, as L{nixserve.app.hookentry} needs it.
"""

from __future__ import annotations

import os
import sys

from nixserve.app.statedirs import hookStateDir, socketDirectory
from nixserve.errors import NixServeError, UsageError
from nixserve.store.ownpaths import makeOwnDirectory

TYPE_CHECKING = False

if TYPE_CHECKING:
    import signal
    import socket
    from collections.abc import Callable, Mapping

    Serve = Callable[[int, str, int, float], None]
else:
    # The modules in front of these load enum, re and selectors, which takes longer than all the rest here.
    import _signal as signal
    import _socket as socket

__all__ = ["TAKEN", "Preloaded", "openDescriptors", "persistSeconds"]

_PERSIST_SECONDS = 60
"""How long what hook processes share stays without a build, if nobody says."""

_SHARE = "NIXSERVE_HOOK_SHARE"
"""The variable that says it; with 0 every hook process does everything by itself."""

TAKEN = b"+"
"""What the process says that does the work."""

_FROM_NIX = (0, 1, 2, 4, 5)
"""The descriptors that Nix gives to a hook."""

_UNTIL_THE_END = (1, 4)
"""
Those that stay open here. Nix takes the end of the pipe behind 1 and 2 for the end of the hook, kills what is left of
it, and has its status (Nix 2.8, src/libstore/build/local-derivation-goal.cc). So the end is to come no sooner than that
of this process. Of the pipe behind 4 that Nix has a writing end itself; to count on it would be too much.
"""

_PATIENCE = 10.0
"""Seconds for a preloaded process to be loaded and to make a child. That takes tenths of one, and milliseconds."""

_END_SECONDS = 5.0
"""How long this process stays at most for the child to end first."""

_CAUGHT = (signal.SIGTERM, signal.SIGINT)

_LISTENING = 3
"""The descriptor on which a preloaded process listens."""

_BACKLOG = 64

_LONGEST = 24 * 3600


class Preloaded:
    """
    The preloaded process of the Nix that has started this one, whether it is there or not.
    """

    def __init__(self, path: str, seconds: int) -> None:
        """
        @param path: where it listens. Nobody but this user can make anything there.
        @param seconds: how long it stays without a build.
        """
        self._path = path
        self._seconds = seconds
        self._isAbsent = True

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> Preloaded | None:
        """
        @param environ: the process's own.
        @return: C{None} if there can be none, or is to be none.
        """
        try:
            seconds = persistSeconds(environ)
            return cls(_socketPath(environ), min(seconds, _LONGEST)) if seconds else None
        except (OSError, NixServeError):
            # If something is wrong, whoever does the work says so.
            return None

    def hand(self, verbosity: str) -> None:
        """
        Have it answer Nix, and end this process as that does. Returns if there is none, or it does not take the work.

        @param verbosity: the argument from Nix.
        """
        control = self._connect()
        if control is None:
            return
        for number in _CAUGHT:
            signal.signal(number, _interrupt)
        try:
            if not _send(control, verbosity):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return
            isWanted = _wait(control)
        except KeyboardInterrupt:
            isWanted = False
        os._exit(_result(control, isWanted))

    def start(self, serve: Serve) -> None:
        """
        Have one for the next hook process. Does nothing if it cannot be, or there is one that does not want to work.

        @param serve: what it does, in a process of its own, which is the place to load what that needs. Called as
            L{nixserve.app.preloaded.serve} is.
        """
        if not self._isAbsent:
            return
        try:
            # It watches processes by these.
            os.close(os.pidfd_open(os.getppid()))
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            temporary = f"{self._path}.{os.getpid()}"
            listening.bind(temporary)
            listening.listen(_BACKLOG)
            # From here on the next hook process waits until it is loaded.
            os.rename(temporary, self._path)
            parent = os.getppid()
            if os.fork() == 0:
                _become(listening, self._path, parent, self._seconds, serve)
            listening.close()
        except OSError:
            return

    def _connect(self) -> socket.socket | None:
        """
        @return: a socket at whose other end a process waits for the request; C{None} if there is none.
        """
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.settimeout(_PATIENCE)
        try:
            control.connect(self._path)
            credentials = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            taken = int.from_bytes(credentials[4:8], sys.byteorder) == os.geteuid() and control.recv(1) == TAKEN
            self._isAbsent = False
            if taken:
                return control
        except OSError as e:
            # One that says nothing for so long is as good as none.
            self._isAbsent = isinstance(e, FileNotFoundError | ConnectionRefusedError | TimeoutError)
        control.close()
        return None


def persistSeconds(environ: Mapping[str, str]) -> int:
    """
    How long what hook processes share stays without a build; 0 if nothing is to be shared.

    @raise UsageError: the variable is no number.
    """
    text = environ.get(_SHARE, str(_PERSIST_SECONDS))
    if not text.isdecimal():
        raise UsageError(f"{_SHARE} is '{text}'; it must be a number of seconds, or 0 for no shared connections")
    return int(text)


def openDescriptors() -> list[int]:
    """All descriptors that are open."""
    # The one that lists them is closed by then.
    return [int(name) for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]


def _socketPath(environ: Mapping[str, str]) -> str:
    """
    Where the preloaded process of the Nix listens that has started this one. Its number may come again, at another
    time or in another container; and where it is no Nix, as in tests, the next hook may have another environment.

    @raise nixserve.store.ownpaths.UnsafePath: there can be none: others may make sockets there.
    @raise OSError: likewise, or the directory cannot be made.
    """
    from zlib import crc32

    directory = socketDirectory(hookStateDir(environ), "preloaded")
    makeOwnDirectory(directory)
    status = os.lstat(directory)
    if status.st_uid != os.geteuid() or status.st_mode & 0o170077 != 0o040000:
        raise PermissionError
    parent = os.getppid()
    with open(f"/proc/{parent}/stat", "rb", buffering=0) as stream:
        # The name of the program, in parentheses, may hold anything.
        started = int(stream.read().rpartition(b")")[2].split()[19])
    space = os.stat("/proc/self/ns/pid").st_ino
    same = crc32(os.fsencode("\0".join([sys.executable, __file__, *map("=".join, sorted(environ.items()))])))
    return f"{directory}/{parent}-{space:x}-{started:x}-{same:x}"


def _become(listening: socket.socket, path: str, parent: int, seconds: int, serve: Serve) -> None:
    """Become the preloaded process. Does not return."""
    try:
        os.setsid()
        os.dup2(listening.fileno(), _LISTENING)
        nothing = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        # Among them are locks of the build that the hook process is about to do.
        for fd in openDescriptors():
            if fd > _LISTENING:
                os.close(fd)
        serve(_LISTENING, path, parent, seconds)
    finally:
        os._exit(0)


def _send(control: socket.socket, verbosity: str) -> bool:
    """
    Hand over the work.

    @return: whether it has been taken.
    """
    fds = [fd for fd in openDescriptors() if fd in _FROM_NIX and fd != control.fileno()]
    if 1 not in fds:
        return False
    rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    try:
        request = " ".join(map(str, [verbosity, *fds])).encode()
        control.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        taken = control.recv(1) == TAKEN
    except OSError:
        taken = False
    if not taken:
        control.close()
        return False
    for fd in fds:
        if fd not in _UNTIL_THE_END:
            os.close(fd)
    return True


def _wait(control: socket.socket) -> bool:
    """
    Wait for the end of the work.

    @return: false if Nix has ended before.
    """
    import select

    poll = select.poll()
    poll.register(control, select.POLLIN)
    # Whether somebody still reads there.
    poll.register(1, 0)
    return any(fd == control.fileno() for fd, _ in poll.poll())


def _result(control: socket.socket, isWanted: bool) -> int:
    """
    The exit status.

    @param isWanted: otherwise the child is killed. It ends before this process does, for Nix goes on then.
    """
    control.settimeout(_END_SECONDS)
    answer = b""
    try:
        if not isWanted:
            control.shutdown(socket.SHUT_WR)
        answer = control.recv(1)
        # Of one that was interrupted early it may still come.
        while answer == TAKEN:
            answer = control.recv(1)
        if answer:
            # It is told again, or there is an end, when nothing of it runs any more.
            control.recv(1)
    except OSError:
        # There is no end of it. What was told is so all the same.
        pass
    return answer[0] if answer else 1


def _interrupt(number: int, frame: object) -> None:
    for caught in _CAUGHT:
        signal.signal(caught, signal.SIG_DFL)
    raise KeyboardInterrupt

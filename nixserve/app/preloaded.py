"""
A process with all that a build hook imports, which forks a child for each hook process of one Nix. The first hook
process that builds starts it (L{nixserve.app.handover}, which also has the other end of the conversation).

No reactor is made and no thread runs before a fork, so a child begins as a new process would, but loaded. From the hook
process that it stands for it gets the descriptors; all else is the same for all of them. It answers that process
itself. If that process is gone, the child is killed: first it alone, for the ends of its descriptors end what it has
started in an orderly way (ssh's master tells the machine, a server here ends its build); what is left a little later is
killed as well.

Ends with Nix, or some time after the last build. Blocking, with C{poll(2)}.
"""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Self

from nixserve.app.handover import TAKEN, openDescriptors
from nixserve.app.hookcommand import HookOptions, answer

__all__ = ["PreloadedServer", "serve"]

LOADED_NAME, CHILD_NAME = "hook-loaded", "hook-build"
"""What C{ps -e} shows in place of the program's name."""

_LOADED = ("nixserve.hook.running", "twisted.internet.epollreactor", "twisted.logger")
"""What a child needs that this module does not import itself. C{twisted.internet.reactor} is not to be among it: that
makes a reactor."""

_MAX_REQUEST, _MAX_FDS = 100, 16

_REQUEST_SECONDS = 10.0
"""How long a hook process may take to say what it wants. It does so at once."""

_PAUSE_SECONDS = 0.1

_GRACE_SECONDS = 2.0
"""How long what a killed child has started may take to end by itself."""


def serve(listening: int, path: str, parent: int, seconds: float) -> None:
    """
    Serve one Nix, until it has ended.

    @param listening: the descriptor of a listening socket.
    @param path: where it is.
    @param parent: the process that runs Nix.
    @param seconds: how long to stay without a child.
    """
    _setName(LOADED_NAME)
    with (
        suppress(ProcessLookupError),
        PreloadedServer(socket.socket(fileno=listening), path, parent, seconds) as server,
    ):
        for name in _LOADED:
            import_module(name)
        # What has been loaded stays: not to be looked through in any child, whose pages that would copy.
        gc.collect()
        gc.freeze()
        server.run()


@dataclass(slots=True)
class _Child:
    """
    @ivar handle: readable when it has ended (pidfd_open(2)).
    @ivar control: leads to the hook process that waits for it.
    @ivar killed: it has been, and will end in time.
    @ivar leftUntil: when what is left of it is killed. C{None} while it has not ended.
    """

    pid: int
    handle: int
    control: socket.socket
    killed: bool = False
    leftUntil: float | None = None


class PreloadedServer:
    """
    Forks children. C{with} removes the socket at the end.
    """

    def __init__(self, listening: socket.socket, path: str, parent: int, seconds: float) -> None:
        """
        @param path: of the socket.
        @param parent: the process that runs Nix.
        @param seconds: how long to stay without a child.
        @raise ProcessLookupError: Nix has ended.
        """
        self._listening = listening
        self._path = path
        self._inode = os.stat(path).st_ino
        self._parent = parent
        self._seconds = seconds
        self._children: list[_Child] = []
        self._nix = os.pidfd_open(parent)
        _removeDead(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(FileNotFoundError):
            # It may be that of another one, if this one was stopped for so long that it was given up.
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        self._listening.close()
        os.close(self._nix)

    def run(self) -> None:
        """Until it is of no more use."""
        while True:
            children = list(self._children)
            ready = self._wait()
            for child in children:
                self._attend(child, ready)
            if self._listening.fileno() in ready:
                self._accept()
            elif not children and (not ready or self._nix in ready):
                return

    def _wait(self) -> set[int]:
        """
        Wait until there is something to do.

        @return: the descriptors that say something; none if it is time for something.
        """
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        for child in self._children:
            if child.leftUntil is None:
                poll.register(child.handle, select.POLLIN)
                if not child.killed:
                    poll.register(child.control, select.POLLRDHUP)
        moments = [child.leftUntil for child in self._children if child.leftUntil is not None]
        seconds = max(0.0, min(moments) - time.monotonic()) if moments else None
        if not self._children:
            poll.register(self._nix, select.POLLIN)
            seconds = self._seconds
        return {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}

    def _attend(self, child: _Child, ready: set[int]) -> None:
        if child.leftUntil is not None:
            if child.leftUntil <= time.monotonic():
                # Until it is waited for, nobody else has its number.
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                self._forget(child)
        elif child.handle in ready:
            self._tellEnd(child)
            if child.killed:
                child.leftUntil = time.monotonic() + _GRACE_SECONDS
            else:
                self._forget(child)
        elif not child.killed and child.control.fileno() in ready:
            # Nobody wants it any more.
            os.kill(child.pid, signal.SIGKILL)
            child.killed = True

    def _accept(self) -> None:
        try:
            control, _ = self._listening.accept()
        except OSError:
            # No descriptor is free; when a child ends some will be.
            time.sleep(_PAUSE_SECONDS)
            return
        pid = -1
        try:
            pid = os.fork()
            if not pid:
                _beChild(control, self._parent)
            self._children.append(_Child(pid, os.pidfd_open(pid), control))
        except OSError:
            # The hook process does it itself.
            control.close()
            if pid > 0:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _tellEnd(self, child: _Child) -> None:
        """A child that has ended by itself has told its status. Of one that was killed it is told as by a shell."""
        result = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert result is not None, "it has ended"
        with suppress(OSError):
            child.control.send(bytes([result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status]))
        child.control.close()

    def _forget(self, child: _Child) -> None:
        os.waitpid(child.pid, 0)
        os.close(child.handle)
        self._children.remove(child)


def _beChild(control: socket.socket, parent: int) -> None:
    """
    Do the work of the hook process at the other end. Ends the process.
    """
    status = 1
    try:
        os.setsid()
        _setName(CHILD_NAME)
        control, verbosity = _takeDescriptors(control)
        status = answer(HookOptions(verbosity, waiting=control.fileno()), os.environ, parent)
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            control.send(bytes([status]))
        os._exit(status)


def _takeDescriptors(control: socket.socket) -> tuple[socket.socket, int]:
    """
    Have the descriptors of the hook process, and no others.

    @return: the way to it, and the argument that it has from Nix.
    @raise OSError: it has given up, and does the work itself.
    @raise ValueError: likewise.
    """
    control.settimeout(_REQUEST_SECONDS)
    control.send(TAKEN)
    request, received, _, _ = socket.recv_fds(control, _MAX_REQUEST, _MAX_FDS)
    verbosity, *fds = map(int, request.split())
    if len(received) != len(fds):
        raise ValueError("not all descriptors have come")
    # First out of the way of the numbers that they are to have.
    above = max(fds) + 1
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in [control.fileno(), *received]]
    for source, fd in zip(sources[1:], fds, strict=True):
        os.dup2(source, fd)
    for fd in openDescriptors():
        if fd not in fds and fd != sources[0]:
            os.close(fd)
    # The old one is closed, whatever has its number now.
    control.detach()
    control = socket.socket(fileno=sources[0])
    control.send(TAKEN)
    return control, verbosity


def _setName(name: str) -> None:
    with suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as stream:
        stream.write(name)


def _removeDead(path: str) -> None:
    """Remove sockets that others, who were killed, have left beside this one."""
    directory, name = os.path.split(path)
    _, space, *_ = name.split("-")
    for other in os.listdir(directory):
        parent, _, rest = other.partition("-")
        # The numbers of another namespace say nothing here.
        if rest.startswith(f"{space}-") and not os.path.exists(f"/proc/{parent}"):
            with suppress(FileNotFoundError):
                os.unlink(f"{directory}/{other}")

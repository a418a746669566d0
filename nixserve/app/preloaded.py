"""
C{python -m nixserve.app.preloaded SOCKET PARENT SECONDS}: a process with all that a build hook imports, which forks a
child for each hook process of one Nix. L{nixserve.app.hookentry} starts it, and has the other end of the conversation.

No reactor is made and no thread runs before the fork, so a child begins as a new process would, but loaded. From the
hook process that it stands for it gets the descriptors; all else is the same for all of them. If that process is
killed, so is the child, and it alone: the ends of its descriptors end whatever it has started, in an orderly way. Its
ssh, for one, has the time to tell the machine that nothing more comes.

Ends when Nix has ended, or some time after the last build. Blocking, with C{poll(2)}.
"""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Self

from nixserve.app.hookcommand import HookOptions, answer
from nixserve.app.hookentry import READY, TAKEN

__all__ = ["PreloadedServer", "main"]

_LOADED = ("nixserve.hook.running", "twisted.internet.epollreactor", "twisted.logger")
"""What a child needs that this module does not import itself. C{twisted.internet.reactor} is not to be among it: that
makes a reactor."""

_BACKLOG = 64

_MAX_REQUEST, _MAX_FDS = 100, 16

_ASIDE = 256
"""From here on are descriptors that stand for others for a moment: above all that Nix gives."""

_REQUEST_SECONDS = 10.0
"""How long a hook process may take to say what it wants. It does so at once."""


def main() -> None:
    """Serve one Nix. Ends the process."""
    path, parent, seconds = sys.argv[1:]
    for name in _LOADED:
        import_module(name)
    # What has been loaded stays: not to be looked through in any child, whose pages that would copy.
    gc.collect()
    gc.freeze()
    with suppress(ProcessLookupError), PreloadedServer(path, int(parent), float(seconds)) as server:
        os.close(READY)
        server.run()


@dataclass(slots=True)
class _Child:
    """
    @ivar control: leads to the hook process that waits for it.
    @ivar handle: readable when it has ended (pidfd_open(2)).
    @ivar killed: it has been, and will end in time.
    """

    pid: int
    control: socket.socket
    handle: int
    killed: bool = False


class PreloadedServer:
    """
    Forks children. C{with} removes the socket at the end.
    """

    def __init__(self, path: str, parent: int, seconds: float) -> None:
        """
        Listen.

        @param path: of the socket. What lies there is replaced.
        @param parent: the process that runs Nix.
        @param seconds: how long to stay without a child.
        @raise ProcessLookupError: Nix has ended.
        @raise OSError: the file system refuses.
        """
        self._path = path
        self._parent = parent
        self._seconds = seconds
        self._children: list[_Child] = []
        self._nix = os.pidfd_open(parent)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with suppress(FileNotFoundError):
            os.unlink(path)
        self._listening.bind(path)
        self._listening.listen(_BACKLOG)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listening.close()
        os.close(self._nix)

    def run(self) -> None:
        """Until it is of no more use."""
        while self._children or not self._idle():
            ready = self._wait(None)
            for child in list(self._children):
                if child.handle in ready:
                    self._reap(child)
                elif not child.killed and child.control.fileno() in ready:
                    # Nobody waits for it any more.
                    os.kill(child.pid, signal.SIGKILL)
                    child.killed = True
            if self._listening.fileno() in ready:
                self._accept()

    def _idle(self) -> bool:
        """Wait, without any child, for work. @return: whether there will be none."""
        ready = self._wait(self._seconds)
        return not ready or self._nix in ready

    def _wait(self, seconds: float | None) -> set[int]:
        """
        @return: the descriptors that say something.
        """
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        if not self._children:
            poll.register(self._nix, select.POLLIN)
        for child in self._children:
            poll.register(child.handle, select.POLLIN)
            if not child.killed:
                poll.register(child.control, select.POLLRDHUP)
        return {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}

    def _accept(self) -> None:
        control, _ = self._listening.accept()
        try:
            pid = os.fork()
        except OSError:
            # The hook process does it itself.
            control.close()
            return
        if not pid:
            _beChild(control, self._parent)
        self._children.append(_Child(pid, control, os.pidfd_open(pid)))

    def _reap(self, child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        with suppress(OSError):
            # As a shell says that a signal has killed it.
            child.control.send(bytes([code if code >= 0 else 128 - code]))
        child.control.close()
        os.close(child.handle)
        self._children.remove(child)


def _beChild(control: socket.socket, parent: int) -> None:
    """
    Do the work of the hook process at the other end. Ends the process.
    """
    status = 1
    try:
        os.setsid()
        status = answer(HookOptions(_takeDescriptors(control)), os.environ, parent)
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _takeDescriptors(control: socket.socket) -> int:
    """
    Have the descriptors of the hook process, and no others.

    @return: the argument that it has from Nix.
    @raise ValueError: it has given up, and does the work itself.
    """
    control.settimeout(_REQUEST_SECONDS)
    control.send(TAKEN)
    request, received, _, _ = socket.recv_fds(control, _MAX_REQUEST, _MAX_FDS)
    verbosity, *fds = map(int, request.split())
    control.detach()
    # First out of the way of the numbers that they are to have.
    aside = [fcntl.fcntl(fd, fcntl.F_DUPFD, _ASIDE) for fd in received]
    os.closerange(0, _ASIDE)
    for source, fd in zip(aside, fds, strict=True):
        os.dup2(source, fd)
    os.closerange(_ASIDE, os.sysconf("SC_OPEN_MAX"))
    return verbosity


if __name__ == "__main__":
    main()

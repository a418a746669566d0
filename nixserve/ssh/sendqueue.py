"""
What a channel has still to send, cut into packets.
"""

from __future__ import annotations

from collections import deque

__all__ = ["MAX_ERROR_BYTES", "SendQueue"]

# Standard error that waits for a peer which does not read it; what comes on top is dropped, and counted.
MAX_ERROR_BYTES = 256 * 1024


class SendQueue:
    """
    What one channel has still to send: two streams of pieces, cut and joined into packets without copying more
    than once.

    @ivar outSize: bytes of standard output that wait.
    @ivar errorSize: bytes of standard error that wait, at most L{MAX_ERROR_BYTES}.
    """

    def __init__(self) -> None:
        self.outSize = 0
        self.errorSize = 0
        self._out: deque[bytes | memoryview] = deque()
        self._error: deque[bytes | memoryview] = deque()
        self._droppedLines = 0
        self._outTurn = False

    def __bool__(self) -> bool:
        return bool(self._out or self._error)

    def write(self, data: bytes) -> None:
        """Append to standard output."""
        if data:
            self._out.append(data)
            self.outSize += len(data)

    def writeError(self, data: bytes) -> None:
        """Append to standard error, or drop and count it if too much waits already."""
        if self.errorSize + len(data) > MAX_ERROR_BYTES:
            self._droppedLines += max(1, data.count(b"\n"))
            return
        if self._droppedLines:
            notice = b"[%d lines of messages were dropped: they were not read]\n" % self._droppedLines
            self._droppedLines = 0
            self._error.append(notice)
            self.errorSize += len(notice)
        if data:
            self._error.append(data)
            self.errorSize += len(data)

    def take(self, window: int, maxPacket: int, reserve: int) -> tuple[bool, bytes | memoryview]:
        """
        The next packet's data. The streams take turns; standard error leaves C{reserve} of the window alone.

        @return: whether it is standard error, and the data, which is empty if nothing may be sent now.
        """
        errorRoom = min(window - reserve, maxPacket)
        if self._error and errorRoom > 0 and not (self._outTurn and self._out):
            self._outTurn = True
            data = _takeFrom(self._error, errorRoom)
            self.errorSize -= len(data)
            return True, data
        self._outTurn = False
        data = _takeFrom(self._out, min(window, maxPacket))
        self.outSize -= len(data)
        return False, data

    def clear(self) -> None:
        """Drop everything that is queued."""
        self._out.clear()
        self._error.clear()
        self.outSize = self.errorSize = 0


def _takeFrom(pieces: deque[bytes | memoryview], room: int) -> bytes | memoryview:
    """At most C{room} bytes from the front: a view of a large piece, or small pieces joined."""
    if not pieces or room <= 0:
        return b""
    if len(pieces[0]) > room:
        piece = memoryview(pieces[0])
        pieces[0] = piece[room:]
        return piece[:room]
    taken = [pieces.popleft()]
    size = len(taken[0])
    while pieces and size + len(pieces[0]) <= room:
        taken.append(pieces.popleft())
        size += len(taken[-1])
    return b"".join(taken) if len(taken) > 1 else taken[0]

"""
The log of a build on its way to the clients that wait for it.

It passes through bounded buffers and is dropped where nobody reads it; a builder never waits for a client. What is
dropped here is complete in the log on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from nixserve.protocol.reactors import IThreadReactor

__all__ = ["MAX_KEPT_LOG", "MAX_PENDING_LOG", "BuildLog", "Listener"]

MAX_PENDING_LOG = 256 * 1024
"""Bytes of log between a builder's thread and the reactor."""

MAX_KEPT_LOG = 1024 * 1024
"""Bytes of log that are kept for clients which come later."""

Listener = Callable[[bytes], None]
"""Takes whole lines of a log."""


class BuildLog:
    """
    The log of one build on its way from the builder's thread to any number of clients.
    """

    def __init__(self, reactor: IThreadReactor) -> None:
        self._reactor = reactor
        self._listeners: list[Listener] = []
        self._kept: list[bytes] = []
        self._keptSize = 0
        self._keptDropped = 0
        # Shared with the builder's thread.
        self._mutex = threading.Lock()
        self._pending: list[bytes] = []
        self._pendingSize = 0
        self._dropped = 0

    def feed(self, lines: bytes) -> None:
        """Some whole lines. Called in a thread of the builder's; never blocks."""
        with self._mutex:
            scheduled = bool(self._pending)
            # One piece is taken however large it is: its maker bounds it. After a gap nothing more is taken, for the
            # notice stands at the end.
            if self._dropped or (self._pending and self._pendingSize + len(lines) > MAX_PENDING_LOG):
                self._dropped += lines.count(b"\n")
            else:
                self._pending.append(lines)
                self._pendingSize += len(lines)
        if not scheduled:
            self._reactor.callFromThread(self.deliver)

    def deliver(self) -> None:
        """Pass on what has come. In the reactor's thread."""
        with self._mutex:
            lines, dropped = self._pending, self._dropped
            self._pending, self._pendingSize, self._dropped = [], 0, 0
        if dropped:
            lines.append(_droppedNotice(dropped))
        text = b"".join(lines)
        if not text:
            return
        for listener in list(self._listeners):
            listener(text)
        if not self._keptDropped and self._keptSize + len(text) <= MAX_KEPT_LOG:
            self._kept.append(text)
            self._keptSize += len(text)
        else:
            self._keptDropped += text.count(b"\n")

    def listen(self, listener: Listener) -> None:
        """Give a client the log, from its start."""
        for text in self._kept:
            listener(text)
        if self._keptDropped:
            listener(_droppedNotice(self._keptDropped))
        self._listeners.append(listener)

    def leave(self, listener: Listener) -> None:
        """A client needs it no more."""
        self._listeners.remove(listener)


def _droppedNotice(lines: int) -> bytes:
    return b"[%d lines of this log were dropped here; the log on the build machine has them]\n" % lines

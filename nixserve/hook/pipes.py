"""
The descriptors that a build hook has from Nix, in the reactor: none of them ever blocks it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.protocol.reactors import IStreamReactor
from nixserve.protocol.stdio import OutputStream, pendingOf
from nixserve.protocol.workers import whenFired

__all__ = ["MAX_PENDING", "PipeToNix", "whenReadable"]

MAX_PENDING: Final = 16 * 1024 * 1024
"""Bytes that wait for a Nix which does not read. It reads whenever it does nothing else, so this many come together
only while it is stuck for long; what comes then is dropped, as our server does for its clients."""


class PipeToNix:
    """
    Takes any amount of bytes at once, and passes them on as Nix reads them.

    @ivar ended: fires when everything was written and the descriptor is closed, or Nix is gone.
    """

    def __init__(self, reactor: IStreamReactor, fd: int, onLost: Callable[[], None]) -> None:
        """
        @param fd: a pipe, of which nobody else has the writing end; it is closed at the end. Anything else, as people
            may try it, is written to as it is.
        @param onLost: called when Nix is gone before L{finish}.
        """
        self.ended: Deferred[None] = Deferred()
        self._fd = fd
        self._onLost = onLost
        self._dropped = 0
        self._finishing = False
        self._stream = OutputStream(reactor, fd, self._lost) if stat.S_ISFIFO(os.fstat(fd).st_mode) else None

    def write(self, data: bytes) -> None:
        """Pass this on. What comes when Nix is gone is nobody's."""
        if self._finishing or self.ended.called or not data:
            return
        if self._stream is None:
            os.write(self._fd, data)
        elif pendingOf(self._stream) + len(data) > MAX_PENDING:
            self._dropped += len(data)
        else:
            self._tellDropped()
            self._stream.write(data)

    def finish(self) -> Deferred[None]:
        """
        Nothing more will be written.

        @return: fires when Nix has taken everything, or is gone.
        """
        if not self._finishing:
            self._finishing = True
            if self._stream is not None:
                self._tellDropped()
                self._stream.loseConnection()
            elif not self.ended.called:
                self._lost(None)
        return whenFired(self.ended)

    def _tellDropped(self) -> None:
        if self._dropped and self._stream is not None:
            self._stream.write(b"\n[%d bytes were dropped here: Nix did not read]\n" % self._dropped)
            self._dropped = 0

    def _lost(self, reason: Failure | None) -> None:
        # A reactor that stops ends all descriptors, also those that have ended already.
        if self.ended.called:
            return
        os.close(self._fd)
        self.ended.callback(None)
        if not self._finishing:
            self._onLost()


def whenReadable(reactor: IStreamReactor, fd: int) -> Deferred[None]:
    """
    @return: fires when there is something to be read from a pipe, or its end.
    """
    reader = _Reader(reactor, fd)
    reactor.addReader(reader)
    return reader.readable


@implementer(IReadDescriptor)
class _Reader:
    """Waits until a descriptor can be read, once, without reading it."""

    def __init__(self, reactor: IStreamReactor, fd: int) -> None:
        self.readable: Deferred[None] = Deferred(lambda _: reactor.removeReader(self))
        self._reactor = reactor
        self._fd = fd

    def fileno(self) -> int:
        """See C{IFileDescriptor}."""
        return self._fd

    def logPrefix(self) -> str:
        """See C{ILoggingContext}."""
        return "requests of Nix"

    def doRead(self) -> None:
        """There is something to be read: stop watching, and say so."""
        self._reactor.removeReader(self)
        self.readable.callback(None)

    def connectionLost(self, reason: Failure) -> None:
        """For the reactor: it stops, or the other end is closed and nothing is left to be read."""
        self._reactor.removeReader(self)
        if not self.readable.called:
            self.readable.callback(None)

"""
Transports without a connection: one end of two that are joined, and one whose other end is the test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IAddress
from zope.interface import implementer

from nixserve.protocol.interfaces import IServeTransport

__all__ = ["MemoryTransport", "RecordingTransport"]

CAPACITY = 64 * 1024
"""Bytes on their way in one direction after which the sender is paused, as by a real connection."""


@implementer(IAddress)
class _MemoryAddress:
    def __repr__(self) -> str:
        return "memory"


_HERE = _MemoryAddress()


@implementer(IServeTransport)
class MemoryTransport:
    """
    One end of a L{Pair}.

    @ivar written: what is on its way to the other end.
    @ivar errors: the same for standard error.
    @ivar status: what the session has ended with, once it has.
    @ivar paused: its protocol takes nothing for now.
    @ivar capacity: bytes on their way after which the producer is paused.
    @ivar mostUnread: the most bytes that were on their way at any time.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None, capacity: int = CAPACITY) -> None:
        """
        @param wake: called when something may move.
        """
        self.written = bytearray()
        self.errors = bytearray()
        self.status: int | None = None
        self.aborted = False
        self.closing = False
        self.paused = False
        self.producer: Any = None
        self.capacity = capacity
        self.mostUnread = 0
        self.sent = 0
        self._producerPaused = False
        self._wake = wake

    def write(self, data: bytes) -> None:
        """See L{IServeTransport}."""
        if not self.ended:
            self.written += data
            self.mostUnread = max(self.mostUnread, self.unsent)
            self._throttle()
            self._wake()

    @property
    def ended(self) -> bool:
        """Is it too late to write anything?"""
        return self.aborted or self.status is not None

    def writeSequence(self, data: Any) -> None:
        """See L{IServeTransport}."""
        self.write(b"".join(data))

    @property
    def unsent(self) -> int:
        """See L{IServeTransport}."""
        return len(self.written)

    def allowUnread(self, size: int) -> int:
        """See L{IServeTransport}. What is not read stays with the other end."""
        return 0

    def writeError(self, data: bytes) -> None:
        """See L{IServeTransport}."""
        if not self.ended:
            self.errors += data
            self._wake()

    def take(self, most: int) -> bytes:
        """
        The other end reads.

        @param most: how many bytes at most.
        """
        data = bytes(self.written[:most])
        del self.written[:most]
        self.sent += len(data)
        return data

    def taken(self) -> None:
        """What was read has been dealt with: the producer may have to go on."""
        if self.producer is not None and self._producerPaused and self.unsent <= self.capacity:
            self._producerPaused = False
            self.producer.resumeProducing()

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """See L{IServeTransport}."""
        assert streaming and self.producer is None, "one push producer at a time"
        self.producer = producer
        self._throttle()

    def unregisterProducer(self) -> None:
        """See L{IServeTransport}."""
        self.producer = None
        self._producerPaused = False

    def pauseProducing(self) -> None:
        """See L{IServeTransport}."""
        assert not self.paused, "paused twice"
        self.paused = True

    def resumeProducing(self) -> None:
        """See L{IServeTransport}."""
        self.paused = False
        self._wake()

    def stopProducing(self) -> None:
        """See L{IServeTransport}."""
        self.abortConnection()

    def exit(self, status: int) -> None:
        """See L{IServeTransport}."""
        if self.status is None:
            self.status = status
            self._wake()

    def loseConnection(self) -> None:
        """See L{IServeTransport}."""
        self.closing = True
        self._wake()

    def abortConnection(self) -> None:
        """See L{IServeTransport}."""
        self.aborted = self.closing = True
        self._wake()

    def getPeer(self) -> IAddress:
        """See L{IServeTransport}."""
        return _HERE

    def getHost(self) -> IAddress:
        """See L{IServeTransport}."""
        return _HERE

    def _throttle(self) -> None:
        if self.producer is not None and not self._producerPaused and self.unsent > self.capacity:
            self._producerPaused = True
            self.producer.pauseProducing()


class RecordingTransport(MemoryTransport):
    """
    A transport whose other end is the test, which reads when it calls L{take}.

    @ivar written: all that was written, read or not.
    @ivar late: what was written after the end, or after it was aborted, which a real transport drops.
    @ivar exits: how often the session has ended.
    @ivar pauses: how often its protocol has begun to take nothing.
    @ivar window: how much the protocol has let the peer send on while it is paused.
    """

    def __init__(self, capacity: int = sys.maxsize) -> None:
        super().__init__(capacity=capacity)
        self.late = bytearray()
        self.exits = 0
        self.pauses = 0
        self.window: int | None = None

    @property
    def unsent(self) -> int:
        """See L{IServeTransport}."""
        return len(self.written) - self.sent

    def write(self, data: bytes) -> None:
        """See L{IServeTransport}."""
        if self.ended:
            self.late += data
        super().write(data)

    def writeError(self, data: bytes) -> None:
        """See L{IServeTransport}."""
        if self.ended:
            self.late += data
        super().writeError(data)

    def take(self, most: int = sys.maxsize) -> bytes:
        """
        The peer reads.

        @param most: how many bytes at most.
        """
        data = bytes(self.written[self.sent :][:most])
        self.sent += len(data)
        self.taken()
        return data

    def allowUnread(self, size: int) -> int:
        """See L{IServeTransport}. What comes meanwhile is held here."""
        self.window = size
        return size

    def pauseProducing(self) -> None:
        """See L{IServeTransport}."""
        super().pauseProducing()
        self.pauses += 1

    def exit(self, status: int) -> None:
        """See L{IServeTransport}."""
        self.exits += 1
        super().exit(status)

    def loseConnection(self) -> None:
        """See L{IServeTransport}."""
        self.exit(1)

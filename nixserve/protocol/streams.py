"""
NAR bytes through the door, with back-pressure both ways.

Between the reactor and a worker lies a queue of at most L{MAX_QUEUED} bytes. While a worker works on one batch the
reactor fills the next; a full queue pauses the peer's transport. In the other direction one batch is read ahead
while the one before it is being written, and nothing is read while the transport is paused. So no NAR is ever held
whole, and no worker ever waits for a peer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.codec.nar import MAX_CHUNK
from nixserve.errors import NixServeError
from nixserve.protocol.interfaces import IServeTransport
from nixserve.protocol.workers import Door

__all__ = ["MAX_QUEUED", "NarInflow", "NarOutflow", "Throttle", "drained"]

MAX_QUEUED = 1024 * 1024
"""Bytes in one queue: some milliseconds of work for a worker, so that neither side waits for the other's turn."""

READ_AHEAD = 512 * 1024
"""Bytes that one turn of a worker reads."""


class Fed(Protocol):
    """Takes the bytes of one NAR: L{nixserve.store.api.PathWriter} or L{nixserve.store.api.ImportWriter}."""

    def feed(self, data: bytes) -> None: ...


F = TypeVar("F", bound=Fed)


class Consumer(Protocol):
    """Where an outflow goes: what is needed of L{twisted.internet.interfaces.IConsumer}."""

    def write(self, data: bytes) -> None: ...

    def registerProducer(self, producer: Any, streaming: bool) -> None: ...

    def unregisterProducer(self) -> None: ...


class Throttle:
    """
    Pauses a transport as long as anybody wants it paused.
    """

    def __init__(self, transport: IServeTransport) -> None:
        self._transport = transport
        self._holders: set[object] = set()

    def pause(self, holder: object) -> None:
        """Pause the transport until C{holder}, and whoever else does so, resumes it."""
        if not self._holders:
            self._transport.pauseProducing()
        self._holders.add(holder)

    def resume(self, holder: object) -> None:
        """C{holder} takes more, if it did not before."""
        if holder in self._holders:
            self._holders.discard(holder)
            if not self._holders:
                self._transport.resumeProducing()


class NarInflow(Generic[F]):
    """
    One NAR from the peer to the store.

    The writer is opened, fed and finished in worker threads; whatever fails there fails L{failed} at once, though
    the peer may go on sending.

    @ivar failed: called with the failure of opening or feeding.
    """

    def __init__(
        self, door: Door, throttle: Throttle, begin: Callable[[], F], failed: Callable[[Failure], None]
    ) -> None:
        self._door = door
        self._throttle = throttle
        self._begin = begin
        self.failed = failed
        self._writer: F | None = None
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._batch: deque[bytes] = deque()
        self._working = False
        self._finish: Callable[[F], None] | None = None
        self._finished: Deferred[None] | None = None

    def write(self, data: bytes) -> None:
        """Bytes have arrived. They are handed on by L{push}, or when enough have gathered."""
        self._queue.append(data)
        self._queued += len(data)
        if self._queued >= MAX_CHUNK:
            self.push()
        if self._queued >= MAX_QUEUED:
            self._throttle.pause(self)

    def push(self) -> None:
        """No more bytes are here right now: let a worker have what there is."""
        if self._working or not (self._queue or self._finish):
            return
        self._working = True
        self._batch, self._queue, self._queued = self._queue, deque(), 0
        finish, self._finish = self._finish, None
        working = self._door.call(self._work, finish)
        working.addCallbacks(self._worked, self._workFailed, (finish is not None,))

    def end(self, finish: Callable[[F], None]) -> Deferred[None]:
        """
        The NAR is complete.

        @param finish: called with the writer in a worker when it has been fed everything; may raise L{Busy}.
        @return: fires when C{finish} has returned, or with its failure.
        """
        self._finish = finish
        self._finished = Deferred()
        self.push()
        return self._finished

    def _work(self, finish: Callable[[F], None] | None) -> None:
        """In a worker. After L{Busy} it is called again: what has been fed is gone from the batch."""
        if self._writer is None:
            self._writer = self._begin()
        while self._batch:
            self._writer.feed(_gather(self._batch))
        if finish is not None:
            finish(self._writer)

    def _worked(self, _: None, last: bool) -> None:
        self._working = False
        self._throttle.resume(self)
        if last and self._finished is not None:
            self._finished.callback(None)
        else:
            self.push()

    def _workFailed(self, failure: Failure) -> None:
        # _working stays true: nothing more will be fed.
        if self._finished is not None:
            self._finished.errback(failure)
        else:
            self.failed(failure)


def _gather(chunks: deque[bytes]) -> bytes:
    """
    Take chunks from the left until L{MAX_CHUNK} are together: each piece costs the blocking side a round of its
    parser and a call of its hash, so packets of SSH are worth joining.
    """
    gathered = [chunks.popleft()]
    size = len(gathered[0])
    while chunks and size + len(chunks[0]) <= MAX_CHUNK:
        gathered.append(chunks.popleft())
        size += len(gathered[-1])
    return gathered[0] if len(gathered) == 1 else b"".join(gathered)


def _joined(chunks: deque[bytes]) -> Iterator[bytes]:
    """Small chunks joined: each costs a packet or a call of the system."""
    while chunks:
        yield _gather(chunks)


@implementer(IPushProducer)
class NarOutflow:
    """
    A stream of bytes from the store to the peer.
    """

    def __init__(
        self,
        door: Door,
        transport: Consumer,
        begin: Callable[[], Iterator[bytes]],
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """
        @param begin: gives the chunks; called in a worker.
        @param progress: called whenever something has been written.
        """
        self._door = door
        self._transport = transport
        self._begin = begin
        self._progress = progress
        self._chunks: Iterator[bytes] | None = None
        self._error: Exception | None = None
        self._ready: tuple[list[bytes], bool] | None = None
        self._writing = False
        self.paused = False
        self._finished: Deferred[None] = Deferred(lambda _: self._cancelled())

    def start(self) -> Deferred[None]:
        """
        Write all of it.

        @return: fires when everything has been handed to the transport, or with what went wrong while reading.
            Cancelling stops at once.
        """
        self._transport.registerProducer(self, True)
        self._read()
        return self._finished

    def pauseProducing(self) -> None:
        """The transport has enough for now."""
        self.paused = True

    def resumeProducing(self) -> None:
        """The transport wants more."""
        if not self._finished.called:
            self.paused = False
            self._flush()

    def stopProducing(self) -> None:
        """The transport is gone. Its owner hears of it too and ends the session."""
        self.paused = True

    def _read(self) -> None:
        reading = self._door.call(self._readSome)
        reading.addCallbacks(self._haveRead, self._failed)

    def _readSome(self) -> tuple[list[bytes], bool]:
        """
        In a worker: read about L{READ_AHEAD} bytes.

        @return: chunks, and whether they are the last ones.
        """
        if self._error is not None:
            raise self._error
        if self._chunks is None:
            self._chunks = self._begin()
        batch: deque[bytes] = deque()
        size = 0
        last = False
        try:
            while size < READ_AHEAD and not last:
                chunk = next(self._chunks, b"")
                batch.append(chunk)
                size += len(chunk)
                last = not chunk
        except Exception as error:
            if not batch:
                raise
            # What was read before goes out first: it may be the answers to other requests.
            self._error = error
        return list(_joined(batch)), last

    def _haveRead(self, batch: tuple[list[bytes], bool]) -> None:
        self._ready = batch
        self._flush()

    def _flush(self) -> None:
        if self._writing:
            return
        self._writing = True
        while self._ready is not None and not self.paused:
            (chunks, last), self._ready = self._ready, None
            if not last:
                # The next batch is read while this one is being encrypted and sent.
                self._read()
            try:
                for chunk in chunks:
                    self._transport.write(chunk)
            except NixServeError:
                # A consumer that counts has been given too much.
                self._failed(Failure())
                break
            self._progress()
            if last:
                self._transport.unregisterProducer()
                self._finished.callback(None)
        self._writing = False

    def _failed(self, failure: Failure) -> None:
        self.paused = True
        if not self._finished.called:
            self._transport.unregisterProducer()
            self._finished.errback(failure)

    def _cancelled(self) -> None:
        self.paused = True
        self._transport.unregisterProducer()


def drained(transport: Consumer) -> Deferred[None]:
    """
    @return: fires when a transport takes more; at once, if it does. Cancelling gives up waiting.
    """
    return _Drain(transport).finished


@implementer(IPushProducer)
class _Drain:
    """A producer that has nothing to write, and so only learns whether it might."""

    def __init__(self, transport: Consumer) -> None:
        self._transport = transport
        self._paused = False
        self.finished: Deferred[None] = Deferred(lambda _: transport.unregisterProducer())
        transport.registerProducer(self, True)
        if not self._paused:
            self.resumeProducing()

    def pauseProducing(self) -> None:
        """The transport has enough for now."""
        self._paused = True

    def resumeProducing(self) -> None:
        """The transport wants more."""
        if not self.finished.called:
            self._transport.unregisterProducer()
            self.finished.callback(None)

    def stopProducing(self) -> None:
        """The transport is gone. Its owner hears of it too and ends the session."""
        self._paused = True

"""NAR bytes through the door: what lies in queues, who is paused, and what failures do."""

import pytest
from twisted.internet.defer import CancelledError

from nixserve.codec.nar import MAX_CHUNK
from nixserve.protocol.streams import MAX_QUEUED, READ_AHEAD, NarInflow, NarOutflow, Throttle
from nixserve.protocol.workers import Door
from nixserve.store.api import Busy
from nixserve.testing import ImmediateWorkers, ManualWorkers, RecordingTransport, result


class Writer:
    """Takes what it is fed."""

    def __init__(self):
        self.pieces = []
        self.finished = 0
        self.raises = {}

    def begin(self):
        """For NarInflow."""
        self.fail("begin")
        return self

    def feed(self, data):
        """Take it."""
        self.fail("feed")
        self.pieces.append(data)

    def finish(self):
        """Be complete."""
        self.fail("finish")
        self.finished += 1

    def fail(self, where):
        """Raise what the test wants raised."""
        if self.raises.get(where):
            raise self.raises[where].pop(0)


class Inflow:
    """A NarInflow with everything around it."""

    def __init__(self, workers=None):
        self.workers = workers or ManualWorkers()
        self.transport = RecordingTransport()
        self.writer = Writer()
        self.failures = []
        self.flow = NarInflow(Door(self.workers), Throttle(self.transport), self.writer.begin, self.failures.append)

    def end(self):
        """The NAR is complete."""
        return self.flow.end(lambda writer: writer.finish())


def test_inflow():
    """Everything arrives in order, then the writer is finished."""
    inflow = Inflow(ImmediateWorkers())
    for data in (b"a", b"b", b"c" * MAX_CHUNK):
        inflow.flow.write(data)
    inflow.flow.write(b"d")
    inflow.flow.push()
    ended = inflow.end()
    assert result(ended) is None
    assert b"".join(inflow.writer.pieces) == b"ab" + b"c" * MAX_CHUNK + b"d"
    assert inflow.writer.finished == 1 and inflow.failures == []


def test_emptyInflow():
    """A NAR of no bytes is begun and finished too: what is wrong with it is the writer's business."""
    inflow = Inflow(ImmediateWorkers())
    assert result(inflow.end()) is None
    assert inflow.writer.finished == 1 and inflow.writer.pieces == []


def test_inflowGathersPackets():
    """Small packets reach the writer joined, up to 256 KiB; larger pieces are not cut."""
    inflow = Inflow()
    for _ in range(40):
        inflow.flow.write(bytes(10_000))
    inflow.flow.write(bytes(MAX_CHUNK + 1))
    inflow.end()
    inflow.workers.drain()
    sizes = list(map(len, inflow.writer.pieces))
    assert sum(sizes) == 400_000 + MAX_CHUNK + 1
    assert max(sizes) == MAX_CHUNK + 1 and len(sizes) <= 4


def test_inflowWaitsForEnough():
    """No worker is troubled with a few bytes as long as more are at hand; C{push} says that there are none."""
    inflow = Inflow()
    inflow.flow.write(b"x")
    assert not inflow.workers.waiting
    inflow.flow.push()
    assert len(inflow.workers.waiting) == 1
    inflow.flow.push()
    inflow.workers.drain()
    assert inflow.writer.pieces == [b"x"] and not inflow.workers.waiting


def test_fullQueuePauses():
    """
    While a worker is at it the queue takes one MiB and the chunk that fills it, then the peer is paused until the
    worker comes back.
    """
    inflow = Inflow()
    inflow.flow.write(bytes(MAX_CHUNK))
    arrive = inflow.workers.run()
    written = 0
    while not inflow.transport.paused:
        assert written < MAX_QUEUED
        inflow.flow.write(bytes(32768))
        written += 32768
    assert written == MAX_QUEUED
    assert inflow.transport.pauses == 1
    arrive()
    assert not inflow.transport.paused
    for _ in range(5):
        while not inflow.transport.paused:
            inflow.flow.write(bytes(32768))
        inflow.flow.write(bytes(32768))
        assert inflow.flow._queued <= MAX_QUEUED + 32768
        inflow.workers.step()
    ended = inflow.end()
    inflow.workers.drain()
    assert ended.called and not inflow.transport.paused


@pytest.mark.parametrize("where", ["begin", "feed"])
def test_inflowFails(where):
    """A failure is reported at once, and nothing is fed after it."""
    inflow = Inflow()
    error = ValueError("no")
    inflow.writer.raises = {where: [error]}
    inflow.flow.write(bytes(MAX_CHUNK))
    inflow.workers.step()
    assert [failure.value for failure in inflow.failures] == [error]
    for _ in range(10):
        inflow.flow.write(bytes(MAX_CHUNK))
    inflow.flow.push()
    assert not inflow.workers.waiting
    assert inflow.transport.paused


@pytest.mark.parametrize("where", ["begin", "feed", "finish"])
def test_inflowFailsAtItsEnd(where):
    """When the end is known, the failure goes to whoever waits for it, once."""
    inflow = Inflow()
    inflow.writer.raises = {where: [ValueError("no")]}
    inflow.flow.write(b"x")
    ended = inflow.end()
    inflow.workers.drain()
    with pytest.raises(ValueError, match="no"):
        result(ended)
    assert inflow.failures == []


def test_failureWhileTheEndArrives():
    """The end may come while the piece that fails is still being worked on."""
    inflow = Inflow()
    inflow.writer.raises = {"feed": [ValueError("no")]}
    inflow.flow.write(bytes(MAX_CHUNK))
    arrive = inflow.workers.run()
    ended = inflow.end()
    arrive()
    with pytest.raises(ValueError, match="no"):
        result(ended)
    assert inflow.failures == [] and not inflow.workers.waiting


@pytest.mark.parametrize("where", ["begin", "finish"])
def test_busyFeedsNothingTwice(where):
    """Where the writer has to wait for a lock, every byte is still fed once."""
    inflow = Inflow()
    inflow.writer.raises = {where: [Busy("a lock"), Busy("a lock")]}
    inflow.flow.write(b"x" * MAX_CHUNK)
    inflow.flow.write(b"y")
    ended = inflow.end()
    for _ in range(4):
        inflow.workers.drain()
        inflow.workers.reactor.advance(1)
    assert ended.called
    assert b"".join(inflow.writer.pieces) == b"x" * MAX_CHUNK + b"y" and inflow.writer.finished == 1


def test_throttle():
    """A transport is paused as long as anybody wants it paused, and nobody resumes it for another."""
    transport = RecordingTransport()
    throttle = Throttle(transport)
    throttle.resume("a")
    throttle.pause("a")
    throttle.pause("a")
    throttle.pause("b")
    assert transport.paused and transport.pauses == 1
    throttle.resume("a")
    assert transport.paused
    throttle.resume("b")
    assert not transport.paused
    throttle.pause("a")
    assert transport.paused


class Source:
    """Chunks, counted."""

    def __init__(self, chunks):
        self.chunks = chunks
        self.read = 0

    def begin(self):
        """For NarOutflow."""
        for chunk in self.chunks:
            self.read += 1
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


CHUNK = bytes(MAX_CHUNK)
AHEAD = READ_AHEAD // MAX_CHUNK
"""Chunks in one batch."""


@pytest.mark.parametrize("workers", [ImmediateWorkers, ManualWorkers])
def test_outflow(workers):
    """Everything is written in order, and the producer unregistered."""
    transport, workers = RecordingTransport(), workers()
    chunks = [bytes([n]) * 100_000 for n in range(50)]
    ended = NarOutflow(Door(workers), transport, Source(chunks).begin).start()
    if isinstance(workers, ManualWorkers):
        assert transport.producer is not None
        workers.drain()
    assert result(ended) is None
    assert transport.written == b"".join(chunks) and transport.producer is None


def test_emptyOutflow():
    """A stream of nothing ends."""
    transport = RecordingTransport()
    assert result(NarOutflow(Door(ImmediateWorkers()), transport, Source([]).begin).start()) is None


def test_slowReader():
    """
    A transport that has enough stops the reading: at most one batch is written beyond its capacity and one read ahead.
    """
    transport, workers = RecordingTransport(capacity=64 * 1024), ManualWorkers()
    source = Source([CHUNK] * 40)
    flow = NarOutflow(Door(workers), transport, source.begin)
    ended = flow.start()
    workers.drain()
    assert flow.paused and source.read == 2 * AHEAD and len(transport.written) == READ_AHEAD
    while transport.unsent:
        transport.take()
        workers.drain()
        assert transport.unsent <= 2 * READ_AHEAD
        assert source.read * MAX_CHUNK - len(transport.written) <= READ_AHEAD
    assert ended.called and len(transport.written) == 40 * MAX_CHUNK


def test_pausedBeforeTheFirstByte():
    """A transport that is full when the outflow begins gets nothing until it wants it."""
    transport, workers = RecordingTransport(capacity=10), ManualWorkers()
    transport.write(bytes(100))
    ended = NarOutflow(Door(workers), transport, Source([b"x"]).begin).start()
    workers.drain()
    assert len(transport.written) == 100 and not ended.called
    transport.take()
    workers.drain()
    assert transport.written[100:] == b"x" and ended.called


def test_progress():
    """Whoever watches hears of every batch that is written."""
    told = []
    transport = RecordingTransport(capacity=1)
    workers = ManualWorkers()
    NarOutflow(Door(workers), transport, Source([CHUNK] * 3 * AHEAD).begin, lambda: told.append(1)).start()
    workers.drain()
    assert len(told) == 1
    transport.take()
    workers.drain()
    assert len(told) == 2


@pytest.mark.parametrize("before", [0, 1, AHEAD, 5 * AHEAD])
def test_outflowFails(before):
    """What was read before the failure is written, then the failure arrives, once."""
    transport, workers = RecordingTransport(), ManualWorkers()
    ended = NarOutflow(Door(workers), transport, Source([CHUNK] * before + [OSError("bad disk")]).begin).start()
    workers.drain()
    with pytest.raises(OSError, match="bad disk"):
        result(ended)
    assert len(transport.written) == before * len(CHUNK)
    assert transport.producer is None


def test_outflowJoins():
    """Small chunks are written together, large ones as they are."""
    transport = RecordingTransport()
    writes = []
    transport.write = writes.append
    NarOutflow(Door(ImmediateWorkers()), transport, Source([b"a", b"b", CHUNK, b"c", b"d" * 1000, b"e"]).begin).start()
    assert writes == [b"ab", CHUNK, b"c" + b"d" * 1000 + b"e"]


@pytest.mark.parametrize("state", ["reading", "paused"])
def test_cancelOutflow(state):
    """Cancelling stops at once, whatever it waits for, and nothing is written afterwards."""
    transport, workers = RecordingTransport(capacity=1), ManualWorkers()
    flow = NarOutflow(Door(workers), transport, Source([CHUNK] * 100).begin)
    ended = flow.start()
    workers.step()
    if state == "paused":
        workers.drain()
    written = len(transport.written)
    ended.cancel()
    with pytest.raises(CancelledError):
        result(ended)
    assert transport.producer is None
    workers.drain()
    flow.resumeProducing()
    assert len(transport.written) == written and not workers.waiting


def test_lostTransport():
    """When the transport is gone nothing more is read; its owner cancels."""
    transport, workers = RecordingTransport(), ManualWorkers()
    source = Source([CHUNK] * 100)
    flow = NarOutflow(Door(workers), transport, source.begin)
    ended = flow.start()
    workers.step()
    flow.stopProducing()
    workers.drain()
    assert source.read == 2 * AHEAD and not ended.called
    ended.addErrback(lambda _: None)
    ended.cancel()


def test_manyBatchesWithoutRecursion():
    """A worker that is always faster than the transport does not pile up frames."""
    transport = RecordingTransport()
    chunks = [bytes(READ_AHEAD)] * 3000
    ended = NarOutflow(Door(ImmediateWorkers()), _Drain(transport), Source(chunks).begin).start()
    assert result(ended) is None


class _Drain:
    """A consumer that forgets."""

    def __init__(self, transport):
        self.registerProducer = transport.registerProducer
        self.unregisterProducer = transport.unregisterProducer

    def write(self, data):
        """Forget it."""

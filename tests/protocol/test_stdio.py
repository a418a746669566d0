"""Standard streams as a transport, over real pipes and a real reactor."""

import os
import socket

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from zope.interface import implementer

from nixserve.protocol import stdio
from nixserve.protocol.policy import EVERYTHING, Peer
from nixserve.protocol.server import ServeServer
from nixserve.protocol.stdio import MAX_ERROR_BUFFER, StdioTransport
from nixserve.protocol.workers import Workers
from nixserve.testing import FakeStore
from tests.vectors.serve.messages import captured


@implementer(IHalfCloseableProtocol)
class Recorder(Protocol):
    """Keeps what happens."""

    def __init__(self):
        self.received = bytearray()
        self.ends = []
        self.ended = Deferred()
        self.lost = Deferred()

    def dataReceived(self, data):
        """Keep it."""
        self.received += data

    def readConnectionLost(self):
        """Keep that."""
        self.ends.append("read")
        self.ended.callback(None)

    def writeConnectionLost(self):
        """Keep that."""
        self.ends.append("write")

    def connectionLost(self, reason):
        """Keep that."""
        self.ends.append("lost")
        self.lost.callback(None)


class Streams:
    """A transport over three pipes, and the other ends of them."""

    def __init__(self, protocol):
        stdin, self.stdin = os.pipe()
        self.stdout, stdout = os.pipe()
        self.stderr, stderr = os.pipe()
        self.inner = [stdin, stdout, stderr]
        self.protocol = protocol
        self.transport = StdioTransport(protocol, reactor, stdin, stdout, stderr)

    def close(self, *names):
        """Close other ends."""
        for name in names:
            fd = getattr(self, name)
            setattr(self, name, None)
            if fd is not None:
                os.close(fd)


@pytest.fixture
def streams():
    """Streams with a protocol that records. After the end nothing of them is left in the reactor."""
    one = Streams(Recorder())
    yield one
    one.transport.abortConnection()
    one.close("stdin", "stdout", "stderr")
    for fd in one.inner:
        os.close(fd)
    assert not [d for d in [*reactor.getReaders(), *reactor.getWriters()] if isinstance(d, stdio.Stream)]
    assert not [call for call in reactor.getDelayedCalls() if "StdioTransport" in repr(call)]


def soon(seconds=0.02):
    """Let the reactor work."""
    return deferLater(reactor, seconds, lambda: None)


def readAll(fd):
    """Everything until the end, for a thread."""
    pieces = []
    while data := os.read(fd, 1 << 20):
        pieces.append(data)
    return b"".join(pieces)


def writeAll(fd, data):
    """Everything, then the end, for a thread."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view[: 1 << 20]) :]


SIZE = 64 * 1024 * 1024


@pytest_twisted.inlineCallbacks
def test_input(streams):
    """64 MiB arrive whole and in large pieces, then the end."""
    pieces = []
    streams.protocol.dataReceived = pieces.append
    streams.transport._input._received = pieces.append
    data = os.urandom(1 << 20) * (SIZE >> 20)
    yield deferToThread(writeAll, streams.stdin, data)
    streams.close("stdin")
    yield streams.protocol.ended
    assert b"".join(pieces) == data
    assert len(pieces) < SIZE / 20_000
    assert streams.protocol.ends == ["read"]


@pytest_twisted.inlineCallbacks
def test_output(streams):
    """64 MiB from a producer arrive whole; then the exit status is reported."""

    class Producer:
        left = SIZE >> 18
        most = 0
        paused = True

        def resumeProducing(self):
            self.paused = False
            while self.left and not self.paused:
                self.left -= 1
                streams.transport.write(bytes(1 << 18))
                self.most = max(self.most, stdio.pendingOf(streams.transport._output))
            if not self.left:
                streams.transport.unregisterProducer()
                streams.transport.exit(3)

        def pauseProducing(self):
            self.paused = True

        def stopProducing(self):
            self.left = 0

    reading = deferToThread(readAll, streams.stdout)
    producer = Producer()
    streams.transport.registerProducer(producer, True)
    producer.resumeProducing()
    assert (yield streams.transport.exited) == 3
    os.close(streams.inner[1])
    assert len((yield reading)) == SIZE
    assert producer.most <= 2 << 18
    streams.inner[1] = os.open(os.devnull, os.O_RDONLY)


@pytest_twisted.inlineCallbacks
def test_pause(streams):
    """Paused, nothing is delivered; resumed, all of it."""
    streams.transport.pauseProducing()
    os.write(streams.stdin, b"x" * 1000)
    streams.close("stdin")
    yield soon()
    assert streams.protocol.received == b"" and streams.protocol.ends == []
    streams.transport.resumeProducing()
    yield streams.protocol.ended
    assert streams.protocol.received == b"x" * 1000


@pytest_twisted.inlineCallbacks
def test_exitFlushes(streams):
    """What was written before the exit arrives on both streams, however slow the reader; what comes later does not."""
    streams.transport.write(b"o" * 3_000_000)
    streams.transport.writeError(b"error: no\n")
    streams.transport.exit(1)
    streams.transport.exit(0)
    streams.transport.write(b"late")
    streams.transport.writeError(b"late")
    yield soon()
    assert not streams.transport.exited.called
    got = 0
    while got < 3_000_000:
        got += len(os.read(streams.stdout, 500_000))
        yield soon(0.001)
    assert (yield streams.transport.exited) == 1
    assert os.read(streams.stderr, 1000) == b"error: no\n"
    assert streams.protocol.ends == ["lost"]


@pytest_twisted.inlineCallbacks
def test_exitWaitsForSlowReader(streams, monkeypatch):
    """A reader that takes something now and then gets everything; one that takes nothing is given up."""
    monkeypatch.setattr(stdio, "LINGER_SECONDS", 0.1)
    streams.transport.write(b"o" * 4_000_000)
    streams.transport.exit(0)
    for _ in range(5):
        yield soon(0.07)
        os.read(streams.stdout, 200_000)
    assert not streams.transport.exited.called
    assert (yield streams.transport.exited) == 0


@pytest_twisted.inlineCallbacks
def test_nothingArrivesAfterTheExit(streams):
    """From the exit on the protocol hears nothing but its end."""
    streams.transport.write(b"o" * 3_000_000)
    streams.transport.exit(0)
    streams.transport.resumeProducing()
    os.write(streams.stdin, b"more")
    streams.close("stdin")
    yield soon()
    assert streams.protocol.received == b"" and streams.protocol.ends == []
    streams.transport.abortConnection()
    assert streams.protocol.ends == ["lost"]
    yield streams.transport.exited


@pytest_twisted.inlineCallbacks
def test_producerThatComesLate(streams):
    """A producer that comes when too much waits already is paused at once, and resumed when it has been read."""
    size = left = 4 * 1024 * 1024
    calls = []

    class Late:
        def pauseProducing(self):
            calls.append("pause")

        def resumeProducing(self):
            calls.append("resume")
            streams.transport.unregisterProducer()

    streams.transport.write(bytes(size))
    assert streams.transport.unsent > 1024 * 1024
    streams.transport.registerProducer(Late(), True)
    assert calls == ["pause"]
    while calls != ["pause", "resume"]:
        left -= len((yield deferToThread(os.read, streams.stdout, min(left, 1 << 20))))
    assert streams.transport.unsent == 0


@pytest_twisted.inlineCallbacks
def test_readerGone(streams):
    """A reader that goes away while nothing is written is noticed at once, and the session lost."""
    streams.close("stdout")
    yield streams.protocol.lost
    assert (yield streams.transport.exited) == 1
    assert streams.protocol.ends == ["lost"]
    streams.transport.write(b"x")
    streams.transport.exit(0)


@pytest_twisted.inlineCallbacks
def test_readerGoneWhileWriting(streams):
    """So is one that goes away while much is written; the producer is stopped."""
    stopped = []

    class Producer:
        def pauseProducing(self):
            pass

        def stopProducing(self):
            stopped.append(1)

    streams.transport.registerProducer(Producer(), True)
    streams.transport.write(b"x" * 5_000_000)
    yield soon()
    streams.close("stdout")
    yield streams.protocol.lost
    assert stopped == [1]
    streams.transport.registerProducer(Producer(), True)
    assert stopped == [1, 1]


@pytest_twisted.inlineCallbacks
def test_errorReaderGone(streams):
    """Nobody has to read standard error."""
    streams.close("stderr")
    yield soon()
    streams.transport.writeError(b"x")
    os.write(streams.stdin, b"still here")
    yield soon()
    assert streams.protocol.received == b"still here"
    streams.transport.write(b"answer")
    streams.transport.exit(0)
    assert (yield streams.transport.exited) == 0
    assert os.read(streams.stdout, 100) == b"answer"


@pytest_twisted.inlineCallbacks
def test_standardErrorIsBounded(streams):
    """What nobody reads on standard error is dropped beyond a bound, in whole lines, and stalls nothing."""
    line = b"x" * 999 + b"\n"
    for _ in range(10_000):
        streams.transport.writeError(line)
    assert stdio.pendingOf(streams.transport._errors) <= MAX_ERROR_BUFFER
    reading = deferToThread(readAll, streams.stderr)
    streams.transport.exit(0)
    assert (yield streams.transport.exited) == 0
    os.close(streams.inner[2])
    got = yield reading
    streams.inner[2] = os.open(os.devnull, os.O_RDONLY)
    assert set(got.splitlines(True)) == {line} and len(got) < 1 << 21


@pytest_twisted.inlineCallbacks
def test_descriptorsAreLeftBlocking(streams):
    """Whoever gave us the descriptors finds them as they were: blocking, and not closed."""
    assert not os.get_blocking(streams.inner[0])
    streams.transport.exit(0)
    yield streams.transport.exited
    assert [os.get_blocking(fd) for fd in streams.inner] == [True] * 3


@pytest_twisted.inlineCallbacks
def test_oneSocket():
    """Input and output may be one socket, as behind sshd: its end of input does not make writing block."""
    ours, theirs = socket.socketpair()
    errors, stderr = os.pipe()
    protocol = Recorder()
    stdout = os.dup(ours.fileno())
    transport = StdioTransport(protocol, reactor, ours.fileno(), stdout, stderr)
    theirs.shutdown(socket.SHUT_WR)
    yield protocol.ended
    assert not os.get_blocking(stdout)
    transport.write(b"o" * 5_000_000)
    transport.exit(0)
    theirs.settimeout(10)
    received = yield deferToThread(lambda: _receive(theirs, 5_000_000))
    assert received == 5_000_000
    assert (yield transport.exited) == 0
    for fd in (errors, stderr, stdout):
        os.close(fd)
    ours.close()
    theirs.close()


def _receive(sock, size):
    got = 0
    while got < size:
        got += len(sock.recv(1 << 20))
    return got


@pytest_twisted.inlineCallbacks
@pytest.mark.parametrize("cut", [1 << 20, 700])
def test_wholeSession(cut):
    """A whole conversation with the server over pipes, with real threads: what real Nix answers, and exit status 0."""
    request, reply = captured("conversation-2.7")
    workers = Workers(reactor)
    workers.start()
    server = ServeServer(FakeStore(), workers, EVERYTHING, Peer("pipe"), reactor)
    streams = Streams(server)
    try:
        for start in range(0, len(request), cut):
            os.write(streams.stdin, request[start : start + cut])
            yield soon(0.001)
        streams.close("stdin")
        assert (yield streams.transport.exited) == 0
        yield server.ended
        assert os.read(streams.stdout, 1 << 20)[16:] == reply[16:]
    finally:
        yield deferToThread(workers.stop)
        streams.close("stdout", "stderr")
        for fd in streams.inner:
            os.close(fd)

"""Sessions over a unix socket: the header, the frames, the rights of local users."""

import os
import socket

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import capturedLogs, formatEvent
from twisted.python.filepath import FilePath

from nixserve.codec.relay import MAX_HEADER, Frame, FrameReader, RelayHeader
from nixserve.protocol import relay
from nixserve.protocol.logbudget import KEY
from nixserve.protocol.policy import READ_ONLY
from nixserve.protocol.relay import RelayFactory
from nixserve.protocol.sessions import ServeSessions
from nixserve.protocol.stdio import MAX_ERROR_BUFFER
from nixserve.protocol.workers import Workers
from nixserve.testing import FakeStore
from tests.vectors.serve.messages import CLIENT_MAGIC, SERVER_MAGIC, ZEROS, captured, wire

HEADER = RelayHeader("read,write,build,trust").encode()
HELLO = CLIENT_MAGIC + wire(0x207)
ANSWER = SERVER_MAGIC + wire(0x208)


class Service:
    """A service on a socket."""

    def __init__(self, address):
        self.address = str(address)
        self.store = FakeStore()
        self.workers = Workers(reactor)
        self.sessions = ServeSessions(self.store, self.workers, reactor, lambda uri: uri == "auto")

    @pytest_twisted.inlineCallbacks
    def start(self):
        """Listen."""
        self.workers.start()
        factory = RelayFactory(self.sessions, READ_ONLY)
        self.port = yield UNIXServerEndpoint(reactor, self.address).listen(factory)

    @pytest_twisted.inlineCallbacks
    def stop(self):
        """Listen no more; no session may be left."""
        yield self.port.stopListening()
        for _ in range(500):
            if not len(self.sessions):
                break
            yield deferLater(reactor, 0.01, lambda: None)
        yield deferToThread(self.workers.stop)
        assert len(self.sessions) == 0

    def connect(self):
        """A relay's socket, blocking: for threads."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(self.address)
        return sock

    def ask(self, *pieces, halfClose=True):
        """
        What a relay gets that sends C{pieces}.

        @return: a Deferred with output, errors and exit status; C{None} without one.
        """

        def work():
            with self.connect() as sock:
                for piece in pieces:
                    sock.sendall(piece)
                if halfClose:
                    sock.shutdown(socket.SHUT_WR)
                return collected(readFrames(sock))

        return deferToThread(work)


def readFrames(sock):
    """All frames until the end."""
    reader, frames = FrameReader(), []
    while data := sock.recv(1 << 20):
        frames.extend(reader.feed(data))
    return frames


def collected(frames):
    """Output, errors and exit status."""

    def of(kind):
        return b"".join(data for found, data in frames if found is kind)

    exits = [data for kind, data in frames if kind is Frame.EXIT]
    assert len(exits) <= 1 and (not exits or frames[-1][0] is Frame.EXIT)
    return of(Frame.OUTPUT), of(Frame.ERROR), exits[0][0] if exits else None


@pytest.fixture
def service(tmp_path):
    """A service that runs."""
    one = Service(tmp_path / "serve.sock")
    pytest_twisted.blockon(one.start())
    yield one
    pytest_twisted.blockon(one.stop())


@pytest_twisted.inlineCallbacks
@pytest.mark.parametrize("cut", [1 << 20, 100])
def test_conversation(service, cut):
    """What real Nix answers, in frames, and the exit status after it."""
    request, reply = captured("conversation-2.7")
    sent = HEADER + request
    output, errors, status = yield service.ask(*[sent[i : i + cut] for i in range(0, len(sent), cut)])
    assert output[16:] == reply[16:] and (errors, status) == (b"", 0)


@pytest_twisted.inlineCallbacks
def test_twoAtOnce(service):
    """Relays do not disturb each other."""
    one, other = service.ask(HEADER + HELLO + wire(1, 0, 0, [])), service.ask(HEADER + HELLO)
    assert (yield one) == (ANSWER + wire([]), b"", 0)
    assert (yield other) == (ANSWER, b"", 0)


@pytest_twisted.inlineCallbacks
def test_errors(service):
    """Standard error has frames of its own."""
    result = yield service.ask(HEADER + HELLO + wire(10), halfClose=False)
    assert result == (ANSWER, b"error: unknown serve command 10\n", 1)


@pytest_twisted.inlineCallbacks
def test_rightsAskedFor(service):
    """Who asks for less gets less."""
    result = yield service.ask(RelayHeader("read").encode() + HELLO + wire(4))
    assert result == (ANSWER, b"error: importing paths is not allowed\n", 1)


@pytest_twisted.inlineCallbacks
@pytest.mark.parametrize(("uid", "allowed"), [(0, True), (os.geteuid(), True), (65534, False)])
def test_rightsOfUsers(service, monkeypatch, uid, allowed):
    """Root and our own user get what they ask for, others no more than the default."""
    seen = []
    userOf = relay._userOf
    monkeypatch.setattr(relay, "_userOf", lambda transport: (seen.append(userOf(transport)), uid)[1])
    _, errors, status = yield service.ask(HEADER + HELLO + wire(4, 0))
    assert seen == [os.geteuid()]
    assert (errors, status) == ((b"", 0) if allowed else (b"error: importing paths is not allowed\n", 1))


@pytest_twisted.inlineCallbacks
@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"GET / HTTP/1.1\r\n", b"this socket is for 'nixserve-store --connect'"),
        (CLIENT_MAGIC + b"\n", b"this socket is for"),
        (b"x" * (MAX_HEADER + 1), b"this socket is for"),
        (b'{"nixserve-relay": 2, "rights": "", "store": ""}\n', b"speaks another version"),
        (RelayHeader("admin").encode(), b"unknown right 'admin'"),
        (RelayHeader("read", "/other").encode(), b"the store '/other' is not served here"),
    ],
)
def test_badHeader(service, header, text):
    """Who is not let in hears why, in frames, with exit status 1; no session begins."""
    output, errors, status = yield service.ask(header + b"more" * 10, halfClose=False)
    assert output == b"" and errors.startswith(b"error: ") and text in errors and errors.endswith(b"\n")
    assert status == 1 and service.store.names == []


@pytest_twisted.inlineCallbacks
def test_storeThatIsServed(service):
    """The store that is served may be named."""
    assert (yield service.ask(RelayHeader("read", "auto").encode() + HELLO)) == (ANSWER, b"", 0)


@pytest_twisted.inlineCallbacks
@pytest.mark.parametrize("data", [b"", HEADER[:-1]])
def test_endBeforeTheHeader(service, data):
    """A relay that ends without a header gets nothing."""
    assert (yield service.ask(data)) == (b"", b"", None)
    assert service.store.names == []


@pytest_twisted.inlineCallbacks
def test_halfClose(service):
    """The end of the relay's input is the client's end of input: what was asked is still answered."""
    service.store.madeUp[ZEROS] = [bytes(256 * 1024)] * 40
    output, errors, status = yield service.ask(HEADER + HELLO + wire(3, ZEROS))
    assert (len(output), errors, status) == (len(ANSWER) + 40 * 256 * 1024, b"", 0)


@pytest_twisted.inlineCallbacks
def test_relayGone(service):
    """A relay that is gone ends its session, whatever was under way."""

    def work():
        sock = service.connect()
        sock.sendall(HEADER + HELLO + wire(3, ZEROS))
        sock.recv(100)
        sock.close()

    service.store.madeUp[ZEROS] = [bytes(256 * 1024)] * 400
    yield deferToThread(work)
    for _ in range(500):
        if "close" in service.store.names:
            break
        yield deferLater(reactor, 0.01, lambda: None)
    assert service.store.names[-1] == "close"
    assert service.store.chunksRead < 100


@pytest_twisted.inlineCallbacks
def test_relayThatReadsNothing(service):
    """A relay whose own output is stuck stops the reading of files."""
    service.store.madeUp[ZEROS] = [bytes(256 * 1024)] * 400
    sock = service.connect()
    sock.sendall(HEADER + HELLO + wire(3, ZEROS))
    yield deferLater(reactor, 0.5, lambda: None)
    assert 2 <= service.store.chunksRead < 20
    output, errors, status = yield deferToThread(
        lambda: (sock.shutdown(socket.SHUT_WR), collected(readFrames(sock)))[1]
    )
    assert len(output) == len(ANSWER) + 400 * 256 * 1024 and (errors, status) == (b"", 0)
    sock.close()


@pytest_twisted.inlineCallbacks
def test_errorsThatNobodyReads(service):
    """What is said to such a relay on standard error is dropped beyond a bound; the exit status is not."""
    sock = service.connect()
    sock.sendall(HEADER)
    while not len(service.sessions):
        yield deferLater(reactor, 0.01, lambda: None)
    (server,) = service.sessions._running
    for _ in range(100):
        server.transport.writeError(bytes(MAX_ERROR_BUFFER))
    server.stop()
    _, errors, status = yield deferToThread(lambda: collected(readFrames(sock)))
    assert MAX_ERROR_BUFFER <= len(errors) < 20 * MAX_ERROR_BUFFER and status == 1
    sock.close()


def test_nothingLeftBehind(service):
    """The socket belongs to the service."""
    assert FilePath(service.address).isSocket()


@pytest_twisted.inlineCallbacks
def test_relaysWordsInTheLog(service):
    """What a relay sends reaches the log shown, and only so much of it."""
    evil = "\x1b]0;evil\x07"
    with capturedLogs() as events:
        for _ in range(300):
            _output, _errors, status = yield service.ask(RelayHeader("read", evil + "x" * 200).encode())
            assert status == 1
    texts = [formatEvent(event) for event in events]
    assert r"\x1b]0;evil\x07" in texts[0]
    assert all(text.isprintable() for text in texts)
    assert sum(map(len, texts)) < 1.1 * KEY[0]

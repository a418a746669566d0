"""The client's end of a service's socket."""

import pytest
from twisted.internet.error import ConnectionDone, ConnectionLost, ProcessTerminated
from twisted.internet.protocol import Protocol
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from zope.interface import implementer
from zope.interface.verify import verifyObject

from nixserve.codec.relay import Frame, RelayHeader, encodeFrame
from nixserve.protocol.interfaces import IErrorReceiver, IServeTransport
from nixserve.protocol.relayclient import RelayTransport


class Socket(StringTransport):
    """A socket that tells what is done to it."""

    dataBuffer, offset, _tempDataLen = b"", 0, 0
    halfClosed = aborted = False

    def loseWriteConnection(self):
        self.halfClosed = True

    def abortConnection(self):
        self.aborted = True


@implementer(IErrorReceiver)
class Recorder(Protocol):
    """Keeps what happens; C{pauseAt} is a chunk at which it has had enough."""

    pauseAt = None

    def __init__(self):
        self.chunks, self.errors, self.reasons = [], [], []

    def dataReceived(self, data):
        self.chunks.append(data)
        if data == self.pauseAt:
            self.transport.pauseProducing()

    def errorReceived(self, data):
        self.errors.append(data)

    def connectionLost(self, reason):
        self.reasons.append(reason.value)


@pytest.fixture
def relay():
    """A connected pair: the protocol and its transport."""
    recorder = Recorder()
    transport = RelayTransport(recorder, RelayHeader("read", "/x"))
    transport.makeConnection(Socket())
    return recorder, transport


def output(*chunks):
    """Frames of standard output."""
    return b"".join(encodeFrame(Frame.OUTPUT, chunk) for chunk in chunks)


LOST = Failure(ConnectionDone())


def test_interface(relay):
    """It is a transport as a client's protocol needs it, and begins with the header."""
    assert verifyObject(IServeTransport, relay[1])
    assert relay[1].transport.value() == RelayHeader("read", "/x").encode()


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_streams(relay, cut):
    """Output and errors are told apart, in any cut."""
    recorder, transport = relay
    data = output(b"one", b"two") + encodeFrame(Frame.ERROR, b"oh") + output(b"three")
    for start in range(0, len(data), cut):
        transport.dataReceived(data[start : start + cut])
    assert (recorder.chunks, recorder.errors) == ([b"one", b"two", b"three"], [b"oh"])


@pytest.mark.parametrize(
    ("frames", "kind", "status"),
    [
        (encodeFrame(Frame.EXIT, b"\0"), ConnectionDone, None),
        (encodeFrame(Frame.EXIT, b"\3"), ProcessTerminated, 3),
        (b"", ConnectionLost, None),
    ],
)
def test_exitStatus(relay, frames, kind, status):
    """The exit status is the reason of the end, once."""
    recorder, transport = relay
    transport.dataReceived(frames)
    assert recorder.reasons == []
    transport.connectionLost(LOST)
    (reason,) = recorder.reasons
    assert type(reason) is kind and getattr(reason, "exitCode", None) == status


def test_noFrames(relay):
    """What is no frame ends the connection."""
    recorder, transport = relay
    transport.dataReceived(b"error: protocol mismatch\n")
    assert transport.transport.aborted
    transport.connectionLost(LOST)
    assert isinstance(recorder.reasons[0], ConnectionLost) and "something else than frames" in str(recorder.reasons[0])


def test_pause(relay):
    """A protocol that pauses gets nothing more, not even the end, until it resumes."""
    recorder, transport = relay
    recorder.pauseAt = b"two"
    transport.dataReceived(output(b"one", b"two", b"three") + encodeFrame(Frame.EXIT, b"\0"))
    transport.connectionLost(LOST)
    assert (recorder.chunks, recorder.reasons) == ([b"one", b"two"], [])
    assert transport.transport.producerState == "paused"
    transport.resumeProducing()
    assert recorder.chunks[2:] == [b"three"] and type(recorder.reasons[0]) is ConnectionDone


def test_abortWhilePaused(relay):
    """Aborting does not wait for what nobody wants."""
    recorder, transport = relay
    recorder.pauseAt = b"one"
    transport.dataReceived(output(b"one", b"two"))
    transport.stopProducing()
    transport.connectionLost(LOST)
    assert transport.transport.aborted and recorder.chunks == [b"one"] and len(recorder.reasons) == 1


def test_input(relay):
    """What is written goes out as it is and is counted; losing the connection ends the input only."""
    recorder, transport = relay
    transport.transport.clear()
    transport.writeSequence([b"a", b"bc"])
    assert transport.transport.value() == b"abc" and transport.sent == 3
    transport.writeError(b"dropped")
    transport.exit(0)
    assert transport.transport.halfClosed and transport.transport.value() == b"abc" and not recorder.reasons


def test_inputAfterTheEnd(relay):
    """A socket that is gone has no input to be ended: who closes a session that is lost does no harm."""
    _, transport = relay
    transport.connectionLost(LOST)
    transport.transport.connected = False
    transport.loseConnection()
    assert not transport.transport.halfClosed

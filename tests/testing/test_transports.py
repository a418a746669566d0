"""
A transport whose other end is the test.
"""

import pytest
from zope.interface.verify import verifyObject

from nixserve.protocol.interfaces import IServeTransport
from nixserve.testing import MemoryTransport, RecordingTransport


class Producer:
    """Counts how often it is told to stop and to go on."""

    def __init__(self):
        self.told = []

    def pauseProducing(self):
        """It is told to stop."""
        self.told.append("pause")

    def resumeProducing(self):
        """It is told to go on."""
        self.told.append("resume")


@pytest.mark.parametrize("kind", [MemoryTransport, RecordingTransport])
def test_isATransport(kind):
    """Both provide what protocols of sessions ask for."""
    assert verifyObject(IServeTransport, kind())


def test_keepsWhatIsWritten():
    """All is kept, read or not; what comes after the end is kept apart."""
    transport = RecordingTransport()
    transport.writeSequence([b"ab", b"cd"])
    transport.writeError(b"e")
    assert transport.take(3) == b"abc" and (transport.sent, transport.unsent) == (3, 1)
    assert transport.take() == b"d" and transport.written == b"abcd" and transport.errors == b"e"
    transport.exit(0)
    transport.exit(1)
    transport.write(b"late ")
    transport.writeError(b"too")
    assert (transport.status, transport.exits, transport.late) == (0, 2, b"late too")
    assert transport.written == b"abcd" and transport.errors == b"e" and transport.mostUnread == 4


def test_keepsWhatComesAfterAborting():
    """The same when it was aborted, which is no status."""
    transport = RecordingTransport()
    transport.write(b"ab")
    transport.abortConnection()
    transport.write(b"late ")
    transport.writeError(b"too")
    assert transport.late == b"late too" and transport.status is None
    assert transport.written == b"ab" and transport.errors == b""


def test_pausesItsProducer():
    """A producer is paused while more is unread than there is room for."""
    transport, producer = RecordingTransport(capacity=2), Producer()
    transport.registerProducer(producer, True)
    transport.write(b"ab")
    assert producer.told == []
    transport.write(b"c")
    transport.write(b"d")
    assert producer.told == ["pause"]
    transport.take(1)
    assert producer.told == ["pause"]
    transport.take(1)
    assert producer.told == ["pause", "resume"]
    transport.unregisterProducer()
    transport.write(b"ef")
    transport.registerProducer(producer, True)
    assert producer.told == ["pause", "resume", "pause"]


def test_recordsPauses():
    """How often the session has taken nothing, and how much it has let come meanwhile."""
    transport = RecordingTransport()
    transport.pauseProducing()
    assert transport.paused
    with pytest.raises(AssertionError, match="paused twice"):
        transport.pauseProducing()
    transport.resumeProducing()
    assert not transport.paused and transport.pauses == 1
    assert transport.allowUnread(10) == transport.window == 10

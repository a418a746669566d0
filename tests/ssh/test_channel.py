"""
The flow control of channels, without a network: a recording connection and a clock.
"""

import tracemalloc

import pytest
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.logger import Logger, capturedLogs
from zope.interface import implementer
from zope.interface.verify import verifyObject

from nixserve.protocol.interfaces import IServeTransport
from nixserve.protocol.limits import FULL_WINDOW
from nixserve.protocol.peerlog import PeerLog
from nixserve.ssh.channel import ERROR_RESERVE, FLUSH_SECONDS, HIGH_WATER, LOW_WATER, PacedChannel
from nixserve.ssh.connection import KEEPALIVE_SECONDS, PacedConnection
from nixserve.ssh.sendqueue import MAX_ERROR_BYTES
from nixserve.ssh.transport import MAX_PACKET

MIB = 1024 * 1024


class PacketTransport:
    """Stands for the SSH transport: records packets, and says whether data may be sent."""

    def __init__(self, clock):
        self.clock = clock
        self.canSend = True
        self.heard = False
        self.packets = []
        self.data = []
        self.aborted = False
        self.onWritable = self.onData = None
        self.limit = None
        self.log = PeerLog(Logger())
        self.peerText = "peer"

    def sendPacket(self, kind, payload):
        self.packets.append((kind, payload))

    def sendChannelData(self, head, data):
        self.data.append((head, bytes(data)))
        if self.limit is not None:
            self.limit -= 1
            self.canSend = self.limit > 0

    def abort(self):
        self.aborted = True
        self.canSend = False

    def kinds(self):
        return [kind for kind, _ in self.packets]


@implementer(IHalfCloseableProtocol)
class Recorder(Protocol):
    def __init__(self):
        self.events = []
        self.pauseAfter = None

    def dataReceived(self, data):
        self.events.append(data)
        if self.pauseAfter is not None and len(self.events) >= self.pauseAfter:
            self.transport.pauseProducing()

    def readConnectionLost(self):
        self.events.append("EOF")

    def connectionLost(self, reason):
        self.events.append(reason.type)


@implementer(IPushProducer)
class Producer:
    def __init__(self):
        self.calls = []

    def pauseProducing(self):
        self.calls.append("pause")

    def resumeProducing(self):
        self.calls.append("resume")

    def stopProducing(self):
        self.calls.append("stop")


class Harness:
    """A connection with channels on it."""

    def __init__(self, window=FULL_WINDOW, channels=1, kind=PacedChannel):
        self.clock = Clock()
        self.transport = PacketTransport(self.clock)
        self.connection = PacedConnection()
        self.connection.transport = self.transport
        self.connection.serviceStarted()
        self.channels = []
        for number in range(channels):
            channel = kind(self.clock, remoteWindow=window, remoteMaxPacket=MAX_PACKET, conn=self.connection)
            channel.id = number
            self.connection.channels[number] = channel
            self.connection.channelsToRemoteChannel[channel] = 100 + number
            self.connection.localToRemoteChannel[number] = 100 + number
            channel.channelOpen(b"")
            self.channels.append(channel)
        self.channel = self.channels[0]
        self.protocol = Recorder()
        self.channel.attach(self.protocol)

    def arrive(self, data, channel=0):
        self.connection.dataArrived(channel, data)

    def turn(self):
        self.clock.advance(0)

    def out(self):
        return b"".join(data for head, data in self.transport.data if head[0] == 94)

    def errors(self):
        return b"".join(data for head, data in self.transport.data if head[0] == 95)


DATA, ADJUST, EOF, CLOSE, REQUEST = 94, 93, 96, 97, 98


# Sending


def test_interface():
    """A channel provides what a session's protocol expects."""
    assert verifyObject(IServeTransport, Harness().channel)


def test_smallWritesShareAPacket():
    """What is written in one turn of the reactor leaves in one packet."""
    harness = Harness()
    for piece in (b"a", b"b", b"c"):
        harness.channel.write(piece)
    assert harness.transport.data == []
    harness.turn()
    assert [data for _, data in harness.transport.data] == [b"abc"]


def test_windowIsKept():
    """Never more than the peer's window is sent; the rest follows as it grows."""
    harness = Harness(window=100_000)
    content = bytes(range(256)) * 1000
    harness.channel.write(content)
    harness.turn()
    assert len(harness.out()) == 100_000
    assert max(len(data) for _, data in harness.transport.data) == MAX_PACKET
    harness.channel.addWindowBytes(1)
    harness.turn()
    assert len(harness.out()) == 100_001
    harness.channel.addWindowBytes(2**32 - 1)
    harness.turn()
    assert harness.out() == content


def test_nothingIsSentWhileTheTransportMayNot():
    """While TCP is full or keys are exchanged nothing is sent; afterwards everything is."""
    harness = Harness()
    harness.transport.canSend = False
    harness.channel.write(b"x" * 100)
    harness.channel.exit(0)
    harness.turn()
    assert harness.transport.data == []
    assert harness.transport.packets == []
    harness.transport.canSend = True
    harness.transport.onWritable()
    assert harness.out() == b"x" * 100
    assert harness.transport.kinds() == [EOF, REQUEST, CLOSE]


def test_channelsTakeTurns():
    """A packet of each channel in turn: no session waits for the end of another's transfer."""
    harness = Harness(channels=3)
    for channel in harness.channels:
        channel.write(b"x" * 5 * MAX_PACKET)
    harness.transport.limit = 6
    harness.turn()
    assert [head[4] - 100 for head, _ in harness.transport.data] == [0, 1, 2, 0, 1, 2]


def test_producerIsPausedAndResumed():
    """A producer is paused above the high mark and resumed, in a later turn, below the low one."""
    harness = Harness(window=0)
    producer = Producer()
    harness.channel.registerProducer(producer, True)
    harness.channel.write(b"x" * HIGH_WATER)
    assert producer.calls == []
    harness.channel.write(b"x")
    harness.channel.write(b"x")
    assert producer.calls == ["pause"]
    harness.channel.addWindowBytes(HIGH_WATER - LOW_WATER)
    harness.turn()
    assert producer.calls == ["pause"]
    harness.channel.addWindowBytes(10)
    harness.connection.pump()
    assert producer.calls == ["pause"]
    harness.turn()
    assert producer.calls == ["pause", "resume"]


def test_producerThatComesLate():
    """A producer that comes when too much waits already is paused at once, and resumed like any other."""
    harness = Harness(window=0)
    harness.channel.write(b"x" * (HIGH_WATER + 1))
    assert harness.channel.unsent == HIGH_WATER + 1
    producer = Producer()
    harness.channel.registerProducer(producer, True)
    assert producer.calls == ["pause"]
    harness.channel.addWindowBytes(HIGH_WATER)
    harness.turn()
    harness.turn()
    assert producer.calls == ["pause", "resume"]
    assert harness.channel.unsent == 1


def test_windowOfASession():
    """A session's peer may send little at first, and more when the protocol says so."""
    harness = Harness(kind=type("Small", (PacedChannel,), {"firstWindow": 1000}))
    channel = harness.channel
    assert channel.localWindowLeft == 1000
    assert channel.allowUnread(500) == 1000
    assert channel.allowUnread(10_000) == 10_000
    assert channel.localWindowLeft == 10_000
    assert harness.transport.kinds() == [ADJUST]
    harness.arrive(b"x" * 10_000)
    assert channel.localWindowLeft == 10_000


def test_producerRules():
    """One push producer at a time; one that comes too late is stopped at once; one that is there at the end, too."""
    harness = Harness()
    producer = Producer()
    with pytest.raises(ValueError, match="push"):
        harness.channel.registerProducer(producer, False)
    harness.channel.registerProducer(producer, True)
    with pytest.raises(RuntimeError):
        harness.channel.registerProducer(Producer(), True)
    harness.channel.exit(1)
    assert producer.calls == ["stop"]
    late = Producer()
    harness.channel.registerProducer(late, True)
    assert late.calls == ["stop"]


def test_loseConnectionWaitsForTheProducer():
    """As with TCP, a registered producer may finish before the channel closes."""
    harness = Harness()
    harness.channel.registerProducer(Producer(), True)
    harness.channel.loseConnection()
    harness.turn()
    assert harness.transport.kinds() == []
    harness.channel.write(b"last")
    harness.channel.unregisterProducer()
    harness.channel.write(b"too late")
    harness.turn()
    assert harness.out() == b"last"
    assert harness.transport.kinds() == [EOF, CLOSE]


def test_exitComesAfterEverything():
    """Both streams, EOF, exit status, close, in this order; then the protocol learns of the end."""
    harness = Harness(window=10)
    harness.channel.write(b"o" * 15)
    harness.channel.writeError(b"e" * 5)
    harness.channel.exit(7)
    harness.channel.write(b"dropped")
    harness.channel.exit(8)
    harness.turn()
    assert harness.transport.kinds() == []
    harness.channel.addWindowBytes(100)
    harness.connection.pump()
    assert harness.out() == b"o" * 15
    assert harness.errors() == b"e" * 5
    assert harness.transport.kinds() == [EOF, REQUEST, CLOSE]
    assert harness.transport.packets[1][1].endswith(b"exit-status\x00\x00\x00\x00\x07")
    assert harness.protocol.events == []
    harness.turn()
    assert harness.protocol.events == [ConnectionDone]


def test_peerThatDoesNotTakeTheEnd():
    """A finished session whose peer reads nothing is cut off some day, and its session freed."""
    harness = Harness(window=0)
    harness.channel.write(b"x")
    harness.channel.exit(0)
    harness.clock.pump([FLUSH_SECONDS - 1, 2, 0])
    assert CLOSE in harness.transport.kinds()
    assert harness.protocol.events == [ConnectionAborted]


def test_errorsLeaveRoomForTheReply():
    """Standard error that nobody reads cannot use up the window: the reply still fits."""
    harness = Harness(window=2 * ERROR_RESERVE)
    harness.channel.writeError(b"e" * MAX_ERROR_BYTES)
    harness.turn()
    assert len(harness.errors()) == ERROR_RESERVE
    harness.channel.write(b"r" * ERROR_RESERVE)
    harness.turn()
    assert len(harness.out()) == ERROR_RESERVE


def test_errorsWithASmallWindow():
    """A peer with a window smaller than the reserve still gets standard error."""
    harness = Harness(window=1000)
    harness.channel.writeError(b"hello")
    harness.turn()
    assert harness.errors() == b"hello"


# Receiving


def test_creditsWhatIsDelivered():
    """The window is topped up for delivered bytes, in steps."""
    harness = Harness()
    for _ in range(8):
        harness.arrive(b"x" * MAX_PACKET)
    assert harness.transport.packets == [(ADJUST, b"\x00\x00\x00\x64\x00\x04\x00\x00")]
    assert harness.channel.localWindowLeft == FULL_WINDOW


def test_pausedSessionCreditsNothing():
    """A paused session gets nothing, holds at most its window, and credits it once it has taken it."""
    harness = Harness(channels=2)
    harness.protocol.pauseAfter = 1
    for _ in range(FULL_WINDOW // MAX_PACKET):
        harness.arrive(b"x" * MAX_PACKET)
    assert len(harness.protocol.events) == 1
    assert harness.transport.packets == []
    assert harness.channel.localWindowLeft == 0
    # The other session of the connection goes on.
    other = Recorder()
    harness.channels[1].attach(other)
    harness.arrive(b"y", channel=1)
    assert other.events == [b"y"]
    harness.protocol.pauseAfter = 5
    harness.channel.resumeProducing()
    assert len(harness.protocol.events) == 1
    harness.turn()
    assert len(harness.protocol.events) == 5
    harness.protocol.pauseAfter = None
    harness.channel.resumeProducing()
    harness.turn()
    assert len(harness.protocol.events) == FULL_WINDOW // MAX_PACKET
    assert harness.channel.localWindowLeft == FULL_WINDOW


def test_orderAcrossAPause():
    """What arrives between resuming and delivery keeps its place; EOF comes last."""
    harness = Harness()
    harness.channel.pauseProducing()
    harness.arrive(b"1")
    harness.channel.resumeProducing()
    harness.arrive(b"2")
    harness.channel.eofReceived()
    harness.turn()
    assert harness.protocol.events == [b"12", "EOF"]


def test_earlyBytesWaitForTheSession():
    """A client may send before its command is answered."""
    harness = Harness()
    harness.channel.protocol = None
    harness.arrive(b"early")
    protocol = Recorder()
    harness.channel.attach(protocol)
    assert protocol.events == []
    harness.turn()
    assert protocol.events == [b"early"]


def test_earlyPiecesAreJoined():
    """What arrives two bytes at a time for a session that has not begun takes hardly more memory than its bytes."""
    harness = Harness()
    harness.channel.protocol = None
    tracemalloc.start()
    try:
        for _ in range(MIB // 16 // 2):
            harness.arrive(bytes([65, 66]))
        held, _most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < MIB // 8
    harness.channel.attach(protocol := Recorder())
    harness.turn()
    assert b"".join(protocol.events) == b"AB" * (MIB // 16 // 2)


def test_overrunWindowClosesTheChannel():
    """More than the window, or than a packet, ends that channel alone."""
    harness = Harness(channels=2)
    with capturedLogs() as events:
        harness.arrive(b"x" * (MAX_PACKET + 1))
    assert "more than the channel's window" in events[0]["log_format"]
    assert harness.transport.kinds() == [CLOSE]
    harness.turn()
    assert harness.protocol.events == [ConnectionAborted]
    harness.arrive(b"still sent by the peer")
    assert harness.transport.kinds() == [CLOSE]


def test_exceptionEndsOneSession():
    """A bug in a session is logged and ends that session, not the connection."""
    harness = Harness(channels=2)
    harness.protocol.dataReceived = lambda data: 1 / 0
    with capturedLogs() as events:
        harness.arrive(b"x")
    assert events[0]["log_failure"].check(ZeroDivisionError)
    assert harness.transport.kinds() == [CLOSE]
    harness.turn()
    assert harness.protocol.events == [ConnectionAborted]
    assert not harness.transport.aborted


def test_peerCloses():
    """A client that closes its channel ends the session at once, whatever waits."""
    harness = Harness(window=0)
    producer = Producer()
    harness.channel.registerProducer(producer, True)
    harness.channel.write(b"never sent")
    harness.channel.pauseProducing()
    harness.arrive(b"never delivered")
    harness.connection.ssh_CHANNEL_CLOSE(b"\x00\x00\x00\x00")
    harness.turn()
    assert harness.protocol.events == [ConnectionLost]
    assert producer.calls == ["stop"]
    assert harness.transport.kinds() == [CLOSE]
    assert harness.connection.channels == {}
    harness.channel.write(b"ignored")
    harness.channel.exit(0)
    harness.channel.resumeProducing()
    harness.turn()
    assert harness.transport.data == []


def test_clientGetsEverythingFirst():
    """A client that has paused still gets what arrived before the close, then the end."""

    class ClientChannel(PacedChannel):
        deliversAfterClose = True

    harness = Harness(kind=ClientChannel)
    harness.channel.pauseProducing()
    harness.arrive(b"last words")
    harness.channel.eofReceived()
    harness.connection.ssh_CHANNEL_CLOSE(b"\x00\x00\x00\x00")
    harness.turn()
    assert harness.protocol.events == []
    harness.channel.resumeProducing()
    harness.turn()
    assert harness.protocol.events == [b"last words", ConnectionLost]


def test_lostConnectionEndsAllSessions():
    """When the connection is gone every session learns of it, and no timer stays behind."""
    harness = Harness(channels=2)
    other = Recorder()
    harness.channels[1].attach(other)
    harness.channel.write(b"x")
    harness.connection.serviceStopped()
    harness.turn()
    assert harness.protocol.events == other.events == [ConnectionLost]
    assert harness.clock.getDelayedCalls() == []


# Keepalive


def test_keepaliveEndsADeadConnection():
    """Three questions without an answer end the connection at the fourth tick."""
    harness = Harness()
    with capturedLogs():
        for tick in range(1, 4):
            harness.clock.advance(KEEPALIVE_SECONDS)
            assert len(harness.transport.packets) == tick
            assert b"keepalive@openssh.com\xff" in harness.transport.packets[-1][1]
        assert not harness.transport.aborted
        harness.clock.advance(KEEPALIVE_SECONDS)
    assert harness.transport.aborted
    harness.connection.serviceStopped()


def test_keepaliveIsAnsweredByAnything():
    """Whatever arrives, a refusal included, shows that the peer is there."""
    harness = Harness()
    for _ in range(20):
        harness.clock.advance(KEEPALIVE_SECONDS)
        harness.connection.ssh_REQUEST_FAILURE(b"")
        harness.transport.heard = True
    assert not harness.transport.aborted
    harness.connection.serviceStopped()


def test_tinyPacketsTakeTurns():
    """A peer whose packets hold one byte has them sent in many turns of the reactor, and gets all of them."""
    harness = Harness()
    harness.channel.remoteMaxPacket = 1
    text = bytes(range(250)) * 4
    harness.channel.write(text)
    # A turn of the clock is all that is due until nothing is.
    harness.connection.pump()
    assert 0 < len(harness.transport.data) < 200
    harness.turn()
    assert harness.out() == text

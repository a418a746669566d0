"""
SSH channels with flow control both ways, shared by server and client.

Conch's channel appends what does not fit the peer's window to one string and cuts it anew at each window
adjustment: 3 MB/s, where a channel that never holds a buffer does 130 MB/s. And it credits the peer's window as data
arrives, consumed or not. So here:

  - What is written waits in a L{SendQueue} in pieces and leaves a packet at a time, when
    L{nixserve.ssh.connection.PacedConnection} says that it is this channel's turn. The producer is paused above
    L{HIGH_WATER} and resumed below L{LOW_WATER}, in a later turn of the reactor.
  - A byte is credited when the session's protocol has it. A paused session slows down its own sender only, not the
    other sessions of the connection, and holds at most L{FULL_WINDOW}.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Any, ClassVar

from twisted.conch.ssh.channel import SSHChannel
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableProtocol,
    IProtocol,
    IPushProducer,
    IReactorTime,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.protocol.interfaces import IServeTransport
from nixserve.protocol.limits import FULL_WINDOW
from nixserve.protocol.peerlog import PeerLog
from nixserve.ssh.sendqueue import SendQueue
from nixserve.ssh.transport import MAX_PACKET, ConchLog

__all__ = ["ERROR_RESERVE", "FLUSH_SECONDS", "HIGH_WATER", "LOW_WATER", "PacedChannel"]

# The peer's window is topped up in steps of this part of it: small enough that a fast sender never runs dry.
_CREDIT_STEPS = 8

# A producer is paused above the one and resumed below the other. Low enough for thousands of sessions, high enough
# that TCP does not run dry while a producer's next piece comes from a thread.
HIGH_WATER = 512 * 1024
LOW_WATER = 256 * 1024

# What waits for its session is joined up to this: a peer that sends two bytes at a time would have us hold 25 times as
# much as it may send.
_JOIN_BYTES = 4096

# Standard error shares the channel's window with standard output: this much stays for the reply.
ERROR_RESERVE = 64 * 1024

# A finished session whose peer does not take its last bytes is cut off after this.
FLUSH_SECONDS = 600.0

_WINDOW_MAX = 2**32 - 1

_log = Logger()


@implementer(IServeTransport, IPushProducer)
class PacedChannel(SSHChannel):
    """
    A session channel that is its protocol's transport.

    It is connected to a protocol by L{attach}. The protocol learns of the end once, by C{connectionLost}, in a turn
    of the reactor of its own; an exception out of the protocol ends its channel, not the connection.

    @cvar firstWindow: bytes that the peer may send before the protocol says that it may send more.
    @cvar deliversAfterClose: whether bytes that arrived before the peer closed are still delivered to a protocol
        that has paused. A client wants them; on a server the session ends the moment its client is gone.
    @ivar protocol: the session's, while there is one.
    @ivar sent: see L{nixserve.protocol.interfaces.IServeTransport}.
    @ivar exitStatus: what the peer's command exited with, if it said so.
    """

    name = b"session"
    firstWindow = FULL_WINDOW
    deliversAfterClose = False
    requests: ClassVar[dict[bytes, str]] = {}
    # A PacedConnection, or None before it is opened; the module that defines it imports this one.
    conn: Any

    # Over Conch's.
    _log: Any = ConchLog()

    def __init__(self, clock: IReactorTime, **kwargs: Any) -> None:
        """
        @param clock: for delayed calls.
        @param kwargs: as L{SSHChannel} takes them.
        """
        super().__init__(localWindow=self.firstWindow, localMaxPacket=MAX_PACKET, **kwargs)
        self._clock = clock
        self.queue = SendQueue()
        self.queued = False
        self.sent = 0
        self.exitStatus: int | None = None
        self.protocol: IProtocol | None = None
        self._producer: Any = None
        self._producerPaused = False
        self._incoming: deque[bytes] = deque()
        self._errorReserve = ERROR_RESERVE
        self._paused = False
        self._draining = False
        self._remoteEOF = False
        self._consumed = 0
        self._finishing = False
        self._finished = False
        self._eofWanted = self._eofSent = False
        self._statusToSend: int | None = None
        self._flushTimeout: IDelayedCall | None = None
        self._end: Failure | None = None

    def channelOpen(self, specificData: bytes) -> None:
        """Both sides know the channel, and the peer's window is known."""
        self._errorReserve = min(ERROR_RESERVE, self.remoteWindowLeft // 2)

    def attach(self, protocol: IProtocol) -> None:
        """Connect the session's protocol. What has arrived already is delivered in a later turn."""
        self.protocol = protocol
        if self.callProtocol("makeConnection", self):
            self._drainLater()

    # IServeTransport: sending

    @property
    def unsent(self) -> int:
        """See L{IServeTransport}."""
        return self.queue.outSize

    def write(self, data: bytes) -> None:
        """Queue bytes for the peer's standard input or output."""
        if self._closedForWriting():
            return
        self.queue.write(data)
        self._wantToSend()
        if self._producer is not None and not self._producerPaused and self.queue.outSize > HIGH_WATER:
            self._producerPaused = True
            self._producer.pauseProducing()

    def writeSequence(self, data: Any) -> None:
        """Write each of an iterable of byte strings."""
        for piece in data:
            self.write(piece)

    def writeError(self, data: bytes) -> None:
        """Queue bytes for the peer's standard error; what it does not read is dropped in the end."""
        if self._closedForWriting():
            return
        self.queue.writeError(data)
        self._wantToSend()

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """
        @raise RuntimeError: there is one already.
        @raise ValueError: it is a pull producer.
        """
        if self._producer is not None:
            raise RuntimeError(f"cannot register {producer!r}: {self._producer!r} was not unregistered")
        if not streaming:
            raise ValueError("only push producers can be registered")
        if self._closedForWriting():
            producer.stopProducing()
            return
        self._producer = producer
        self._producerPaused = self.queue.outSize > HIGH_WATER
        if self._producerPaused:
            producer.pauseProducing()

    def unregisterProducer(self) -> None:
        """The producer has written everything."""
        self._producer = None
        self._wantToSend()

    def exit(self, status: int) -> None:
        """Send what is queued, then the exit status, and close. What is written afterwards is dropped."""
        if self._finishing:
            return
        self._statusToSend = status
        self._stopProducer()
        self.loseConnection()

    def endWith(self, line: str) -> None:
        """Drop what is queued, say a line on the peer's standard error, and exit with status 1."""
        self.queue.clear()
        self.writeError(line.encode("utf-8", "surrogateescape") + b"\n")
        self.exit(1)

    def loseWriteConnection(self) -> None:
        """Send what is queued, then EOF; go on receiving."""
        self._eofWanted = True
        self._wantToSend()

    def loseConnection(self) -> None:
        """Send what is queued, and what a registered producer still writes, then close."""
        if self._finishing or self._end is not None:
            return
        self._finishing = True
        self._incoming.clear()
        self._flushTimeout = self._clock.callLater(FLUSH_SECONDS, self.abortConnection)
        self._wantToSend()

    def abortConnection(self) -> None:
        """Close at once; what is queued is lost."""
        self.queue.clear()
        self._incoming.clear()
        self._finished = True
        self._ended(Failure(ConnectionAborted()))
        self._sendClose()

    def _closedForWriting(self) -> bool:
        if self._end is not None or self._eofSent:
            return True
        return (self._finishing or self._eofWanted) and self._producer is None

    def _wantToSend(self) -> None:
        if self.conn is not None and self._end is None:
            self.conn.wantToSend(self)

    def sendOne(self) -> bool:
        """
        Send one packet, or what closes the channel if that is due. Called by the connection.

        @return: whether there may be more to send.
        """
        if self._end is not None:
            return False
        closing = self._finishing and not self.queue.outSize and self._producer is None
        reserve = 0 if closing else self._errorReserve
        isError, data = self.queue.take(self.remoteWindowLeft, min(self.remoteMaxPacket, MAX_PACKET), reserve)
        if data:
            self.remoteWindowLeft -= len(data)
            self.sent += len(data)
            self.conn.sendPiece(self, isError, data)
            self._resumeProducerLater()
            return True
        if not self.queue and self._producer is None:
            self._sendEnd()
        return False

    def _sendEnd(self) -> None:
        """Everything is sent: EOF, exit status and close, as far as they are wanted."""
        if (self._eofWanted or self._finishing) and not self._eofSent:
            self._eofSent = True
            self.conn.sendEOF(self)
        if self._finishing and not self._finished:
            self._finished = True
            if self._statusToSend is not None:
                self.conn.sendRequest(self, b"exit-status", struct.pack(">L", self._statusToSend & 0xFFFFFFFF))
            self._ended(Failure(ConnectionDone()))
            self._sendClose()

    def _sendClose(self) -> None:
        # Before the channel is confirmed, and after the connection is gone, there is nobody to tell.
        if self.conn is not None and self in self.conn.channelsToRemoteChannel:
            self.conn.sendClose(self)

    def _resumeProducerLater(self) -> None:
        # In the next turn: the producer may write at once, and this is called from within sending.
        if self._producerPaused and self.queue.outSize <= LOW_WATER:
            self._producerPaused = False
            self._clock.callLater(0, self._resumeProducer, self._producer)

    def _resumeProducer(self, producer: Any) -> None:
        if producer is self._producer and producer is not None and not self._producerPaused:
            producer.resumeProducing()

    def _stopProducer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.stopProducing()

    def addWindowBytes(self, data: int) -> None:
        """The peer's window has grown."""
        self.remoteWindowLeft = min(self.remoteWindowLeft + data, _WINDOW_MAX)
        self._wantToSend()

    # IServeTransport: receiving

    def allowUnread(self, size: int) -> int:
        """Enlarge the window that the peer has; it is never made smaller."""
        more = size - self.localWindowSize
        if more > 0 and self._end is None and self.conn is not None:
            self.localWindowSize = size
            self.conn.adjustWindow(self, more)
        return self.localWindowSize

    def pauseProducing(self) -> None:
        """Deliver nothing for now; what arrives waits here, at most a window of it."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Deliver again, from the next turn of the reactor on."""
        self._paused = False
        self._drainLater()

    def stopProducing(self) -> None:
        """Who consumes the bytes wants no more of them."""
        self.loseConnection()

    def dataReceived(self, data: bytes) -> None:
        """Bytes from the peer: deliver them if nothing stands before them, drop them once the session closes."""
        if self._finishing:
            return
        if self._paused or self._incoming or self._draining or self.protocol is None:
            if self._incoming and len(self._incoming[-1]) + len(data) <= _JOIN_BYTES:
                data = self._incoming.pop() + data
            self._incoming.append(data)
        else:
            self._deliver(data)

    def extReceived(self, dataType: int, data: bytes) -> None:
        """Extended data from the peer; only a client cares."""
        self._credit(len(data))

    def eofReceived(self) -> None:
        """The peer sends no more."""
        self._remoteEOF = True
        self._drainLater()

    def closeReceived(self) -> None:
        """The peer has closed the channel: answer, whatever is queued."""
        self.queue.clear()
        self._stopProducer()
        self._finished = True
        self._sendClose()

    def closed(self) -> None:
        """Both sides have closed, or the connection is gone."""
        self._ended(Failure(self.lossReason()))

    def lossReason(self) -> Exception:
        """What to tell the protocol if the end did not come from this side."""
        return ConnectionLost("the peer closed the channel" if self._finished else "the SSH connection was lost")

    def requestReceived(self, requestType: bytes, data: bytes) -> bool:
        """A channel request: to its method in C{requests}, or refused."""
        method = self.requests.get(requestType)
        return bool(getattr(self, method)(data)) if method is not None else self.unknownRequest(requestType)

    def unknownRequest(self, requestType: bytes) -> bool:
        """A request that is not in C{requests}. @return: false."""
        return False

    def _drainLater(self) -> None:
        if self._draining or self._paused or self.protocol is None:
            return
        if self._incoming or self._remoteEOF or self._end is not None:
            self._draining = True
            self._clock.callLater(0, self._drain)

    def _drain(self) -> None:
        """Deliver what waits, in order: bytes, EOF, the end."""
        self._draining = False
        while self._incoming:
            if self._paused:
                return
            self._deliver(self._incoming.popleft())
        if self._remoteEOF and not self._paused and self._end is None:
            self._remoteEOF = False
            self._deliverEOF()
        if self._end is not None:
            self._deliverEnd()

    def _deliver(self, data: bytes) -> None:
        if self.callProtocol("dataReceived", data):
            self._credit(len(data))

    def _deliverEOF(self) -> None:
        protocol: Any = self.protocol
        if IHalfCloseableProtocol.providedBy(protocol):
            self.callProtocol("readConnectionLost")
        else:
            self.loseConnection()

    def callProtocol(self, method: str, *arguments: object) -> bool:
        """
        Call the session's protocol; an exception ends this session alone.

        @return: whether there was none.
        """
        try:
            getattr(self.protocol, method)(*arguments)
        except Exception:
            self.peerLog.failure("a session failed in {method}", method=method)
            self.abortConnection()
            return False
        return True

    @property
    def peerLog(self) -> PeerLog:
        """For what concerns the peer."""
        return self.conn.transport.log if self.conn is not None else PeerLog(_log)

    def _credit(self, size: int) -> None:
        self._consumed += size
        if self._consumed * _CREDIT_STEPS >= self.localWindowSize and self._end is None and self.conn is not None:
            size, self._consumed = self._consumed, 0
            self.conn.adjustWindow(self, size)

    # The end

    def _ended(self, reason: Failure) -> None:
        """Nothing more is sent; tell the protocol in a later turn."""
        if self._end is not None:
            return
        self._end = reason
        self.queue.clear()
        if self._flushTimeout is not None and self._flushTimeout.active():
            self._flushTimeout.cancel()
        self._stopProducer()
        if not self.deliversAfterClose:
            self._incoming.clear()
        self._clock.callLater(0, self._deliverEnd)

    def _deliverEnd(self) -> None:
        if self._incoming or self._draining:
            # The rest first; whoever has paused asks for it by resuming.
            self._drainLater()
        elif self.protocol is not None:
            self.callProtocol("connectionLost", self._end)
            self.protocol = None

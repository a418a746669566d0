"""
The C{ssh-connection} service: many channels on one connection, in turn; and is the peer still there?
"""

from __future__ import annotations

import struct
from collections import deque

from twisted.conch.ssh.connection import EXTENDED_DATA_STDERR, SSHConnection
from twisted.internet.interfaces import IDelayedCall

from nixserve.ssh.channel import PacedChannel
from nixserve.ssh.transport import ConchLog, PacedTransport

__all__ = ["KEEPALIVE_LIMIT", "KEEPALIVE_SECONDS", "PacedConnection"]

# keepalive@openssh.com as ssh(1) does it with ServerAliveInterval 30, ServerAliveCountMax 3.
KEEPALIVE_SECONDS = 30.0
KEEPALIVE_LIMIT = 3

# Some milliseconds. A peer says how large its packets may be: of one byte, TCP takes thousands in a row.
_PACKETS_AT_ONCE = 128

_MSG_CHANNEL_DATA = 94
_MSG_CHANNEL_EXTENDED_DATA = 95
_OUT_HEAD = struct.Struct(">BLL")
_ERROR_HEAD = struct.Struct(">BLLL")


class PacedConnection(SSHConnection):
    """
    The C{ssh-connection} service over a L{PacedTransport}: lets its channels send in turn, and asks now and then
    whether the peer is still there.
    """

    transport: PacedTransport

    @property
    def _log(self) -> ConchLog:  # type: ignore[override]
        """In the place of Conch's own logger."""
        return ConchLog(self.transport.log)

    def __init__(self) -> None:
        super().__init__()
        self._ready: deque[PacedChannel] = deque()
        self._pumping: IDelayedCall | None = None
        self._keepalive: IDelayedCall | None = None
        self._unanswered = 0

    def serviceStarted(self) -> None:
        """Login is over: take over the transport's data."""
        super().serviceStarted()
        self.transport.onWritable = self.pump
        self.transport.onData = self.dataArrived
        self._keepalive = self.transport.clock.callLater(KEEPALIVE_SECONDS, self._askAlive)

    def serviceStopped(self) -> None:
        """The connection is gone: each channel's protocol learns of it."""
        for call in (self._keepalive, self._pumping):
            if call is not None and call.active():
                call.cancel()
        self._ready.clear()
        super().serviceStopped()

    # Sending

    def wantToSend(self, channel: PacedChannel) -> None:
        """Let C{channel} send when its turn comes; in a later turn of the reactor, so small writes are joined."""
        if not channel.queued:
            channel.queued = True
            self._ready.append(channel)
        if self._pumping is None and self.transport.canSend:
            self._pumping = self.transport.clock.callLater(0, self._pumpNow)

    def _pumpNow(self) -> None:
        self._pumping = None
        self.pump()

    def pump(self) -> None:
        """Send a packet of each channel in turn while TCP and the key exchange allow; then the reactor has its turn."""
        for _ in range(_PACKETS_AT_ONCE):
            if not (self._ready and self.transport.canSend):
                return
            channel = self._ready.popleft()
            if channel.sendOne():
                self._ready.append(channel)
            else:
                channel.queued = False
        if self._ready and self._pumping is None:
            self._pumping = self.transport.clock.callLater(0, self._pumpNow)

    def sendPiece(self, channel: PacedChannel, isError: bool, data: bytes | memoryview) -> None:
        """Send one packet of a channel's standard output or error."""
        remote = self.channelsToRemoteChannel[channel]
        if isError:
            head = _ERROR_HEAD.pack(_MSG_CHANNEL_EXTENDED_DATA, remote, EXTENDED_DATA_STDERR, len(data))
        else:
            head = _OUT_HEAD.pack(_MSG_CHANNEL_DATA, remote, len(data))
        self.transport.sendChannelData(head, data)

    def endSessions(self, line: str) -> None:
        """End every session with a line on its standard error, which is sent if it can be at once."""
        for channel in list(self.channels.values()):
            channel.endWith(line)
        self.pump()

    # Receiving

    def dataArrived(self, localChannel: int, data: bytes) -> None:
        """
        Channel data from the peer. It is credited by the channel once delivered.

        @raise KeyError: there is no such channel.
        """
        channel = self.channels[localChannel]
        if self._mayArrive(channel, len(data)):
            channel.dataReceived(data)

    def ssh_CHANNEL_EXTENDED_DATA(self, packet: bytes) -> None:
        """As L{dataArrived}, for standard error. Payload: channel, type, length, data."""
        localChannel, dataType, length = struct.unpack_from(">3L", packet)
        channel = self.channels[localChannel]
        if self._mayArrive(channel, length):
            channel.extReceived(dataType, packet[12 : 12 + length])

    def _mayArrive(self, channel: PacedChannel, size: int) -> bool:
        """Take C{size} from the channel's window; false if it is closed or the peer overruns it."""
        if channel.localClosed:
            return False
        if size > channel.localWindowLeft or size > channel.localMaxPacket:
            self.transport.log.warn(
                "{peer} sent more than the channel's window: closing it", peer=self.transport.peerText
            )
            channel.abortConnection()
            return False
        channel.localWindowLeft -= size
        return True

    def ssh_CHANNEL_OPEN_CONFIRMATION(self, packet: bytes) -> None:
        """As Conch's, for a channel that we have asked for and that is not open. Payload: channel, and more."""
        self._checkAsked(packet)
        super().ssh_CHANNEL_OPEN_CONFIRMATION(packet)

    def ssh_CHANNEL_OPEN_FAILURE(self, packet: bytes) -> None:
        """
        As L{ssh_CHANNEL_OPEN_CONFIRMATION}. Conch would forget a channel that is open, which then counts no more among
        those that a client may have, while its session goes on.
        """
        self._checkAsked(packet)
        super().ssh_CHANNEL_OPEN_FAILURE(packet)

    def _checkAsked(self, packet: bytes) -> None:
        """
        @raise ValueError: the channel is open already.
        """
        (localChannel,) = struct.unpack_from(">L", packet)
        if self.channels[localChannel] in self.channelsToRemoteChannel:
            raise ValueError("an answer to a question that was not asked")

    # Keepalive

    def _askAlive(self) -> None:
        """Whatever has arrived since the last question answers it."""
        if self.transport.heard:
            self._unanswered = 0
        if self._unanswered >= KEEPALIVE_LIMIT:
            self.transport.log.warn("{peer} does not answer: disconnecting", peer=self.transport.peerText)
            self.transport.abort()
            return
        self.transport.heard = False
        self._unanswered += 1
        # "Failure" is what OpenSSH answers, and what a lost connection gives: both are fine.
        self.sendGlobalRequest(b"keepalive@openssh.com", b"", wantReply=1).addErrback(lambda _: None)
        self._keepalive = self.transport.clock.callLater(KEEPALIVE_SECONDS, self._askAlive)

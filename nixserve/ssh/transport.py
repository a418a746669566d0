"""
Conch's transport with the modern algorithms only, flow control and fewer copies; shared by server and client.

What differs from L{twisted.conch.ssh.transport} (Twisted 26.10):

  - Algorithms: key exchange over elliptic curves (and ML-KEM where Conch has it), AES in counter mode, HMAC-SHA-2.
    No compression: Conch would inflate a one-megabyte packet of a stranger, before login, to a gigabyte. Conch
    lacks strict key exchange, but Terrapin (CVE-2023-48795) needs ChaCha20-Poly1305 or encrypt-then-MAC, and it
    has neither: in counter mode with encrypt-and-MAC a packet taken from the stream puts key stream and sequence
    number out of step, so the next MAC fails.
  - Flow control: Conch writes whatever it is given, and queues without bound while keys are exchanged. Here
    channels send only while L{PacedTransport.canSend}, and a peer that makes us answer without reading is cut off
    at L{MAX_BACKLOG}.
  - New keys after L{REKEY_BYTES}, which Conch never asks for, and sequence numbers that wrap.
  - A malformed packet ends the connection with one line in the log, not with a traceback.
  - Of what Conch logs, which is each message of a peer with its words, nothing is but what went wrong in it; that, and
    what is logged here, goes through the connection's L{PeerLog}.
"""

from __future__ import annotations

import hmac
import os
import struct
import traceback
from collections.abc import Callable
from typing import Any

from twisted.conch.ssh import transport
from twisted.internet.interfaces import IDelayedCall, IPushProducer, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.protocol.logbudget import CONNECTION, LogBudget
from nixserve.protocol.peerlog import PeerLog

__all__ = [
    "MAX_BACKLOG",
    "MAX_PACKET",
    "PUBLIC_KEY_ALGORITHMS",
    "REKEY_BYTES",
    "ConchLog",
    "PacedTransport",
    "addressText",
]

# What OpenSSH uses; every implementation must take it (RFC 4253, section 6.1).
MAX_PACKET = 32 * 1024

# RFC 4253, section 9, recommends new keys after each gigabyte.
REKEY_BYTES = 1024**3

# Bytes of answers and window adjustments that may wait for a peer which does not read, or does not finish a key
# exchange: some 4,000 of them; an honest peer never has more than a few dozen outstanding.
MAX_BACKLOG = 256 * 1024
# Lengths, padding and MAC of a packet, about.
_PACKET_OVERHEAD = 64

# How long a last message may take to leave before the connection is cut.
_LINGER_SECONDS = 5.0

# For host keys and users' keys alike. Without ssh-rsa and ssh-dss, whose signatures are over SHA-1.
PUBLIC_KEY_ALGORITHMS = (
    b"ssh-ed25519",
    b"ecdsa-sha2-nistp256",
    b"ecdsa-sha2-nistp384",
    b"ecdsa-sha2-nistp521",
    b"rsa-sha2-512",
    b"rsa-sha2-256",
)
_KEY_EXCHANGES = (
    b"mlkem768x25519-sha256",
    b"curve25519-sha256",
    b"curve25519-sha256@libssh.org",
    b"ecdh-sha2-nistp256",
    b"ecdh-sha2-nistp384",
    b"ecdh-sha2-nistp521",
)

_MSG_CHANNEL_DATA = 94
# Sequence number (for the MAC only), packet length, padding length.
_SEALED_HEAD = struct.Struct(">LLB")
_OPENED_HEAD = struct.Struct(">LB")
_SEQUENCE = struct.Struct(">L")
_DATA_HEAD = struct.Struct(">LL")
_log = Logger()


class ConchLog:
    """
    What Conch's classes log to here, in the place of their C{_log}: failures, as anything that concerns a peer, and
    nothing else.
    """

    def __init__(self, log: PeerLog | None = None) -> None:
        self._peerLog = log

    def debug(self, text: str, **facts: Any) -> None:
        """Dropped: twistd's log files have events of this level too."""

    info = warn = error = debug

    def failure(self, text: str, failure: Failure | None = None, **facts: Any) -> None:
        """As L{Logger.failure}."""
        if self._peerLog is not None:
            self._peerLog.failure(text, failure, **facts)


def addressText(address: Any) -> str:
    """An address for logs: C{192.0.2.1:5555}, C{[2001:db8::1]:5555}, or what Twisted prints."""
    host, port = getattr(address, "host", None), getattr(address, "port", None)
    if not host:
        return str(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@implementer(IPushProducer)
class PacedTransport(transport.SSHTransportBase):
    """
    The common base of our server's and client's transport, put before Conch's C{SSHServerTransport} or
    C{SSHClientTransport} among the bases. It is the producer of its TCP transport.

    Conch's private names used here (C{_keyExchangeState}, C{_allowedKeyExchangeMessageType}, C{_newKeys}) are those
    of Twisted 26.10; the tests of rekeying fail if they change.

    @cvar maxIncoming: bytes of a packet of the peer's at most. RFC 4253 asks for 35,000 at least; this is Conch's own.
    @ivar clock: gives time and delayed calls; set by the factory before the connection is made.
    @ivar log: for what concerns the peer.
    @ivar heard: has anything arrived since somebody last set this to false? For the keepalive.
    @ivar onWritable: called whenever L{canSend} may have become true.
    @ivar onData: called with the local channel number and bytes of each C{SSH_MSG_CHANNEL_DATA}; C{None} while no
        connection service runs.
    """

    # SHA-256 before SHA-512: with SHA instructions it is the faster one.
    supportedCiphers = [b"aes128-ctr", b"aes192-ctr", b"aes256-ctr"]
    supportedMACs = [b"hmac-sha2-256", b"hmac-sha2-512"]
    supportedCompressions = [b"none"]
    supportedPublicKeys = list(PUBLIC_KEY_ALGORITHMS)

    # An ITCPTransport or its like; Conch says ITransport or None. Its cipher objects are typed as those before the
    # first key exchange.
    transport: Any
    currentEncryptions: Any

    rekeyBytes = REKEY_BYTES
    maxIncoming = 256 * 1024
    clock: IReactorTime
    heard = False
    onWritable: Callable[[], None] | None = None
    onData: Callable[[int, bytes], None] | None = None

    log = PeerLog(_log)
    # Over Conch's.
    _log: Any = ConchLog()
    _paused = False
    _ending = False
    _lingering: IDelayedCall | None = None
    _backlog = 0
    _sinceKeys = 0
    # Where the next packet begins in buf, and the one being opened: 4 bytes of sequence number, then the packet.
    _offset = 0
    _opened: memoryview = memoryview(b"")
    _openedHead = False

    @property
    def canSend(self) -> bool:
        """May channel data be sent now: TCP has room, no key exchange is going on, nothing has ended?"""
        return not (self._paused or self._ending or self._keyExchangeState != self._KEY_EXCHANGE_NONE)

    # The connection as a whole

    def connectionMade(self) -> None:
        """Begin the key exchange, in lists of our own so that a subclass may narrow them for one connection."""
        self.supportedKeyExchanges = [name for name in self.supportedKeyExchanges if name in _KEY_EXCHANGES]
        self._opened = memoryview(bytearray(4 + MAX_PACKET + 1024))
        setNoDelay = getattr(self.transport, "setTcpNoDelay", None)
        if setNoDelay is not None:
            # Requests and answers are small and wait for each other: Nagle's algorithm would add 40 ms to each.
            setNoDelay(True)
        self.transport.registerProducer(self, True)
        self.log = PeerLog(_log, self.makeBudget())
        self._log = ConchLog(self.log)
        super().connectionMade()

    def makeBudget(self) -> LogBudget:
        """How much may be logged about this connection."""
        return LogBudget(f"the connection to {self.peerText}", CONNECTION)

    @property
    def peerText(self) -> str:
        """Where the peer is, for logs."""
        return addressText(self.transport.getPeer())

    def connectionLost(self, reason: Failure | None = None) -> None:
        """Tell the running service, and only once."""
        self._ending = True
        if self._lingering is not None and self._lingering.active():
            self._lingering.cancel()
        super().connectionLost(reason)
        self.onWritable = self.onData = None
        self.log.close()

    def sendDisconnect(self, reason: int, desc: bytes) -> None:
        """Say goodbye, and see to it that the connection ends even if the peer does not read it."""
        if self._ending:
            return
        super().sendDisconnect(reason, desc)
        self._ending = True
        self._lingering = self.clock.callLater(_LINGER_SECONDS, self.transport.abortConnection)

    def abort(self) -> None:
        """Cut the connection at once."""
        self._ending = True
        self.transport.abortConnection()

    # As the producer of TCP

    def pauseProducing(self) -> None:
        """TCP's buffer is full: channels wait."""
        self._paused = True

    def resumeProducing(self) -> None:
        """TCP has taken everything."""
        self._paused = False
        self._backlog = 0
        self._writable()

    def stopProducing(self) -> None:
        """TCP is gone; C{connectionLost} follows."""
        self._paused = True

    def _writable(self) -> None:
        if self.onWritable is not None and self.canSend:
            self.onWritable()

    # Key exchange

    def sendKexInit(self) -> None:
        """Begin a key exchange; channels wait until it is over."""
        self._sinceKeys = 0
        super().sendKexInit()

    def _newKeys(self) -> None:
        super()._newKeys()
        self._backlog = 0
        self._writable()

    def _countForRekey(self, size: int) -> None:
        self._sinceKeys += size
        if self._sinceKeys >= self.rekeyBytes and self.canSend:
            self.sendKexInit()

    # Sending

    def sendPacket(self, messageType: int, payload: bytes) -> None:
        """
        Send, or queue during a key exchange, what is not channel data.

        A peer that provokes more than L{MAX_BACKLOG} of it without taking any is disconnected.
        """
        exchanging = self._keyExchangeState != self._KEY_EXCHANGE_NONE
        if self._paused or exchanging:
            self._backlog += len(payload) + _PACKET_OVERHEAD
            if self._backlog > MAX_BACKLOG and not self._ending:
                self.log.warn("{peer} does not read: disconnecting", peer=self.peerText)
                self.abort()
        if self._ending:
            return
        if exchanging or self.currentEncryptions.outMAC[0] is None:
            super().sendPacket(messageType, payload)
        else:
            self._seal(bytes((messageType,)), payload)

    def sendChannelData(self, head: bytes, data: bytes | memoryview) -> None:
        """
        Send one packet of channel data; only while L{canSend}.

        @param head: the packet's payload up to the data: message number, channel, lengths.
        @param data: at most L{MAX_PACKET} bytes, copied once.
        """
        self._seal(head, data)

    def _seal(self, head: bytes, data: bytes | memoryview) -> None:
        """Pad, MAC and encrypt (RFC 4253, section 6), in one buffer that begins with the sequence number."""
        ciphers = self.currentEncryptions
        blockSize = ciphers.encBlockSize
        size = 5 + len(head) + len(data)
        padding = blockSize - size % blockSize
        if padding < 4:
            padding += blockSize
        sequence = self.outgoingPacketSequence
        packet = b"".join(
            (_SEALED_HEAD.pack(sequence, size + padding - 4, padding), head, data, os.urandom(padding)),
        )
        # The MAC is over the sequence number and the plain packet, the encryption over the packet alone.
        mac = hmac.digest(ciphers.outMAC.key, packet, ciphers.outMAC[0])
        self.outgoingPacketSequence = (sequence + 1) & 0xFFFFFFFF
        self.transport.writeSequence((ciphers.encryptor.update(memoryview(packet)[4:]), mac))
        self._countForRekey(size)

    # Receiving

    def dataReceived(self, data: bytes) -> None:
        """Bytes from TCP: open packets and pass them on until the rest is less than a packet."""
        self.heard = True
        if not self.gotVersion:
            self._guarded(super().dataReceived, data)
            return
        self.buf = self.buf + data if self.buf else data
        while not self._ending and self.mayWorkOn():
            size = self._openPacket()
            if not size:
                return
            self._guarded(self._dispatch, size)

    def mayWorkOn(self) -> bool:
        """
        May the next packet be opened now? If not, what has arrived stays in C{buf} until C{dataReceived} is called.
        """
        return True

    def getPacket(self) -> bytes | None:
        """The next packet's payload, or C{None}; used by Conch right after the version exchange."""
        if self._ending:
            return None
        size = self._openPacket()
        return bytes(self._opened[9 : 9 + size]) if size else None

    def _guarded(self, call: Callable[..., None], argument: object) -> None:
        """
        Call what handles bytes of the peer. Conch unpacks packets without looking at their lengths first; whatever
        that raises means the peer broke the format. (Errors of our own sessions do not come this far.)
        """
        try:
            call(argument)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.log.warn(
                "{peer} sent a malformed packet ({error}, in {place}): disconnecting",
                peer=self.peerText,
                error=f"{type(error).__name__}: {error}",
                place=f"{place.name}:{place.lineno}",
            )
            self.sendDisconnect(transport.DISCONNECT_PROTOCOL_ERROR, b"malformed packet")

    def _dispatch(self, size: int) -> None:
        """
        Pass the opened packet on. Channel data goes the short way, copied once; the rest goes Conch's.

        @param size: of the payload, which begins at byte 9 of C{_opened}.
        """
        opened = self._opened
        if opened[9] == _MSG_CHANNEL_DATA and self.onData is not None:
            channel, length = _DATA_HEAD.unpack_from(opened, 10)
            if length != size - 9:
                raise ValueError("channel data of another length than announced")
            self.onData(channel, bytes(opened[18 : 18 + length]))
        else:
            self.dispatchMessage(opened[9], bytes(opened[10 : 9 + size]))

    def _openPacket(self) -> int:
        """
        Decrypt and verify the next packet of C{buf} into C{_opened}.

        @return: the length of its payload; 0 if there is not enough yet, or if the connection is at its end.
        """
        ciphers = self.currentEncryptions
        blockSize, macSize = ciphers.decBlockSize, ciphers.verifyDigestSize
        available = len(self.buf) - self._offset
        if available < blockSize:
            return self._needMore()
        if not self._openedHead:
            self._decrypt(self._offset, blockSize, 4)
            self._openedHead = True
        length, padding = _OPENED_HEAD.unpack_from(self._opened, 4)
        if not self._checkLengths(length, padding, blockSize):
            return 0
        if available < 4 + length + macSize:
            return self._needMore()
        self._decrypt(self._offset + blockSize, 4 + length - blockSize, 4 + blockSize)
        end = self._offset + 4 + length
        if not self._verifyMAC(length, self.buf[end : end + macSize]):
            self.sendDisconnect(transport.DISCONNECT_MAC_ERROR, b"bad MAC")
            return 0
        self._offset = end + macSize
        self._openedHead = False
        self.incomingPacketSequence = (self.incomingPacketSequence + 1) & 0xFFFFFFFF
        self._countForRekey(length)
        return int(length - padding - 1)

    def _needMore(self) -> int:
        if self._offset:
            self.buf = self.buf[self._offset :]
            self._offset = 0
        return 0

    def _checkLengths(self, length: int, padding: int, blockSize: int) -> bool:
        """RFC 4253, section 6: whole blocks, at least four bytes of padding; and an empty payload says nothing."""
        if length > self.maxIncoming or (length + 4) % blockSize or padding < 4 or length < padding + 2:
            self.sendDisconnect(transport.DISCONNECT_PROTOCOL_ERROR, b"bad packet length")
            return False
        needed = 4 + 4 + length + blockSize
        if needed > len(self._opened):
            larger = memoryview(bytearray(needed))
            larger[: 4 + blockSize] = self._opened[: 4 + blockSize]
            self._opened = larger
        return True

    def _decrypt(self, start: int, size: int, target: int) -> None:
        """Decrypt C{buf[start:start+size]} to C{_opened[target:]}."""
        if not size:
            return
        piece = memoryview(self.buf)[start : start + size]
        decryptor = self.currentEncryptions.decryptor
        if self.currentEncryptions.inCipType == b"none":
            self._opened[target : target + size] = piece
        else:
            decryptor.update_into(piece, self._opened[target:])

    def _verifyMAC(self, length: int, mac: bytes) -> bool:
        ciphers = self.currentEncryptions
        if ciphers.inMAC[0] is None:
            return True
        _SEQUENCE.pack_into(self._opened, 0, self.incomingPacketSequence)
        expected = hmac.digest(ciphers.inMAC.key, self._opened[: 8 + length], ciphers.inMAC[0])
        return hmac.compare_digest(mac, expected)

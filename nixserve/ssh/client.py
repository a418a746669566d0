"""
Runs a command on another host over SSH, in this process, where there is no C{ssh} program or none is wanted.

It reads no ssh_config, asks no agent and no person: user name, keys and host keys are given. Whoever wants those
things runs C{ssh} in a child process.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

from twisted.conch.client.knownhosts import KnownHostsFile
from twisted.conch.ssh import transport, userauth
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.connection import EXTENDED_DATA_STDERR
from twisted.conch.ssh.keys import Key
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.error import ConnectError, ConnectionDone, ConnectionLost, ProcessTerminated
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProtocol,
    IProtocolFactory,
    IReactorTime,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import ClientFactory
from twisted.python.failure import Failure
from twisted.python.filepath import FilePath
from zope.interface import implementer

from nixserve.codec.text import shownText
from nixserve.errors import RemoteError
from nixserve.protocol.interfaces import IErrorReceiver
from nixserve.protocol.reactors import IClientReactor
from nixserve.ssh.authorizedkeys import fingerprint
from nixserve.ssh.channel import PacedChannel
from nixserve.ssh.connection import PacedConnection
from nixserve.ssh.transport import PUBLIC_KEY_ALGORITHMS, ConchLog, PacedTransport

__all__ = [
    "CONNECT_SECONDS",
    "HostKeyError",
    "LoginError",
    "SSHCommandEndpoint",
    "SSHError",
    "readKnownHosts",
]

# From the first TCP packet to the start of the command.
CONNECT_SECONDS = 30.0


class SSHError(RemoteError):
    """The command could not be started on the other host."""


class HostKeyError(SSHError):
    """
    The host is not who it should be.

    @ivar expected: fingerprints of the keys that it might have shown.
    @ivar found: the fingerprint of the one that it did.
    @ivar key: that key, as C{TYPE BASE64}.
    """

    def __init__(self, host: str, expected: Sequence[str], found: str, key: str) -> None:
        self.host = host
        self.expected = tuple(expected)
        self.found = found
        self.key = key
        super().__init__(host, expected, found, key)

    def __str__(self) -> str:
        known = ", ".join(self.expected) or "none is known"
        return f"the host key of {self.host} is {self.found}, expected {known}: refusing to go on"


class LoginError(SSHError):
    """The host knows none of the keys that were offered."""


def readKnownHosts(path: str, host: str, port: int = 22) -> list[Key]:
    """
    The keys that a C{known_hosts} file has for a host, names hashed or not. Blocks on the disk.

    Patterns with wildcards and lines with the marker C{@cert-authority} are passed over. A key that is C{@revoked},
    for whatever host, is no host's.
    """
    name = (host if port == 22 else f"[{host}]:{port}").encode("utf-8")
    entries: Any = list(KnownHostsFile.fromPath(FilePath(path)).iterentries())
    keys = [entry.publicKey for entry in entries if entry.matchesHost(name)]
    revoked = {line.split()[3] for entry in entries if _isRevocation(line := entry.toString())}
    return [key for key in keys if base64.b64encode(key.blob()) not in revoked]


def _isRevocation(line: bytes) -> bool:
    """C{@revoked HOSTS TYPE BASE64} (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""
    words = line.split(None, 4)
    return len(words) > 3 and words[0] == b"@revoked"


@implementer(IStreamClientEndpoint)
class SSHCommandEndpoint:
    """
    Connects a protocol to the standard input and output of a command on another host. One SSH connection each
    time; it ends with the command.

    The protocol's transport is an L{nixserve.protocol.interfaces.IServeTransport}, whose C{loseConnection} ends the
    command's input, as with a child process. The protocol is told the end of the command with L{ConnectionDone} for
    status 0, L{twisted.internet.error.ProcessTerminated} for any other, and L{ConnectionLost} if there was none; and
    sees the command's standard error if it provides L{IErrorReceiver}.
    """

    def __init__(
        self,
        reactor: IClientReactor,
        host: str,
        port: int,
        username: str,
        command: str,
        *,
        keys: Sequence[Key],
        hostKeys: Collection[Key],
        timeoutSeconds: float = CONNECT_SECONDS,
    ) -> None:
        """
        @param command: the command line, as a shell there would read it.
        @param keys: private keys, tried in this order.
        @param hostKeys: the host's public keys, any of which will do.
        @param timeoutSeconds: until the command must have started.
        """
        self._reactor = reactor
        self._host = host
        self._port = port
        self._username = username
        self._command = command
        self._keys = tuple(keys)
        self._hostKeys = tuple(hostKeys)
        self._timeout = timeoutSeconds

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """
        Connect, log in and start the command.

        @return: fires with the connected protocol. Fails with an L{SSHError}, or with what Twisted says of TCP.
            Cancelling it cuts the connection.
        """
        attempt = _Attempt(self._reactor, self._timeout, self._host)
        factory = _ClientFactory(
            lambda: _ClientTransport(
                attempt,
                self._reactor,
                self._host,
                self._hostKeys,
                _ClientUserAuth(
                    self._username.encode("utf-8"),
                    _ClientConnection(attempt, self._command.encode("utf-8", "surrogateescape"), protocolFactory),
                    self._keys,
                ),
            )
        )
        endpoint = HostnameEndpoint(self._reactor, self._host, self._port, timeout=self._timeout)
        return attempt.begin(endpoint.connect(factory))


class _Attempt:
    """
    One try to get to the running command: ends once, with the protocol or with the first error.
    """

    def __init__(self, clock: IReactorTime, seconds: float, host: str) -> None:
        self.host = host
        self._result: Deferred[IProtocol] | None = Deferred(self._cancel)
        self._timeout: IDelayedCall = clock.callLater(seconds, self._tooSlow, seconds)
        self._tcp: Deferred[Any] | None = None
        self._transport: PacedTransport | None = None

    def begin(self, tcp: Deferred[Any]) -> Deferred[IProtocol]:
        """Start, with the Deferred of the TCP connection."""
        result = self._result
        assert result is not None
        self._tcp = tcp
        tcp.addCallbacks(self._connected, self.failed)
        return result

    def _connected(self, transport: Any) -> None:
        self._tcp, self._transport = None, transport
        if self._result is None:
            transport.abort()

    def succeeded(self, protocol: IProtocol) -> None:
        """Give the protocol to whoever wants to connect: the command runs."""
        result, self._result = self._result, None
        self._stopTimeout()
        if result is not None:
            result.callback(protocol)

    def failed(self, reason: Failure | Exception) -> None:
        """The command will not run. Means nothing once there is a result."""
        result, self._result = self._result, None
        if result is None:
            return
        self._stopTimeout()
        self._cut()
        result.errback(reason)

    def _cut(self) -> None:
        if self._tcp is not None:
            tcp, self._tcp = self._tcp, None
            tcp.cancel()
        elif self._transport is not None:
            self._transport.abort()

    def _tooSlow(self, seconds: float) -> None:
        self.failed(SSHError(f"{self.host} did not start the command within {seconds:g} s"))

    def _cancel(self, result: Deferred[IProtocol]) -> None:
        self.failed(CancelledError())

    def _stopTimeout(self) -> None:
        if self._timeout.active():
            self._timeout.cancel()


class _ClientFactory(ClientFactory):
    noisy = False

    def __init__(self, build: Callable[[], _ClientTransport]) -> None:
        self._build = build

    def buildProtocol(self, addr: IAddress) -> _ClientTransport:  # type: ignore[override]
        connection = self._build()
        connection.factory = self
        return connection


class _ClientTransport(PacedTransport, transport.SSHClientTransport):
    """The connection: who the host is."""

    ourVersionString = b"SSH-2.0-nixserve"

    def __init__(
        self,
        attempt: _Attempt,
        clock: IReactorTime,
        host: str,
        hostKeys: Collection[Key],
        userAuth: _ClientUserAuth,
    ) -> None:
        self.clock = clock
        self.attempt = attempt
        self.host = host
        self._hostKeys = hostKeys
        self._userAuth = userAuth
        self._secure = False
        # Ask first for the kinds of keys that we know, or a host with several might show another one.
        known = {name for key in hostKeys for name in key.supportedSignatureAlgorithms()}
        self.supportedPublicKeys = sorted(PUBLIC_KEY_ALGORITHMS, key=lambda name: name not in known)

    def verifyHostKey(self, hostKey: bytes, fingerprint_: bytes) -> Deferred[bool]:
        """Is it one of the keys that were given?"""
        if any(key.blob() == hostKey for key in self._hostKeys):
            return succeed(True)
        expected = [fingerprint(key) for key in self._hostKeys]
        text = f"{shownText(getNS(hostKey)[0])} {base64.b64encode(hostKey).decode('ascii')}"
        error = HostKeyError(self.host, expected, fingerprint(hostKey), text)
        self.attempt.failed(error)
        return fail(error)

    def connectionSecure(self) -> None:
        """The first key exchange is over: log in. Conch calls this after each of them."""
        if not self._secure:
            self._secure = True
            self.requestService(self._userAuth)

    def receiveError(self, reasonCode: int, description: bytes) -> None:
        """The host says goodbye."""
        self.attempt.failed(SSHError(f"{self.host} disconnected: {shownText(description)}"))
        super().receiveError(reasonCode, description)

    def sendDisconnect(self, reason: int, desc: bytes) -> None:
        """We say goodbye."""
        self.attempt.failed(SSHError(f"{self.host}: {shownText(desc)}"))
        super().sendDisconnect(reason, desc)

    def connectionLost(self, reason: Failure | None = None) -> None:
        """The connection is gone."""
        self.attempt.failed(SSHError(f"the connection to {self.host} was lost before the command started"))
        super().connectionLost(reason)


class _ClientUserAuth(userauth.SSHUserAuthClient):
    """
    The login: one round trip for each key, signed at once.

    Conch asks for the methods first, then whether a key would do, and signs with the key type's name: for RSA that
    is SHA-1, which no server takes any more.
    """

    transport: _ClientTransport
    # Over Conch's.
    _log: Any = ConchLog()

    def __init__(self, user: bytes, instance: _ClientConnection, keys: Sequence[Key]) -> None:
        super().__init__(user, instance)
        self._untried = list(keys)

    def serviceStarted(self) -> None:
        """Offer the first key. (Conch's own begins with a question about the methods.)"""
        self._tryNext()

    def ssh_USERAUTH_FAILURE(self, packet: bytes) -> None:
        """That key will not do."""
        self._tryNext()

    def _tryNext(self) -> None:
        if not self._untried:
            error = LoginError(f"{self.transport.host} accepts none of the keys offered for user {self._userText()}")
            self.transport.attempt.failed(error)
            return
        key = self._untried.pop(0)
        algorithm = _signatureAlgorithm(key, self.transport.peerExtensions)
        request = b"\x01" + NS(algorithm) + NS(key.public().blob())
        signed = NS(self.transport.sessionID or b"") + bytes((userauth.MSG_USERAUTH_REQUEST,))
        signed += NS(self.user) + NS(self.instance.name) + NS(b"publickey") + request
        self.askForAuth(b"publickey", request + NS(key.sign(signed, algorithm)))

    def _userText(self) -> str:
        return ascii(self.user.decode("utf-8", "replace"))


def _signatureAlgorithm(key: Key, extensions: dict[bytes, bytes]) -> bytes:
    """The key's best algorithm among those that the server has announced, if it has (RFC 8308, section 3.1)."""
    announced = extensions.get(b"server-sig-algs", b"").split(b",")
    possible: list[bytes] = key.supportedSignatureAlgorithms()
    return next((name for name in possible if name in announced), possible[0])


class _ClientConnection(PacedConnection):
    """The sessions' service: opens one channel."""

    def __init__(self, attempt: _Attempt, command: bytes, protocolFactory: IProtocolFactory) -> None:
        super().__init__()
        self.attempt = attempt
        self.command = command
        self.protocolFactory = protocolFactory

    def serviceStarted(self) -> None:
        """The login is over: open the channel."""
        super().serviceStarted()
        self.openChannel(_ClientChannel(self.transport.clock))

    def channelClosed(self, channel: PacedChannel) -> None:
        """The command is over, and so is the connection."""
        super().channelClosed(channel)
        self.transport.sendDisconnect(transport.DISCONNECT_BY_APPLICATION, b"done")


class _ClientChannel(PacedChannel):
    """The channel on which the command runs."""

    deliversAfterClose = True
    requests: ClassVar[dict[bytes, str]] = {b"exit-status": "requestExitStatus", b"exit-signal": "requestExitSignal"}

    conn: _ClientConnection
    _signal: str | None = None

    def channelOpen(self, specificData: bytes) -> None:
        """Ask the host to run the command."""
        super().channelOpen(specificData)
        started = self.conn.sendRequest(self, b"exec", NS(self.conn.command), wantReply=1)
        started.addCallbacks(self._started, self._refused)

    def _started(self, _: object) -> None:
        protocol = self.conn.protocolFactory.buildProtocol(self.getPeer())
        if protocol is None:
            self.conn.attempt.failed(ConnectError(string="the factory built no protocol"))
            return
        self.attach(protocol)
        self.conn.attempt.succeeded(protocol)

    def _refused(self, _: Failure) -> None:
        self.conn.attempt.failed(SSHError(f"{self.conn.attempt.host} refused to run the command"))

    def openFailed(self, reason: Any) -> None:
        """The host opens no session."""
        value = getattr(reason, "value", reason)
        text = shownText(value if isinstance(value, bytes) else str(value))
        self.conn.attempt.failed(SSHError(f"{self.conn.attempt.host} opened no session: {text}"))

    def loseConnection(self) -> None:
        """Send what is queued and end the command's input. It ends by itself then, and its status says how."""
        self.loseWriteConnection()

    def abortConnection(self) -> None:
        """Cut the whole connection, which serves only this channel: its other end may be beyond hearing."""
        super().abortConnection()
        self.conn.transport.abort()

    def extReceived(self, dataType: int, data: bytes) -> None:
        """The command's standard error."""
        protocol: Any = self.protocol
        if dataType == EXTENDED_DATA_STDERR and IErrorReceiver.providedBy(protocol):
            self.callProtocol("errorReceived", data)
        super().extReceived(dataType, data)

    def requestExitStatus(self, data: bytes) -> bool:
        """The command has exited."""
        (self.exitStatus,) = struct.unpack_from(">L", data)
        return True

    def requestExitSignal(self, data: bytes) -> bool:
        """A signal has ended the command."""
        self._signal = shownText(getNS(data)[0], 20)
        return True

    def lossReason(self) -> Exception:
        """The exit status, as for a child process."""
        if self.exitStatus == 0:
            return ConnectionDone()
        if self.exitStatus is not None or self._signal is not None:
            return ProcessTerminated(exitCode=self.exitStatus, signal=self._signal)
        return ConnectionLost("the connection was lost while the command ran")

"""
The SSH endpoint: lets public keys in and runs sessions of C{nix-store --serve} for them, nothing else.

Everything that faces strangers has a limit: how long a login may take, how many tries it has, how many connections
may be at it at once. After that, a connection has at most L{MAX_CHANNELS} sessions.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, cast

from cryptography.exceptions import UnsupportedAlgorithm
from twisted.conch.avatar import ConchUser
from twisted.conch.interfaces import IConchUser
from twisted.conch.ssh import transport, userauth
from twisted.conch.ssh.common import NS, getNS
from twisted.conch.ssh.connection import OPEN_ADMINISTRATIVELY_PROHIBITED, OPEN_RESOURCE_SHORTAGE
from twisted.conch.ssh.factory import SSHFactory
from twisted.conch.ssh.keys import Key
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import IRealm, Portal
from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IAddress, IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import Interface, implementer

from nixserve.errors import PolicyError
from nixserve.protocol.interfaces import IServeSessions
from nixserve.protocol.policy import READ_ONLY, Peer, Policy
from nixserve.ssh.authorizedkeys import AuthorizedKey, fingerprint
from nixserve.ssh.channel import PacedChannel
from nixserve.ssh.command import ServeCommand, isDaemonCommand, parseCommand
from nixserve.ssh.connection import PacedConnection
from nixserve.ssh.keys import AuthorizedKeysChecker, KeyCredentials
from nixserve.ssh.transport import PUBLIC_KEY_ALGORITHMS, PacedTransport

__all__ = [
    "LOGIN_SECONDS",
    "LOGIN_TRIES",
    "MAX_CHANNELS",
    "MAX_LOGINS",
    "ServeFactory",
    "ServeRealm",
]

# From the TCP connection to the end of the login; sshd's LoginGraceTime is four times that.
LOGIN_SECONDS = 30
# As sshd's MaxAuthTries. A client offers each key of its agent, and each that is refused is a try.
LOGIN_TRIES = 6
# Connections that have not logged in; sshd's MaxStartups begins to refuse at 10.
MAX_LOGINS = 32
# Sessions and half-open channels of one connection; sshd's MaxSessions is 10.
MAX_CHANNELS = 64

_MSG_CHANNEL_OPEN_FAILURE = 92
# Security keys are users' keys only.
_USER_KEY_ALGORITHMS = (
    *PUBLIC_KEY_ALGORITHMS,
    b"sk-ssh-ed25519@openssh.com",
    b"sk-ecdsa-sha2-nistp256@openssh.com",
)

_log = Logger()


def addressHost(address: IAddress) -> str:
    """The text of an IP address, or empty for other kinds of sockets."""
    return str(getattr(address, "host", ""))


def addressText(address: IAddress) -> str:
    """An address for logs: C{192.0.2.1:5555}, C{[2001:db8::1]:5555}, or what Twisted prints."""
    host, port = addressHost(address), getattr(address, "port", None)
    if not host:
        return str(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class ServeTransport(PacedTransport, transport.SSHServerTransport):
    """One connection, with the limits on its login."""

    version = b"nixserve"
    # OpenSSH's client tells a server whose name begins like this, and no other, that whoever read from it is gone
    # ("eow@openssh.com"; compat.c of 9.2: SSH_NEW_OPENSSH). Without that, the ssh of a Nix that was killed takes what
    # is left of a download, gigabytes perhaps, and throws it away, and meanwhile its session goes on.
    ourVersionString = b"SSH-2.0-OpenSSHlike_nixserve"

    factory: ServeFactory

    _loginTimeout: IDelayedCall | None = None

    @property
    def peerAddress(self) -> IAddress:
        """Where the client is."""
        return cast(IAddress, self.transport.getPeer())

    def connectionMade(self) -> None:
        """Start the time that a login may take."""
        self.factory.loggingIn.add(self)
        self.factory.connections.add(self)
        self._loginTimeout = self.clock.callLater(LOGIN_SECONDS, self._loginTooSlow)
        super().connectionMade()

    def connectionLost(self, reason: Failure | None = None) -> None:
        """Forget the connection."""
        self.loginOver()
        self.factory.connections.discard(self)
        super().connectionLost(reason)

    def loginOver(self) -> None:
        """The client has logged in, or is gone."""
        self.factory.loggingIn.discard(self)
        if self._loginTimeout is not None and self._loginTimeout.active():
            self._loginTimeout.cancel()

    def _loginTooSlow(self) -> None:
        _log.warn("{peer} did not log in within {seconds} s", peer=addressText(self.peerAddress), seconds=LOGIN_SECONDS)
        self.factory.loggingIn.discard(self)
        self.sendDisconnect(transport.DISCONNECT_NO_MORE_AUTH_METHODS_AVAILABLE, b"the login took too long")

    def sendExtInfo(self, extensions: list[tuple[bytes, bytes]]) -> None:
        """
        Tell the client which signatures we accept. Conch tells it those of our host key, and then OpenSSH (8.8 and
        later) finds nothing to use an RSA key with.
        """
        super().sendExtInfo([(b"server-sig-algs", b",".join(_USER_KEY_ALGORITHMS))])

    def ssh_SERVICE_REQUEST(self, packet: bytes) -> None:
        """
        Start the login. Once: in Conch a second request starts it anew, with all its tries and all its time.
        """
        if self.service is not None:
            self.sendDisconnect(transport.DISCONNECT_PROTOCOL_ERROR, b"a service runs already")
            return
        super().ssh_SERVICE_REQUEST(packet)


class _AddressedPortal:
    """The factory's portal, told where the client is."""

    def __init__(self, portal: Portal, address: str) -> None:
        self._portal = portal
        self._address = address

    def login(self, credentials: Any, mind: object, *interfaces: type[Interface]) -> Deferred[Any]:
        """As L{Portal.login}."""
        addressed = KeyCredentials(
            credentials.username,
            credentials.algName,
            credentials.blob,
            credentials.sigData,
            credentials.signature,
            self._address,
        )
        return cast("Deferred[Any]", self._portal.login(addressed, mind, *interfaces))


class ServeUserAuth(userauth.SSHUserAuthServer):
    """The login, by public key alone."""

    transport: ServeTransport
    # Conch disconnects at one more than this.
    attemptsBeforeDisconnect = LOGIN_TRIES - 1
    loginTimeout = LOGIN_SECONDS

    def serviceStarted(self) -> None:
        """Use the transport's clock, whatever reactor Conch found, and tell the portal the client's address."""
        self.clock = self.transport.clock
        super().serviceStarted()
        self.portal = _AddressedPortal(self.transport.factory.portal, addressHost(self.transport.peerAddress))

    def ssh_USERAUTH_REQUEST(self, packet: bytes) -> Deferred[Any] | None:
        """A try to log in. Conch looks at the service that shall follow only after a successful one, and stumbles."""
        _, service, _ = getNS(packet, 2)
        if service != PacedConnection.name:
            self.transport.sendDisconnect(transport.DISCONNECT_SERVICE_NOT_AVAILABLE, b"no such service")
            return None
        return super().ssh_USERAUTH_REQUEST(packet)

    def auth_publickey(self, packet: bytes) -> Deferred[Any]:
        """
        Go Conch's way with algorithms that are accepted; Conch leaves them to the key. Payload: has signature,
        algorithm, key, and the signature if it has one.
        """
        algorithm, blob, rest = getNS(packet[1:], 2)
        try:
            if packet[0] and getNS(getNS(rest)[0])[0] != algorithm:
                raise ValueError("the signature is of another type than announced")
            if algorithm not in _USER_KEY_ALGORITHMS:
                raise ValueError(f"the algorithm {ascii(algorithm)[2:-1]} is not accepted")
            # Conch guesses the blob's format, private keys and other programs' formats included.
            if getNS(blob)[0] != (b"ssh-rsa" if algorithm.startswith(b"rsa-") else algorithm):
                raise ValueError("the key is of another type than its algorithm")
            login = super().auth_publickey(packet)
        except (ValueError, UnsupportedAlgorithm) as error:
            login = fail(UnauthorizedLogin(str(error)))
        return login.addErrback(self._logRefusal, blob)

    def _logRefusal(self, reason: Failure, blob: bytes) -> Failure:
        if reason.check(UnauthorizedLogin):
            _log.info(
                "{peer}: the key {key} is refused: {reason}",
                peer=addressText(self.transport.peerAddress),
                key=fingerprint(blob),
                reason=reason.getErrorMessage(),
            )
        return reason


class ServeConnection(PacedConnection):
    """The sessions of one client that has logged in."""

    transport: ServeTransport

    def serviceStarted(self) -> None:
        """The login is over."""
        self.transport.loginOver()
        avatar = cast(ServeAvatar, self.transport.avatar)
        avatar.address = self.transport.peerAddress
        _log.info("{peer} logged in with {key}", peer=avatar.peerText, key=str(avatar.entry))
        super().serviceStarted()

    def ssh_CHANNEL_OPEN(self, packet: bytes) -> None:
        """
        Open a session; refuse forwarding of any kind, and too many sessions. Payload: type, the client's channel
        number, and more. (Conch logs a traceback for what it refuses.)
        """
        kind, rest = getNS(packet)
        if kind != PacedChannel.name:
            self._refuseChannel(rest, OPEN_ADMINISTRATIVELY_PROHIBITED, kind, b"only sessions are offered here")
        elif len(self.channels) >= MAX_CHANNELS:
            self._refuseChannel(rest, OPEN_RESOURCE_SHORTAGE, kind, b"too many sessions on one connection")
        else:
            super().ssh_CHANNEL_OPEN(packet)

    def _refuseChannel(self, rest: bytes, code: int, kind: bytes, reason: bytes) -> None:
        cast(ServeAvatar, self.transport.avatar).logRefusal("channel " + ascii(kind)[2:-1], reason.decode("ascii"))
        (sender,) = struct.unpack_from(">L", rest)
        self.transport.sendPacket(_MSG_CHANNEL_OPEN_FAILURE, struct.pack(">2L", sender, code) + NS(reason) + NS(b""))


class ServeChannel(PacedChannel):
    """One session: the channel on which a client runs C{nix-store --serve}."""

    avatar: ServeAvatar
    requests: ClassVar[dict[bytes, str]] = {
        b"exec": "requestExec",
        b"shell": "requestShell",
        b"env": "requestNothing",
        b"signal": "requestNothing",
        b"window-change": "requestNothing",
        b"eow@openssh.com": "requestEndOfWrite",
    }

    _started = False

    def requestExec(self, data: bytes) -> bool:
        """Run a command, or say on standard error why not. Once."""
        if self._started:
            return False
        self._started = True
        line = getNS(data)[0].decode("utf-8", "surrogateescape")
        try:
            command = self.avatar.decide(line)
        except PolicyError as error:
            self.avatar.logRefusal(f"command {line[:200]!a}", str(error))
            self._refuse(f"error: {error}")
            return True
        session = self.avatar.realm.nextSession()
        peer = Peer(self.avatar.peerText, str(self.avatar.entry), session)
        _log.info(
            "{peer} ({key}): session {session} with the rights {policy}: {command}",
            peer=peer.address,
            key=peer.key,
            session=session,
            policy=str(command.policy),
            command=ascii(line[:200]),
        )
        try:
            self.attach(self.avatar.realm.sessions.buildSession(command.policy, peer))
        except Exception:
            _log.failure("session {session} could not be built", session=session)
            self._refuse("error: internal error of the endpoint; its log says more")
        return True

    def requestShell(self, data: bytes) -> bool:
        """Somebody has typed C{ssh host}: say what this is."""
        if self._started:
            return False
        self._started = True
        self.avatar.logRefusal("shell", "only nix-store --serve runs here")
        self._refuse(
            "This is a Nix store, not a shell. Use it from Nix, for example: nix copy --to ssh://HOST[:PORT] PATH"
        )
        return True

    def requestNothing(self, data: bytes) -> bool:
        """What clients send as a matter of course and nobody here needs."""
        return False

    def requestEndOfWrite(self, data: bytes) -> bool:
        """The client's standard output is closed (OpenSSH, PROTOCOL, section 2.1): nobody waits for the rest."""
        self.abortConnection()
        return True

    def unknownRequest(self, requestType: bytes) -> bool:
        """A terminal, a subsystem, X11, an agent: refused, and logged."""
        self.avatar.logRefusal("request " + ascii(requestType)[2:-1], "only nix-store --serve runs here")
        return False

    def _refuse(self, line: str) -> None:
        self.writeError(line.encode("utf-8", "surrogateescape") + b"\n")
        self.exit(1)


class ServeAvatar(ConchUser):
    """
    A client that has logged in.

    @ivar entry: the line of C{authorized_keys} that let it in.
    @ivar realm: what it may use.
    @ivar address: where it is; set when its connection starts.
    """

    address: IAddress

    def __init__(self, entry: AuthorizedKey, realm: ServeRealm) -> None:
        super().__init__()
        self.entry = entry
        self.realm = realm

    @property
    def peerText(self) -> str:
        """The client's address for logs."""
        return addressText(self.address)

    def lookupChannel(self, channelType: bytes, windowSize: int, maxPacket: int, data: bytes) -> ServeChannel:
        """A channel for a session."""
        return ServeChannel(self.realm.clock, remoteWindow=windowSize, remoteMaxPacket=maxPacket, avatar=self)

    def gotGlobalRequest(self, requestType: bytes, data: bytes) -> int:
        """Forwarding of ports and sockets is refused; so is a keepalive, which is an answer all the same."""
        if b"forward" in requestType:
            self.logRefusal("request " + ascii(requestType)[2:-1], "forwarding is not offered here")
        return 0

    def decide(self, line: str) -> ServeCommand:
        """
        What runs when the client asks for C{line}: its key's forced command, or that line with its rights cut down
        to those that keys have without one.

        @raise PolicyError: nothing; the text says why.
        """
        forced = self.entry.forced
        if forced is not None and not isDaemonCommand(line):
            command = forced
        else:
            asked = parseCommand(line)
            command = ServeCommand(asked.policy.cutDownTo(self.realm.defaultPolicy), asked.storeURI)
        if command.storeURI is not None and not self.realm.sessions.isServed(command.storeURI):
            raise PolicyError(f"the store '{command.storeURI[:200]}' is not served here; leave out '--store'")
        return command

    def logRefusal(self, what: str, reason: str) -> None:
        """Log that something was refused."""
        _log.warn(
            "{peer} ({key}): refused {what}: {reason}",
            peer=self.peerText,
            key=str(self.entry),
            what=what,
            reason=reason,
        )


@implementer(IRealm)
class ServeRealm:
    """
    Gives an avatar to whom an L{AuthorizedKeysChecker} lets in.

    @ivar sessions: makes the protocol of each session.
    @ivar clock: for delayed calls.
    @ivar defaultPolicy: the rights of keys without a forced command.
    """

    def __init__(
        self,
        sessions: IServeSessions,
        clock: IReactorTime,
        defaultPolicy: Policy = READ_ONLY,
        sessionNumbers: Iterator[int] | None = None,
    ) -> None:
        """
        @param sessionNumbers: where the numbers of sessions come from, if other endpoints count with this one.
        """
        self.sessions = sessions
        self.clock = clock
        self.defaultPolicy = defaultPolicy
        self._numbers = itertools.count(1) if sessionNumbers is None else sessionNumbers

    def nextSession(self) -> int:
        """The number of a new session."""
        return next(self._numbers)

    def requestAvatar(
        self, avatarId: Any, mind: object, *interfaces: type[Interface]
    ) -> tuple[type[Interface], ServeAvatar, Callable[[], None]]:
        """
        @param avatarId: an L{AuthorizedKey}.
        @raise NotImplementedError: C{interfaces} lacks L{IConchUser}.
        """
        if IConchUser not in interfaces:
            raise NotImplementedError("only IConchUser is offered")
        return IConchUser, ServeAvatar(avatarId, self), lambda: None


class ServeFactory(SSHFactory):
    """
    Builds the connections of one SSH port.

    @ivar loggingIn: the connections that have not logged in.
    @ivar connections: all of them.
    """

    protocol = ServeTransport
    noisy = False
    services = {ServeUserAuth.name: ServeUserAuth, ServeConnection.name: ServeConnection}
    # No key exchange that needs them is offered.
    primes = None

    def __init__(
        self, realm: ServeRealm, checker: AuthorizedKeysChecker, hostKeys: Iterable[Key], clock: IReactorTime
    ) -> None:
        """
        @param hostKeys: private keys, at most one of each type.
        @param clock: gives time and delayed calls, to every connection.
        """
        self.portal = Portal(realm, [checker])
        self.privateKeys = {key.sshType(): key for key in hostKeys}
        self.publicKeys = {name: key.public() for name, key in self.privateKeys.items()}
        self.clock = clock
        self.loggingIn: set[ServeTransport] = set()
        self.connections: set[ServeTransport] = set()

    def buildProtocol(self, addr: IAddress | None) -> ServeTransport | None:  # type: ignore[override]
        """
        @return: C{None}, on which the reactor closes the connection, if too many have not logged in.
        """
        if len(self.loggingIn) >= MAX_LOGINS:
            _log.warn(
                "{peer} is turned away: {count} connections have not logged in yet",
                peer=addressText(addr) if addr is not None else "somebody",
                count=len(self.loggingIn),
            )
            return None
        connection = self.protocol()
        connection.factory = self
        connection.clock = self.clock
        offered = {name for key in self.privateKeys.values() for name in key.supportedSignatureAlgorithms()}
        connection.supportedPublicKeys = [name for name in PUBLIC_KEY_ALGORITHMS if name in offered]
        return connection

    def loseConnections(self) -> None:
        """Disconnect everybody, which ends their sessions; for the end of the service."""
        for connection in list(self.connections):
            connection.sendDisconnect(transport.DISCONNECT_BY_APPLICATION, b"the service is stopping")

"""
The SSH endpoint: lets public keys in and runs sessions of C{nix-store --serve} for them, nothing else.

Everything that faces strangers has a limit: how many connections may be logging in and for how long
(L{nixserve.ssh.admission}), how many keys each may try, how many bytes it may send until then. After that, a connection
has at most L{MAX_CHANNELS} sessions.
"""

from __future__ import annotations

import itertools
import math
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
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.python.failure import Failure
from zope.interface import Interface, implementer

from nixserve.codec.text import shownText
from nixserve.errors import PolicyError
from nixserve.protocol.descriptors import CONNECTION, Descriptors
from nixserve.protocol.interfaces import IServeSessions
from nixserve.protocol.logbudget import LogBudget, LogBudgets
from nixserve.protocol.peerlog import PeerLog
from nixserve.protocol.policy import READ_ONLY, Peer, Policy
from nixserve.ssh.admission import TURN_BYTES, Admission, sourceOf
from nixserve.ssh.authorizedkeys import AuthorizedKey, fingerprint
from nixserve.ssh.channel import PacedChannel
from nixserve.ssh.command import ServeCommand, parseCommand
from nixserve.ssh.connection import PacedConnection
from nixserve.ssh.keys import AuthorizedKeysChecker, KeyCredentials, KnownKeyRefused
from nixserve.ssh.keywatch import KeyWatch
from nixserve.ssh.shares import Shares
from nixserve.ssh.transport import MAX_PACKET, PUBLIC_KEY_ALGORITHMS, ConchLog, PacedTransport, addressText

__all__ = [
    "FOREIGN_TRIES",
    "LOGIN_TRIES",
    "MAX_CHANNELS",
    "MAX_LOGIN_BYTES",
    "ServeFactory",
    "ServeRealm",
]

# As sshd's MaxAuthTries, of keys that are known here.
LOGIN_TRIES = 6
# A client offers each key of its agent in turn, and most of them are for other hosts.
FOREIGN_TRIES = 20
# A login takes some 5 KiB, and less than 2 for each further key, if it is of the largest kind.
MAX_LOGIN_BYTES = 128 * 1024
# Sessions and half-open channels of one connection; sshd's MaxSessions is 10.
MAX_CHANNELS = 64

_MSG_CHANNEL_OPEN_FAILURE = 92
# Security keys are users' keys only.
_USER_KEY_ALGORITHMS = (
    *PUBLIC_KEY_ALGORITHMS,
    b"sk-ssh-ed25519@openssh.com",
    b"sk-ecdsa-sha2-nistp256@openssh.com",
)


def addressHost(address: IAddress) -> str:
    """The text of an IP address, or empty for other kinds of sockets."""
    return str(getattr(address, "host", ""))


class ServeTransport(PacedTransport, transport.SSHServerTransport):
    """
    One connection, with the limits on its login.

    @ivar source: see L{nixserve.ssh.admission.Newcomer}.
    @ivar host: see L{nixserve.ssh.keywatch.LoggedIn}.
    @ivar share: see L{nixserve.ssh.shares.Sharer}.
    """

    version = b"nixserve"
    # OpenSSH's client tells a server whose name begins like this, and no other, that whoever read from it is gone
    # ("eow@openssh.com"; compat.c of 9.2: SSH_NEW_OPENSSH). Without that, the ssh of a Nix that was killed takes what
    # is left of a download, gigabytes perhaps, and throws it away, and meanwhile its session goes on.
    ourVersionString = b"SSH-2.0-OpenSSHlike_nixserve"

    # A packet that is not complete is held twice, for each connection. No client sends larger ones than a channel has.
    maxIncoming = MAX_PACKET + 4096

    factory: ServeFactory

    source = host = share = ""
    _early = b""
    _earlyBytes = 0
    # When the share of the key is used up, and whether that was before everything was worked off.
    _until = math.inf
    _isWaiting = _isFresh = False

    @property
    def peerAddress(self) -> IAddress:
        """Where the client is."""
        return cast(IAddress, self.transport.getPeer())

    def makeBudget(self) -> LogBudget:
        """A part of that of the client's address, and then of its key."""
        return self.factory.budgets.connection(self.peerText, f"the address {self.source}")

    def connectionMade(self) -> None:
        """Say hello, and wait to be let in."""
        self.factory.connections.add(self)
        self.host = addressHost(self.peerAddress)
        self.source = sourceOf(self.host)
        super().connectionMade()
        self.factory.admission.enter(self)

    def connectionLost(self, reason: Failure | None = None) -> None:
        """Forget the connection."""
        self.factory.admission.leave(self)
        self.factory.watch.discard(self)
        self.factory.connections.discard(self)
        super().connectionLost(reason)

    def loginOver(self) -> None:
        """The client has logged in."""
        self.factory.admission.leave(self)
        self.factory.watch.add(self)
        self.share = str(self.entry)
        if self.log.budget is not None:
            self.log.budget.above = self.factory.budgets.known(f"the key {self.entry}")

    @property
    def entry(self) -> AuthorizedKey:
        """The line of C{authorized_keys} that lets the client in, once it has."""
        return cast(ServeAvatar, self.avatar).entry

    @entry.setter
    def entry(self, entry: AuthorizedKey) -> None:
        cast(ServeAvatar, self.avatar).entry = entry

    def expel(self, reason: str) -> None:
        """See L{nixserve.ssh.keywatch.LoggedIn}."""
        self.log.warn(
            "{peer} ({key}) is disconnected: {reason}", peer=self.peerText, key=str(self.entry), reason=reason
        )
        cast(ServeConnection, self.service).endSessions(f"error: {reason}")
        self.sendDisconnect(transport.DISCONNECT_BY_APPLICATION, reason.encode("utf-8", "replace"))

    # Before the login

    def dataReceived(self, data: bytes) -> None:
        """Bytes from TCP. Until the client has logged in they wait for their turn, and the next ones in the kernel."""
        if self._isWaiting:
            self.buf += data
            return
        if self not in self.factory.admission:
            self._work(data)
            return
        self._early += data
        self._earlyBytes += len(data)
        self.transport.pauseProducing()
        self.factory.admission.wantTurn(self)

    def takeTurn(self) -> None:
        """See L{nixserve.ssh.admission.Newcomer}."""
        piece, self._early = self._early[:TURN_BYTES], self._early[TURN_BYTES:]
        super().dataReceived(piece)
        if self not in self.factory.admission:
            # It has logged in, or is at its end.
            piece, self._early = self._early, b""
            self._work(piece)
        elif self._earlyBytes > MAX_LOGIN_BYTES:
            self.factory.admission.leave(self)
            self.turnAway(f"more than {MAX_LOGIN_BYTES} bytes and no login")
            return
        elif self._early:
            self.factory.admission.wantTurn(self)
            return
        if not self._isWaiting:
            self.transport.resumeProducing()

    def turnAway(self, reason: str) -> None:
        """See L{nixserve.ssh.admission.Newcomer}."""
        self._early = b""
        self.log.warn("{peer} is disconnected before its login: {reason}", peer=self.peerText, reason=reason)
        self.sendDisconnect(transport.DISCONNECT_NO_MORE_AUTH_METHODS_AVAILABLE, reason.encode("ascii"))

    # After the login

    def _work(self, data: bytes) -> None:
        """Work off what has arrived, for as long as the share of the key lasts; the rest waits here."""
        shares = self.factory.shares
        begun = self.clock.seconds()
        left = shares.left(self.share)
        self._until, self._isFresh = begun + left, left > 0
        super().dataReceived(data)
        shares.spend(self.share, self.clock.seconds() - begun)
        if self._isWaiting:
            self.transport.pauseProducing()
            shares.wait(self)

    def workOn(self) -> None:
        """See L{nixserve.ssh.shares.Sharer}."""
        self._isWaiting = False
        self._work(b"")
        if not self._isWaiting:
            self.transport.resumeProducing()

    def mayWorkOn(self) -> bool:
        """As L{PacedTransport.mayWorkOn}: while the share of the key lasts, and once in each turn."""
        self._isWaiting = not self._isFresh and self.clock.seconds() >= self._until
        self._isFresh = False
        return not self._isWaiting

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

    def __init__(self) -> None:
        self._foreign = 0

    @property
    def _log(self) -> ConchLog:  # type: ignore[override]
        """In the place of Conch's own logger."""
        return ConchLog(self.transport.log)

    def serviceStarted(self) -> None:
        """Tell the portal the client's address; and no clock but that of the admission runs."""
        # Conch's clock counts what the server takes, too.
        self.clock = self.transport.clock
        super().serviceStarted()
        self._cancelLoginTimeout.cancel()
        self._cancelLoginTimeout = None  # type: ignore[assignment]
        self.portal = _AddressedPortal(self.transport.factory.portal, self.transport.host)

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

    def _ebBadAuth(self, reason: Failure) -> None:
        """
        A try has failed. Keys that are not known here are other hosts', and Conch counts them as it does guesses.
        """
        if reason.check(KnownKeyRefused) or not reason.check(UnauthorizedLogin) or self._foreign >= FOREIGN_TRIES:
            super()._ebBadAuth(reason)
            return
        self._foreign += 1
        methods = NS(b",".join(self.supportedAuthentications))
        self.transport.sendPacket(userauth.MSG_USERAUTH_FAILURE, methods + b"\x00")

    def _logRefusal(self, reason: Failure, blob: bytes) -> Failure:
        if reason.check(UnauthorizedLogin):
            self.transport.log.info(
                "{peer}: the key {key} is refused: {reason}",
                peer=self.transport.peerText,
                key=fingerprint(blob),
                reason=reason.getErrorMessage(),
            )
        return reason


class ServeConnection(PacedConnection):
    """The sessions of one client that has logged in."""

    transport: ServeTransport
    # Under which name its descriptor is counted.
    _countedFor: str | None = None

    def serviceStarted(self) -> None:
        """The login is over."""
        avatar = cast(ServeAvatar, self.transport.avatar)
        self.transport.loginOver()
        avatar.address = self.transport.peerAddress
        avatar.log = self.transport.log
        self.transport.log.info("{peer} logged in with {key}", peer=avatar.peerText, key=str(avatar.entry))
        name = str(avatar.entry)
        try:
            avatar.realm.descriptors.take(name, CONNECTION)
        except PolicyError as error:
            avatar.logRefusal("connection", str(error))
            self.transport.sendDisconnect(transport.DISCONNECT_TOO_MANY_CONNECTIONS, str(error).encode())
            return
        self._countedFor = name
        super().serviceStarted()

    def serviceStopped(self) -> None:
        """The connection is gone."""
        super().serviceStopped()
        if self._countedFor is not None:
            name, self._countedFor = self._countedFor, None
            cast(ServeAvatar, self.transport.avatar).realm.descriptors.giveBack(name, CONNECTION)

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
        cast(ServeAvatar, self.transport.avatar).logRefusal("channel " + shownText(kind, 40), reason.decode("ascii"))
        (sender,) = struct.unpack_from(">L", rest)
        self.transport.sendPacket(_MSG_CHANNEL_OPEN_FAILURE, struct.pack(">2L", sender, code) + NS(reason) + NS(b""))


class ServeChannel(PacedChannel):
    """One session: the channel on which a client runs C{nix-store --serve}."""

    # Enough for a greeting and some requests, so that nobody waits a round trip; the session says how much it takes.
    # What waits for a session that is never asked for is counted for no key.
    firstWindow = 1024
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
            self.avatar.logRefusal(f"command {shownText(line, 120)}", str(error))
            self.endWith(f"error: {error}")
            return True
        session = self.avatar.realm.nextSession()
        peer = Peer(self.avatar.peerText, str(self.avatar.entry), session, self.avatar.log.budget)
        self.avatar.log.info(
            "{peer} ({key}): session {session} with the rights {policy}: {command}",
            peer=peer.address,
            key=peer.key,
            session=session,
            policy=str(command.policy),
            command=line,
        )
        try:
            self.attach(self.avatar.realm.sessions.buildSession(command.policy, peer))
        except PolicyError as error:
            self.avatar.logRefusal(f"session {session}", str(error))
            self.endWith(f"error: {error}")
        except Exception:
            self.avatar.log.failure("session {session} could not be built", session=session)
            self.endWith("error: internal error of the endpoint; its log says more")
        return True

    def requestShell(self, data: bytes) -> bool:
        """Somebody has typed C{ssh host}: say what this is."""
        if self._started:
            return False
        self._started = True
        self.avatar.logRefusal("shell", "only nix-store --serve runs here")
        self.endWith(
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
        self.avatar.logRefusal("request " + shownText(requestType, 40), "only nix-store --serve runs here")
        return False


class ServeAvatar(ConchUser):
    """
    A client that has logged in.

    @ivar entry: the line of C{authorized_keys} that let it in.
    @ivar realm: what it may use.
    @ivar address: where it is; set when its connection starts.
    @ivar log: for what concerns it; likewise.
    """

    address: IAddress
    log: PeerLog
    # Over Conch's.
    _log: Any = ConchLog()

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
            self.logRefusal("request " + shownText(requestType, 40), "forwarding is not offered here")
        return 0

    def decide(self, line: str) -> ServeCommand:
        """
        What runs when the client asks for C{line}, which must be a command to serve: its key's forced command, or that
        line with its rights cut down to those that keys have without one.

        @raise PolicyError: nothing; the text says why.
        """
        asked = parseCommand(line)
        command = self.entry.forced
        if command is None:
            command = ServeCommand(asked.policy.cutDownTo(self.realm.defaultPolicy), asked.storeURI)
        if command.storeURI is not None and not self.realm.sessions.isServed(command.storeURI):
            raise PolicyError(f"the store '{shownText(command.storeURI, 200)}' is not served here; leave out '--store'")
        return command

    def logRefusal(self, what: str, reason: str) -> None:
        """Log that something was refused."""
        self.log.warn(
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
    @ivar descriptors: for connections.
    """

    def __init__(
        self,
        sessions: IServeSessions,
        clock: IReactorTime,
        defaultPolicy: Policy = READ_ONLY,
        sessionNumbers: Iterator[int] | None = None,
        descriptors: Descriptors | None = None,
    ) -> None:
        """
        @param descriptors: those that each connection is given when it has logged in.
        @param sessionNumbers: where the numbers of sessions come from, if other endpoints count with this one.
        """
        self.sessions = sessions
        self.clock = clock
        self.defaultPolicy = defaultPolicy
        self.descriptors = descriptors or Descriptors()
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

    @ivar admission: the connections that have not logged in.
    @ivar watch: those that have.
    @ivar shares: of the reactor's time, for those that have.
    @ivar connections: all connections, logged in or not.
    @ivar budgets: how much may be logged about whom.
    """

    protocol = ServeTransport
    # Over Conch's.
    _log: Any = ConchLog()
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
        self.admission = Admission(clock)
        self.watch = KeyWatch(checker, clock)
        self.shares = Shares(clock)
        self.budgets = LogBudgets(clock.seconds)
        self.connections: set[ServeTransport] = set()

    def buildProtocol(self, addr: IAddress | None) -> ServeTransport:
        """A connection, with the algorithms of our host keys."""
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

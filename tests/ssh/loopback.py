"""
Sessions that echo, swallow or produce bytes, a server on loopback that has them, and its clients.
"""

import os
import shutil
import struct

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import Factory, ProcessProtocol, Protocol
from zope.interface import implementer

from nixserve.protocol.interfaces import IErrorReceiver, IServeSessions
from nixserve.protocol.limits import FULL_WINDOW
from nixserve.protocol.policy import EVERYTHING
from nixserve.ssh.client import SSHCommandEndpoint
from nixserve.ssh.keys import AuthorizedKeysChecker, AuthorizedKeysFile, loadHostKey
from nixserve.ssh.server import ServeFactory, ServeRealm
from tests.waiting import sleep

SSH = shutil.which("ssh")
MIB = 1024 * 1024


@implementer(IHalfCloseableProtocol)
class Session(Protocol):
    """Records what happens to it; its first line of input says what it does."""

    def __init__(self, policy, peer):
        self.policy, self.peer = policy, peer
        self.received = 0
        self.head = b""
        self.mode = None
        self.lost = None
        self.ended = Deferred()
        self.eof = False

    def connectionMade(self):
        """Take as much as real sessions that have something to receive."""
        self.transport.allowUnread(FULL_WINDOW)

    def dataReceived(self, data):
        if self.mode is None:
            self.head += data
            if b"\n" not in self.head:
                return
            line, _, data = self.head.partition(b"\n")
            name, *arguments = line.decode().split()
            self.mode = getattr(self, "do_" + name)
            getattr(self, "start_" + name, lambda *_: None)(*map(int, arguments))
        self.received += len(data)
        self.mode(data)

    def readConnectionLost(self):
        self.eof = True
        if self.mode == self.do_sink:
            self.transport.write(b"%d\n" % self.received)
        if self.mode in (self.do_sink, self.do_echo):
            self.transport.exit(0)

    def writeConnectionLost(self):
        pass

    def connectionLost(self, reason):
        self.lost = reason
        self.ended.callback(reason.value)

    def do_echo(self, data):
        self.transport.write(data)

    def do_sink(self, data):
        pass

    def start_status(self, status):
        self.transport.write(b"out\n")
        self.transport.writeError(b"err\n")
        self.transport.exit(status)

    def do_status(self, data):
        pass

    def start_source(self, size):
        Source(self.transport, size)

    def do_source(self, data):
        pass

    def start_errors(self, size):
        for _ in range(size // 1000):
            self.transport.writeError(b"e" * 999 + b"\n")

    def do_errors(self, data):
        self.transport.write(b"answer\n")

    def start_hold(self):
        self.transport.pauseProducing()

    def do_hold(self, data):
        pass

    def do_fail(self, data):
        raise RuntimeError("a bug in a session")


@implementer(IPushProducer)
class Source:
    """Writes a number of bytes as fast as it is let, then exits with status 0."""

    CHUNK = bytes(range(256)) * 1024

    def __init__(self, transport, size):
        self.transport, self.left = transport, size
        self.paused = False
        self.consumer.registerProducer(self, True)
        self.resumeProducing()

    @property
    def consumer(self):
        """What pauses it."""
        return self.transport

    def end(self):
        """Everything is written."""
        self.transport.exit(0)

    def resumeProducing(self):
        self.paused = False
        while not self.paused and self.left:
            piece = self.CHUNK[: self.left]
            self.left -= len(piece)
            self.transport.write(piece)
        if not self.left:
            self.consumer.unregisterProducer()
            self.end()
            self.left = None

    def pauseProducing(self):
        self.paused = True

    def stopProducing(self):
        self.paused = True


@implementer(IServeSessions)
class Sessions:
    """Builds and keeps L{Session}s; serves the stores named C{auto} and C{/served}."""

    def __init__(self):
        self.all = []

    def isServed(self, storeURI):
        return storeURI in ("auto", "/served")

    def buildSession(self, policy, peer):
        self.all.append(Session(policy, peer))
        return self.all[-1]


class Server:
    """An endpoint on loopback with one user key, and what is needed to reach it."""

    def __init__(self, reactor, directory, options="", policy=EVERYTHING, clock=None):
        self.reactor = reactor
        self.directory = str(directory)
        self.hostKey = loadHostKey(f"{directory}/host")
        self.userKey = loadHostKey(f"{directory}/user")
        self.authorize(options)
        self.sessions = Sessions()
        clock = reactor if clock is None else clock
        self.factory = ServeFactory(
            ServeRealm(self.sessions, clock, policy),
            AuthorizedKeysChecker(AuthorizedKeysFile(f"{directory}/authorized_keys")),
            [self.hostKey],
            clock,
        )
        self.port = reactor.listenTCP(0, self.factory, interface="127.0.0.1")
        self.number = self.port.getHost().port
        with open(f"{directory}/known_hosts", "w") as stream:
            line = self.hostKey.public().toString("OPENSSH").decode()
            stream.write(f"[127.0.0.1]:{self.number} {line}\n")

    def authorize(self, options="", key=None, comment="me@here"):
        line = (key or self.userKey).public().toString("OPENSSH", comment=comment.encode()).decode()
        descriptor = os.open(f"{self.directory}/authorized_keys", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(f"{options} {line}\n".lstrip())

    async def stop(self):
        await self.port.stopListening()
        for connection in list(self.factory.connections):
            connection.abort()
        while self.factory.connections:
            await sleep(self.reactor, 0.01)

    def endpoint(self, command="nix-store --serve --write", **options):
        options.setdefault("keys", [self.userKey])
        options.setdefault("hostKeys", [self.hostKey.public()])
        options.setdefault("timeoutSeconds", 20)
        return SSHCommandEndpoint(self.reactor, "127.0.0.1", self.number, "someone", command, **options)

    def sshArguments(self, *options):
        return [
            SSH, "-F", "none", "-x", "-p", str(self.number), "-i", f"{self.directory}/user",
            "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes",
            "-o", f"UserKnownHostsFile={self.directory}/known_hosts", "-o", "GlobalKnownHostsFile=none",
            "-o", "StrictHostKeyChecking=yes", *options, "someone@127.0.0.1",
        ]  # fmt: skip


@implementer(IErrorReceiver, IHalfCloseableProtocol)
class Recorder(Protocol):
    """A client's protocol that counts what it gets."""

    def __init__(self):
        self.data = b""
        self.count = 0
        self.errors = b""
        self.keep = True
        self.ended = Deferred()

    def dataReceived(self, data):
        self.count += len(data)
        if self.keep:
            self.data += data

    def errorReceived(self, data):
        self.errors += data

    def readConnectionLost(self):
        pass

    def writeConnectionLost(self):
        pass

    def connectionLost(self, reason):
        self.ended.callback(reason.value)


class Child(ProcessProtocol):
    """A child process that counts its output; C{feed} bytes are written to it as fast as it takes them."""

    def __init__(self, feed=0, head=b"", close=True, keep=True):
        self.feed, self.head, self.close, self.keep = feed, head, close, keep
        self.out, self.err, self.count = b"", b"", 0
        self.ended = Deferred()

    def connectionMade(self):
        self.transport.write(self.head)
        if self.feed:
            FeedStdin(self.transport, self.feed)
        elif self.close:
            self.transport.closeStdin()

    def outReceived(self, data):
        self.count += len(data)
        if self.keep:
            self.out += data

    def errReceived(self, data):
        self.err += data

    def processEnded(self, reason):
        code = 0 if reason.check(ConnectionDone) else reason.value.exitCode
        self.ended.callback(code)


@implementer(IPushProducer)
class FeedStdin(Source):
    """As L{Source}, into a child's standard input, which is closed at the end."""

    @property
    def consumer(self):
        """See L{Source}."""
        return self.transport.pipes[0]

    def end(self):
        """See L{Source}."""
        self.transport.closeStdin()


def runSSH(server, command, *options, child=None, terminal=False):
    """Start OpenSSH's client; its L{Child}."""
    child = Child(close=not terminal) if child is None else child
    arguments = [*server.sshArguments(*options), "--", *([command] if command else [])]
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": server.directory, "LC_ALL": "C"}
    server.reactor.spawnProcess(child, arguments[0], arguments, environment, usePTY=terminal)
    return child


def clientFactory(protocol):
    return Factory.forProtocol(lambda: protocol)


async def connect(server, first=b"", command="nix-store --serve --write", **options):
    """A connected client protocol that has sent its first line."""
    recorder = Recorder()
    await server.endpoint(command, **options).connect(clientFactory(recorder))
    recorder.transport.write(first)
    return recorder


class Raw(Protocol):
    """Says what a test says, and records."""

    def __init__(self, greeting=b""):
        self.greeting = greeting
        self.data = b""
        self.lost = False

    def connectionMade(self):
        self.transport.write(self.greeting)

    def dataReceived(self, data):
        self.data += data

    def connectionLost(self, reason):
        self.lost = True


def raw(server, greeting=b""):
    """A connection on which a test says what it likes."""
    return connectProtocol(TCP4ClientEndpoint(server.reactor, "127.0.0.1", server.number), Raw(greeting))


def plainPacket(kind, payload):
    """A packet before the first key exchange."""
    padding = 16 - (6 + len(payload)) % 8
    return struct.pack(">LBB", 2 + len(payload) + padding, padding, kind) + payload + bytes(padding)


def serviceOf(recorder):
    """The client's SSH connection that a protocol is on."""
    return recorder.transport.conn

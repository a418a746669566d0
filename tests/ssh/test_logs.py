"""
What others can make the endpoint write to its log: none of their bytes as they are, and not much.
"""

import io
import struct
from random import Random

import pytest
import pytest_twisted
from twisted.conch.ssh.common import NS
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, formatEvent, globalLogPublisher, textFileLogObserver

from nixserve.ssh.client import SSHError
from nixserve.ssh.keys import AuthorizedKeysFile
from nixserve.ssh.server import MAX_CHANNELS, ServeConnection, ServeTransport
from tests.ssh.loopback import Recorder, Server, clientFactory, connect, plainPacket, raw, serviceOf
from tests.waiting import until, within

TEXT = "\x1b]0;evil\x07\r\x9b31m\u202e"
EVIL = TEXT.encode() + b"\x00\xff"
# What the figure in docs/security.md says.
MOST = 10_000


@pytest.fixture
def log():
    """What twistd would write to its file, without what concerns the tests' own endpoints."""
    written = io.StringIO()
    write = textFileLogObserver(written)

    def observer(event):
        if event.get("log_namespace") not in ("twisted.internet.endpoints.OneShotFactory", "log_legacy"):
            write(event)

    globalLogPublisher.addObserver(observer)
    yield written
    globalLogPublisher.removeObserver(observer)


@pytest.fixture
def makeServer(tmp_path):
    """Makes servers that are stopped after the test."""
    servers = []

    def make(**options):
        servers.append(Server(reactor, tmp_path, **options))
        return servers[-1]

    yield make
    for server in servers:
        pytest_twisted.blockon(Deferred.fromCoroutine(server.stop()))


def check(log):
    """Nothing but printable lines, and few of them."""
    text = log.getvalue()
    assert text.replace("\t", "").replace("\n", "").isprintable()
    assert not any(char in text for char in "\x1b\x07\r\x9b\u202e\x00\udcff")
    assert len(text.encode()) < MOST, text[:2000]


VERSION = b"SSH-2.0-x " + EVIL.replace(b"\r", b"") + b"\r\n"
FLOODS = {
    "debug": plainPacket(4, b"\x01" + NS(EVIL * 50) + NS(b"")) * 10_000,
    "ignore": plainPacket(2, NS(EVIL)) * 50_000,
    "unimplemented": plainPacket(3, struct.pack(">L", 7)) * 50_000,
    "disconnect": plainPacket(1, struct.pack(">L", 2) + NS(EVIL * 100) + NS(EVIL)) * 10_000,
    "unknown messages": VERSION
    + b"".join(plainPacket(kind, EVIL) for kind in range(6, 256) if kind not in (20, 30)) * 99,
    "services": plainPacket(5, NS(EVIL)) * 20_000,
    "malformed": plainPacket(20, EVIL),
    "version": b"SSH-9.9-" + EVIL + b"\r\n",
    "no version": EVIL * 100_000,
    "lengths": EVIL * 10_000,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
@pytest_twisted.ensureDeferred
async def test_strangersWords(makeServer, log, flood):
    """Whatever a stranger sends before the key exchange, its bytes stay out of the log and the log small."""
    server = makeServer()
    greets = flood.startswith((b"SSH-", EVIL * 11_000))
    stranger = await raw(server, b"" if greets else VERSION)
    await until(reactor, lambda: [one for one in server.factory.connections if one.gotVersion or greets])
    stranger.transport.write(flood)
    # Once everything is sent.
    stranger.transport.loseConnection()
    await until(reactor, lambda: not server.factory.connections, 60)
    check(log)


@pytest_twisted.ensureDeferred
async def test_strangersConnections(makeServer, log):
    """Nor does a stranger get further by coming back: lines about one address have a budget of their own."""
    server = makeServer()
    for _ in range(300):
        stranger = await raw(server, b"SSH-2.0-x\r\n" + plainPacket(20, EVIL * 20))
        await until(reactor, lambda stranger=stranger: stranger.lost)
    assert len(log.getvalue()) < 50_000
    assert "for now nothing more is written" in log.getvalue()


def attacks(service, channel):
    """What a key that may only read can send: a name, and a function that sends some of it."""
    transport = service.transport
    opening = struct.pack(">3L", 5, 100, 100)

    def request(kind, data=b"", wantReply=True):
        service.sendRequest(channel, kind, data, wantReply=wantReply)

    def open_(kind):
        transport.sendPacket(90, NS(kind) + opening)

    return {
        "refused channels": lambda: open_(EVIL),
        "forwarded channels": lambda: open_(b"direct-tcpip"),
        "global requests": lambda: transport.sendPacket(80, NS(b"forward" + EVIL) + b"\x00"),
        "terminals": lambda: request(b"pty-req", NS(EVIL) * 3, False),
        "environment": lambda: request(b"env", NS(EVIL) + NS(EVIL), False),
        "subsystems": lambda: request(b"subsystem", NS(EVIL), False),
        "unknown requests": lambda: request(EVIL, EVIL, False),
        "debug": lambda: transport.sendPacket(4, b"\x01" + NS(EVIL) + NS(b"")),
        "unknown messages": lambda: transport.sendPacket(200, EVIL),
        "unimplemented": lambda: transport.sendPacket(3, struct.pack(">L", 1)),
        "services": lambda: transport.sendPacket(6, NS(EVIL)),
    }


NAMES = list(attacks(type("", (), {"transport": None})(), None))


@pytest.mark.parametrize("name", NAMES)
@pytest_twisted.ensureDeferred
async def test_readersWords(makeServer, log, name):
    """Whatever a client with a key sends, its bytes stay out of the log, and a connection's log small."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    service = serviceOf(recorder)
    # The answers concern nobody here.
    for answer in ("CHANNEL_OPEN_FAILURE", "REQUEST_FAILURE", "CHANNEL_FAILURE"):
        setattr(service, f"ssh_{answer}", lambda packet: None)
    service.transport.ssh_UNIMPLEMENTED = lambda packet: None
    attack = attacks(service, recorder.transport)[name]
    for _ in range(1500):
        attack()
    recorder.transport.write(b"alive")
    await until(reactor, lambda: recorder.data == b"alive")
    recorder.transport.abortConnection()
    await until(reactor, lambda: not server.factory.connections)
    check(log)


@pytest.mark.parametrize("command", ["nix-store --serve --store '%s'", "%s", "nix-store --serve %s", "'%s"])
@pytest_twisted.ensureDeferred
async def test_readersCommands(makeServer, log, command):
    """Nor do its commands, as many as it likes."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    service = serviceOf(recorder)
    line = NS((command % (TEXT * 20)).encode())
    service.ssh_CHANNEL_OPEN_CONFIRMATION = lambda packet: service.transport.sendPacket(
        98, packet[4:8] + NS(b"exec") + b"\x00" + line
    )
    closed = []
    for message in ("WINDOW_ADJUST", "DATA", "EXTENDED_DATA", "EOF", "REQUEST"):
        setattr(service, f"ssh_CHANNEL_{message}", lambda packet: None)
    service.ssh_CHANNEL_CLOSE = closed.append
    many = MAX_CHANNELS - 10
    for count in range(1, 5):
        for number in range(many):
            service.transport.sendPacket(90, NS(b"session") + struct.pack(">3L", 1000 + number, 100_000, 100_000))
        await until(reactor, lambda count=count: len(closed) == count * many)
        (connection,) = server.factory.connections
        for channel in filter(None, connection.service.channels):
            service.transport.sendPacket(97, struct.pack(">L", channel))
    service.transport.abort()
    await until(reactor, lambda: not server.factory.connections)
    check(log)


@pytest_twisted.ensureDeferred
async def test_usersNames(makeServer, log):
    """A user's name, a key's comment, and what goes wrong in a login are no bytes of the log either."""
    server = makeServer()
    endpoint = server.endpoint()
    endpoint._username = TEXT
    server.authorize(comment=TEXT)
    recorder = Recorder()
    await endpoint.connect(clientFactory(recorder))
    recorder.transport.write(b"status 0\n")
    await within(reactor, 10, recorder.ended)
    check(log)
    assert "logged in" in log.getvalue()


@pytest_twisted.ensureDeferred
async def test_logOfAnHonestConnection(makeServer, log):
    """Who logs in and works is in the log with address, key, session and command: two lines, and none of Conch's."""
    server = makeServer()
    recorder = await connect(server, b"status 0\n")
    await within(reactor, 10, recorder.ended)
    text = log.getvalue()
    assert "logged in with SHA256:" in text
    assert "me@here" in text
    assert "session 1 with the rights read,write,build,trust: nix-store --serve --write" in text
    assert text.count("\n") == 2


@pytest_twisted.ensureDeferred
async def test_channelsAreNotForgotten(makeServer):
    """A client cannot make the server forget an open channel, and so have more sessions than it may."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    serviceOf(recorder).transport.sendPacket(92, struct.pack(">2L", 0, 1) + NS(b"x") + NS(b""))
    await within(reactor, 5, server.sessions.all[0].ended)
    await until(reactor, lambda: not server.factory.connections)


NAMES_OF_REQUESTS = [b"session", b"exec", b"shell", b"env", b"signal", b"exit-status", b"tcpip-forward", EVIL]


def randomPayload(random):
    """Fields of the kinds that messages consist of, in no order."""
    kinds = [
        lambda: struct.pack(">L", random.choice([0, 1, 2, 3, 100, 2**31, 2**32 - 1])),
        lambda: NS(random.choice(NAMES_OF_REQUESTS)),
        lambda: NS(b"nix-store --serve"),
        lambda: random.randbytes(random.randrange(30)),
        lambda: bytes([random.randrange(2)]),
    ]
    return b"".join(random.choice(kinds)() for _ in range(random.randrange(6)))


@pytest.mark.parametrize("seed", range(3))
@pytest_twisted.ensureDeferred
async def test_randomMessages(makeServer, log, seed):
    """Whatever messages a client with a key sends, it provokes no traceback, and leaves nothing behind."""
    server = makeServer()
    random = Random(seed)
    with capturedLogs() as events:
        for _ in range(12):
            recorder = await connect(server, b"echo\n")
            transport = serviceOf(recorder).transport
            serviceOf(recorder).packetReceived = transport.ssh_UNIMPLEMENTED = lambda *_: None
            for _ in range(40):
                if not transport._ending:
                    transport.sendPacket(random.choice([*range(2, 8), *range(80, 83), *range(90, 101), 98, 98, 200]),
                                         randomPayload(random))  # fmt: skip
            transport.sendDisconnect(11, EVIL)
            await until(reactor, lambda: not server.factory.connections)
    assert [formatEvent(event) for event in events if event["log_level"].name in ("critical", "error")] == []
    assert log.getvalue().replace("\n", "").replace("\t", "").isprintable()
    await until(reactor, lambda: all(session.lost is not None for session in server.sessions.all))


HOSTS_WORDS = {
    "goodbye": ("ssh_KEXINIT", lambda self, packet: self.sendDisconnect(2, EVIL), ServeTransport),
    "no session": (
        "ssh_CHANNEL_OPEN",
        lambda self, packet: self.transport.sendPacket(92, struct.pack(">2L", 0, 1) + NS(EVIL) + NS(EVIL)),
        ServeConnection,
    ),
}


@pytest.mark.parametrize("name", HOSTS_WORDS)
@pytest_twisted.ensureDeferred
async def test_hostsWords(makeServer, monkeypatch, log, name):
    """What a host says reaches our client's errors and log as text, and none of it a terminal as it is."""
    method, says, kind = HOSTS_WORDS[name]
    monkeypatch.setattr(kind, method, says)
    with pytest.raises(SSHError) as caught:
        await connect(makeServer())
    assert str(caught.value).isprintable()
    assert r"\x1b]0;evil\x07" in str(caught.value)
    check(log)


@pytest_twisted.ensureDeferred
async def test_hostsMessages(makeServer, log):
    """A host that floods a client with messages makes its log no larger than a peer's."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    await until(reactor, lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    (connection,) = server.factory.connections
    connection.ssh_UNIMPLEMENTED = lambda packet: None
    for _ in range(1000):
        connection.sendPacket(4, b"\x01" + NS(EVIL) + NS(b""))
        connection.sendPacket(3, struct.pack(">L", 1))
        connection.sendPacket(99, EVIL)
        connection.sendPacket(200, EVIL)
    recorder.transport.write(b"alive")
    await until(reactor, lambda: recorder.data == b"alive")
    recorder.transport.abortConnection()
    check(log)


def test_authorizedKeysWords(tmp_path, log):
    """Lines of authorized_keys that are not understood are named in the log, shown, and not each of thousands."""
    path = tmp_path / "authorized_keys"
    path.write_bytes((EVIL.replace(b"\r", b"") + b"=x ssh-ed25519 AAAA\n") * 1000)
    path.chmod(0o600)
    AuthorizedKeysFile(str(path)).find(b"")
    check(log)
    assert "line 1 lets nobody in" in log.getvalue()
    assert "980 more lines" in log.getvalue()

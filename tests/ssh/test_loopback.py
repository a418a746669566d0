"""
Our endpoint and our own client, over loopback.
"""

import os
import socket
import struct

import pytest
import pytest_twisted
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from twisted.conch.ssh.common import NS
from twisted.conch.ssh.keys import Key
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred, gatherResults
from twisted.internet.error import ConnectionDone, ConnectionLost, ConnectionRefusedError, ProcessTerminated
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from nixserve.protocol.policy import EVERYTHING, READ_ONLY
from nixserve.ssh import admission as admissionModule
from nixserve.ssh import keywatch as keywatchModule
from nixserve.ssh import transport as transportModule
from nixserve.ssh.admission import LOGIN_SECONDS, TICK_SECONDS
from nixserve.ssh.authorizedkeys import fingerprint
from nixserve.ssh.client import HostKeyError, LoginError, SSHError, readKnownHosts
from nixserve.ssh.server import FOREIGN_TRIES, LOGIN_TRIES, MAX_CHANNELS
from nixserve.ssh.transport import MAX_BACKLOG, MAX_PACKET
from tests.ssh.loopback import MIB, Recorder, Server, Source, clientFactory, connect, plainPacket, raw, serviceOf
from tests.waiting import sleep, until, within


@pytest.fixture
def makeServer(tmp_path):
    """Makes servers that are stopped after the test."""
    servers = []

    def make(**options):
        directory = tmp_path / str(len(servers))
        directory.mkdir()
        servers.append(Server(reactor, directory, **options))
        return servers[-1]

    yield make
    for server in servers:
        pytest_twisted.blockon(Deferred.fromCoroutine(server.stop()))


@pytest_twisted.ensureDeferred
async def test_exitStatus(makeServer):
    """Output, standard error and the exit status arrive; status 0 is a clean end."""
    server = makeServer()
    recorder = await connect(server, b"status 3\n")
    reason = await within(reactor, 10, recorder.ended)
    assert isinstance(reason, ProcessTerminated)
    assert (reason.exitCode, recorder.data, recorder.errors) == (3, b"out\n", b"err\n")
    recorder = await connect(server, b"status 0\n")
    assert isinstance(await within(reactor, 10, recorder.ended), ConnectionDone)
    assert [str(session.policy) for session in server.sessions.all] == ["read,write,build,trust"] * 2
    assert [session.peer.session for session in server.sessions.all] == [1, 2]
    assert server.sessions.all[0].peer.key == f"{fingerprint(server.userKey)} me@here"
    assert server.sessions.all[0].peer.address.startswith("127.0.0.1:")
    await until(reactor, lambda: not server.factory.connections)


@pytest.mark.parametrize("close", ["loseWriteConnection", "loseConnection"])
@pytest_twisted.ensureDeferred
async def test_eof(makeServer, close):
    """The client's EOF reaches the session after all bytes, and the answer and the exit status still come."""
    server = makeServer()
    recorder = await connect(server, b"sink\n")
    recorder.transport.write(b"x" * 100_000)
    getattr(recorder.transport, close)()
    assert isinstance(await within(reactor, 10, recorder.ended), ConnectionDone)
    assert recorder.data == b"100000\n"


@pytest_twisted.ensureDeferred
async def test_transfers(makeServer):
    """64 MiB each way, within bounded time and buffers."""
    server = makeServer()
    recorder = await connect(server, b"source %d\n" % (64 * MIB))
    recorder.keep = False
    assert isinstance(await within(reactor, 60, recorder.ended), ConnectionDone)
    assert recorder.count == 64 * MIB

    class Upload(Source):
        def resumeProducing(self):
            self.paused = False
            while not self.paused and self.left:
                self.transport.write(self.CHUNK)
                self.left -= len(self.CHUNK)
            if not self.left:
                self.transport.unregisterProducer()
                self.transport.loseWriteConnection()
                self.left = None

    recorder = await connect(server, b"sink\n")
    Upload(recorder.transport, 64 * MIB)
    assert isinstance(await within(reactor, 60, recorder.ended), ConnectionDone)
    assert recorder.data == b"%d\n" % (64 * MIB)


@pytest_twisted.ensureDeferred
async def test_echoOfContent(makeServer, monkeypatch):
    """Bytes come back as they were, across many key exchanges begun by both sides."""
    monkeypatch.setattr(transportModule.PacedTransport, "rekeyBytes", 300_000)
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    exchanges = []
    (connection,) = server.factory.connections
    monkeypatch.setattr(
        connection, "ssh_NEWKEYS", lambda packet, old=connection.ssh_NEWKEYS: exchanges.append(old(packet))
    )
    content = bytes(range(251)) * 20_000
    recorder.transport.write(content)
    recorder.transport.loseWriteConnection()
    assert isinstance(await within(reactor, 60, recorder.ended), ConnectionDone)
    assert recorder.data == content
    assert len(exchanges) > 10


@pytest_twisted.ensureDeferred
async def test_slowReader(makeServer):
    """A client that does not read stops the session's producer; nothing grows."""
    server = makeServer()
    recorder = await connect(server, b"source %d\n" % (64 * MIB))
    recorder.transport.pauseProducing()
    recorder.keep = False
    await sleep(reactor, 0.3)
    channel = server.sessions.all[0].transport
    assert channel.queue.outSize <= 1.5 * MIB
    assert recorder.count + sum(map(len, recorder.transport._incoming)) < 4 * MIB
    recorder.transport.resumeProducing()
    assert isinstance(await within(reactor, 60, recorder.ended), ConnectionDone)
    assert recorder.count == 64 * MIB


@pytest_twisted.ensureDeferred
async def test_slowSession(makeServer):
    """A session that does not read stops its client's producer, and holds at most a window."""
    server = makeServer()
    recorder = await connect(server, b"hold\n")
    await until(reactor, lambda: server.sessions.all[0].mode is not None)
    source = Source(recorder.transport, 64 * MIB)
    await sleep(reactor, 0.3)
    session = server.sessions.all[0]
    assert source.paused
    assert source.left > 58 * MIB
    assert sum(map(len, session.transport._incoming)) <= 2 * MIB
    session.transport.resumeProducing()
    await until(reactor, lambda: session.received == 64 * MIB, 60)
    recorder.transport.abortConnection()
    await within(reactor, 10, session.ended)


@pytest_twisted.ensureDeferred
async def test_unreadErrorsDoNotBlockTheReply(makeServer):
    """Megabytes of messages to a client that pauses its output do not keep the answer back."""
    server = makeServer()
    recorder = await connect(server, b"errors 4000000\n")
    recorder.transport.write(b"ask")
    await until(reactor, lambda: b"answer\n" in recorder.data)
    assert len(recorder.errors) < 1 * MIB
    recorder.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_refusedCommands(makeServer):
    """A refused command says why on standard error and exits with 1."""
    server = makeServer()
    cases = {
        "rm -rf /": b"error: this endpoint runs only 'nix-store --serve",
        "nix-daemon --stdio": b"ssh:// instead of ssh-ng://",
        "nix-store --serve --store /other": b"error: the store '/other' is not served here",
    }
    for command, text in cases.items():
        recorder = await connect(server, command=command)
        reason = await within(reactor, 10, recorder.ended)
        assert reason.exitCode == 1
        assert text in recorder.errors
        assert recorder.errors.count(b"\n") == 1
    assert server.sessions.all == []
    recorder = await connect(server, b"status 0\n", "nix-store --serve --store /served")
    await within(reactor, 10, recorder.ended)


@pytest.mark.parametrize(
    ("options", "default", "command", "expected"),
    [
        ("", EVERYTHING, "nix-store --serve --write", EVERYTHING),
        ("", EVERYTHING, "nix-store --serve", READ_ONLY),
        ("", READ_ONLY, "nix-store --serve --write", READ_ONLY),
        ('command="nix-store --serve --write"', READ_ONLY, "nix-store --serve", EVERYTHING),
        ('command="nix-store --serve",restrict', EVERYTHING, "nix-store --serve --write", READ_ONLY),
        ('command="nix-store --serve"', EVERYTHING, "nix-store --serve --write --store /other", READ_ONLY),
    ],
)
@pytest_twisted.ensureDeferred
async def test_policy(makeServer, options, default, command, expected):
    """A forced command alone decides; without one, the rights asked for are cut down to the default."""
    server = makeServer(options=options, policy=default)
    recorder = await connect(server, b"status 0\n", command)
    await within(reactor, 10, recorder.ended)
    assert server.sessions.all[0].policy == expected


@pytest_twisted.ensureDeferred
async def test_otherCommandsOfForcedKeys(makeServer):
    """A client of a key with a forced command that asks for something else than to be served is told so at once."""
    server = makeServer(options='command="nix-store --serve"')
    for command, text in (("rm -rf /", b"runs only"), ("nix-daemon --stdio", b"ssh:// instead of")):
        recorder = await connect(server, command=command)
        assert (await within(reactor, 10, recorder.ended)).exitCode == 1
        assert text in recorder.errors
    assert server.sessions.all == []


@pytest_twisted.ensureDeferred
async def test_forcedStoreMustBeServed(makeServer):
    """A forced command that names another store is refused, too."""
    server = makeServer(options='command="nix-store --serve --store /other"')
    recorder = await connect(server)
    assert (await within(reactor, 10, recorder.ended)).exitCode == 1
    assert b"/other" in recorder.errors


# Logging in


@pytest_twisted.ensureDeferred
async def test_kindsOfUserKeys(makeServer):
    """RSA and ECDSA keys log in, RSA with SHA-2; the first that fits of several is used."""
    server = makeServer()
    for private in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        key = Key(private)
        server.authorize(key=key)
        recorder = await connect(server, b"status 0\n", keys=[Key(ed25519.Ed25519PrivateKey.generate()), key])
        assert isinstance(await within(reactor, 10, recorder.ended), ConnectionDone)


@pytest_twisted.ensureDeferred
async def test_unknownKey(makeServer):
    """A client whose keys are not known is told so; the server logs the fingerprint."""
    server = makeServer()
    stranger = Key(ed25519.Ed25519PrivateKey.generate())
    with capturedLogs() as events, pytest.raises(LoginError, match="accepts none of the keys"):
        await connect(server, keys=[stranger])
    assert any(event.get("key") == fingerprint(stranger) and "not known" in event["reason"] for event in events)
    with pytest.raises(LoginError):
        await connect(server, keys=[])


@pytest.mark.parametrize(
    "options",
    [
        'from="10.0.0.0/8"',
        'from=""',
        'expiry-time="20200101"',
        'expiry-time="29990101",expiry-time="20200101"',
        "cert-authority",
        'command="sh"',
        'command=""',
        'command="nix-store --serve --option x y"',
        'command="nix-store --serve",command="nix-store --serve --write"',
        'environment="A=b"',
        "restrict,pty",
        "verify-required",
    ],
)
@pytest_twisted.ensureDeferred
async def test_linesThatLetNobodyIn(makeServer, options):
    """from=, expiry-time= and lines that are not understood are enforced at the login."""
    server = makeServer(options=options)
    with pytest.raises(LoginError):
        await connect(server)
    server.authorize('from="127.0.0.0/8",expiry-time="29990101"')
    recorder = await connect(server, b"status 0\n")
    await within(reactor, 10, recorder.ended)


@pytest_twisted.ensureDeferred
async def test_tooManyTries(makeServer):
    """The sixth try with a key that is known here is the last."""
    server = makeServer(options='from="10.0.0.1"')
    with pytest.raises(SSHError, match="too many bad auths"):
        await connect(server, keys=[server.userKey] * (LOGIN_TRIES + 1))
    with pytest.raises(LoginError):
        await connect(server, keys=[server.userKey] * (LOGIN_TRIES - 1))


@pytest_twisted.ensureDeferred
async def test_manyForeignKeys(makeServer):
    """Keys that are not known here, up to twenty, are no tries: an agent holds those of other hosts."""
    server = makeServer()
    keys = [Key(ed25519.Ed25519PrivateKey.generate()) for _ in range(FOREIGN_TRIES)]
    recorder = await connect(server, b"status 0\n", keys=[*keys, server.userKey])
    await within(reactor, 10, recorder.ended)
    more = [Key(ed25519.Ed25519PrivateKey.generate()) for _ in range(LOGIN_TRIES)]
    with pytest.raises(SSHError, match="too many bad auths"):
        await connect(server, keys=[*keys, *more, server.userKey])


@pytest_twisted.ensureDeferred
async def test_wrongHostKey(makeServer):
    """A host that is not who it should be: both fingerprints are named, and no key of ours is shown."""
    server = makeServer()
    other = Key(ed25519.Ed25519PrivateKey.generate()).public()
    with capturedLogs() as events, pytest.raises(HostKeyError) as caught:
        await connect(server, hostKeys=[other])
    assert caught.value.expected == (fingerprint(other),)
    assert caught.value.found == fingerprint(server.hostKey)
    assert caught.value.key == server.hostKey.public().toString("OPENSSH").decode()
    assert fingerprint(other) in str(caught.value)
    assert fingerprint(server.hostKey) in str(caught.value)
    assert not any("logged in" in event.get("log_format", "") for event in events)


@pytest_twisted.ensureDeferred
async def test_knownHosts(makeServer):
    """A known_hosts file gives the host's keys, under its name and port."""
    server = makeServer()
    path = f"{server.directory}/known_hosts"
    (key,) = readKnownHosts(path, "127.0.0.1", server.number)
    assert key == server.hostKey.public()
    assert readKnownHosts(path, "127.0.0.1") == readKnownHosts(path + ".missing", "127.0.0.1") == []


@pytest.mark.parametrize("hosts", ["*", "elsewhere", "|1|c2FsdA==|aGFzaA=="])
def test_revokedHostKeys(tmp_path, hosts):
    """A key that is revoked anywhere is no host's; others on lines beside it are."""
    good, bad = (Key(ed25519.Ed25519PrivateKey.generate()).public() for _ in range(2))
    lines = [f"host {key.toString('OPENSSH').decode()} comment\n" for key in (good, bad)]
    path = tmp_path / "known_hosts"
    path.write_text("".join([*lines, "@revoked\n", f"@revoked {hosts} {bad.toString('OPENSSH').decode()} stolen\n"]))
    assert readKnownHosts(str(path), "host") == [good]


@pytest_twisted.ensureDeferred
async def test_abortCutsTheConnection(makeServer):
    """A client that aborts leaves no connection, even if nobody on the other side listens any more."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    await until(reactor, lambda: server.sessions.all)
    (connection,) = server.factory.connections
    connection.transport.pauseProducing()
    transport = recorder.transport.conn.transport.transport
    recorder.transport.abortConnection()
    await within(reactor, 10, recorder.ended)
    await until(reactor, lambda: not transport.connected)
    connection.transport.resumeProducing()
    await within(reactor, 10, server.sessions.all[0].ended)


@pytest_twisted.ensureDeferred
async def test_connectErrors(makeServer):
    """A refused port, a host that says nothing, a cancelled attempt: each fails once, and clearly."""
    server = makeServer()
    endpoint = server.endpoint()
    endpoint._port = unusedPort()
    with pytest.raises(ConnectionRefusedError):
        await within(reactor, 10, endpoint.connect(clientFactory(Recorder())))
    silent = socket.create_server(("127.0.0.1", 0))
    endpoint = server.endpoint(timeoutSeconds=0.2)
    endpoint._port = silent.getsockname()[1]
    with pytest.raises(SSHError, match=r"within 0\.2 s"):
        await within(reactor, 10, endpoint.connect(clientFactory(Recorder())))
    endpoint = server.endpoint()
    endpoint._port = silent.getsockname()[1]
    attempt = endpoint.connect(clientFactory(Recorder()))
    reactor.callLater(0.05, attempt.cancel)
    with pytest.raises(CancelledError):
        await within(reactor, 10, attempt)
    silent.close()


def unusedPort():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest_twisted.ensureDeferred
async def test_loginTakesTooLong(makeServer):
    """A connection that has not logged in after 30 s is closed; one that has, is not."""
    clock = Clock()
    server = makeServer(clock=clock)
    idle = await raw(server, b"SSH-2.0-slow\r\n")
    await until(reactor, lambda: len(server.factory.admission) == 1)
    clock.pump([TICK_SECONDS] * (LOGIN_SECONDS - 1))
    await sleep(reactor, 0.05)
    assert not idle.lost
    clock.advance(TICK_SECONDS)
    await until(reactor, lambda: idle.lost)
    assert b"took too long" in idle.data


@pytest_twisted.ensureDeferred
async def test_loginClockOfABusyServer(makeServer):
    """While the reactor is held up the time of a login stands still: however late a tick comes, it is one."""
    clock = Clock()
    server = makeServer(clock=clock)
    idle = await raw(server, b"SSH-2.0-honest\r\n")
    await until(reactor, lambda: len(server.factory.admission) == 1)
    for _ in range(LOGIN_SECONDS - 1):
        clock.advance(10 * TICK_SECONDS)
    await sleep(reactor, 0.05)
    assert not idle.lost
    idle.transport.loseConnection()


@pytest_twisted.ensureDeferred
async def test_idleConnections(makeServer):
    """99 connections that say nothing keep nobody out, not even from their own address; nor does a burst of 80."""
    server = makeServer()
    idle = [await raw(server) for _ in range(99)]
    await until(reactor, lambda: len(server.factory.admission) == 99)
    recorders = await within(reactor, 60, gatherResults([
        Deferred.fromCoroutine(connect(server, b"status 0\n", timeoutSeconds=60)) for _ in range(80)
    ]))  # fmt: skip
    await within(reactor, 60, gatherResults([recorder.ended for recorder in recorders]))
    assert not any(stranger.lost for stranger in idle)
    for stranger in idle:
        stranger.transport.loseConnection()


@pytest_twisted.ensureDeferred
async def test_slowestGoesFirst(makeServer, monkeypatch):
    """When too many have not logged in, who has been waited for longest makes room; who has logged in stays."""
    monkeypatch.setattr(admissionModule, "MAX_LOGINS", 4)
    clock = Clock()
    server = makeServer(clock=clock)
    idle = [await raw(server)]
    await until(reactor, lambda: len(server.factory.admission) == 1)
    clock.advance(TICK_SECONDS)
    for count in range(2, 5):
        idle.append(await raw(server))
        await until(reactor, lambda count=count: len(server.factory.admission) == count)
    late = await raw(server)
    await until(reactor, lambda: idle[0].lost)
    await until(reactor, lambda: late.data)
    assert b"too many connections" in idle[0].data
    assert not late.lost
    assert not any(stranger.lost for stranger in idle[1:])


@pytest_twisted.ensureDeferred
async def test_tooMuchBeforeTheLogin(makeServer):
    """Who sends without end and does not log in is cut off."""
    server = makeServer()
    stranger = await raw(server, b"SSH-2.0-x\r\n" + plainPacket(2, NS(b"x" * 1000)) * 1000)
    await until(reactor, lambda: stranger.lost)
    assert b"bytes and no login" in stranger.data
    assert not server.factory.connections


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.0\r\n" * 400,
        b"SSH-1.5-old\r\n",
        b"SSH-2.0-x\r\n" + b"\xff" * 100,
        b"SSH-2.0-x\r\n" + b"\x00" * 100,
        # A KEXINIT with a truncated list.
        b"SSH-2.0-x\r\n" + struct.pack(">LB", 28, 4) + b"\x14" + b"c" * 16 + b"\xff\xff\xff\xff" + b"\x00" * 6,
        b"SSH-2.0-x\r\n" + struct.pack(">LB", 12, 4) + b"\x1e" + b"\x00" * 10,
        b"SSH-2.0-x\r\n" + struct.pack(">LB", 12, 4) + b"\x50" + b"\x00" * 10,
    ],
)
@pytest_twisted.ensureDeferred
async def test_garbage(makeServer, garbage):
    """Strangers' bytes end their connection, or are answered, without a traceback in the log."""
    server = makeServer()
    with capturedLogs() as events:
        stranger = await raw(server, garbage)
        await sleep(reactor, 0.05)
        stranger.transport.loseConnection()
        await until(reactor, lambda: not server.factory.connections)
    assert [event for event in events if event["log_level"].name in ("critical", "error")] == []


# Being logged in


REVOCATIONS = {
    "removed": ("key is no longer let in", lambda server: server.authorize(key=server.hostKey)),
    "file removed": ("key is no longer let in", lambda server: os.unlink(f"{server.directory}/authorized_keys")),
    "file open to others": (
        "key is no longer let in",
        lambda server: os.chmod(f"{server.directory}/authorized_keys", 0o666),
    ),
    "line not understood": ("key is no longer let in", lambda server: server.authorize("cert-authority")),
    "expired": ("the key has expired", lambda server: server.authorize('expiry-time="20200101"')),
    "elsewhere": ("is not to be used from 127", lambda server: server.authorize('from="10.0.0.1"')),
    "forced": ("may do has changed", lambda server: server.authorize('command="nix-store --serve"')),
}


@pytest.mark.parametrize("name", REVOCATIONS)
@pytest_twisted.ensureDeferred
async def test_revokedKeys(makeServer, monkeypatch, name):
    """A key that is removed or changed loses its connection and all sessions, with a line that says why."""
    reason, revoke = REVOCATIONS[name]
    monkeypatch.setattr(keywatchModule, "LOOK_SECONDS", 0.05)
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    await until(reactor, lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    with capturedLogs() as events:
        revoke(server)
        ended = await within(reactor, 10, recorder.ended)
        await within(reactor, 10, server.sessions.all[0].ended)
        await until(reactor, lambda: not server.factory.connections)
    assert ended.exitCode == 1
    assert reason in recorder.errors.decode()
    assert recorder.errors.startswith(b"error: ")
    assert recorder.errors.count(b"\n") == 1
    (event,) = [event for event in events if "is disconnected" in event.get("log_format", "")]
    assert reason in event["reason"]
    assert "me@here" in event["key"]


@pytest_twisted.ensureDeferred
async def test_revokedKeyOfABusyConnection(makeServer, monkeypatch):
    """Nor does a client that reads nothing, in the middle of a reply, keep its sessions."""
    monkeypatch.setattr(keywatchModule, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(transportModule, "_LINGER_SECONDS", 0.2)
    server = makeServer()
    recorder = await connect(server, b"source %d\n" % (64 * MIB))
    await until(reactor, lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    serviceOf(recorder).transport.transport.pauseProducing()
    server.authorize(key=server.hostKey)
    await within(reactor, 10, server.sessions.all[0].ended)
    await until(reactor, lambda: not server.factory.connections)
    recorder.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_otherChangesOfTheFile(makeServer, monkeypatch):
    """Who is still let in stays, whatever else changes: other lines, the comment, a later expiry."""
    monkeypatch.setattr(keywatchModule, "LOOK_SECONDS", 0.01)
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    (connection,) = server.factory.connections
    server.authorize('restrict,expiry-time="29990101",from="127.0.0.1"', comment="another")
    await until(reactor, lambda: connection.entry.comment == "another")
    recorder.transport.write(b"alive")
    await until(reactor, lambda: recorder.data == b"alive")
    recorder.transport.abortConnection()


# The connection


def connectionOf(server):
    (connection,) = server.factory.connections
    return connection


@pytest_twisted.ensureDeferred
async def test_forwardingIsRefused(makeServer):
    """Channels other than sessions, and requests for forwarding, are refused and logged."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    service = serviceOf(recorder)
    failures = []
    service.ssh_CHANNEL_OPEN_FAILURE = lambda packet: failures.append(struct.unpack(">L", packet[4:8])[0])
    with capturedLogs() as events:
        for kind in (b"direct-tcpip", b"x11", b"tun@openssh.com", b"\xff"):
            service.transport.sendPacket(90, NS(kind) + struct.pack(">3L", 5, 100, 100))
        forwarding = service.sendGlobalRequest(b"tcpip-forward", NS(b"") + struct.pack(">L", 0), wantReply=1)
        with pytest.raises(Exception, match="global request failed"):
            await within(reactor, 10, forwarding)
    assert failures == [1, 1, 1, 1]
    refused = [event for event in events if "refused" in event.get("log_format", "")]
    assert len(refused) == 5
    assert all(event["key"].startswith("SHA256:") and event["peer"] for event in refused)
    assert not [event for event in events if event["log_level"].name == "critical"]
    recorder.transport.write(b"alive")
    await until(reactor, lambda: recorder.data == b"alive")
    recorder.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_requestsThatAreRefused(makeServer):
    """Terminals, subsystems, agents, environments and a second command fail; the session goes on."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    for request in (
        b"pty-req",
        b"subsystem",
        b"auth-agent-req@openssh.com",
        b"x11-req",
        b"env",
        b"exec",
        b"shell",
        b"\xff",
    ):
        answer = serviceOf(recorder).sendRequest(recorder.transport, request, NS(b"sftp"), wantReply=1)
        with pytest.raises(Exception, match="channel request failed"):
            await within(reactor, 10, answer)
    recorder.transport.write(b"alive")
    await until(reactor, lambda: recorder.data == b"alive")
    # A client whose output is closed is not served any further.
    serviceOf(recorder).sendRequest(recorder.transport, b"eow@openssh.com", b"")
    await within(reactor, 10, server.sessions.all[0].ended)


@pytest_twisted.ensureDeferred
async def test_tooManyChannels(makeServer):
    """The channels of one connection are limited; the others go on."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    service = serviceOf(recorder)
    opened, refused = [], []
    service.ssh_CHANNEL_OPEN_CONFIRMATION = opened.append
    service.ssh_CHANNEL_OPEN_FAILURE = lambda packet: refused.append(struct.unpack(">L", packet[4:8])[0])
    for number in range(MAX_CHANNELS):
        service.transport.sendPacket(90, NS(b"session") + struct.pack(">3L", number + 1, 100, 100))
    await until(reactor, lambda: len(opened) + len(refused) == MAX_CHANNELS)
    assert refused == [4]
    recorder.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_channelsWithoutSessions(makeServer):
    """What a client sends before it has asked for a session is held by nobody's account, so it is little."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    windows = []
    service = serviceOf(recorder)
    service.ssh_CHANNEL_OPEN_CONFIRMATION = lambda packet: windows.append(struct.unpack_from(">3L", packet)[2])
    for number in range(MAX_CHANNELS - 1):
        service.transport.sendPacket(90, NS(b"session") + struct.pack(">3L", number + 1, 100, 100))
    await until(reactor, lambda: len(windows) == MAX_CHANNELS - 1)
    assert sum(windows) <= 64 * 1024
    recorder.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_halfPackets(makeServer):
    """What a connection holds of a packet that is not complete is little more than the largest of a channel."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    await until(reactor, lambda: server.sessions.all[0].mode is not None)
    (connection,) = server.factory.connections
    recorder.transport.write(bytes(MAX_PACKET))
    await until(reactor, lambda: server.sessions.all[0].received >= MAX_PACKET)
    assert len(connection._opened) <= MAX_PACKET + 5000
    serviceOf(recorder).transport.sendPacket(2, NS(bytes(2 * MAX_PACKET)))
    await within(reactor, 10, server.sessions.all[0].ended)


@pytest_twisted.ensureDeferred
async def test_clientVanishes(makeServer):
    """When TCP closes, each session learns of it at once."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    await until(reactor, lambda: server.sessions.all[0].mode is not None)
    serviceOf(recorder).transport.abort()
    assert isinstance(await within(reactor, 5, server.sessions.all[0].ended), ConnectionLost)
    assert isinstance(await within(reactor, 5, recorder.ended), ConnectionLost)


@pytest_twisted.ensureDeferred
async def test_serviceStops(makeServer):
    """loseConnections ends everybody's sessions."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    server.factory.loseConnections()
    assert isinstance(await within(reactor, 5, recorder.ended), ConnectionLost)
    await within(reactor, 5, server.sessions.all[0].ended)


@pytest.mark.parametrize("stall", ["tcp", "exchange"])
@pytest_twisted.ensureDeferred
async def test_peerThatTakesNothing(makeServer, stall):
    """A peer that provokes answers and reads none, or never finishes a key exchange, is cut off."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    await until(reactor, lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    connection, transport = connectionOf(server), serviceOf(recorder).transport
    if stall == "tcp":
        # What TCP does when its buffer is full, and stays so.
        connection.pauseProducing()
        connection.resumeProducing = lambda: None
        serviceOf(recorder).ssh_REQUEST_FAILURE = lambda packet: None
    else:
        transport.ssh_KEXINIT = lambda packet: None
        transport._seal(b"\x14", transport.ourKexInitPayload[1:])
    with capturedLogs() as events:
        for _ in range(MAX_BACKLOG // 64 + 100):
            transport._seal(b"\x50", NS(b"keepalive@openssh.com") + b"\x01")
        assert isinstance(await within(reactor, 5, server.sessions.all[0].ended), ConnectionLost)
    assert any("does not read" in event["log_format"] for event in events if "log_format" in event)
    await within(reactor, 5, recorder.ended)


@pytest_twisted.ensureDeferred
async def test_writersWaitForTCP(makeServer):
    """While TCP's buffer is full channels send nothing, and go on when it is empty."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    await until(reactor, lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    connection = connectionOf(server)
    connection.pauseProducing()
    recorder.transport.write(b"x" * 1000)
    await until(reactor, lambda: server.sessions.all[0].received == 1000)
    await sleep(reactor, 0.05)
    assert recorder.data == b""
    connection.resumeProducing()
    await until(reactor, lambda: recorder.data == b"x" * 1000)
    recorder.transport.abortConnection()


@pytest_twisted.ensureDeferred
async def test_loginCannotBeStartedAnew(makeServer):
    """A second request for a service, which in Conch would bring new tries and more time, ends the connection."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    serviceOf(recorder).transport.sendPacket(5, NS(b"ssh-userauth"))
    await within(reactor, 5, recorder.ended)
    await until(reactor, lambda: not server.factory.connections)


@pytest_twisted.ensureDeferred
async def test_sequenceNumbersWrap(makeServer):
    """After 2**32 packets the numbers begin again at 0 (RFC 4253, section 6.4)."""
    server = makeServer()
    recorder = await connect(server, b"echo\n")
    await until(reactor, lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    here, there = serviceOf(recorder).transport, connectionOf(server)
    for transport in (here, there):
        transport.outgoingPacketSequence = transport.incomingPacketSequence = 2**32 - 2
    for count in range(1, 6):
        recorder.transport.write(b"x")
        await until(reactor, lambda count=count: len(recorder.data) == count)
    assert here.outgoingPacketSequence < 10
    recorder.transport.abortConnection()


def test_algorithms():
    """Nothing old is offered, and nothing that Terrapin works on: no CBC, ChaCha20, encrypt-then-MAC, compression."""
    offered = transportModule.PacedTransport
    assert {name[-4:] for name in offered.supportedCiphers} == {b"-ctr"}
    assert offered.supportedMACs == [b"hmac-sha2-256", b"hmac-sha2-512"]
    assert offered.supportedCompressions == [b"none"]
    assert not {b"ssh-rsa", b"ssh-dss"} & set(offered.supportedPublicKeys)

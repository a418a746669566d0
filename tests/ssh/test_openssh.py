"""
Our endpoint and OpenSSH's client, over loopback.
"""

import os
import shutil
import tempfile

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock

from nixserve.ssh.connection import KEEPALIVE_SECONDS
from tests.ssh.loopback import MIB, SSH, Child, Server, runSSH
from tests.waiting import sleep, until, within

pytestmark = pytest.mark.skipif(SSH is None, reason="there is no ssh program")

COMMAND = "nix-store --serve --write"


@pytest.fixture
def makeServer():
    """Makes servers that are stopped after the test, in directories with short names for control sockets."""
    servers, directories = [], []

    def make(**options):
        directories.append(tempfile.mkdtemp(prefix="ns"))
        servers.append(Server(reactor, directories[-1], **options))
        return servers[-1]

    yield make
    for server in servers:
        pytest_twisted.blockon(Deferred.fromCoroutine(server.stop()))
    for directory in directories:
        shutil.rmtree(directory)


async def finish(child, seconds=20):
    """The exit status of a child, in bounded time."""
    try:
        return await within(reactor, seconds, child.ended)
    except Exception:
        child.transport.signalProcess("KILL")
        raise


@pytest_twisted.ensureDeferred
async def test_exitStatus(makeServer):
    """Output, standard error and exit status arrive."""
    server = makeServer()
    child = runSSH(server, COMMAND, child=Child(head=b"status 4\n"))
    assert await finish(child) == 4
    assert (child.out, child.err) == (b"out\n", b"err\n")


@pytest.mark.parametrize("options", [(), ("-C",), ("-o", "RekeyLimit=1M")], ids=["plain", "compressed", "rekey"])
@pytest_twisted.ensureDeferred
async def test_upload(makeServer, options):
    """64 MiB to the endpoint; with -C, which we do not take up; with new keys for every megabyte."""
    server = makeServer()
    child = runSSH(server, COMMAND, *options, child=Child(head=b"sink\n", feed=64 * MIB))
    assert await finish(child, 60) == 0
    assert child.out == b"%d\n" % (64 * MIB)
    assert child.err == b""


@pytest.mark.parametrize("options", [(), ("-o", "RekeyLimit=1M")], ids=["plain", "rekey"])
@pytest_twisted.ensureDeferred
async def test_download(makeServer, options):
    """64 MiB from the endpoint, also with new keys for every megabyte."""
    server = makeServer()
    child = runSSH(server, COMMAND, *options, child=Child(b"", b"source %d\n" % (64 * MIB), close=False, keep=False))
    assert await finish(child, 60) == 0
    assert child.count == 64 * MIB


@pytest_twisted.ensureDeferred
async def test_ourRekeying(makeServer, monkeypatch):
    """New keys that we ask for, during a transfer each way at once."""
    monkeypatch.setattr("nixserve.ssh.transport.PacedTransport.rekeyBytes", MIB)
    server = makeServer()
    child = runSSH(server, COMMAND, child=Child(16 * MIB, b"echo\n", keep=False))
    await until(reactor, lambda: server.factory.connections)
    (connection,) = server.factory.connections
    exchanges, newKeys = [], connection.ssh_NEWKEYS
    connection.ssh_NEWKEYS = lambda packet: exchanges.append(newKeys(packet))
    assert await finish(child, 60) == 0
    assert child.count == 16 * MIB
    assert len(exchanges) > 8


@pytest_twisted.ensureDeferred
async def test_slowReader(makeServer):
    """A client that does not read its pipe stops the producer; nothing grows."""
    server = makeServer()
    child = runSSH(server, COMMAND, child=Child(b"", b"source %d\n" % (64 * MIB), close=False, keep=False))
    await until(reactor, lambda: child.count)
    child.transport.pipes[1].pauseProducing()
    await sleep(reactor, 0.3)
    assert server.sessions.all[0].transport.queue.outSize <= 1.5 * MIB
    child.transport.pipes[1].resumeProducing()
    assert await finish(child, 60) == 0
    assert child.count == 64 * MIB


@pytest_twisted.ensureDeferred
async def test_slowSession(makeServer):
    """A session that does not read stops the client; at most a window waits here."""
    server = makeServer()
    child = runSSH(server, COMMAND, child=Child(64 * MIB, b"hold\n"))
    await until(reactor, lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    await sleep(reactor, 0.3)
    session = server.sessions.all[0]
    assert sum(map(len, session.transport._incoming)) <= 2 * MIB
    session.transport.resumeProducing()
    await until(reactor, lambda: session.eof, 60)
    assert session.received == 64 * MIB
    session.transport.exit(0)
    assert await finish(child) == 0


@pytest_twisted.ensureDeferred
async def test_controlMaster(makeServer):
    """Many sessions over one connection: one that is stuck does not hold up the others, and one may end early."""
    server = makeServer()
    path = f"{server.directory}/control"
    master = runSSH(server, "", "-M", "-N", "-S", path)
    await until(reactor, lambda: os.path.exists(path))
    stuck = runSSH(server, COMMAND, "-S", path, child=Child(MIB, b"hold\n"))
    await until(reactor, lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    children = [runSSH(server, COMMAND, "-S", path, child=Child(4 * MIB, b"echo\n", keep=False)) for _ in range(9)]
    assert [await finish(child, 60) for child in children] == [0] * 9
    assert [child.count for child in children] == [4 * MIB] * 9
    assert len(server.factory.connections) == 1
    assert [session.peer.session for session in server.sessions.all] == list(range(1, 11))
    stuck.transport.signalProcess("KILL")
    assert isinstance(await within(reactor, 10, server.sessions.all[0].ended), ConnectionLost)
    child = runSSH(server, COMMAND, "-S", path, child=Child(head=b"status 5\n"))
    assert await finish(child) == 5

    def ended():
        # OpenSSH's client (9.2) misses a signal that comes between its look for one and its poll, until it is woken up.
        if not master.ended.called:
            master.transport.signalProcess("TERM")
        return master.ended.called

    await until(reactor, ended)
    await until(reactor, lambda: not server.factory.connections)


@pytest_twisted.ensureDeferred
async def test_refusedCommand(makeServer):
    """What is not served says so on standard error and exits with 1."""
    server = makeServer()
    for command, text in (("id", b"error: this endpoint runs only"), ("nix-daemon --stdio", b"ssh:// instead of")):
        child = runSSH(server, command)
        assert await finish(child) == 1
        assert text in child.err
        assert child.out == b""
    assert server.sessions.all == []


@pytest_twisted.ensureDeferred
async def test_shell(makeServer):
    """ssh without a command, from a terminal or not, is told what this is."""
    server = makeServer()
    child = runSSH(server, "")
    assert await finish(child) == 1
    assert b"This is a Nix store, not a shell." in child.err
    child = runSSH(server, "", terminal=True)
    assert await finish(child) == 1
    assert b"PTY allocation request failed" in child.out
    assert b"This is a Nix store, not a shell." in child.out


@pytest_twisted.ensureDeferred
async def test_subsystem(makeServer):
    """sftp and other subsystems are refused."""
    child = runSSH(makeServer(), "sftp", "-s")
    assert await finish(child) == 255
    assert b"subsystem request failed" in child.err


@pytest_twisted.ensureDeferred
async def test_forwardings(makeServer):
    """Forwarding of ports both ways, of the agent and of X11 is refused; the session is served all the same."""
    server = makeServer()
    options = ("-A", "-o", "ForwardX11=yes", "-R", "0:127.0.0.1:1", "-o", "SendEnv=LC_ALL")
    child = runSSH(server, COMMAND, *options, child=Child(head=b"status 0\n"))
    assert await finish(child) == 0
    assert b"remote port forwarding failed" in child.err
    child = runSSH(server, "", "-W", "127.0.0.1:1")
    assert await finish(child) == 255
    assert b"only sessions are offered here" in child.err


@pytest_twisted.ensureDeferred
async def test_wrongKey(makeServer):
    """A key that is not known does not get in, and no other method is offered."""
    server = makeServer()
    server.authorize(key=server.hostKey)
    child = runSSH(server, COMMAND)
    assert await finish(child) == 255
    assert b"Permission denied (publickey)" in child.err


@pytest.mark.parametrize(
    "kind", [["-t", "rsa", "-b", "2048"], ["-t", "ecdsa"], ["-t", "ed25519"]], ids=lambda kind: kind[1]
)
@pytest_twisted.ensureDeferred
async def test_kindsOfUserKeys(makeServer, kind):
    """Keys made by ssh-keygen log in; RSA with a SHA-2 signature, which the client uses only if we announce it."""
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        pytest.skip("there is no ssh-keygen")
    server = makeServer()
    path = f"{server.directory}/made"
    child = Child()
    reactor.spawnProcess(child, keygen, [keygen, "-q", *kind, "-N", "", "-C", "made", "-f", path], {})
    assert await finish(child) == 0
    with open(path + ".pub") as public, open(f"{server.directory}/authorized_keys", "w") as keys:
        keys.write(public.read())
    child = runSSH(server, COMMAND, "-i", path, child=Child(head=b"status 0\n"))
    assert await finish(child) == 0
    assert server.sessions.all[0].peer.key.endswith(" made")


@pytest.mark.parametrize("signal", ["KILL", "TERM", "INT"])
@pytest_twisted.ensureDeferred
async def test_clientIsKilled(makeServer, signal):
    """A client that is killed ends its session at once."""
    server = makeServer()
    child = runSSH(server, COMMAND, child=Child(head=b"echo\nx", close=False))
    await until(reactor, lambda: child.out == b"x")
    child.transport.signalProcess(signal)
    assert isinstance(await within(reactor, 5, server.sessions.all[0].ended), ConnectionLost)
    await within(reactor, 5, child.ended)


@pytest_twisted.ensureDeferred
async def test_keepalive(makeServer):
    """A client that is there answers the keepalive; one that is stopped is disconnected, and its session ends."""
    clock = Clock()
    server = makeServer(clock=clock)
    child = runSSH(server, COMMAND, child=Child(head=b"echo\n", close=False))

    async def pump(condition):
        async def turn():
            clock.advance(0)
            await sleep(reactor, 0.005)

        for _ in range(2000):
            if condition():
                return
            await turn()
        raise AssertionError("the condition did not come true")

    await pump(lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    (connection,) = server.factory.connections
    for _ in range(10):
        clock.advance(KEEPALIVE_SECONDS)
        await pump(lambda: connection.heard)
    child.transport.signalProcess("STOP")
    for _ in range(4):
        assert server.sessions.all[0].lost is None
        clock.advance(KEEPALIVE_SECONDS)
    await pump(lambda: server.sessions.all[0].lost is not None)
    assert server.sessions.all[0].lost.check(ConnectionLost)
    child.transport.signalProcess("KILL")
    await within(reactor, 5, child.ended)


@pytest_twisted.ensureDeferred
async def test_unreadErrors(makeServer):
    """A client whose standard error is not read still gets the reply."""
    server = makeServer()
    child = runSSH(server, COMMAND, child=Child(head=b"errors 4000000\n", close=False))
    child.transport.pipes[2].pauseProducing()
    await until(reactor, lambda: server.sessions.all and server.sessions.all[0].mode is not None)
    await sleep(reactor, 0.2)
    child.transport.write(b"ask")
    await until(reactor, lambda: b"answer\n" in child.out)
    child.transport.signalProcess("KILL")
    child.transport.pipes[2].resumeProducing()
    await within(reactor, 5, child.ended)

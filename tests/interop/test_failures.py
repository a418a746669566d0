"""
What can happen to a session of our client happens, at several moments: each ends soon, with an error that says which
side and what; afterwards both stores are clean, and copying again copies what is missing and nothing else.
"""

import contextlib
import fcntl
import os
import re
import signal
import socket
import sys
import time
from dataclasses import dataclass

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater

from nixserve.errors import NixServeError, RemoteError, StoreError
from nixserve.protocol.copying import copyClosure
from nixserve.ssh import connection
from nixserve.testing import makeNar
from tests.interop.building import requireSandbox
from tests.interop.conversations import SERVER_MAGIC
from tests.interop.faults import AtMiddle, Proxy, assertClean, kill, smallDisk
from tests.interop.remotes import (
    Remote,
    basic,
    builderPids,
    here,
    instantiate,
    locks,
    outputsOf,
    readDerivation,
    wayName,
)
from tests.interop.stores import add, assertSame, infos, opened, temporaryRoots
from tests.interop.watching import MIB

#: Seconds within which everything that has failed has ended.
SOON = 5

SIZE = 16 * MIB


@dataclass(frozen=True)
class Cargo:
    """
    A closure to be copied.

    @ivar paths: each refers to the one before.
    @ivar big: the one in the middle, in which things happen.
    @ivar builds: derivations by name.
    """

    root: object
    paths: list
    big: str
    builds: dict

    @property
    def top(self):
        return self.paths[-1:]


@pytest.fixture(scope="module")
def cargo(scratch, nix):
    """A store that nobody changes."""
    place = scratch / "cargo"
    place.mkdir()
    root = place / "root"
    with opened(root) as session:
        paths = []
        for number in range(7):
            contents = os.urandom(SIZE) if number == 3 else b"%d" % number
            paths.append(add(session, "big" if number == 3 else f"small-{number}", makeNar(contents), paths[-1:]))
    return Cargo(root, paths, paths[3], instantiate(nix, place, root))


class Scene:
    """
    A session to which something is going to happen.

    @ivar happen: what, called without arguments when the moment has come.
    """

    def __init__(self, remote, cargo, workers, back, port=None):
        self.remote, self.cargo, self.workers, self.back, self.port = remote, cargo, workers, back, port
        self.happen = None
        self.happened = None
        self.log = b""
        self.operation = None

    def now(self):
        """The moment has come."""
        if self.happened is None:
            self.happened = time.monotonic()
            self.happen()

    def heard(self, data):
        """Standard error. A builder says when it has begun."""
        self.log += data
        if b"begun" in self.log:
            self.now()

    async def run(self, moment):
        """
        Do what is to be interrupted.

        @return: what it failed with.
        """
        client = await self.remote.connect(self.heard, self.port)
        self.client = client
        try:
            with pytest.raises((NixServeError, CancelledError)) as raised:
                await Deferred.fromCoroutine(getattr(self, moment)(client)).addTimeout(4 * SOON, reactor)
        finally:
            client.cut()
        seconds = time.monotonic() - self.happened
        await client.ended.addTimeout(SOON, reactor)
        assert seconds < SOON
        return raised.value

    async def question(self, client):
        """The remote waits for a collector before it answers."""
        with collectorOf(self.remote.root):
            reactor.callLater(0.3, self.now)
            async with here(self.workers, self.cargo.root) as session:
                self.operation = copyClosure(session, client, self.cargo.top)
                await self.operation

    async def upload(self, client):
        """A large object is on its way there."""
        async with here(self.workers, self.cargo.root) as session:
            self.operation = copyClosure(session, client, self.cargo.top, progress=AtMiddle(self.now))
            await self.operation

    async def download(self, client):
        """A large object is on its way here."""
        async with here(self.workers, self.cargo.root) as session:
            await copyClosure(session, client, self.cargo.top)
        async with here(self.workers, self.back) as session:
            self.operation = copyClosure(client, session, self.cargo.top, progress=AtMiddle(self.now))
            await self.operation

    async def build(self, client):
        """A builder runs there."""
        drv = self.cargo.builds["slow"]
        self.operation = client.buildDerivation(drv, basic(readDerivation(self.cargo.root, drv)))
        await self.operation

    def thing(self, moment):
        """What an error is about."""
        return {
            "question": "",
            "upload": f"adding '{self.cargo.big}'",
            "download": f"fetching '{self.cargo.big}'",
            "build": f"building '{self.cargo.builds['slow']}'",
        }[moment]


@contextlib.contextmanager
def collectorOf(root):
    """A collector of a store that neither ends nor answers: whoever wants roots waits for it."""
    state = root / "nix/var/nix"
    with opened(root), (state / "gc.lock").open("a+b") as lock, socket.socket(socket.AF_UNIX) as listening:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Without its socket real Nix takes it for gone.
        (state / "gc-socket").mkdir(exist_ok=True)
        listening.bind(str(state / "gc-socket/socket"))
        listening.listen()
        yield


async def copyAgain(nix, scene, remote, moment):
    """Copying again copies exactly what is missing, in the direction in which it was interrupted."""
    cargo, root = scene.cargo, scene.back if moment == "download" else remote.root
    before = infos(nix, root).keys()
    client = await remote.connect()
    async with here(scene.workers, cargo.root) as source:
        copied = await copyClosure(source, client, cargo.top)
        if moment == "download":
            async with here(scene.workers, scene.back) as back:
                copied = await copyClosure(client, back, cargo.top)
    assert [info.path for info in copied.infos] == [path for path in cargo.paths if path not in before]
    assert copied.present == len(before & set(cargo.paths))
    await client.close()
    assertSame(nix, cargo.root, root, cargo.paths)


# --- a session that has begun ---------------------------------------------------------------------------------

MOMENTS = ["question", "upload", "download", "build"]

#: How a server ends, and what is said then.
ENDS = {
    "killed": (signal.SIGKILL, "it was killed by signal 9"),
    "terminated": (signal.SIGTERM, "interrupted by the user|the server is being stopped"),
}


def config():
    """For servers that build."""
    return requireSandbox()["NIX_CONFIG"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("who", ["real", "ours"])
@pytest_twisted.ensureDeferred
async def test_serverEnds(nix, request, directory, workers, cargo, who, moment, end):
    """The server's process is killed, or told to end."""
    number, text = ENDS[end]
    remote = Remote(request, who, "child", directory / "remote", config())
    scene = Scene(remote, cargo, workers, directory / "back")
    scene.happen = lambda: kill(remote.serverPids(), number)
    error = await scene.run(moment)
    assert isinstance(error, RemoteError)
    assert re.search(f"(?s)^{remote.name}: {scene.thing(moment)}.*({text})", str(error)), str(error)
    await assertAftermath(nix, scene, remote, moment, killed=end == "killed")


@pytest.mark.parametrize(
    ("who", "by", "moment"),
    [
        *(("real", "child", moment) for moment in MOMENTS),
        *(("ours", "child", moment) for moment in MOMENTS),
        ("real", "conch", "upload"),
        ("real", "ssh", "build"),
        ("ours", "ssh", "download"),
        ("ours", "conch", "build"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_cancelled(nix, request, directory, workers, cargo, who, by, moment):
    """Whoever waits for a copy or a build gives up, as at Ctrl-C: the server ends too."""
    remote = Remote(request, who, by, directory / "remote", config())
    scene = Scene(remote, cargo, workers, directory / "back")
    scene.happen = lambda: scene.operation.cancel()
    error = await scene.run(moment)
    assert isinstance(error, CancelledError) or "cancelled" in str(error)
    await assertAftermath(nix, scene, remote, moment)


#: What ssh and Conch say of a connection that is gone.
LOST = "[Cc]onnection (was )?(reset|lost|aborted|closed|to the other side was lost)|Broken pipe|exited with status 255"


@pytest.mark.parametrize(
    ("who", "by", "moment"),
    [
        *((who, by, "upload") for who in ("real", "ours") for by in ("ssh", "conch")),
        ("real", "ssh", "download"),
        ("ours", "conch", "download"),
        ("real", "conch", "build"),
        ("ours", "ssh", "build"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_connectionDropped(nix, request, directory, workers, cargo, who, by, moment):
    """The network drops the connection."""
    remote = Remote(request, who, by, directory / "remote", config())
    proxy = Proxy(remote.server.port)
    try:
        scene = Scene(remote, cargo, workers, directory / "back", proxy.port)
        scene.happen = proxy.cut
        error = await scene.run(moment)
    finally:
        await proxy.stop()
    assert isinstance(error, RemoteError)
    assert str(error).startswith(f"{remote.name}: {scene.thing(moment)}: "), str(error)
    assert re.search(LOST, str(error)), str(error)
    await assertAftermath(nix, scene, remote, moment)


@pytest.mark.parametrize("moment", ["upload", "download"])
@pytest.mark.parametrize("who", ["real", "ours"])
@pytest_twisted.ensureDeferred
async def test_sshKilled(nix, request, directory, workers, cargo, who, moment):
    """The ssh program on this side is killed."""
    remote = Remote(request, who, "ssh", directory / "remote", config())
    scene = Scene(remote, cargo, workers, directory / "back")
    scene.happen = lambda: os.kill(scene.client.transport._process.pid, signal.SIGKILL)
    error = await scene.run(moment)
    assert str(error) == f"{remote.name}: {scene.thing(moment)}: unexpected end-of-file: it was killed by signal 9"
    await assertAftermath(nix, scene, remote, moment)


@pytest.mark.parametrize("moment", ["upload", "download", "build"])
@pytest_twisted.ensureDeferred
async def test_serviceKilled(nix, request, directory, workers, cargo, moment):
    """The whole service is killed; another one on the same store takes the rest."""
    remote = Remote(request, "ours", "conch", directory / "remote", config())
    scene = Scene(remote, cargo, workers, directory / "back")
    scene.happen = remote.service.process.kill
    error = await scene.run(moment)
    assert str(error).startswith(f"{remote.name}: {scene.thing(moment)}: "), str(error)
    remote.service.process.wait(SOON)
    await assertAftermath(nix, scene, Remote(request, "ours", "conch", directory / "remote"), moment, killed=True)


async def assertAftermath(nix, scene, remote, moment, killed=False):
    """Both stores are clean, no server or builder runs, and copying again works."""
    output = outputsOf(readDerivation(scene.cargo.root, scene.cargo.builds["slow"]))["out"]
    if moment == "build" and killed and remote.who == "real":
        # Its builders outlive it.
        kill(builderPids(output))
    await soon(lambda: builderPids(output) == [], "the builder still runs")
    await assertEnded(remote, killed)
    assertClean(nix, remote.root, [scene.cargo.big], killed=killed)
    assertClean(nix, scene.cargo.root)
    if scene.back.exists():
        assertClean(nix, scene.back, [scene.cargo.big])
    await copyAgain(nix, scene, remote, moment)
    await assertEnded(remote, killed)
    assertClean(nix, remote.root, killed=killed)


async def assertEnded(remote, killed):
    """Soon no server runs for a session, and none holds a lock or a root."""
    await soon(lambda: remote.serverPids() == [], "the server still runs")
    await soon(lambda: locks(remote.root) == [], "something is still locked")
    if not killed:
        await soon(lambda: temporaryRoots(remote.root) == [], "there are still roots")


async def soon(condition, message):
    """Wait for a condition without stopping the reactor."""
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, message
        await deferLater(reactor, 0.02)


# --- before there is a session --------------------------------------------------------------------------------

HELLO = f"import os,sys; os.write(1, ({SERVER_MAGIC}).to_bytes(8, 'little') + (0x207).to_bytes(8, 'little'));"

#: What is in the place of a server, and what is said of it.
STRANGERS = {
    "text": ("echo Welcome to the machine", "protocol mismatch, got b'Welcome to the machine"),
    "a message": ("echo error: no such store >&2; exit 3", "the remote said: error: no such store"),
    "silent exit": ("exit 7", "unexpected end-of-file: it exited with status 7"),
    "no program": ("nix-store-of-nobody --serve", "nix-store-of-nobody: .*not found"),
    "half a hello": ("printf abcd", "protocol mismatch, got b'abcd'"),
}


@pytest.mark.parametrize("what", STRANGERS)
@pytest.mark.parametrize("way", ["child", "ssh"])
@pytest_twisted.ensureDeferred
async def test_noServer(request, directory, way, what):
    """Something that is no server answers, or nothing does."""
    script, text = STRANGERS[what]
    remote = Remote(request, "real", way, directory / "remote")
    if way == "ssh":
        remote.server.force(script)
    client, _ = remote.attach(command=["sh", "-c", script])
    begun = time.monotonic()
    question = client.queryValidPaths([])
    for waiting in (client.ready, question):
        with pytest.raises(RemoteError, match=f"^{remote.name}: .*{text}"):
            await waiting
    await client.close()
    assert time.monotonic() - begun < SOON


@pytest.mark.parametrize("way", [("real", "child"), ("real", "ssh")], ids=wayName)
@pytest_twisted.ensureDeferred
async def test_beforeHello(request, directory, way):
    """A server that never says hello is killed; or whoever waits for it cuts the session."""
    for how in ("killed", "cut"):
        remote = Remote(request, *way, directory / "remote")
        script = "exec cat >/dev/null"
        if way[1] == "ssh":
            remote.server.force(script)
        client, transport = remote.attach(command=["sh", "-c", script])
        question = client.queryValidPaths([])
        await deferLater(reactor, 0.5)
        begun = time.monotonic()
        if how == "killed":
            os.kill(transport._process.pid, signal.SIGKILL)
        else:
            client.cut()
        text = "it was killed by signal 9" if how == "killed" else "the session was cut"
        for waiting in (client.ready, question):
            with pytest.raises(RemoteError, match=f"^{remote.name}: .*{text}"):
                await waiting
        await client.ended
        assert time.monotonic() - begun < SOON


@pytest_twisted.ensureDeferred
async def test_textInReply(request, directory):
    """Text comes where a reply should be: the error shows it."""
    remote = Remote(request, "real", "child", directory / "remote")
    script = HELLO + "os.read(0, 1000); os.write(1, b'Connection to example.org closed by remote host.\\n')"
    client, _ = remote.attach(command=[sys.executable, "-c", script])
    with pytest.raises(RemoteError, match=f"^{remote.name}: .*the bytes are the text 'Connecti'"):
        await client.queryValidPaths([])
    await client.close()


# --- no room --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["real", "ours"])
@pytest_twisted.ensureDeferred
async def test_remoteDiskFull(nix, request, directory, workers, cargo, who):
    """The remote's disk fills up: its own words say so, and what arrived stays."""
    with smallDisk(directory / "disk", SIZE - MIB) as resize:
        remote = Remote(request, who, "child", directory / "disk" / "remote")
        scene = Scene(remote, cargo, workers, directory / "back")
        scene.happen = lambda: None
        error = await scene.run("upload")
        assert re.search(f"^{remote.name}: adding '{cargo.big}': .*No space left on device", str(error)), str(error)
        resize(SIZE * 5)
        await assertAftermath(nix, scene, remote, "upload")


@pytest.mark.parametrize("who", ["real", "ours"])
@pytest_twisted.ensureDeferred
async def test_diskFullHere(nix, request, directory, workers, cargo, who):
    """The disk here fills up in a download."""
    remote = Remote(request, who, "child", directory / "remote")
    with smallDisk(directory / "disk", SIZE - MIB) as resize:
        scene = Scene(remote, cargo, workers, directory / "disk" / "back")
        scene.happen = lambda: None
        error = await scene.run("download")
        assert isinstance(error, StoreError)
        assert cargo.big in str(error) and "No space left on device" in str(error), str(error)
        resize(SIZE * 5)
        await assertAftermath(nix, scene, remote, "download")


@pytest_twisted.ensureDeferred
async def test_diskFullOfSmall(nix, request, directory, workers):
    """The disk here fills up with small objects, of which many are stored at once: what is there is whole."""
    remote = Remote(request, "real", "child", directory / "remote")
    with opened(remote.root) as session:
        paths = []
        for number in range(300):
            paths.append(add(session, f"small-{number}", makeNar(os.urandom(60_000)), paths[-1:]))
    with smallDisk(directory / "disk", SIZE - MIB) as resize:
        client = await remote.connect()
        async with here(workers, directory / "disk" / "back") as session:
            with pytest.raises(StoreError, match=r"No space left on device|disk is full"):
                await copyClosure(client, session, paths[-1:])
        await client.ended
        there = infos(nix, directory / "disk" / "back")
        assert there.keys() == set(paths[: len(there)]) and len(there) > 10
        resize(SIZE * 5)
        client = await remote.connect()
        async with here(workers, directory / "disk" / "back") as session:
            copied = await copyClosure(client, session, paths[-1:])
        await client.close()
        assert [info.path for info in copied.infos] == paths[len(there) :]
        assertClean(nix, directory / "disk" / "back")
        assertSame(nix, remote.root, directory / "disk" / "back", paths)


# --- silence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "by", "moment"), [("real", "child", "upload"), ("ours", "child", "download"), ("real", "ssh", "upload")]
)
@pytest_twisted.ensureDeferred
async def test_serverStopped(nix, request, directory, workers, cargo, who, by, moment):
    """
    A server that is stopped says nothing and is not gone: the copy waits, for the connection is alive, until somebody
    gives up; that works at once.
    """
    remote = Remote(request, who, by, directory / "remote", config())
    scene = Scene(remote, cargo, workers, directory / "back")
    stopped = []

    def happen():
        stopped.extend(remote.serverPids())
        kill(stopped, signal.SIGSTOP)
        reactor.callLater(0.5, scene.operation.cancel)

    scene.happen = happen
    error = await scene.run(moment)
    assert isinstance(error, CancelledError) or "cancelled" in str(error)
    if by == "ssh":
        kill(stopped, signal.SIGCONT)
    await assertAftermath(nix, scene, remote, moment, killed=by == "child")


@pytest.mark.parametrize("way", [("real", "ssh"), ("real", "conch"), ("ours", "conch")], ids=wayName)
@pytest_twisted.ensureDeferred
async def test_networkSilent(nix, request, directory, workers, cargo, monkeypatch, way):
    """
    A network that carries nothing any more without saying so is noticed by the questions of SSH: of ssh where it is
    told to ask, of ours always. Both ask often here.
    """
    monkeypatch.setattr(connection, "KEEPALIVE_SECONDS", 0.5)
    remote = Remote(request, *way, directory / "remote")
    proxy = Proxy(remote.server.port)
    client = await remote.connect(
        port=proxy.port, options=["-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1"]
    )
    try:
        proxy.freeze()
        begun = time.monotonic()
        with pytest.raises(RemoteError, match=f"^{remote.name}: .*") as raised:
            await client.queryValidPaths([]).addTimeout(2 * SOON, reactor)
        assert time.monotonic() - begun < SOON
        print(raised.value)
    finally:
        await proxy.stop()
        client.cut()
        await client.ended

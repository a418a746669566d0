"""
L{nixserve.remote.store}: the contract over sessions of the protocol, and what only a remote store has.

What blocks runs in a thread of the reactor's pool, as in a service; the reactor is that of pytest-twisted.
"""

import os
import shutil
import subprocess
import tempfile
import threading
import time
import unittest
from dataclasses import replace

import pytest
import pytest_twisted
from twisted.internet import reactor, threads
from twisted.internet.defer import CancelledError, Deferred, fail
from twisted.internet.task import deferLater

from nixserve.codec.hashes import hashBytes
from nixserve.codec.storepath import StoreDir
from nixserve.errors import LocalProtocolError, RemoteError, StoreError
from nixserve.protocol.childprocess import ProcessTransport
from nixserve.protocol.client import ServeClient
from nixserve.remote.address import RemoteAddress
from nixserve.remote.store import RemoteStore
from nixserve.store.api import Busy, InvalidPath
from nixserve.store.files import deletePath
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.store.memory import MemoryStore
from nixserve.store.uploads import LOOK_SECONDS
from nixserve.testing import FakeStore, Joined, StoreContract, addObject, makeInfo, makeNar
from tests.interop.nix import NIX_CONFIG, ourProgram, requireProgram
from tests.realcollector import collecting

LARGE = makeNar({"a": bytes(range(256)) * 40_000, "b": b"x"})
"""10 MB."""


def inThread(function, *arguments):
    """What a function returns that blocks."""
    return threads.deferToThread(function, *arguments)


def addSlowly(session, info, nar):
    """Add an object in pieces, as it comes from a network."""
    writer = session.addToStore(info)
    for start in range(0, len(nar), 65536):
        writer.feed(nar[start : start + 65536])
    writer.finish()


def pause(seconds=0.1):
    """A while later."""
    return deferLater(reactor, seconds)


# --- the contract -----------------------------------------------------------------------------------------


class RemoteContract(StoreContract):
    """The contract, with what the protocol does not carry."""

    def run(self, result=None):
        """Each test runs with all around it in a thread."""
        pytest_twisted.blockon(inThread(super().run, result))

    def makeRoot(self):
        """A directory for a store, gone after the test."""
        self.root = tempfile.mkdtemp(prefix="nixserve-test-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.addCleanup(shutil.rmtree, self.root)
        self.addCleanup(subprocess.run, ["chmod", "-R", "u+w", self.root], check=False)
        return self.root

    def told(self, info):
        return replace(info, registrationTime=0, ultimate=False)

    def test_registrationTime(self):
        """The protocol does not say when something was registered."""
        path = self.add("x", registrationTime=5)
        self.assertEqual(self.session.queryPathInfos([path])[path].registrationTime, 0)


class ChildContract(RemoteContract):
    """The contract over a child process for each remote session."""

    def makeStore(self):
        command = self.command(self.makeRoot())
        environment = {**os.environ, "NIX_CONFIG": NIX_CONFIG}

        def open(onError):
            client = ServeClient(StoreDir(), onError, "child", reactor)
            ProcessTransport.spawn(client, reactor, command, environment)
            return client.ready.addCallback(lambda _: client)

        return RemoteStore(reactor, open)

    def collectGarbage(self, store):
        program = requireProgram("nix-store")
        command = [program, "--store", self.root, "--gc"]
        collecting(lambda: subprocess.run(command, capture_output=True, timeout=60)).check_returncode()


class RealNixTests(ChildContract, unittest.TestCase):
    """Real Nix at the other end."""

    # It takes an object for the lock file that it is called like, and then spins for ever.
    test_namedLikeALockFile = None
    test_namedLikeALockFileInUse = None

    def command(self, root):
        return [requireProgram("nix-store"), "--serve", "--write", "--store", root]


class OurProgramTests(ChildContract, unittest.TestCase):
    """Our program at the other end, where that is another one than in L{OurServerTests}."""

    def command(self, root):
        return [ourProgram("nixserve-store"), "--serve", "--write", "--store", root]


# Starting it takes half a second, often several times for a test: one test for each thing that the process matters to.
for name in dir(StoreContract):
    if name.startswith("test_") and name not in (
        *("test_narRoundTrip", "test_wrongHash", "test_closeFreesLocks", "test_abort", "test_export"),
        *("test_import", "test_roots", "test_rootsOfAdded", "test_addSmallPaths"),
    ):
        setattr(OurProgramTests, name, None)


class OurServerTests(RemoteContract, unittest.TestCase):
    """Our server on a store on disk at the other end, in this process."""

    def makeStore(self):
        store = LocalStore(StoreLayout.underRoot(self.makeRoot()), reservedSize=0)
        self.addCleanup(store.close)
        remote = Remote(store)
        self.addCleanup(remote.assertFreed)
        return RemoteStore(reactor, remote.open)

    def collectGarbage(self, store):
        program = requireProgram("nix-store")
        command = [program, "--store", self.root, "--gc"]
        collecting(lambda: subprocess.run(command, capture_output=True, timeout=60)).check_returncode()


class MemoryTests(RemoteContract, unittest.TestCase):
    """Our server on a store in memory."""

    def makeStore(self):
        self.inner = MemoryStore()
        return RemoteStore(reactor, Remote(self.inner).open)

    def collectGarbage(self, store):
        threads.blockingCallFromThread(reactor, self.inner.collectGarbage)


# --- what only a remote store has -------------------------------------------------------------------------


class Remote:
    """
    A server of ours in this process.

    @ivar joined: all sessions that were ever opened on it.
    @ivar refusals: what the next attempts to open one fail with.
    """

    def __init__(self, store, **options):
        self.store = store
        self.options = options
        self.joined = []
        self.refusals = []

    def open(self, onError):
        """Opens a session."""
        if self.refusals:
            return fail(self.refusals.pop(0))
        joined = Joined(self.store, reactor=reactor, onError=onError, name="there", **self.options)
        self.joined.append(joined)
        return joined.client.ready.addCallback(lambda _: joined.client)

    @property
    def alive(self):
        """Whether each session is, in the order in which they were opened."""
        return [not joined.pair.over for joined in self.joined]

    def assertFreed(self):
        """Nothing is left."""
        assert not any(self.alive)


@pytest.fixture
def far():
    """The store at the other end."""
    return FakeStore()


@pytest.fixture
def remote(far):
    """What serves it."""
    return Remote(far)


@pytest.fixture
def store(remote):
    """The same store, from here."""
    store = RemoteStore(reactor, remote.open)
    yield store
    pytest_twisted.blockon(inThread(store.close))
    remote.assertFreed()


@pytest.fixture
def session(store):
    """A session on it."""
    return store.openSession()


@pytest_twisted.ensureDeferred
async def test_notInTheReactor(store, session):
    """Whoever would block the reactor for ever is told so instead; closing is possible there."""
    with pytest.raises(LocalProtocolError, match="use it in a worker's thread"):
        session.queryValidPaths([makeInfo("x", b"").path])
    session.close()
    store.close()


@pytest_twisted.ensureDeferred
async def test_opensWhatItNeeds(far, remote, session):
    """Nothing is opened before it is needed; questions need one session, transfers one more, which is used again."""
    info = far.add("x", b"x")
    assert remote.alive == []
    assert await inThread(session.queryValidPaths, [info.path]) == {info.path}
    assert remote.alive == [True]
    for _ in range(3):
        assert await inThread(lambda: b"".join(session.narFromPath(info.path))) == makeNar(b"x")
    await inThread(addObject, session, makeInfo("y", makeNar(b"y")), makeNar(b"y"))
    assert remote.alive == [True, True]
    await inThread(session.close)
    assert remote.alive == [False, False]


@pytest_twisted.ensureDeferred
async def test_asksOnce(far, session):
    """What was found valid while it was a root is not asked about again, nor made a root again."""
    infos = [far.add(str(number), b"") for number in range(3)]
    paths = [info.path for info in infos]
    await inThread(session.addTempRoots, paths)
    del far.calls[:]
    await inThread(session.addTempRoots, paths)
    assert await inThread(session.queryValidPaths, paths) == set(paths)
    assert far.names == []


@pytest_twisted.ensureDeferred
async def test_failureKeepsRoots(far, remote, session):
    """An object that the remote refuses costs the transfer, not the roots; the reason is said."""
    kept = far.add("kept", b"")
    await inThread(session.addTempRoots, [kept.path])
    for call in ("addSmallPaths", "addToStore"):
        far.fail(call, StoreError("the disk is full"))
    for number, nar in enumerate([makeNar(b"small"), LARGE]):
        info = makeInfo(f"x-{number}", nar)
        with pytest.raises(RemoteError, match=f"there: adding '{info.path}': the remote said: error: the disk is full"):
            await inThread(addObject, session, info, nar)
        assert remote.alive[0] and not any(remote.alive[1:])
        await inThread(addObject, session, info, nar)
    far.inner.collectGarbage()
    assert far.valid([kept]) == [kept]


@pytest_twisted.ensureDeferred
async def test_doomed(far, remote, session):
    """An object whose contents are wrong is refused here: a small one is never sent, a large one is cut off."""
    wrong = hashBytes("sha256", b"")
    with pytest.raises(StoreError, match="hash mismatch importing path"):
        await inThread(addObject, session, makeInfo("x", makeNar(b"x"), narHash=wrong), makeNar(b"x"))
    assert remote.alive == [True]
    with pytest.raises(StoreError, match="hash mismatch importing path"):
        await inThread(addSlowly, session, makeInfo("y", LARGE, narHash=wrong), LARGE)
    await pause()
    assert remote.alive == [True, False]
    assert "finish" not in far.names


@pytest_twisted.ensureDeferred
async def test_slowRemote(remote, session):
    """As long as the remote takes nothing, feeding waits, and only a little has been taken."""
    info = makeInfo("x", LARGE)
    writer = await inThread(session.addToStore, info)
    fed = []

    def feed():
        for start in range(0, len(LARGE), 65536):
            writer.feed(LARGE[start : start + 65536])
            fed.append(start)
            if len(fed) == 20:
                remote.joined[-1].pair.serverSide.paused = True
        writer.finish()

    feeding = threads.deferToThread(feed)
    await pause(0.2)
    assert 20 <= len(fed) < 60 and not feeding.called
    remote.joined[-1].pair.serverSide.resumeProducing()
    await feeding
    assert remote.joined[-1].pair.clientSide.mostUnread < 2 << 20
    assert await inThread(lambda: b"".join(session.narFromPath(info.path))) == LARGE


@pytest_twisted.ensureDeferred
async def test_slowReader(far, remote, session):
    """As long as nobody reads on, the remote waits."""
    info = far.add("x", {"a": bytes(range(256)) * 40_000, "b": b"x"})
    stream = await inThread(session.narFromPath, info.path)
    first = await inThread(next, stream)
    await pause(0.2)
    assert len(first) <= remote.joined[-1].pair.serverSide.sent < 3 << 20
    assert first + await inThread(b"".join, stream) == LARGE


@pytest_twisted.ensureDeferred
async def test_abandonedStream(far, remote, session):
    """A stream that is given up is cut off, alone; the next one has another session."""
    large = far.add("x", {"a": bytes(range(256)) * 40_000, "b": b"x"})
    stream = await inThread(session.narFromPath, large.path)
    await inThread(next, stream)
    stream.close()
    await pause()
    assert remote.alive == [True, False]
    assert await inThread(lambda: b"".join(session.narFromPath(large.path))) == LARGE
    assert remote.alive == [True, False, True]


@pytest_twisted.ensureDeferred
async def test_streamsAtOnce(far, remote, session):
    """A stream that is read while another one is, is in nobody's way."""
    infos = [far.add(name, {"a": bytes(1_000_000), "b": name.encode()}) for name in ("x", "y")]

    def both():
        first, second = (session.narFromPath(info.path) for info in infos)
        start = next(first)
        return b"".join(second), start + b"".join(first)

    assert [len(nar) for nar in await inThread(both)] == [info.narSize for info in infos]
    await pause()
    # One of the two is kept for later.
    assert sum(remote.alive) == 2


@pytest_twisted.ensureDeferred
async def test_narsFromPaths(far, session):
    """Many NARs are one stream; what is not valid is said when the stream has come there."""
    infos = [far.add(f"x-{number}", str(number).encode()) for number in range(300)]
    paths = [info.path for info in infos]
    expected = b"".join(makeNar(str(number).encode()) for number in range(300))
    assert await inThread(lambda: b"".join(session.narsFromPaths(paths))) == expected
    assert await inThread(lambda: b"".join(session.narsFromPaths([]))) == b""
    missing = makeInfo("missing", b"").path
    with pytest.raises(InvalidPath):
        await inThread(session.narsFromPaths, [missing, *paths])
    stream = await inThread(session.narsFromPaths, [paths[0], missing, paths[1]])
    assert await inThread(next, stream) == makeNar(b"0")
    with pytest.raises(InvalidPath):
        await inThread(next, stream)


@pytest_twisted.ensureDeferred
async def test_damage(far, session):
    """What has changed at the other end since it was registered is not exported."""
    info = far.add("x", b"x")
    far.inner._objects[info.path] = replace(far.inner._objects[info.path], nar=makeNar(b"y"))
    with pytest.raises(StoreError, match=f"hash of path '{info.path}' has changed"):
        await inThread(lambda: b"".join(session.exportPaths([info.path])))


@pytest_twisted.ensureDeferred
async def test_remoteDies(far, remote, store, session):
    """A remote that is gone fails what is asked, with its name, from then on; the next session opens another."""
    info = far.add("x", b"")
    await inThread(session.addTempRoots, [info.path])
    other = makeInfo("other", b"").path
    reactor.callWhenRunning(remote.joined[0].cut)
    await pause()
    for _ in range(2):
        with pytest.raises(RemoteError, match="there"):
            await inThread(session.queryValidPaths, [other])
    await inThread(session.close)
    assert await inThread(store.openSession().queryValidPaths, [info.path]) == {info.path}


@pytest_twisted.ensureDeferred
async def test_remoteDiesInStream(far, remote, session):
    """A remote that is gone in the middle of a NAR is an error, not the end of the NAR."""
    info = far.add("x", {"a": bytes(range(256)) * 40_000, "b": b"x"})
    stream = await inThread(session.narFromPath, info.path)
    await inThread(next, stream)
    remote.joined[1].cut()
    with pytest.raises(RemoteError, match=f"there: fetching '{info.path}'"):
        await inThread(b"".join, stream)
    assert await inThread(session.queryValidPaths, [info.path]) == {info.path}


@pytest_twisted.ensureDeferred
async def test_remoteDiesIdle(far, remote, session):
    """A session that was kept for further transfers and has ended meanwhile is replaced."""
    info = far.add("x", b"x")
    for _ in range(2):
        assert await inThread(lambda: b"".join(session.narFromPath(info.path))) == makeNar(b"x")
        await pause()
        assert remote.alive[-1]
        remote.joined[-1].cut()
    assert remote.alive[0] and not any(remote.alive[1:])


@pytest_twisted.ensureDeferred
async def test_cannotConnect(far, remote, session):
    """Why there is no session is said; the next call tries again, as nothing was kept yet."""
    info = far.add("x", b"")
    remote.refusals = [RemoteError("there: no route to host")]
    with pytest.raises(RemoteError, match="no route to host"):
        await inThread(session.queryValidPaths, [info.path])
    assert await inThread(session.queryValidPaths, [info.path]) == {info.path}


@pytest.mark.parametrize("end", ["interrupt", "close"])
@pytest_twisted.ensureDeferred
async def test_interrupt(remote, store, session, end):
    """Whoever waits for the remote, whatever for, is woken when the session is to end, or the store."""
    await inThread(session.addTempRoots, [])
    await inThread(session.queryValidPaths, [makeInfo("x", b"").path])
    remote.joined[0].pair.serverSide.paused = True
    waiting = threads.deferToThread(session.queryValidPaths, [makeInfo("y", b"").path])
    await pause()
    assert not waiting.called
    session.interrupt() if end == "interrupt" else store.close()
    with pytest.raises(RemoteError):
        await waiting


@pytest_twisted.ensureDeferred
async def test_interruptWhileConnecting():
    """So is who waits for the connection, which is given up."""
    given = []
    store = RemoteStore(reactor, lambda onError: Deferred(given.append))
    session = store.openSession()
    waiting = threads.deferToThread(session.queryValidPaths, [makeInfo("y", b"").path])
    await pause()
    session.interrupt()
    with pytest.raises(CancelledError):
        await waiting
    assert len(given) == 1
    await inThread(session.close)


@pytest_twisted.ensureDeferred
async def test_manySessions(far, store):
    """Many threads with sessions of their own add the same objects; each object is added by one of them."""
    objects = [
        (makeInfo(f"x-{number}", makeNar(str(number).encode())), makeNar(str(number).encode())) for number in range(20)
    ]

    def add():
        session = store.openSession()
        done = 0
        while done < len(objects):
            try:
                done += session.addSmallPaths(objects[done:])
            except StoreError:
                time.sleep(0.01)
        session.close()

    running = [threading.Thread(target=add) for _ in range(5)]
    await inThread(lambda: [thread.start() for thread in running] and [thread.join(30) for thread in running])
    assert not any(thread.is_alive() for thread in running)
    assert len(far.valid([info for info, _ in objects])) == 20


@pytest_twisted.ensureDeferred
async def test_at(tmp_path):
    """A store is there under its URL."""
    root = tmp_path / "root"
    address = RemoteAddress.parse(f"ssh://localhost?remote-store={root}&remote-program={ourProgram('nixserve-store')}")
    store = RemoteStore.at(reactor, address, os.environ)
    session = store.openSession()
    info = makeInfo("x", makeNar(b"x"))
    await inThread(addObject, session, info, makeNar(b"x"))
    await inThread(store.close)
    local = LocalStore(StoreLayout.underRoot(str(root)))
    assert local.openSession().queryValidPaths([info.path]) == {info.path}
    local.close()


@pytest_twisted.ensureDeferred
async def test_pastADribble(tmp_path):
    """Whoever is sent next to nothing does not keep another session from the same path for long."""
    inner = LocalStore(StoreLayout.underRoot(str(tmp_path)), reservedSize=0)
    store = RemoteStore(reactor, Remote(inner).open)
    slow, quick = store.openSession(), store.openSession()
    now = [100.0]
    quick._link._courtesy._clock = lambda: now[0]
    info = makeInfo("x", LARGE)
    dribbling = await inThread(slow.addToStore, info)
    await inThread(dribbling.feed, LARGE[:100])
    with pytest.raises(Busy, match="another upload of"):
        await inThread(quick.addToStore, info)
    now[0] += LOOK_SECONDS + 1
    passing = await inThread(quick.addToStore, info)
    await inThread(passing.feed, LARGE)
    await inThread(passing.finish)
    await inThread(dribbling.feed, LARGE[100:])
    await inThread(dribbling.finish)
    assert await inThread(lambda: b"".join(quick.narFromPath(info.path))) == LARGE
    for closing in (slow.close, quick.close, store.close, inner.close):
        await inThread(closing)
    deletePath(inner.layout.realStoreDir)

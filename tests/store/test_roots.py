"""
L{nixserve.store.roots}: temporary roots, and what a session says to a collector at work.
"""

import contextlib
import fcntl
import os
import socket
import threading
import time

import pytest

from nixserve.codec.storepath import StorePath
from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.store.layout import StoreLayout
from nixserve.store.opening import prepareDirectories
from nixserve.store.roots import TempRoots

PATHS = [StorePath(f"/nix/store/{'0' * 31}{digit}-x") for digit in "0123456789"]


class Collector:
    """
    A collector at work: holds the lock, answers on its socket, and remembers what it was told.

    @ivar answer: what to say to each line; empty to keep silent.
    """

    def __init__(self, layout, answer=b"1", listening=True):
        self.layout = layout
        self.answer = answer
        self.told = []
        self.connections = []
        self.lock = os.open(layout.gcLockPath, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.server = None
        if listening:
            self.listen()

    def listen(self):
        """Open the socket, as collectors do some time after they took the lock."""
        os.makedirs(os.path.dirname(self.layout.gcSocketPath), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.layout.gcSocketPath)
        directory = os.open(os.path.dirname(self.layout.gcSocketPath), os.O_PATH)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(f"/proc/self/fd/{directory}/socket")
        os.close(directory)
        self.server.listen(5)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.connections.append(connection)
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection):
        with contextlib.suppress(OSError):
            for line in connection.makefile("r"):
                self.told.append(line.rstrip("\n"))
                connection.sendall(self.answer)

    def end(self):
        """Hang up and unlock; the socket file stays, as collectors leave it."""
        if self.server is not None:
            self.server.shutdown(socket.SHUT_RDWR)
            self.server.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        os.close(self.lock)


@pytest.fixture
def layout(root):
    layout = StoreLayout.underRoot(root)
    prepareDirectories(layout, 0)
    return layout


@pytest.fixture
def dangerous():
    """What is valid or lies in the store."""
    return set()


@pytest.fixture
def roots(layout, dangerous):
    roots = TempRoots(layout, lambda paths: not dangerous.isdisjoint(paths))
    yield roots
    roots.close()


def inFile(layout):
    """What the files of temporary roots hold, as a collector reads it."""
    found = []
    for name in os.listdir(layout.tempRootsDir):
        with open(f"{layout.tempRootsDir}/{name}", "rb") as file:
            *paths, tail = file.read().decode().split("\0")
        assert tail == ""
        found += paths
    return found


def persist(call, *arguments, seconds=5.0):
    """Repeat while it is busy; whether it was."""
    deadline = time.monotonic() + seconds
    busy = False
    while True:
        try:
            call(*arguments)
        except Busy as error:
            busy = True
            assert time.monotonic() < deadline, "still busy"
            time.sleep(min(error.retryAfter, 0.01))
        else:
            return busy


def isFree(layout):
    """Whether a collector could start."""
    fd = os.open(layout.gcLockPath, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def test_nothing(layout, roots):
    """No paths, no file."""
    roots.addTempRoots([])
    assert os.listdir(layout.tempRootsDir) == []


def test_withoutCollector(layout, roots):
    """Each path stands once in the file, followed by NUL; no lock stays behind but that of the file."""
    roots.addTempRoots(PATHS[:3])
    roots.addTempRoots(PATHS[1:5])
    roots.addTempRoots(PATHS[:5])
    assert sorted(inFile(layout)) == PATHS[:5]
    assert isFree(layout)
    [name] = os.listdir(layout.tempRootsDir)
    assert name.split("-")[0] == str(os.getpid())
    fd = os.open(f"{layout.tempRootsDir}/{name}", os.O_RDWR)
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    roots.close()
    roots.close()
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
    assert os.listdir(layout.tempRootsDir) == []


def test_severalSessions(layout, roots, dangerous):
    """Each session has a file of its own."""
    other = TempRoots(layout, lambda paths: False)
    roots.addTempRoots(PATHS[:1])
    other.addTempRoots(PATHS[1:2])
    assert len(os.listdir(layout.tempRootsDir)) == 2
    other.close()
    assert inFile(layout) == PATHS[:1]


def test_takenName(layout, roots, monkeypatch):
    """A file of that name, dead or somebody else's, is left alone."""
    monkeypatch.setattr("nixserve.store.roots._fileNumbers", iter([7, 8]))
    taken = f"{layout.tempRootsDir}/{os.getpid()}-7"
    with open(taken, "w") as file:
        file.write("theirs\0")
    roots.addTempRoots(PATHS[:1])
    assert sorted(os.listdir(layout.tempRootsDir)) == [f"{os.getpid()}-7", f"{os.getpid()}-8"]
    assert os.path.getsize(taken) == 7


def test_collectorMarksNewFile(layout, roots, monkeypatch):
    """A collector that takes the new file for a dead one's makes us start over with another."""
    flock, marked = fcntl.flock, []

    def mark(fd, how):
        name = os.readlink(f"/proc/self/fd/{fd}")
        if "temproots" in name and not marked:
            marked.append(name)
            os.unlink(name)
            os.write(fd, b"d")
        flock(fd, how)

    monkeypatch.setattr("fcntl.flock", mark)
    roots.addTempRoots(PATHS[:1])
    assert marked
    assert inFile(layout) == PATHS[:1]
    assert os.listdir(layout.tempRootsDir) != [os.path.basename(marked[0])]


def test_fullDisk(layout, roots, monkeypatch):
    """A path that was written only in part is taken back: collectors die of half a path."""
    roots.addTempRoots(PATHS[:1])
    write = os.write

    def full(fd, data):
        if len(data) > 40:
            return write(fd, data[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(StoreError, match="No space left"):
        roots.addTempRoots(PATHS[1:2])
    monkeypatch.undo()
    assert inFile(layout) == PATHS[:1]
    assert isFree(layout)
    roots.addTempRoots(PATHS[1:2])
    assert inFile(layout) == PATHS[:2]


def test_announce(layout, roots):
    """A collector at work is told of each path once, after it stands in the file."""
    collector = Collector(layout)
    persist(roots.addTempRoots, PATHS[:4])
    persist(roots.addTempRoots, PATHS[2:6])
    assert sorted(collector.told) == PATHS[:6]
    assert sorted(inFile(layout)) == PATHS[:6]
    assert len(collector.connections) == 1
    collector.end()
    roots.addTempRoots(PATHS[6:7])
    assert sorted(inFile(layout)) == PATHS[:7]


def test_announceMany(layout, roots):
    """Many more lines than fit into a socket's buffer get through, in short calls."""
    paths = [StorePath(f"/nix/store/{number:032d}-{'x' * 150}") for number in range(20_000)]
    collector = Collector(layout)
    assert persist(roots.addTempRoots, paths, seconds=20.0)
    assert sorted(collector.told) == paths
    collector.end()


def test_inFileBeforeAnnounced(layout, roots):
    """The file comes first: the collector may end, and the next one start, before its answer is read."""
    collector = Collector(layout, answer=b"")
    with pytest.raises(Busy):
        roots.addTempRoots(PATHS[:1])
    assert inFile(layout) == PATHS[:1]
    collector.end()


def test_silentCollector(layout, roots):
    """Without an answer each call gives up soon; with the end of the collector it is not needed any more."""
    collector = Collector(layout, answer=b"")
    for _ in range(3):
        before = time.monotonic()
        with pytest.raises(Busy, match="answer"):
            roots.addTempRoots(PATHS[:2])
        assert time.monotonic() - before < 5
    assert sorted(collector.told) == PATHS[:2]
    collector.end()
    roots.addTempRoots(PATHS[:2])
    assert sorted(inFile(layout)) == PATHS[:2]


def test_nextCollector(layout, roots):
    """If one collector ends without an answer and another starts, the paths are announced anew."""
    first = Collector(layout, answer=b"")
    with pytest.raises(Busy):
        roots.addTempRoots(PATHS[:2])
    first.end()
    second = Collector(layout)
    persist(roots.addTempRoots, PATHS[:2])
    assert sorted(second.told) == PATHS[:2]
    assert sorted(inFile(layout)) == PATHS[:2]
    second.end()


@pytest.mark.parametrize("stale", [False, True])
def test_notListeningYet(layout, roots, stale):
    """A collector that has the lock but no socket yet, or an old one's, is waited for. Nix 2.8 goes on without it."""
    if stale:
        Collector(layout).end()
    collector = Collector(layout, listening=False)
    with pytest.raises(Busy, match="begin or end"):
        roots.addTempRoots(PATHS[:1])
    collector.listen()
    persist(roots.addTempRoots, PATHS[:1])
    assert collector.told == PATHS[:1]
    collector.end()


def test_strangeAnswer(layout, roots):
    """Anything but 1 is no answer."""
    collector = Collector(layout, answer=b"?")
    with pytest.raises(StoreError, match="answered") as caught:
        roots.addTempRoots(PATHS[:1])
    assert not isinstance(caught.value, Busy)
    collector.answer = b"1"
    persist(roots.addTempRoots, PATHS[:1])
    collector.end()


def test_inDanger(layout, roots, dangerous):
    """
    The answer does not save a path that may wait for deletion already: nothing is promised before the collector ends.
    """
    dangerous.add(PATHS[1])
    collector = Collector(layout)
    persist(roots.addTempRoots, PATHS[:1])
    for _ in range(3):
        with pytest.raises(Busy, match="to end"):
            roots.addTempRoots(PATHS[:2])
    assert sorted(collector.told) == PATHS[:2]
    collector.end()
    roots.addTempRoots(PATHS[:2])


def test_outOfDanger(layout, roots, dangerous):
    """Once the collector has deleted it, there is nothing more to wait for."""
    dangerous.add(PATHS[0])
    collector = Collector(layout)
    with pytest.raises(Busy):
        roots.addTempRoots(PATHS[:1])
    dangerous.clear()
    persist(roots.addTempRoots, PATHS[:1])
    collector.end()


def test_longSocketPath(tmp_path):
    """The path of the socket may be longer than the address of one."""
    layout = StoreLayout.underRoot(str(tmp_path / ("x" * 120)))
    prepareDirectories(layout, 0)
    roots = TempRoots(layout, lambda paths: False)
    collector = Collector(layout)
    persist(roots.addTempRoots, PATHS[:1])
    assert collector.told == PATHS[:1]
    roots.close()
    collector.end()


@pytest.mark.interop
def test_realCollectorReadsThem(layout, roots, nix):
    """Real Nix lists our roots, and removes the file of a dead session."""
    nix("--add", __file__)
    [name] = [name for name in os.listdir(layout.realStoreDir) if name.endswith("test_roots.py")]
    path = StorePath(f"/nix/store/{name}")
    dead = f"{layout.tempRootsDir}/{os.getpid()}-dead"
    with open(dead, "w") as file:
        file.write("x\0")
    roots.addTempRoots([path])
    assert path in nix("--gc", "--print-roots").decode()
    nix("--gc")
    assert os.path.exists(layout.realPath(path))
    assert not os.path.exists(dead)
    roots.close()
    nix("--gc")
    assert not os.path.exists(layout.realPath(path))

"""
L{nixserve.store.local}: the contract on disk, and what only a store on disk has.
"""

import contextlib
import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
import threading
import tracemalloc
import unittest
from dataclasses import replace

import pytest

from nixserve.codec.hashes import hashBytes
from nixserve.codec.nar import Contents, Directory, EndDirectory, Regular
from nixserve.codec.narwriter import encodeNar, regularStart
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import NixServeError, StoreError, UsageError
from nixserve.store import adding
from nixserve.store.api import Busy, InvalidPath
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.store.pathlocks import PathLocks
from nixserve.store.restoring import restorePath
from nixserve.store.uploads import LONGEST_WAIT, LOOK_SECONDS, WORTHWHILE
from nixserve.testing import Executable, StoreContract, addObject, makeInfo, makeNar
from tests.realcollector import collecting

HELLO = makeNar(b"hello\n")
TREE = makeNar({"bin": {"run": Executable(b"#!/bin/sh\n"), "link": "run"}, "empty": {}, "f": b"x" * 100_000})


def openFiles():
    """What this process has open, but for what the interpreter opens at will."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sorted(found)


class LocalStoreTests(StoreContract, unittest.TestCase):
    """LocalStore keeps the contract."""

    def makeStore(self):
        root = tempfile.mkdtemp(prefix="nixserve-test-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.addCleanup(shutil.rmtree, root)
        self.addCleanup(subprocess.run, ["chmod", "-R", "u+w", root], check=False)
        self.root = root
        return LocalStore(StoreLayout.underRoot(root), reservedSize=0)

    def hold(self, info):
        return PathLocks([self.store.layout.realPath(info.path)]).abandon

    def collectGarbage(self, store):
        program = shutil.which("nix-store")
        if program is None:
            self.skipTest("no nix-store on PATH")
        command = [program, "--store", self.root, "--gc"]
        collecting(lambda: subprocess.run(command, capture_output=True, timeout=60)).check_returncode()


# --- what lies on disk ------------------------------------------------------------------------------------


def test_openedByURI(tmp_path):
    """A store may be named as Nix names it; what is no local store is an error."""
    store = LocalStore(f"local?root={tmp_path}&read-only=false", reservedSize=0)
    assert store.layout == StoreLayout.underRoot(str(tmp_path))
    store.close()
    with pytest.raises(UsageError, match="a remote store cannot be opened as a local one"):
        LocalStore("ssh://host")


def test_canonicalFiles(store, layout):
    """An object lies at its physical path with canonical metadata, and its lock file is gone."""
    info = makeInfo("x", TREE)
    session = store.openSession()
    addObject(session, info, TREE)
    real = layout.realPath(info.path)
    modes = {}
    for directory, directories, files in os.walk(real):
        for name in [directory, *(f"{directory}/{entry}" for entry in directories + files)]:
            found = os.lstat(name)
            assert (found.st_mtime, found.st_uid) == (1, os.geteuid())
            modes[os.path.relpath(name, real)] = stat.S_IMODE(found.st_mode)
    assert (modes["."], modes["bin/run"], modes["f"]) == (0o555, 0o555, 0o444)
    assert not os.path.lexists(real + ".lock")


def test_importedDirectoryIsCanonical(store, layout):
    """Renaming an imported directory leaves its metadata as they were restored; nothing else stays."""
    path = makeInfo("x", TREE).path
    session = store.openSession()
    writer = session.importPath()
    writer.feed(TREE)
    writer.finish(path, [], None)
    found = os.lstat(layout.realPath(path))
    assert (stat.S_IMODE(found.st_mode), found.st_mtime) == (0o555, 1)
    session.close()
    assert set(os.listdir(layout.realStoreDir)) == {".links", path.baseName}


def test_leftoverIsReplaced(store, layout):
    """What lies in the place of a path that is not valid is removed first."""
    info = makeInfo("x", HELLO)
    os.makedirs(layout.realPath(info.path) + "/left/over")
    os.chmod(layout.realPath(info.path), 0o555)
    session = store.openSession()
    addObject(session, info, HELLO)
    assert b"".join(session.narFromPath(info.path)) == HELLO


def test_validBetween(store, monkeypatch):
    """A path that becomes valid between the first look and the lock is left alone."""
    info = makeInfo("x", HELLO)
    original = adding.PathLocks

    def race(paths):
        monkeypatch.setattr(adding, "PathLocks", original)
        store.openSession().addSmallPaths([(info, HELLO)])
        inodes.append(os.stat(store.layout.realPath(info.path)).st_ino)
        return original(paths)

    inodes = []
    writer = store.openSession().addToStore(info)
    writer.feed(HELLO)
    monkeypatch.setattr(adding, "PathLocks", race)
    writer.finish()
    assert os.stat(store.layout.realPath(info.path)).st_ino == inodes[0]
    assert not os.path.exists(store.layout.realPath(info.path) + ".lock")


def test_debris(store, layout):
    """
    What does not come whole leaves nothing; a failure after it has its name leaves the object and an empty lock file,
    as with Nix.
    """
    info = makeInfo("x", HELLO, [makeInfo("missing", HELLO).path])
    session = store.openSession()
    with pytest.raises(StoreError):
        addObject(session, replace(info, narHash=hashBytes("sha256", b"")), HELLO)
    for writer in (session.importPath(), session.addToStore(makeInfo("tree", TREE))):
        writer.feed(TREE[:-8])
        writer.abort()
    session.close()
    assert os.listdir(layout.realStoreDir) == [".links"]
    session = store.openSession()
    with pytest.raises(InvalidPath):
        addObject(session, info, HELLO)
    session.close()
    real = layout.realPath(info.path)
    assert os.path.getsize(real + ".lock") == 0
    assert set(os.listdir(layout.realStoreDir)) == {".links", os.path.basename(real), os.path.basename(real) + ".lock"}


def small(count, start=0):
    """Some small objects with their NARs."""
    nars = [makeNar(b"%d" % number) for number in range(start, start + count)]
    return [(makeInfo(f"small-{number}", nar), nar) for number, nar in enumerate(nars, start)]


def addAll(session, objects):
    """Add objects in as many batches as it takes."""
    added = 0
    while added < len(objects):
        added += session.addSmallPaths(objects[added:])


def test_batchOnDisk(store, layout):
    """What came in a batch is canonical, what lay in its place is gone, and so is every lock file."""
    objects = [*small(100), (makeInfo("tree", TREE), TREE)]
    real = layout.realPath(objects[1][0].path)
    os.makedirs(real + "/left/over")
    session = store.openSession()
    before = openFiles()
    # One more of the same is valid by then, and in nobody's way.
    assert session.addSmallPaths([*objects[:5], objects[2]]) == 6
    addAll(session, objects)
    assert len(openFiles()) <= len(before) + 2, "the file of temporary roots and gc.lock"
    assert set(os.listdir(layout.realStoreDir)) == {".links", *(info.path.baseName for info, _ in objects)}
    found = os.lstat(real)
    assert (stat.S_IMODE(found.st_mode), found.st_mtime, found.st_size) == (0o444, 1, 1)


def test_batchIsOneTransaction(store, layout, monkeypatch):
    """A batch takes one transaction, until the batch would hold too many locks."""
    transactions = []
    register = store.validPaths.registerValidPaths
    monkeypatch.setattr(
        store.validPaths,
        "registerValidPaths",
        lambda infos, outputs: transactions.append(len(infos)) or register(infos),
    )
    addAll(store.openSession(), small(adding.MAX_BATCH + 5))
    assert transactions == [adding.MAX_BATCH, 5]


def test_batchDebris(store, layout):
    """Those behind one that is refused leave an empty lock file and nothing else; those before it are in order."""
    objects = small(3)
    info, nar = objects[1]
    objects[1] = replace(info, narHash=hashBytes("sha256", b"")), nar
    assert store.openSession().addSmallPaths(objects) == 1
    first, *others = [info.path.baseName for info, _ in objects]
    assert set(os.listdir(layout.realStoreDir)) == {".links", first, *(name + ".lock" for name in others)}
    assert all(os.path.getsize(f"{layout.realStoreDir}/{name}.lock") == 0 for name in others)


def test_batchAndABusyDatabase(store, layout):
    """Another writer in the database makes a batch busy: nothing is added, no lock is kept, a later try succeeds."""
    objects = small(3)
    session = store.openSession()
    other = sqlite3.connect(layout.dbPath, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(Busy, match="database"):
        session.addSmallPaths(objects)
    assert session.queryValidPaths([info.path for info, _ in objects]) == set()
    for info, _ in objects:
        store.openSession().addToStore(info).abort()
    other.execute("commit")
    other.close()
    assert session.addSmallPaths(objects) == 3


def test_batchLosesAReference(store, monkeypatch):
    """A reference that is deleted in the last moment is noticed, and costs only the object that has it."""
    (gone, goneNar), first, (second, nar), third = small(4)
    session = store.openSession()
    addObject(session, gone, goneNar)
    objects = [first, (replace(second, references=frozenset({gone.path})), nar), third]
    register = store.validPaths.registerValidPaths

    def race(infos, outputs):
        store.validPaths.invalidatePath(gone.path)
        register(infos, outputs)

    monkeypatch.setattr(store.validPaths, "registerValidPaths", race)
    assert session.addSmallPaths(objects) == 1
    with pytest.raises(InvalidPath) as caught:
        session.addSmallPaths(objects[1:])
    assert caught.value.path == gone.path


def test_batchValidBetween(store, monkeypatch):
    """What becomes valid between the first look and the lock is left alone, with the others added."""
    objects = small(3)
    original = adding.PathLocks
    inodes = []

    def race(paths):
        monkeypatch.setattr(adding, "PathLocks", original)
        addObject(store.openSession(), *objects[0])
        inodes.append(os.stat(store.layout.realPath(objects[0][0].path)).st_ino)
        return original(paths)

    monkeypatch.setattr(adding, "PathLocks", race)
    assert store.openSession().addSmallPaths(objects) == 3
    assert os.stat(store.layout.realPath(objects[0][0].path)).st_ino == inodes[0]
    assert not [name for name in os.listdir(store.layout.realStoreDir) if name.endswith(".lock")]


def test_manyBatches(store):
    """Sessions in many threads add the same objects in different orders; each ends up valid, and nobody hangs."""
    objects = small(200)
    failures = []

    def work(worker):
        session = store.openSession()
        todo = objects if worker % 2 else objects[::-1]
        added = 0
        try:
            while added < len(todo):
                try:
                    added += session.addSmallPaths(todo[added:])
                except Busy:
                    threading.Event().wait(0.005)
        except Exception as error:
            failures.append(error)
        finally:
            session.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert store.validPaths.queryAllValidPaths() == {info.path for info, _ in objects}
    assert set(os.listdir(store.layout.realStoreDir)) == {".links", *(info.path.baseName for info, _ in objects)}


def test_surplusIsNotKept(store):
    """A NAR that is far shorter than announced does not make us keep what follows it."""
    info = makeInfo("x", HELLO, narSize=10**12)
    writer = store.openSession().addToStore(info)
    writer.feed(HELLO)
    with pytest.raises(StoreError, match="size mismatch"):
        writer.feed(bytes(1000))


def test_sessionClosesEverything(store):
    """A session that ends in the middle of everything leaves no file open and no temporary roots."""
    nar = makeNar(bytes(1_000_000))
    info = makeInfo("big", nar)
    first = store.openSession()
    addObject(first, info, nar)
    first.close()
    before = openFiles()
    session = store.openSession()
    streams = [session.narFromPath(info.path), session.exportPaths([info.path])]
    for stream in streams:
        next(stream)
    writer = session.addToStore(makeInfo("tree", TREE))
    writer.feed(TREE[:1500])
    importer = session.importPath()
    importer.feed(TREE[:1500])
    assert openFiles() != before
    session.close()
    assert openFiles() == before
    assert os.listdir(store.layout.tempRootsDir) == []


def test_closeGoesOnAfterFailure(store, monkeypatch):
    """If one thing cannot be freed, the others are, and the failure is reported."""
    session = store.openSession()
    session.addToStore(makeInfo("a", HELLO)).feed(HELLO[:60])
    writer = session.addToStore(makeInfo("b", HELLO))

    def fail():
        raise OSError("no")

    monkeypatch.setattr(writer, "abort", fail)
    with pytest.raises(OSError, match="no"):
        session.close()
    session.close()
    assert os.listdir(store.layout.tempRootsDir) == []
    store.openSession().addToStore(makeInfo("a", HELLO)).abort()


def test_exportOfChangedPath(store, layout):
    """An object that is not what was registered does not leave the store as if it were."""
    info = makeInfo("x", HELLO)
    session = store.openSession()
    addObject(session, info, HELLO)
    os.chmod(layout.realPath(info.path), 0o644)
    with open(layout.realPath(info.path), "w") as file:
        file.write("changed")
    with pytest.raises(StoreError, match=r"hash of path '.*' has changed from 'sha256:.*' to 'sha256:.*'"):
        b"".join(session.exportPaths([info.path]))


def test_exportOfOnePathManyTimes(store):
    """A path that is asked for a hundred thousand times is looked up and exported once, in the memory for one."""
    info = makeInfo("x", HELLO)
    session = store.openSession()
    addObject(session, info, HELLO)
    once = b"".join(session.exportPaths([info.path]))
    asked = [info.path] * 100_000
    tracemalloc.start()
    try:
        assert b"".join(session.exportPaths(asked)) == once
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 * 1024 * 1024


def test_noLockWhileSending(store, layout):
    """
    A sender who goes on for ever with a few bytes keeps nobody from the same path: the next one waits as long as he
    makes way, then goes past him; a path that has come whole waits for nobody. His own object is dropped in the end.
    """
    nar = makeNar(bytes(100_000))
    info = makeInfo("x", nar)
    slow, quick, whole = store.openSession(), store.openSession(), store.openSession()
    now = [100.0]
    quick._adder._courtesy._clock = lambda: now[0]
    dribbling = slow.addToStore(info)
    dribbling.feed(nar[:100])
    PathLocks([layout.realPath(info.path)]).unlock()
    with pytest.raises(Busy, match="another upload of"):
        quick.addToStore(info)
    now[0] += LOOK_SECONDS - 0.1
    with pytest.raises(Busy, match="another upload of"):
        quick.addToStore(info)
    now[0] += 0.2
    passing = quick.addToStore(info)
    passing.feed(nar[:50_000])
    dribbling.feed(nar[100:200])
    assert whole.addSmallPaths([(info, nar)]) == 1
    for writer, left in ((passing, nar[50_000:]), (dribbling, nar[200:])):
        writer.feed(left)
        writer.finish()
        with pytest.raises(StoreError, match="has ended"):
            writer.finish()
    assert b"".join(slow.narFromPath(info.path)) == nar
    assert set(os.listdir(layout.realStoreDir)) == {".links", info.path.baseName}


def test_courtesyEnds(store):
    """Who sends enough is waited for, but not for longer than a minute, and not once he has given up."""
    first, second = store.openSession(), store.openSession()
    now = [100.0]
    second._adder._courtesy._clock = lambda: now[0]
    size = 10**9
    info = makeInfo("x", HELLO, narSize=size)
    sending = first.addToStore(info)
    sending.feed(regularStart(b"", False, size - 120))
    waited = 0
    with pytest.raises(Busy):
        second.addToStore(info)
    while waited < LONGEST_WAIT - 3:
        now[0] += 2.5
        waited += 2.5
        sending.feed(bytes(int(WORTHWHILE * 2.5)))
        with pytest.raises(Busy):
            second.addToStore(info)
    now[0] += 3
    sending.feed(bytes(WORTHWHILE * 3))
    second.addToStore(info).abort()
    third = store.openSession()
    another = makeInfo("y", HELLO)
    sending.abort()
    sending = first.addToStore(another)
    with pytest.raises(Busy):
        third.addToStore(another)
    sending.abort()
    third.addToStore(another).abort()


def test_placeIsLocked(store, layout):
    """
    Who can read the store directory sees where objects are restored. Adding an object of that name waits until its
    place is free, and touches nothing there.
    """
    session, other = store.openSession(), store.openSession()
    info = makeInfo("x", TREE)
    writer = session.addToStore(info)
    writer.feed(TREE[:1000])
    (name,) = [name for name in os.listdir(layout.realStoreDir) if name.endswith("-1")]
    intruding = makeInfo("x", HELLO, path=StorePath(f"{store.storeDir.path}/{name}"))
    with pytest.raises(Busy):
        addObject(other, intruding, HELLO)
    with pytest.raises(Busy):
        other.addSmallPaths([(intruding, HELLO)])
    writer.feed(TREE[1000:])
    writer.finish()
    assert b"".join(session.narFromPath(info.path)) == TREE


def test_databaseBusy(store, layout):
    """Another writer in the database makes finishing busy; a later try succeeds."""
    info = makeInfo("x", HELLO)
    session = store.openSession()
    writer = session.addToStore(info)
    writer.feed(HELLO)
    other = sqlite3.connect(layout.dbPath, isolation_level=None)
    other.execute("begin immediate")
    with pytest.raises(Busy):
        writer.finish()
    assert session.queryValidPaths([info.path]) == set()
    other.execute("commit")
    other.close()
    writer.finish()
    assert session.queryValidPaths([info.path]) == {info.path}


def test_manyThreads(store):
    """Sessions in many threads add the same and different objects; each ends up valid."""
    shared = [makeInfo(f"shared-{number}", makeNar(b"%d" % number)) for number in range(20)]
    failures = []

    def untilFree(call):
        """Beginning and finishing both meet the others' locks: a small object has none before it is complete."""
        while True:
            try:
                return call()
            except Busy:
                threading.Event().wait(0.005)

    def work(worker):
        session = store.openSession()
        try:
            own = [(f"own-{worker}-{number}", b"%d-%d" % (worker, number)) for number in range(10)]
            todo = [(info, makeNar(b"%d" % number)) for number, info in enumerate(shared)]
            todo += [(makeInfo(name, makeNar(data)), makeNar(data)) for name, data in own]
            for info, nar in todo:
                writer = untilFree(lambda info=info: session.addToStore(info))
                writer.feed(nar)
                untilFree(writer.finish)
                assert b"".join(session.narFromPath(info.path)) == nar
        except Exception as error:
            failures.append(error)
        finally:
            session.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert len(store.validPaths.queryAllValidPaths()) == 80


def test_readOnly(store, layout):
    """A store opened read-only answers, beside a writer, and refuses to write."""
    info = makeInfo("x", HELLO)
    addObject(store.openSession(), info, HELLO)
    reader = LocalStore(replace(layout, readOnly=True))
    session = reader.openSession()
    assert session.queryValidPaths([info.path]) == {info.path}
    for use in (
        session.addTempRoots,
        lambda paths: session.addToStore(info),
        lambda paths: session.addSmallPaths([(info, HELLO)]),
        lambda paths: session.importPath(),
    ):
        with pytest.raises(StoreError, match="read-only"):
            use([info.path])
    other = makeInfo("y", HELLO)
    addObject(store.openSession(), other, HELLO)
    assert session.queryValidPaths([other.path]) == {other.path}
    reader.close()


@pytest.mark.parametrize("writer", ["open", "closed", "crashed"])
def test_readOnlyForAnotherUser(root, layout, writer, asNobody):
    """Somebody without any right to write can read, whatever the last writer did."""
    os.chmod(root, 0o755)
    info = makeInfo("x", TREE)
    if writer == "crashed":
        if os.fork() == 0:
            addObject(LocalStore(layout, reservedSize=0).openSession(), info, TREE)
            os._exit(0)
        os.wait()
        assert os.path.exists(layout.dbPath + "-wal")
    else:
        store = LocalStore(layout, reservedSize=0)
        addObject(store.openSession(), info, TREE)
        if writer == "closed":
            store.close()
    asNobody(
        f"""
store = LocalStore(parseStoreURI({root + "?read-only=true"!r}, StoreDefaults()))
session = store.openSession()
path = StorePath({info.path!r})
assert session.queryPathInfos([path])[path].narSize == {len(TREE)}
assert len(b"".join(session.narFromPath(path))) == {len(TREE)}
store.close()
"""
    )
    if writer == "open":
        store.close()


def test_importAsOrdinaryUser(root, asNobody):
    """An ordinary user can rename imported directories that nobody may write to."""
    os.chown(root, 65534, 65534)
    nar = makeNar({"bin": {"run": Executable(b"#!/bin/sh\n")}, "empty": {}})
    asNobody(
        f"""
store = LocalStore(StoreLayout.underRoot({root!r}), reservedSize=0)
session = store.openSession()
writer = session.importPath()
writer.feed({nar!r})
path = StorePath({makeInfo("x", nar).path!r})
writer.finish(path, [], None)
assert b"".join(session.narFromPath(path)) == {nar!r}
assert os.lstat(store.layout.realPath(path)).st_mode & 0o777 == 0o555
store.close()
"""
    )


# --- beside real Nix --------------------------------------------------------------------------------------


@pytest.mark.interop
def test_nixVerifies(store, nix):
    """Real Nix finds nothing wrong with what we added, and answers the same."""
    session = store.openSession()
    a = makeInfo("a", HELLO)
    addObject(session, a, HELLO)
    b = makeInfo("b", TREE, [a.path], deriver=makeInfo("b.drv", b"").path)
    addObject(session, b, TREE)
    writer = session.importPath()
    writer.feed(TREE)
    imported = makeInfo("imported", TREE, [b.path]).path
    writer.finish(imported, [imported, b.path], None)
    objects = [*small(3), (makeInfo("tree", TREE, [imported]), TREE)]
    addAll(session, objects)
    nix("--verify", "--check-contents")
    paths = [a.path, b.path, imported, *(info.path for info, _ in objects)]
    assert nix("-q", "--hash", *paths).split() == [
        str(session.queryPathInfos([path])[path].narHash).encode() for path in paths
    ]
    assert set(nix("-q", "--references", imported).decode().split()) == {imported, b.path}
    assert nix("-q", "--deriver", b.path).decode().strip() == b.deriver
    assert set(nix("-q", "--requisites", imported).decode().split()) == session.queryClosure([imported])
    assert b"".join(session.exportPaths(paths)) == nix("--export", *paths)
    assert b"".join(session.narFromPath(b.path)) == nix("--dump", store.layout.realPath(b.path))


@pytest.mark.interop
def test_opensNixStore(layout, nix, tmp_path):
    """A store made by real Nix opens; both add to it in turn and see what the other did."""
    (tmp_path / "hello.txt").write_bytes(b"hello\n")
    first = StorePath(nix("--add", str(tmp_path / "hello.txt")).decode().strip())
    store = LocalStore(layout, reservedSize=0)
    session = store.openSession()
    info = session.queryPathInfos([first])[first]
    assert (info.narSize, str(info.ca)) == (
        120,
        "fixed:r:sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw",
    )
    assert info.isContentAddressed(StoreDir())
    for number in range(5):
        nar = makeNar(b"%d" % number)
        ours = makeInfo(f"ours-{number}", nar, [first])
        addObject(session, ours, nar)
        assert nix("-q", "--references", ours.path).decode().strip() == first
        (tmp_path / "theirs").write_text(str(number))
        theirs = StorePath(nix("--add", str(tmp_path / "theirs")).decode().strip())
        assert session.queryValidPaths([theirs]) == {theirs}
    nix("--verify", "--check-contents")
    store.close()


@pytest.mark.interop
def test_derivationOutputs(store, nix):
    """Real Nix knows the outputs of a derivation that we registered."""
    out, dev = "/nix/store/1f5018jnvzb10jsijwrp0hyklh9hmmsg-foo", "/nix/store/7zhc9sliq14lz2f1yc1d68fi9njpfhr1-foo-dev"
    nar = makeNar(StoreContract.derivationText(None, out, dev))
    drv = StorePath("/nix/store/vq69sqp8jpimmv62milrq467xk9wkkg0-foo.drv")
    addObject(store.openSession(), makeInfo("foo.drv", nar, path=drv), nar)
    assert nix("-q", "--outputs", drv).decode().split() == [out, dev]


@pytest.mark.interop
def test_nixCollects(store, layout, nix):
    """Real Nix collects what no session keeps, debris too, while others are being added, and the store stays sound."""
    session = store.openSession()
    dead = makeInfo("dead", TREE)
    doomed = store.openSession()
    addObject(doomed, dead, TREE)
    with pytest.raises(StoreError):
        addObject(doomed, makeInfo("debris", HELLO, narSize=121), HELLO)
    doomed.close()
    kept = makeInfo("kept", HELLO)
    writer = session.addToStore(kept)
    writer.feed(HELLO[:100])
    nix("--gc")
    writer.feed(HELLO[100:])
    writer.finish()
    assert set(os.listdir(layout.realStoreDir)) == {".links", kept.path.baseName}
    assert session.queryValidPaths([dead.path, kept.path]) == {kept.path}
    nix("--verify", "--check-contents")


def test_lockedForUs(store, layout):
    """
    What somebody else has locked for a session it adds under that lock, which stays as it is; another session waits.
    """
    small, large = makeInfo("small", HELLO), makeInfo("large", TREE)
    session, other = store.openSession(), store.openSession()
    held = PathLocks([layout.realPath(small.path), layout.realPath(large.path)])
    session.assumeLocked([small.path, large.path])
    waiting = other.addToStore(large)
    waiting.feed(TREE)
    with pytest.raises(Busy):
        waiting.finish()
    waiting.abort()
    with pytest.raises(Busy):
        other.addSmallPaths([(small, HELLO)])
    assert session.addSmallPaths([(small, HELLO)]) == 1
    addObject(session, large, TREE)
    assert other.queryValidPaths([small.path, large.path]) == {small.path, large.path}
    for info in (small, large):
        with pytest.raises(Busy):
            PathLocks([layout.realPath(info.path)])
        assert os.path.getsize(layout.realPath(info.path) + ".lock") == 0
    held.unlock()
    assert not [name for name in os.listdir(layout.realStoreDir) if name.endswith(".lock")]


def test_lockedForUsFails(store, layout):
    """A failure leaves such a lock as it is, too; and other paths are locked as always."""
    info, another = makeInfo("bad", HELLO), makeInfo("another", HELLO)
    taken = PathLocks([layout.realPath(another.path)])
    session = store.openSession()
    held = PathLocks([layout.realPath(info.path)])
    session.assumeLocked([info.path])
    with pytest.raises(StoreError):
        addObject(session, replace(info, narHash=hashBytes("sha256", b"")), HELLO)
    with pytest.raises(Busy):
        PathLocks([layout.realPath(info.path)])
    writer = session.addToStore(another)
    writer.feed(HELLO)
    with pytest.raises(Busy):
        writer.finish()
    taken.abandon()
    writer.finish()
    held.abandon()


def test_pathsTooLongUnderTheFinalName(store, layout):
    """It is its own name that decides how deep an object may be, not the one under which it is restored."""
    name = b"d" * 99
    for more in (1, 0):
        path = makeInfo("x" * 200, HELLO).path
        left = 4095 - len(layout.realPath(path))
        names = [name] * (left // 100)
        names[-1] += b"d" * (left % 100 + more)
        deep = encodeNar([Directory(b""), *map(Directory, names), *[EndDirectory()] * (len(names) + 1)])
        nar = b"".join(deep)
        info = makeInfo("x", nar, path=path)
        for add in adders(info, nar):
            session = store.openSession()
            with pytest.raises(StoreError, match="File name too long") if more else contextlib.nullcontext():
                add(session)
            session.close()
        assert store.validPaths.queryValidPaths([path]) == (set() if more else {path})


@pytest.mark.parametrize("kind", ["addToStore", "importPath"])
def test_openFilesHavePaths(store, layout, kind):
    """
    However deep an object is that somebody sends, and stops in the middle, and however short its name: Nix's collector
    looks at all open files of the machine, ends at the first whose path the kernel cannot tell, and gets past ours.
    """
    path = makeInfo("x", HELLO).path
    size = 4095 - len(layout.realPath(path)) - 2
    names = [b"d" * 99] * (size // 100) + [b"d" * (size % 100 - 1)]
    deep = [Directory(b""), *map(Directory, names), Regular(b"z", False, len(HELLO)), Contents(HELLO)]
    nar = b"".join(encodeNar([*deep, *[EndDirectory()] * (len(names) + 1)]))
    session = store.openSession()
    writer = session.importPath() if kind == "importPath" else session.addToStore(makeInfo("x", nar, path=path))
    with contextlib.suppress(StoreError):
        writer.feed(nar[: nar.index(HELLO) + 1])
    for fd in os.listdir("/proc/self/fd"):
        # That of the listing is gone.
        with contextlib.suppress(FileNotFoundError):
            os.readlink(f"/proc/self/fd/{fd}")
    writer.abort()
    session.close()


# --- names of ours in the store directory -----------------------------------------------------------------


def under(info, suffix, nar=HELLO):
    """An object called like another one, with something behind."""
    return makeInfo("x", nar, path=StorePath(info.path + suffix))


def adders(info, nar):
    """The ways to add an object: functions of a session."""

    def importIt(session):
        writer = session.importPath()
        writer.feed(nar)
        try:
            writer.finish(info.path, [], None)
        except BaseException:
            writer.abort()
            raise

    return [
        lambda session: addObject(session, info, nar),
        lambda session: session.addSmallPaths([(info, nar)]),
        importIt,
    ]


def test_validPathInPlaceOfALockFile(store, layout):
    """A path where a valid path lies in the place of its lock file is refused in one line, in whatever way it comes."""
    session = store.openSession()
    for number, nar in enumerate((HELLO, makeNar(b""), TREE, makeNar("nowhere"))):
        info = makeInfo(f"Cargo-{number}", HELLO)
        lock = under(info, ".lock", nar)
        addObject(session, lock, nar)
        before = os.lstat(layout.realPath(lock.path))
        for add in adders(info, HELLO):
            with pytest.raises(StoreError, match=r"^cannot lock '[^\n]*\.lock' is no lock file[^\n]*$") as caught:
                add(session)
            assert not isinstance(caught.value, Busy)
        assert os.lstat(layout.realPath(lock.path)) == before
        assert session.queryValidPaths([info.path, lock.path]) == {lock.path}


def test_liveLockFileInPlaceOfAnObject(store, layout):
    """While a path is being added, what is called like its lock file waits, and the lock is held all the time."""
    info = makeInfo("Cargo", TREE)
    lock = under(info, ".lock")
    held = PathLocks([layout.realPath(info.path)])
    inode = os.stat(layout.realPath(lock.path)).st_ino
    for add in adders(lock, HELLO):
        session = store.openSession()
        with pytest.raises(Busy, match=r"the lock on '.*-Cargo'"):
            add(session)
        session.close()
        assert os.stat(layout.realPath(lock.path)).st_ino == inode
        with pytest.raises(Busy):
            PathLocks([layout.realPath(info.path)])
    held.unlock()
    addObject(store.openSession(), info, TREE)
    for add in adders(lock, HELLO):
        add(store.openSession())
    assert store.validPaths.queryValidPaths([info.path, lock.path]) == {info.path, lock.path}
    assert not os.path.exists(layout.realPath(lock.path) + ".lock")


def test_lockFileThatWasLeft(store, layout):
    """The lock file of a failed attempt is in nobody's way, also not of an object called like it."""
    info = makeInfo("Cargo", HELLO)
    for number, nar in enumerate((HELLO, TREE, makeNar("nowhere"))):
        for way in range(3):
            lock = under(makeInfo(f"Cargo-{number}-{way}", HELLO), ".lock", nar)
            with open(layout.realPath(lock.path), "x", opener=lambda *how: os.open(*how, 0o600)):
                pass
            adders(lock, nar)[way](store.openSession())
            assert b"".join(store.openSession().narFromPath(lock.path)) == nar
    with pytest.raises(StoreError):
        addObject(store.openSession(), replace(info, narHash=hashBytes("sha256", b"")), HELLO)
    addObject(store.openSession(), under(info, ".lock"), HELLO)


def test_halfAnObjectInPlaceOfALockFile(store, layout):
    """What is left of an object that is called like a lock file gives way; one that is on its way is waited for."""
    for number, nar in enumerate((HELLO, TREE)):
        for way in range(3):
            info = makeInfo(f"Cargo-{number}-{way}", HELLO)
            lock = under(info, ".lock", nar)
            held = PathLocks([layout.realPath(lock.path)])
            restorePath(layout.realPath(lock.path), [nar])
            session = store.openSession()
            with pytest.raises(Busy, match=r"the lock on '.*-Cargo-.*\.lock'"):
                adders(info, HELLO)[way](session)
            session.close()
            held.abandon()
            assert os.path.lexists(layout.realPath(lock.path))
            adders(info, HELLO)[way](store.openSession())
            assert not os.path.lexists(layout.realPath(lock.path))
    # No object can be called like this lock file, so it is not for us to say what it is.
    info = makeInfo("x" * 208, HELLO)
    os.mkdir(layout.realPath(info.path) + ".lock")
    with pytest.raises(NixServeError):
        addObject(store.openSession(), info, HELLO)


def test_bothInOneBatch(store):
    """An object and one called like its lock file come in one batch: what comes first is added."""
    for first in (0, 1):
        info = makeInfo(f"Cargo-{first}", HELLO)
        pair = [(info, HELLO), (under(info, ".lock"), HELLO)]
        batch = [pair[first], pair[1 - first]]
        session = store.openSession()
        added = session.addSmallPaths(batch)
        if added < 2 and first == 0:
            assert session.addSmallPaths(batch[added:]) == 1
        elif added < 2:
            with pytest.raises(StoreError, match="is no lock file"):
                session.addSmallPaths(batch[added:])
        assert batch[0][0].path in session.queryValidPaths([info.path for info, _ in batch])


def test_foreignSandbox(store, layout):
    """The sandbox of a build of real Nix is not removed for an object that is called so."""
    lock = under(makeInfo("x.drv", HELLO), ".chroot")
    os.mkdir(layout.realPath(lock.path), 0o700)
    for add in adders(lock, HELLO):
        with pytest.raises(StoreError, match="there is the sandbox of a build"):
            add(store.openSession())
    assert os.path.isdir(layout.realPath(lock.path))


def test_importIsLocked(store, layout):
    """Where an import is restored nobody else adds an object, and nothing valid is removed."""
    session = store.openSession()
    writer = session.importPath()
    writer.feed(HELLO[:100])
    (place,) = [name for name in os.listdir(layout.realStoreDir) if name.endswith("-1")]
    squatter = makeInfo("x", TREE, path=StoreDir().parseBaseName(place))
    other = store.openSession()
    for add in adders(squatter, TREE):
        with pytest.raises(Busy):
            add(other)
    other.close()
    writer.feed(HELLO[100:])
    imported = makeInfo("imported", HELLO).path
    writer.finish(imported, [], None)
    assert b"".join(session.narFromPath(imported)) == HELLO
    writer = session.importPath()
    following = StoreDir().parseBaseName(place[:-1] + "3")
    addObject(store.openSession(), makeInfo("x", TREE, path=following), TREE)
    with pytest.raises(StoreError, match="is a valid path"):
        session.importPath()
    assert b"".join(store.openSession().narFromPath(following)) == TREE
    writer.feed(HELLO)
    session.close()
    assert not [name for name in os.listdir(layout.realStoreDir) if ".lock" in name or name == place]

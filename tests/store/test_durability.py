"""What is on the disk, and when: L{nixserve.store.durability}, and the end of a session."""

import os
import sqlite3
import threading
from dataclasses import replace

import pytest

from nixserve.codec.narwriter import directoryEnd, directoryStart, regularEnd, regularStart, symlinkNode
from nixserve.store.api import addWhole
from nixserve.store.durability import Durability
from nixserve.store.local import LocalStore
from nixserve.testing import makeInfo, makeNar

HELLO = makeNar(b"hello\n")
INFOS = [makeInfo(f"hello-{number}", HELLO) for number in range(20)]

#: A directory with a file, a link and another directory with a file in it.
TREE = b"".join(
    [
        *(directoryStart(b""), regularStart(b"a", False, 1), b"x", regularEnd(b"a", 1), symlinkNode(b"b", b"/nowhere")),
        *(directoryStart(b"c"), regularStart(b"d", True, 1), b"y", regularEnd(b"d", 1), directoryEnd(b"c")),
        directoryEnd(b""),
    ]
)


class Disk:
    """
    Records what is written out.

    @ivar synced: paths, in order; C{"everything"} for C{sync(2)}.
    @ivar early: those at which no path was valid yet.
    """

    def __init__(self, monkeypatch, layout):
        self.synced = []
        self.early = []
        self._dbPath = layout.dbPath
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, lambda fd: self._note(os.readlink(f"/proc/self/fd/{fd}")))
        monkeypatch.setattr(os, "sync", lambda: self._note("everything"))

    def _note(self, what):
        self.synced.append(what)
        connection = sqlite3.connect(self._dbPath)
        if connection.execute("select count(*) from ValidPaths").fetchone() == (0,):
            self.early.append(what)
        connection.close()


@pytest.fixture
def disk(monkeypatch, layout, store):
    return Disk(monkeypatch, layout)


def opened(layout, **settings):
    return LocalStore(replace(layout, durability=Durability(**settings)), reservedSize=0)


def add(session, info=INFOS[0], nar=HELLO):
    addWhole(session, info, nar)


def test_endOfSessionSyncs(store, layout, disk):
    """What a session registered is on the disk when it has ended, once however many paths it was."""
    session = store.openSession()
    for info in INFOS:
        add(session, info)
    session.addSmallPaths([(makeInfo("small", HELLO), HELLO)])
    assert disk.synced == []
    session.close()
    assert disk.synced == [f"{layout.dbPath}-wal"]
    assert disk.early == []


def test_smallPathsAreSynced(store, layout, disk):
    """So it is with paths that came together, and with an imported one."""
    session = store.openSession()
    assert session.addSmallPaths([(info, HELLO) for info in INFOS]) == len(INFOS)
    session.close()
    session = store.openSession()
    writer = session.importPath()
    writer.feed(HELLO)
    writer.finish(makeInfo("imported", HELLO).path, [], None)
    session.close()
    assert disk.synced == [f"{layout.dbPath}-wal"] * 2


def test_withoutLog(store, layout, disk):
    """Where SQLite keeps no log of its own beside the database, there is none to write out."""
    session = store.openSession()
    add(session)
    os.rename(f"{layout.dbPath}-wal", f"{layout.dbPath}-away")
    session.close()
    assert disk.synced == []


def test_readersSyncNothing(store, disk):
    """A session that registered nothing costs the disk nothing, whoever else writes."""
    writing, reading = store.openSession(), store.openSession()
    add(writing)
    reading.queryPathInfos([INFOS[0].path])
    add(reading)
    reading.close()
    assert disk.synced == []
    writing.close()


def test_sessionsShareASync(store, layout, monkeypatch):
    """Sessions that end while the disk is busy with another one's wait for one more sync, not for one each."""
    sessions = [store.openSession() for _ in INFOS]
    for session, info in zip(sessions, INFOS, strict=True):
        add(session, info)
    begun, go, synced = threading.Event(), threading.Event(), []

    def fdatasync(fd):
        synced.append(fd)
        begun.set()
        go.wait(30)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    first = threading.Thread(target=sessions[0].close)
    first.start()
    assert begun.wait(30)
    late = store.openSession()
    add(late, makeInfo("late", HELLO))
    others = [threading.Thread(target=session.close) for session in (*sessions[1:], late)]
    for thread in others:
        thread.start()
    go.set()
    for thread in (first, *others):
        thread.join(30)
    assert len(synced) == 2


def test_withoutFsyncMetadata(layout, disk):
    """With fsync-metadata = false nothing of that happens, and SQLite syncs nothing either."""
    store = opened(layout, fsyncMetadata=False)
    session = store.openSession()
    add(session)
    session.close()
    with store.database.reading() as connection:
        assert connection.execute("pragma synchronous").fetchone() == (0,)
    store.close()
    assert disk.synced == []


@pytest.mark.parametrize("small", [False, True])
def test_fsyncStorePaths(layout, disk, small):
    """With fsync-store-paths all of an object, then its name, is on the disk before it is valid."""
    store = opened(layout, fsyncStorePaths=True)
    session = store.openSession()
    info = makeInfo("tree", TREE)
    if small:
        session.addSmallPaths([(info, TREE)])
    else:
        add(session, info, TREE)
    top = layout.realPath(info.path)
    synced = list(disk.synced)
    assert sorted(synced) == sorted([f"{top}/a", f"{top}/c/d", f"{top}/c", top, layout.realStoreDir])
    assert synced.index(f"{top}/c/d") < synced.index(f"{top}/c") < synced.index(top)
    assert synced[-1] == layout.realStoreDir
    assert disk.early == synced
    session.close()
    store.close()


def test_fsyncStorePathsTogether(layout, disk):
    """The names of small objects that come together are written out once for all of them."""
    store = opened(layout, fsyncStorePaths=True)
    store.openSession().addSmallPaths([(info, HELLO) for info in INFOS])
    assert sorted(disk.synced) == sorted([layout.realStoreDir, *(layout.realPath(info.path) for info in INFOS)])
    assert disk.early == disk.synced
    store.close()


def test_fsyncThroughLink(layout, disk, tmp_path):
    """So it is in a store that is reached through a symbolic link, where that is allowed."""
    link = tmp_path / "link"
    link.symlink_to(layout.realStoreDir)
    store = opened(replace(layout, realStoreDir=str(link), allowSymlinkedStore=True), fsyncStorePaths=True)
    add(store.openSession())
    assert disk.synced == [layout.realPath(INFOS[0].path), layout.realStoreDir]
    store.close()


def test_fsyncImported(layout, disk):
    """An imported object is written out under its own name."""
    store = opened(layout, fsyncStorePaths=True)
    writer = store.openSession().importPath()
    writer.feed(HELLO)
    writer.finish(INFOS[0].path, [], None)
    assert disk.synced == [layout.realPath(INFOS[0].path), layout.realStoreDir]
    assert disk.early == disk.synced
    store.close()


def test_syncBeforeRegistering(layout, disk):
    """With sync-before-registering all file systems are written out before anything is valid, once for a batch."""
    store = opened(layout, syncBeforeRegistering=True)
    store.openSession().addSmallPaths([(info, HELLO) for info in INFOS])
    assert disk.synced == disk.early == ["everything"]
    store.close()


def test_syncOnceWhileBusy(layout, disk):
    """Who waits for the database does not write everything out again at each attempt."""
    store = opened(layout, syncBeforeRegistering=True)
    foreign = sqlite3.connect(layout.dbPath, isolation_level=None)
    session = store.openSession()
    writer = session.addToStore(INFOS[0])
    writer.feed(HELLO)
    foreign.execute("begin immediate")
    for _ in range(3):
        with pytest.raises(Exception, match="waiting for other users"):
            writer.finish()
    foreign.execute("rollback")
    writer.finish()
    assert disk.synced == ["everything"]
    foreign.close()
    store.close()

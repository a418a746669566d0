"""
L{nixserve.store.database}: Nix's own file, of any age, and whoever else has it open.
"""

import fcntl
import os
import queue
import sqlite3
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from nixserve.errors import StoreError
from nixserve.store import database as databaseModule
from nixserve.store.api import Busy
from nixserve.store.database import PATIENCE, Database
from nixserve.store.local import LocalStore
from nixserve.store.opening import prepareDirectories
from nixserve.store.validpaths import ValidPaths
from tests.store.infos import A, B, C

#: The tables of schema 8, of which Nix 1.11 made stores; those of 7 lacked two columns.
SCHEMA_8 = """
    create table ValidPaths (id integer primary key autoincrement not null, path text unique not null,
        hash text not null, registrationTime integer not null, deriver text, narSize integer {more});
    create table Refs (referrer integer not null, reference integer not null, primary key (referrer, reference),
        foreign key (referrer) references ValidPaths(id) on delete cascade,
        foreign key (reference) references ValidPaths(id) on delete restrict);
    create table DerivationOutputs (drv integer not null, id text not null, path text not null, primary key (drv, id),
        foreign key (drv) references ValidPaths(id) on delete cascade);
    create table FailedPaths (path text primary key not null, time integer not null);
    insert into ValidPaths (path, hash, registrationTime) values ('{path}', '{hash}', 1);
"""


def columns(path):
    """Tables, columns, keys, indices and triggers of a database, without the layout of their SQL."""
    connection = sqlite3.connect(path)
    found = {}
    for kind, name, table in connection.execute("select type, name, tbl_name from sqlite_master order by name"):
        found[kind, name, table] = {
            "table": [
                connection.execute(f"pragma table_info({name})").fetchall(),
                connection.execute(f"pragma foreign_key_list({name})").fetchall(),
                connection.execute(f"pragma index_list({name})").fetchall(),
            ],
            "index": connection.execute(f"pragma index_info({name})").fetchall(),
        }.get(kind)
    connection.close()
    return found


def makeOld(layout, schema):
    """A store of an older Nix with one valid path."""
    os.makedirs(layout.dbDir)
    more = ", ultimate integer, sigs text" if schema >= 8 else ""
    connection = sqlite3.connect(layout.dbPath)
    connection.executescript(SCHEMA_8.format(more=more, path=A.path, hash=A.narHash.hexText))
    connection.close()
    with open(layout.schemaPath, "w") as file:
        file.write(str(schema))


def test_bigLock(database, layout):
    """The big lock is held shared until the database is closed."""
    fd = os.open(layout.bigLockPath, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    other = Database(layout)
    database.close()
    with pytest.raises(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    other.close()
    other.close()
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


def test_pragmas(database):
    """Each connection enforces foreign keys and has Nix's journal settings."""
    with database.reading() as first, database.reading() as second:
        assert first is not second
        for connection in (first, second):
            values = [connection.execute(f"pragma {name}").fetchone()[0] for name in ("foreign_keys", "synchronous")]
            assert values == [1, 1]
            assert connection.execute("pragma journal_mode").fetchone() == ("wal",)
            assert connection.execute("pragma wal_autocheckpoint").fetchone() == (40000,)
    with database.reading() as third:
        assert third in (first, second)


@pytest.mark.parametrize("text", [b"10\n", b"", b"ten", b" 10", b"1" * 20])
def test_corruptSchema(database, layout, text):
    """A schema file that is no plain number makes the store unusable, as for real Nix."""
    with open(layout.schemaPath, "wb") as file:
        file.write(text)
    with pytest.raises(StoreError, match="schema' is corrupt"):
        Database(layout)


@pytest.mark.parametrize(("number", "text"), [("11", "made by a newer Nix; supported is 10"), ("6", "too old")])
def test_foreignSchema(database, layout, number, text):
    """Schemas that we do not know are refused and left alone."""
    with open(layout.schemaPath, "w") as file:
        file.write(number)
    with pytest.raises(StoreError, match=text):
        Database(layout)


@pytest.mark.parametrize("schema", [7, 8, 9])
def test_upgrade(layout, schema):
    """Older schemas are brought up to date, with nobody else in the store, and keep what they hold."""
    makeOld(layout, schema)
    prepareDirectories(layout, 0)
    database = Database(layout)
    assert ValidPaths(database, layout.storeDir).queryPathInfos([A.path])[A.path].narHash == A.narHash
    assert ("ca" in str(columns(layout.dbPath))) and ("sigs" in str(columns(layout.dbPath)))
    assert ("FailedPaths" in str(columns(layout.dbPath))) == (schema == 9)
    with open(layout.schemaPath) as file:
        assert file.read() == "10"
    fd = os.open(layout.bigLockPath, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    os.close(fd)
    database.close()


def test_upgradeWaits(layout):
    """An upgrade waits for everybody else to leave, and sees whether they did it."""
    makeOld(layout, 8)
    prepareDirectories(layout, 0)
    fd = os.open(layout.bigLockPath, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    opened = []
    thread = threading.Thread(target=lambda: opened.append(Database(layout)))
    thread.start()
    time.sleep(0.1)
    assert not opened
    with open(layout.schemaPath, "w") as file:
        file.write("10")
    os.close(fd)
    thread.join(10)
    assert "ca" not in str(columns(layout.dbPath))
    opened[0].close()


def test_upgradeAfterCrash(layout):
    """An upgrade that lacks only the new number is completed; real Nix fails on it."""
    makeOld(layout, 9)
    connection = sqlite3.connect(layout.dbPath)
    connection.execute("alter table ValidPaths add column ca text")
    connection.close()
    prepareDirectories(layout, 0)
    Database(layout).close()
    with open(layout.schemaPath) as file:
        assert file.read() == "10"


def test_missingDatabase(layout):
    """A schema without a database is an error, not a new store."""
    os.makedirs(layout.dbDir)
    with open(layout.schemaPath, "w") as file:
        file.write("10")
    prepareDirectories(layout, 0)
    with pytest.raises(StoreError, match="unable to open database file"):
        Database(layout)
    assert not os.path.exists(layout.dbPath)


def test_readOnly(layout):
    """Nothing is made or upgraded for a reader; an idle store can be read, and is left as it was."""
    reader = replace(layout, readOnly=True)
    with pytest.raises(StoreError, match=r"cannot examine the store directory|there is no store in"):
        LocalStore(reader)
    assert os.listdir(os.path.dirname(os.path.dirname(layout.realStoreDir))) == []
    LocalStore(layout, reservedSize=0).close()
    before = sorted(os.listdir(layout.dbDir))
    store = LocalStore(reader)
    assert store.validPaths.queryAllValidPaths() == set()
    with pytest.raises(StoreError, match="read-only"):
        store.validPaths.registerValidPaths([A])
    store.close()
    assert sorted(os.listdir(layout.dbDir)) == before
    with open(layout.schemaPath, "w") as file:
        file.write("9")
    with pytest.raises(StoreError, match="must be opened for writing once"):
        LocalStore(reader)


def test_closed(database, valid):
    """A closed database says so."""
    database.close()
    with pytest.raises(StoreError, match="is closed"):
        valid.queryAllValidPaths()


def test_closedMeanwhile(database):
    """What is under way while the database is closed comes to its end, and is closed then."""
    with database.reading() as connection:
        database.close()
        assert connection.execute("select count(*) from ValidPaths").fetchone() == (0,)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("select 1")


def test_busy(valid, foreign):
    """Another writer makes ours busy at once, or nearly; readers go on."""
    assert PATIENCE <= 0.1
    foreign.execute("begin immediate")
    with pytest.raises(Busy):
        valid.registerValidPaths([A])
    assert valid.queryValidPaths([A.path]) == set()
    foreign.execute("rollback")
    valid.registerValidPaths([A])


def test_busyWithin(database, valid):
    """So does another writer of our own process."""
    done = []

    def write():
        try:
            valid.registerValidPaths([A])
        except Busy as error:
            done.append(error)

    with database.writing():
        thread = threading.Thread(target=write)
        thread.start()
        thread.join(10)
    assert len(done) == 1


def test_oneThreadWaits(valid, foreign, monkeypatch):
    """While another process writes, one of our threads looks for its end; all others hear of it at once."""
    monkeypatch.setattr(databaseModule, "PATIENCE", 60.0)
    busy, written = queue.Queue(), queue.Queue()

    def write():
        try:
            valid.registerValidPaths([A])
            written.put(A)
        except Busy as error:
            busy.put(error)

    foreign.execute("begin immediate")
    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads[1:]:
        busy.get(timeout=30)
    assert written.empty()
    foreign.execute("rollback")
    assert written.get(timeout=30) is A
    for thread in threads:
        thread.join(30)


def test_afterBusy(valid, foreign):
    """When the other process has ended its transaction, all is as before."""
    foreign.execute("begin immediate")
    for _ in range(3):
        with pytest.raises(Busy):
            valid.registerValidPaths([A])
    foreign.execute("rollback")
    for info in (A, B, C):
        valid.registerValidPaths([info])
    assert valid.queryAllValidPaths() == {A.path, B.path, C.path}


def test_openingIsPatient(database, layout):
    """Who opens a store waits for a program that has its database for itself for a moment."""
    database.close()
    other = sqlite3.connect(layout.dbPath, isolation_level=None, check_same_thread=False)
    other.execute("pragma locking_mode = exclusive")
    other.execute("begin exclusive")
    timer = threading.Timer(0.2, other.close)
    timer.start()
    Database(layout).close()
    timer.join()


def test_rollback(database, valid):
    """What is written before an exception is not there after it."""
    with pytest.raises(KeyError), database.writing() as connection:
        connection.execute("insert into ValidPaths (path, hash, registrationTime) values ('x', 'y', 1)")
        raise KeyError
    assert valid.queryAllValidPaths() == set()


# --- beside real Nix --------------------------------------------------------------------------------------


@pytest.mark.interop
def test_sameTables(layout, nix, tmp_path):
    """A new store of ours has the tables, columns, keys, indices and triggers of one made by real Nix."""
    ours = replace(layout, realStoreDir=str(tmp_path / "store"), stateDir=str(tmp_path / "state"))
    prepareDirectories(ours, 0)
    Database(ours).close()
    nix("--verify")
    assert columns(ours.dbPath) == columns(layout.dbPath)


@pytest.mark.interop
def test_sameFiles(layout, nix, tmp_path):
    """It also has the same files with the same modes, but for what Nix makes for the user who runs it."""

    def listing(state, store):
        found = {}
        for top in (state, store):
            for directory, directories, files in os.walk(top):
                for path in (f"{directory}/{name}" for name in directories + files):
                    status = os.lstat(path)
                    size = status.st_size if os.path.basename(path) in ("schema", "reserved") else None
                    found[os.path.relpath(path, top)] = (oct(status.st_mode), status.st_gid, size)
        return found

    ours = replace(layout, realStoreDir=str(tmp_path / "store"), stateDir=str(tmp_path / "state"))
    LocalStore(ours).close()
    nix("--verify")
    theirs = listing(layout.stateDir, layout.realStoreDir)
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    for name in (f"profiles/per-user/{user}", f"gcroots/per-user/{user}", "gc.lock"):
        theirs.pop(name, None)
    assert listing(ours.stateDir, ours.realStoreDir) == theirs
    assert os.stat(ours.realStoreDir).st_mode == os.stat(layout.realStoreDir).st_mode

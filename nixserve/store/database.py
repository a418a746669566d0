"""
The SQLite database of a store: opened, checked and upgraded as every Nix does it; connections and transactions.

This is shared ground (Nix 2.8, src/libstore/local-store.cc and sqlite.cc). Honoured here: C{STATE/db/schema} holds
the schema's number without a newline; C{STATE/db/big-lock} is locked shared as long as the store is open, and
exclusively by an upgrade; the database is in WAL mode, so that readers and one writer do not wait for each other.
What the rows say is in L{nixserve.store.validpaths}.

Threads. A connection serves one operation at a time, in whichever thread; there are as many as operations were
ever under way at once. While another process writes, one thread looks for its end, for L{PATIENCE}, and all others are
told to come back: see L{Turn}.

Durability. As Nix has it, a commit is not written out by itself (C{synchronous = normal} in WAL mode): SQLite does that
when it checkpoints, which is when the last connection closes, at the end of each C{nix-store}. Here connections stay
open for as long as the store, so L{Database.sync} stands for that end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from typing import Final, TypeVar
from urllib.parse import quote

from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.store.fileerrors import fileSystemErrors, refused
from nixserve.store.layout import StoreLayout

__all__ = ["OLDEST_SCHEMA", "PATIENCE", "SCHEMA", "Database"]

#: The schema that is read and written.
SCHEMA: Final = 10

#: The oldest that can be upgraded.
OLDEST_SCHEMA: Final = 7

#: Seconds to wait for another writer before L{Busy}: a few of a real Nix's transactions. Nix itself waits for an hour,
#: but has a process of its own to wait in.
PATIENCE: Final = 0.05

#: Seconds between two looks meanwhile. SQLite's own waiting becomes slower and slower, and so never finds the moment
#: between two transactions of somebody who makes many.
_LOOK: Final = 0.002

#: Seconds to wait, when the store is opened, for others who are opening it or letting go of it.
_OPENING_PATIENCE: Final = 10.0

#: Settings of a connection, those of Nix's openDB but for the last. Without foreign_keys a deletion would leave
#: dangling references. A connection that only reads needs none, and could not even ask for some.
_PRAGMAS: Final = (
    "pragma foreign_keys = 1",
    "pragma journal_mode = wal",
    "pragma wal_autocheckpoint = 40000",
    f"pragma journal_size_limit = {2**40}",
    # 8 MiB at most: four times the default. The paths of a large store come in no order, each on another page.
    "pragma cache_size = -8192",
)

#: SQLite's result codes for "somebody else is at it". The third is a race in starting up a WAL.
_CONTENTION: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})

_T = TypeVar("_T")


class Turn:
    """
    Whose turn it is to write, among the threads of this process.

    To wait for a turn is to wait for the end of one of our own transactions, some milliseconds; unless who has the turn
    finds another process writing, which may last. Then it says so, and from there on nobody else waits.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._stuck = False

    def take(self, seconds: float) -> bool:
        """
        Wait for the turn, but not longer than C{seconds}.

        @return: whether it was had. Then L{giveBack} it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stuck or not self._taken, seconds)
            if self._taken:
                return False
            self._taken = True
            return True

    def stick(self) -> None:
        """Who has the turn must wait for another process."""
        with self._changed:
            self._stuck = True
            self._changed.notify_all()

    def giveBack(self) -> None:
        """It is the next one's turn."""
        with self._changed:
            self._taken = self._stuck = False
            self._changed.notify()


class Database:
    """
    An open store database. Any method may be called from any thread.

    A store opened read-only needs no right to write anywhere: no lock is taken that cannot be had, and where
    there is no write-ahead log to share, the database is read as it lies, each time afresh.
    """

    def __init__(self, layout: StoreLayout) -> None:
        """
        Open the database, make it if the store is new, upgrade it if it is old. May block while others upgrade.

        @param layout: of a store whose directories exist.
        @raise StoreError: no store, a foreign schema, or the file system refuses.
        """
        self._layout = layout
        self._bigLock = -1
        self._closed = False
        self._idle: list[sqlite3.Connection] = []
        # Guards the two above; never held during I/O.
        self._mutex = threading.Lock()
        # One writer at a time within the process: a queue here, where SQLite would sleep and look again.
        self._turn = Turn()
        # How many transactions were committed, and how many of them are on the disk.
        self._committed = 0
        self._synced = 0
        # Held while they are written out: whoever comes meanwhile waits, and mostly finds that done.
        self._syncing = threading.Lock()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """
        A connection within a transaction that sees one state of the database.

        @raise Busy: only in the moment when another process starts or ends; try again.
        @raise StoreError: the database fails.
        """
        with self._connection() as connection:
            connection.execute("begin")
            try:
                yield connection
            finally:
                connection.rollback()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """
        A connection within a transaction that may write. Committed at the end, rolled back after an exception.

        @raise Busy: others are writing; nothing was changed.
        @raise StoreError: the store is read-only, or the database fails; nothing was changed.
        """
        if self._layout.readOnly:
            raise StoreError(f"the store in '{self._layout.stateDir}' is opened read-only")
        if not self._turn.take(PATIENCE):
            raise Busy("other writers of the store's database")
        try:
            with self._connection() as connection:
                self._begin(connection)
                try:
                    yield connection
                    connection.commit()
                    self._committed += 1
                finally:
                    # Does nothing after a commit, everything after a failed one.
                    connection.rollback()
        finally:
            self._turn.giveBack()

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Begin a transaction that writes; who has the turn looks for L{PATIENCE} whether another process lets it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                connection.execute("begin immediate")
                return
            except sqlite3.Error as error:
                if not _isContention(error) or time.monotonic() >= deadline:
                    raise
            self._turn.stick()
            time.sleep(_LOOK)

    def sync(self) -> None:
        """
        Have on the disk what was committed before this call, unless C{fsync-metadata} is off. Blocks on the disk; calls
        at the same time share the work.

        It is in the write-ahead log, or somebody has checkpointed it since, and then it was synced. The directory entry
        of the log is synced by SQLite, when it makes one.

        @raise StoreError: the disk fails.
        """
        wanted = self._committed
        if not self._layout.durability.fsyncMetadata:
            return
        with self._syncing:
            if self._synced >= wanted:
                return
            wanted = self._committed
            path = f"{self._layout.dbPath}-wal"
            # Without one, on a file system that allows none, SQLite syncs each commit.
            with fileSystemErrors(f"cannot sync '{path}'"), contextlib.suppress(FileNotFoundError):
                # To close this one is harmless: SQLite's locks are on other files.
                _syncFile(path)
            self._synced = wanted

    def close(self) -> None:
        """Close what is idle now and the rest when it becomes so; let go of the big lock. Safe to call twice."""
        with self._mutex:
            self._closed = True
            idle, self._idle = self._idle, []
            bigLock, self._bigLock = self._bigLock, -1
        for connection in idle:
            connection.close()
        if bigLock >= 0:
            os.close(bigLock)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one operation, with SQLite's errors turned into ours."""
        with self._errors():
            connection = self._take()
            try:
                yield connection
            finally:
                self._giveBack(connection)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if _isContention(error):
                raise Busy("other users of the store's database") from error
            raise StoreError(f"database '{self._layout.dbPath}': {error}") from error

    def _take(self) -> sqlite3.Connection:
        with self._mutex:
            if self._closed:
                raise StoreError(f"the store in '{self._layout.stateDir}' is closed")
            if self._idle:
                return self._idle.pop()
        return self._connect()

    def _giveBack(self, connection: sqlite3.Connection) -> None:
        with self._mutex:
            if not self._closed and not self._layout.readOnly:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self, mode: str = "rw") -> sqlite3.Connection:
        if self._layout.readOnly:
            return self._connectReadOnly()
        connection = self._openSQLite(f"mode={mode}")
        try:
            for pragma in _PRAGMAS:
                connection.execute(pragma)
            synchronous = "normal" if self._layout.durability.fsyncMetadata else "off"
            connection.execute(f"pragma synchronous = {synchronous}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _connectReadOnly(self) -> sqlite3.Connection:
        """
        Share the write-ahead log if there is one; else read the database as a file that does not change. SQLite would
        make a log to share, and leave it behind.

        The file may change all the same, once somebody opens it to write: therefore such connections are not kept from
        one operation to the next.
        """
        shared = os.path.exists(f"{self._layout.dbPath}-wal")
        return self._openSQLite("mode=ro" if shared else "immutable=1")

    def _openSQLite(self, options: str) -> sqlite3.Connection:
        # check_same_thread: connections go from thread to thread, but never serve two at once.
        return sqlite3.connect(
            f"file:{quote(self._layout.dbPath)}?{options}",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
        )

    def _open(self) -> None:
        self._lockBigLock()
        schema = self._readSchema()
        if schema > SCHEMA:
            raise StoreError(
                f"the store in '{self._layout.stateDir}' has schema {schema}, made by a newer Nix; "
                f"supported is {SCHEMA}"
            )
        if schema == SCHEMA:
            _patiently(self._look)
        elif self._layout.readOnly:
            raise StoreError(
                f"the store in '{self._layout.stateDir}' has schema {schema}; "
                "it must be opened for writing once to bring it up to date"
            )
        elif schema == 0:
            _patiently(self._create)
            self._writeSchema()
        else:
            self._upgrade()

    def _look(self) -> None:
        with self.reading() as connection:
            connection.execute("select 1 from ValidPaths limit 1")

    def _create(self) -> None:
        with self._errors():
            self._idle.append(self._connect("rwc"))
        with self._connection() as connection:
            # Not in a transaction, but two programs may run it at once, or a crash leave half of it: each
            # statement says "if not exists".
            connection.executescript(_script("schema"))

    def _lockBigLock(self) -> None:
        path = self._layout.bigLockPath
        try:
            if self._layout.readOnly:
                self._bigLock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            else:
                self._bigLock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._bigLock, fcntl.LOCK_SH)
        except OSError as error:
            # A reader without rights, or of a store that nobody has opened since it was copied here.
            if not self._layout.readOnly:
                raise refused(f"cannot lock '{path}'", error) from error

    def _readSchema(self) -> int:
        """
        @return: the number in the file C{schema}; 0 for a store without one.
        """
        path = self._layout.schemaPath
        try:
            with open(path, "rb") as file:
                text = file.read(64)
        except FileNotFoundError:
            if self._layout.readOnly:
                raise StoreError(f"there is no store in '{self._layout.stateDir}': '{path}' is missing") from None
            return 0
        except OSError as error:
            raise refused(f"cannot read '{path}'", error) from error
        # Nix refuses all but digits here, a newline too.
        if not (text.isdigit() and len(text) < 10):
            raise StoreError(f"'{path}' is corrupt: it holds {text!r} where a number alone should be")
        schema = int(text)
        if schema and schema < OLDEST_SCHEMA:
            raise StoreError(
                f"the store in '{self._layout.stateDir}' has schema {schema}, too old to be upgraded; "
                "open it with nix-store first"
            )
        return schema

    def _writeSchema(self) -> None:
        """Written last, when the database is what it says; by rename, for others may be opening the store too."""
        path = self._layout.schemaPath
        temporary = f"{path}.tmp-{os.getpid()}-{threading.get_ident()}"
        with fileSystemErrors(f"cannot write '{path}'"):
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                os.write(fd, str(SCHEMA).encode("ascii"))
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)

    def _upgrade(self) -> None:
        """
        Bring an old database up to date, with nobody else in it.

        The lock is let go before it is asked for exclusively: two upgraders that both keep it shared meanwhile would
        wait for each other.
        """
        try:
            fcntl.flock(self._bigLock, fcntl.LOCK_UN)
            fcntl.flock(self._bigLock, fcntl.LOCK_EX)
            schema = self._readSchema()
            if schema != SCHEMA:
                _patiently(partial(self._runUpgrades, schema))
                self._writeSchema()
            fcntl.flock(self._bigLock, fcntl.LOCK_SH)
        except OSError as error:
            raise refused(f"cannot lock '{self._layout.bigLockPath}'", error) from error

    def _runUpgrades(self, schema: int) -> None:
        with self._connection() as connection:
            _runUpgrades(connection, schema)


def _isContention(error: sqlite3.Error) -> bool:
    """Is somebody else at it? Extended codes carry the plain one in their low byte; errors of the module have none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _CONTENTION


def _patiently(attempt: Callable[[], _T]) -> _T:
    """Try again while others are opening the database or letting go of it. For opening it, where one may wait."""
    deadline = time.monotonic() + _OPENING_PATIENCE
    while True:
        try:
            return attempt()
        except Busy:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOOK)


def _syncFile(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _runUpgrades(connection: sqlite3.Connection, schema: int) -> None:
    """Run the scripts for the schemas after C{schema}, all or none."""
    columns = {name for _, name, *_ in connection.execute("pragma table_info(ValidPaths)")}
    # A crash between the last upgrade and the writing of its number: nothing is left to do.
    if "ca" in columns:
        return
    scripts = "".join(_script(f"upgrade{number}") for number in range(schema + 1, SCHEMA + 1))
    try:
        connection.executescript(f"begin immediate;\n{scripts}\ncommit;")
    finally:
        connection.rollback()


def _script(name: str) -> str:
    return resources.files("nixserve.store").joinpath(f"{name}.sql").read_text(encoding="utf-8")

"""
The contract of a store without a disk: for tests, and for programs that hold few and small objects.

NARs are kept whole. The rules are those of L{nixserve.store.local}, short of what only concerns files; a path that
one session is adding is locked for the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nixserve.codec.derivation import Derivation
from nixserve.codec.nar import MAX_CHUNK
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import NixServeError
from nixserve.store.api import (
    Busy,
    Closable,
    ImportWriter,
    InvalidPath,
    OpenSessions,
    PathWriter,
    StoreSession,
    addWhole,
    requireValid,
)
from nixserve.store.contents import (
    Intake,
    checkContentAddress,
    checkMore,
    checkNar,
    checkNewInfo,
    derivationOutputs,
    exportStream,
    readDerivation,
    referencesFirst,
)
from nixserve.store.drvhashes import DerivationMemo
from nixserve.store.writers import DrainingWriter, ObjectWriter

__all__ = ["MemorySession", "MemoryStore"]


@dataclass(frozen=True, slots=True)
class _Object:
    """
    @ivar outputs: of a derivation, as far as they are known.
    """

    info: ValidPathInfo
    nar: bytes
    outputs: Mapping[str, StorePath] = field(default_factory=dict)


class MemoryStore:
    """
    L{nixserve.store.api.Store} in memory.
    """

    def __init__(self, storeDir: StoreDir | None = None) -> None:
        self._storeDir = storeDir or StoreDir()
        self._objects: dict[StorePath, _Object] = {}
        self._sessions = OpenSessions[MemorySession]()
        self._locks: dict[StorePath, MemorySession] = {}
        self._memo = DerivationMemo()
        # Guards objects and locks. Nothing slow happens under it.
        self._mutex = threading.RLock()

    @property
    def storeDir(self) -> StoreDir:
        """The logical store directory."""
        return self._storeDir

    def openSession(self) -> MemorySession:
        """
        @return: a new session.
        @raise StoreError: the store is closed.
        """
        return self._sessions.open(lambda: MemorySession(self, self._sessions.forget))

    def close(self) -> None:
        """Close every session. Safe to call twice."""
        for session in self._sessions.end():
            session.close()

    def collectGarbage(self) -> set[StorePath]:
        """
        Drop everything but the roots of open sessions and what they refer to.

        @return: what was dropped.
        """
        with self._mutex:
            roots = {path for session in self._sessions.all() for path in session.roots}
            live = self.closure(roots & self._objects.keys(), False)
            dead = self._objects.keys() - live
            for path in dead:
                del self._objects[path]
            return dead

    def lookUp(self, paths: Iterable[StorePath]) -> dict[StorePath, _Object]:
        """The objects of those of C{paths} that are valid, in order."""
        with self._mutex:
            return {path: self._objects[path] for path in paths if path in self._objects}

    def closure(self, paths: Collection[StorePath], includeOutputs: bool) -> set[StorePath]:
        """The valid C{paths} and what they lead to."""
        with self._mutex:
            found: set[StorePath] = set()
            waiting = list(paths)
            while waiting:
                path = waiting.pop()
                if path in found or path not in self._objects:
                    continue
                found.add(path)
                waiting += self._objects[path].info.references
                if includeOutputs:
                    waiting += self._objects[path].outputs.values()
            return found

    def lock(self, path: StorePath, session: MemorySession) -> bool:
        """
        Lock a path for adding, once for each session.

        @return: whether it is not valid yet; only then it is locked.
        @raise Busy: it is locked.
        """
        with self._mutex:
            if path in self._objects:
                return False
            if path in self._locks:
                raise Busy(f"the lock on '{path}'")
            self._locks[path] = session
            return True

    def unlock(self, path: StorePath, session: MemorySession) -> None:
        """Unlock it, if C{session} holds it."""
        with self._mutex:
            if self._locks.get(path) is session:
                del self._locks[path]

    def register(self, info: ValidPathInfo, nar: bytes) -> None:
        """
        Make a path valid.

        @raise InvalidPath: a reference is not.
        """
        with self._mutex:

            def lookup(path: StorePath) -> Derivation:
                if path != info.path and path not in self._objects:
                    raise InvalidPath(path)
                data = nar if path == info.path else self._objects[path].nar
                return readDerivation(path, [data], self._storeDir)

            outputs = derivationOutputs(info.path, lookup, self._storeDir, self._memo)
            requireValid(info.references - {info.path}, self._objects)
            info = replace(info, registrationTime=info.registrationTime or int(time.time()))
            self._objects[info.path] = _Object(info, nar, outputs)

    def unlockAll(self, session: MemorySession) -> None:
        """Unlock what C{session} holds."""
        with self._mutex:
            for path in [path for path, holder in self._locks.items() if holder is session]:
                del self._locks[path]


class MemorySession(Closable, StoreSession):
    """
    L{nixserve.store.api.StoreSession} of a L{MemoryStore}.

    @ivar roots: what it keeps from being collected.
    """

    def __init__(self, store: MemoryStore, onClose: Callable[[MemorySession], None]) -> None:
        super().__init__(onClose)
        self.roots: set[StorePath] = set()
        self._store = store

    @property
    def storeDir(self) -> StoreDir:
        """The logical store directory."""
        return self._store.storeDir

    def addTempRoots(self, paths: Collection[StorePath]) -> None:
        """See L{nixserve.store.api.StoreSession.addTempRoots}. Never busy."""
        self.requireOpen()
        self.roots.update(paths)

    def queryValidPaths(self, paths: Collection[StorePath]) -> set[StorePath]:
        """See L{nixserve.store.api.StoreSession.queryValidPaths}."""
        self.requireOpen()
        return set(self._store.lookUp(paths))

    def queryPathInfos(self, paths: Collection[StorePath]) -> dict[StorePath, ValidPathInfo]:
        """See L{nixserve.store.api.StoreSession.queryPathInfos}. In the order of C{paths}."""
        self.requireOpen()
        return {path: entry.info for path, entry in self._store.lookUp(paths).items()}

    def queryClosure(self, paths: Collection[StorePath], includeOutputs: bool = False) -> set[StorePath]:
        """See L{nixserve.store.api.StoreSession.queryClosure}."""
        self._require(paths)
        return self._store.closure(paths, includeOutputs)

    def narFromPath(self, path: StorePath) -> Iterator[bytes]:
        """See L{nixserve.store.api.StoreSession.narFromPath}."""
        return self.narsFromPaths([path])

    def narsFromPaths(self, paths: Sequence[StorePath]) -> Iterator[bytes]:
        """See L{nixserve.store.api.StoreSession.narsFromPaths}."""
        self._require(paths[:1])
        return self._nars(paths, self._store.lookUp(paths))

    def exportPaths(self, paths: Collection[StorePath]) -> Iterator[bytes]:
        """See L{nixserve.store.api.StoreSession.exportPaths}."""
        objects = self._require(paths)
        infos = {path: entry.info for path, entry in objects.items()}
        return exportStream(referencesFirst(infos), lambda info: self._chunks(objects[info.path].nar))

    def addToStore(self, info: ValidPathInfo) -> PathWriter:
        """
        See L{nixserve.store.api.StoreSession.addToStore}.

        @raise FormatError: a signature is malformed.
        """
        checkNewInfo(info, self.storeDir)
        self.addTempRoots([info.path])
        return _PathWriter(self._store, self, info) if self._store.lock(info.path, self) else DrainingWriter(info)

    def addSmallPaths(self, objects: Sequence[tuple[ValidPathInfo, bytes]]) -> int:
        """See L{nixserve.store.api.StoreSession.addSmallPaths}."""
        for added, (info, nar) in enumerate(objects):
            try:
                addWhole(self, info, nar)
            except NixServeError:
                if added:
                    return added
                raise
        return len(objects)

    def importPath(self) -> ImportWriter:
        """See L{nixserve.store.api.StoreSession.importPath}. Never busy."""
        self.requireOpen()
        return _ImportWriter(self._store, self)

    def _free(self) -> None:
        """What is unfinished fails from now on."""
        self.roots.clear()
        self._store.unlockAll(self)

    def _require(self, paths: Collection[StorePath]) -> dict[StorePath, _Object]:
        """The objects of C{paths}, all of which must be valid."""
        self.requireOpen()
        objects = self._store.lookUp(paths)
        requireValid(paths, objects)
        return objects

    def _chunks(self, nar: bytes) -> Iterator[bytes]:
        for start in range(0, len(nar), MAX_CHUNK):
            self.requireOpen()
            yield nar[start : start + MAX_CHUNK]

    def _nars(self, paths: Sequence[StorePath], objects: Mapping[StorePath, _Object]) -> Iterator[bytes]:
        for path in paths:
            if path not in objects:
                raise InvalidPath(path)
            yield from self._chunks(objects[path].nar)


class _Buffer(Intake):
    """A NAR that is coming in, and is kept."""

    def __init__(self, maxSize: int | None = None) -> None:
        super().__init__(maxSize)
        self._pieces: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """See L{Intake.feed}."""
        super().feed(data)
        self._pieces.append(bytes(data))

    @property
    def nar(self) -> bytes:
        """The whole NAR."""
        return b"".join(self._pieces)

    def forget(self) -> None:
        """Forget what has come."""
        self._pieces.clear()


class _PathWriter(ObjectWriter):
    """L{nixserve.store.api.PathWriter} of a path that is not valid yet."""

    alreadyValid = False

    def __init__(self, store: MemoryStore, session: MemorySession, info: ValidPathInfo) -> None:
        super().__init__(session.requireOpen)
        self._store = store
        self._session = session
        self._info = info
        self._buffer = _Buffer(info.narSize)

    def finish(self) -> None:
        """See L{nixserve.store.api.PathWriter.finish}."""
        with self._working(isLast=True):
            narHash, nar = self._buffer.finish(), self._buffer.nar
            checkNar(self._info, narHash, self._buffer.size)
            checkContentAddress(self._info, lambda: [nar])
            self._store.register(self._info, nar)

    def _take(self, data: bytes) -> None:
        checkMore(self._info, self._buffer.size, self._buffer.finished, data)
        self._buffer.feed(data)

    def _free(self) -> None:
        self._buffer.forget()
        self._store.unlock(self._info.path, self._session)


class _ImportWriter(ObjectWriter):
    """L{nixserve.store.api.ImportWriter}."""

    def __init__(self, store: MemoryStore, session: MemorySession) -> None:
        super().__init__(session.requireOpen)
        self._store = store
        self._session = session
        self._buffer = _Buffer()

    def finish(self, path: StorePath, references: Collection[StorePath], deriver: StorePath | None) -> None:
        """See L{nixserve.store.api.ImportWriter.finish}."""
        with self._working(isLast=True):
            narHash, nar = self._buffer.finish(), self._buffer.nar
            self._session.addTempRoots([path])
            if self._store.lock(path, self._session):
                info = ValidPathInfo(path, narHash, self._buffer.size, frozenset(references), deriver)
                try:
                    self._store.register(info, nar)
                finally:
                    self._store.unlock(path, self._session)

    def _take(self, data: bytes) -> None:
        self._buffer.feed(data)

    def _free(self) -> None:
        self._buffer.forget()

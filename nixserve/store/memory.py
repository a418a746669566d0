"""
The contract of a store without a disk: for tests, and for programs that hold few and small objects.

NARs are kept whole. The rules are those of L{nixserve.store.local}, short of what only concerns files; a path that
one session is adding is locked for the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nixserve.codec.derivation import Derivation
from nixserve.codec.nar import MAX_CHUNK
from nixserve.codec.pathinfo import ValidPathInfo, topoSort
from nixserve.codec.serve import ImportItem, writeExportMarker, writeImportItem
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import NixServeError, StoreError
from nixserve.store.api import Busy, ImportWriter, InvalidPath, PathWriter, StoreSession, addWhole
from nixserve.store.contents import (
    DrainingWriter,
    Intake,
    checkContentAddress,
    checkNar,
    checkNewInfo,
    derivationOutputs,
    readDerivation,
    sizeMismatch,
)
from nixserve.store.drvhashes import DerivationMemo

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
        self._closed = False
        self._objects: dict[StorePath, _Object] = {}
        self._sessions: set[MemorySession] = set()
        self._locks: dict[StorePath, MemorySession] = {}
        self._memo = DerivationMemo()
        # Guards all of the above. Nothing slow happens under it.
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
        with self._mutex:
            if self._closed:
                raise StoreError("the store is closed")
            session = MemorySession(self)
            self._sessions.add(session)
            return session

    def close(self) -> None:
        """Close every session. Safe to call twice."""
        with self._mutex:
            self._closed = True
            for session in list(self._sessions):
                session.close()

    def collectGarbage(self) -> set[StorePath]:
        """
        Drop everything but the roots of open sessions and what they refer to.

        @return: what was dropped.
        """
        with self._mutex:
            roots = {path for session in self._sessions for path in session.roots}
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
            for reference in sorted(info.references - {info.path} - self._objects.keys()):
                raise InvalidPath(reference)
            info = replace(info, registrationTime=info.registrationTime or int(time.time()))
            self._objects[info.path] = _Object(info, nar, outputs)

    def forget(self, session: MemorySession) -> None:
        """The session is closed."""
        with self._mutex:
            self._sessions.discard(session)
            for path in [path for path, holder in self._locks.items() if holder is session]:
                del self._locks[path]


class MemorySession(StoreSession):
    """
    L{nixserve.store.api.StoreSession} of a L{MemoryStore}.

    @ivar roots: what it keeps from being collected.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.roots: set[StorePath] = set()
        self._store = store
        self._closed = False

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
        order = topoSort({path: entry.info.references for path, entry in objects.items()})
        return self._export([objects[path] for path in order])

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

    def close(self) -> None:
        """Give up roots and locks. What is unfinished fails from now on."""
        if not self._closed:
            self._closed = True
            self.roots.clear()
            self._store.forget(self)

    def requireOpen(self) -> None:
        """
        @raise StoreError: the session is closed.
        """
        if self._closed:
            raise StoreError("the session is closed")

    def _require(self, paths: Collection[StorePath]) -> dict[StorePath, _Object]:
        """The objects of C{paths}, all of which must be valid."""
        self.requireOpen()
        objects = self._store.lookUp(paths)
        for path in sorted(set(paths) - objects.keys()):
            raise InvalidPath(path)
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

    def _export(self, objects: list[_Object]) -> Iterator[bytes]:
        for entry in objects:
            info = entry.info
            yield writeExportMarker(True)
            yield from self._chunks(entry.nar)
            yield writeImportItem(ImportItem(info.path, info.references, info.deriver))
        yield writeExportMarker(False)


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
        """All that came."""
        return b"".join(self._pieces)


class _PathWriter:
    """L{nixserve.store.api.PathWriter} of a path that is not valid yet."""

    alreadyValid = False

    def __init__(self, store: MemoryStore, session: MemorySession, info: ValidPathInfo) -> None:
        self._store = store
        self._session = session
        self._info = info
        self._buffer: _Buffer | None = _Buffer(info.narSize)

    def feed(self, data: bytes) -> None:
        """See L{nixserve.store.api.PathWriter.feed}."""
        try:
            buffer = _requireBuffer(self._session, self._buffer)
            size = buffer.size + len(data)
            if size > self._info.narSize or (buffer.finished and data):
                raise sizeMismatch(self._info, size)
            buffer.feed(data)
        except BaseException:
            self.abort()
            raise

    def finish(self) -> None:
        """See L{nixserve.store.api.PathWriter.finish}."""
        try:
            buffer = _requireBuffer(self._session, self._buffer)
            narHash, nar = buffer.finish(), buffer.nar
            checkNar(self._info, narHash, buffer.size)
            checkContentAddress(self._info, lambda: [nar])
            self._store.register(self._info, nar)
        finally:
            self.abort()

    def abort(self) -> None:
        """Forget what came, and unlock."""
        self._buffer = None
        self._store.unlock(self._info.path, self._session)


class _ImportWriter:
    """L{nixserve.store.api.ImportWriter}."""

    def __init__(self, store: MemoryStore, session: MemorySession) -> None:
        self._store = store
        self._session = session
        self._buffer: _Buffer | None = _Buffer()

    def feed(self, data: bytes) -> None:
        """See L{nixserve.store.api.ImportWriter.feed}."""
        try:
            _requireBuffer(self._session, self._buffer).feed(data)
        except BaseException:
            self.abort()
            raise

    def finish(self, path: StorePath, references: Collection[StorePath], deriver: StorePath | None) -> None:
        """See L{nixserve.store.api.ImportWriter.finish}."""
        try:
            buffer = _requireBuffer(self._session, self._buffer)
            narHash, nar = buffer.finish(), buffer.nar
            self._session.addTempRoots([path])
            if self._store.lock(path, self._session):
                try:
                    self._store.register(ValidPathInfo(path, narHash, buffer.size, frozenset(references), deriver), nar)
                finally:
                    self._store.unlock(path, self._session)
        except Busy:
            raise
        except BaseException:
            self.abort()
            raise
        self.abort()

    def abort(self) -> None:
        """Forget what came."""
        self._buffer = None


def _requireBuffer(session: MemorySession, buffer: _Buffer | None) -> _Buffer:
    """
    @raise StoreError: the writer has ended, or its session has.
    """
    session.requireOpen()
    if buffer is None:
        raise StoreError("adding this object to the store has ended already")
    return buffer

"""
A store in memory that says what it was asked, and fails when told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar, TypeVarTuple

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.store.api import ImportWriter, PathWriter, StoreSession
from nixserve.store.memory import MemoryStore
from nixserve.testing.objects import Tree, addObject, makeInfo, makeNar

__all__ = ["FakeStore"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class FakeStore:
    """
    L{nixserve.store.api.Store} over a L{MemoryStore}.

    @ivar inner: the store itself, where nothing is recorded and nothing fails.
    @ivar calls: names and arguments, however those were given, of all calls on its sessions and their writers, and of
        C{openSession}, in order. What a writer does by itself, such as to abort after a failure, is no call.
    @ivar sessions: all that were opened, in order.
    @ivar madeUp: NARs that are given out for paths whether valid or not, in chunks; one that is an exception is raised.
    @ivar chunksRead: how many of those chunks were asked for.
    """

    def __init__(self, storeDir: StoreDir | None = None) -> None:
        self.inner = MemoryStore(storeDir)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.sessions: list[StoreSession] = []
        self.madeUp: dict[StorePath, Sequence[bytes | Exception]] = {}
        self.chunksRead = 0
        self._failures: dict[str, deque[Exception | None]] = {}

    @property
    def storeDir(self) -> StoreDir:
        """The logical store directory."""
        return self.inner.storeDir

    @property
    def names(self) -> list[str]:
        """The names of all calls."""
        return [name for name, _ in self.calls]

    def fail(self, name: str, *errors: Exception | None) -> None:
        """
        Have the next calls of a method fail, each with one of these; with C{None} one succeeds.

        @param name: of a method of a session or of what it gives out: C{queryValidPaths}, C{addToStore}, C{feed},
            C{finish} …
        @param errors: L{nixserve.store.api.Busy}, L{nixserve.errors.StoreError}, C{OSError} …
        """
        self._failures.setdefault(name, deque()).extend(errors)

    def add(self, name: str, tree: Tree, references: Collection[StorePath] = (), **fields: Any) -> ValidPathInfo:
        """
        Make an object valid, unrecorded.

        @return: what is registered about it: see L{makeInfo}.
        """
        nar = makeNar(tree)
        info = makeInfo(name, nar, references, self.storeDir, **fields)
        session = self.inner.openSession()
        try:
            addObject(session, info, nar)
        finally:
            session.close()
        return info

    def valid(self, infos: Collection[ValidPathInfo]) -> list[ValidPathInfo]:
        """Those of C{infos} whose paths are valid, in order; unrecorded."""
        found = self.inner.lookUp([info.path for info in infos])
        return [info for info in infos if info.path in found]

    def openSession(self) -> StoreSession:
        """See L{nixserve.store.api.Store}."""
        self.sessions.append(_FakeSession(self, self.perform(self.inner.openSession)))
        return self.sessions[-1]

    def close(self) -> None:
        """See L{nixserve.store.api.Store}."""
        self.inner.close()

    def perform(self, method: Callable[[*Ts], T], *args: *Ts) -> T:
        """Record a call; then fail, or do it."""
        self.record(method.__name__, *args)
        return method(*args)

    def record(self, name: str, *args: Any) -> None:
        """Record a call; then fail, or return."""
        self.calls.append((name, args))
        failures = self._failures.get(name)
        failure = failures.popleft() if failures else None
        if failure is not None:
            raise failure

    def readMadeUp(self, path: StorePath) -> Iterator[bytes]:
        """The chunks of a NAR in C{madeUp}, counted."""
        for chunk in self.madeUp[path]:
            self.chunksRead += 1
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


class _FakeSession(StoreSession):
    """L{StoreSession}; its methods are described there."""

    def __init__(self, store: FakeStore, inner: StoreSession) -> None:
        self._store = store
        self._inner = inner
        self._do = store.perform

    @property
    def storeDir(self) -> StoreDir:
        return self._store.storeDir

    def addTempRoots(self, paths: Collection[StorePath]) -> None:
        self._do(self._inner.addTempRoots, paths)

    def queryValidPaths(self, paths: Collection[StorePath]) -> set[StorePath]:
        return self._do(self._inner.queryValidPaths, paths)

    def queryPathInfos(self, paths: Collection[StorePath]) -> dict[StorePath, ValidPathInfo]:
        return self._do(self._inner.queryPathInfos, paths)

    def queryClosure(self, paths: Collection[StorePath], includeOutputs: bool = False) -> set[StorePath]:
        return self._do(self._inner.queryClosure, paths, includeOutputs)

    def narFromPath(self, path: StorePath) -> Iterator[bytes]:
        self._store.record("narFromPath", path)
        return self._nars([path])

    def narsFromPaths(self, paths: Sequence[StorePath]) -> Iterator[bytes]:
        self._store.record("narsFromPaths", paths)
        return self._nars(paths)

    def exportPaths(self, paths: Collection[StorePath]) -> Iterator[bytes]:
        return self._do(self._inner.exportPaths, paths)

    def addToStore(self, info: ValidPathInfo) -> PathWriter:
        return _FakePathWriter(self._store, self._do(self._inner.addToStore, info))

    def addSmallPaths(self, objects: Sequence[tuple[ValidPathInfo, bytes]]) -> int:
        return self._do(self._inner.addSmallPaths, objects)

    def importPath(self) -> ImportWriter:
        return _FakeImportWriter(self._store, self._do(self._inner.importPath))

    def close(self) -> None:
        self._do(self._inner.close)

    def _nars(self, paths: Sequence[StorePath]) -> Iterator[bytes]:
        # What is made up stands alone.
        isMadeUp = bool(paths) and paths[0] in self._store.madeUp
        return self._store.readMadeUp(paths[0]) if isMadeUp else self._inner.narsFromPaths(paths)


class _FakePathWriter:
    """L{PathWriter}; its methods are described there."""

    def __init__(self, store: FakeStore, inner: PathWriter) -> None:
        self.alreadyValid = inner.alreadyValid
        self._inner = inner
        self._do = store.perform

    def feed(self, data: bytes) -> None:
        self._do(self._inner.feed, data)

    def finish(self) -> None:
        self._do(self._inner.finish)

    def abort(self) -> None:
        self._do(self._inner.abort)


class _FakeImportWriter:
    """L{ImportWriter}; its methods are described there."""

    def __init__(self, store: FakeStore, inner: ImportWriter) -> None:
        self._inner = inner
        self._do = store.perform

    def feed(self, data: bytes) -> None:
        self._do(self._inner.feed, data)

    def finish(self, path: StorePath, references: Collection[StorePath], deriver: StorePath | None) -> None:
        self._do(self._inner.finish, path, references, deriver)

    def abort(self) -> None:
        self._do(self._inner.abort)

"""
The contract of a store over files and a database: real Nix's store, shared with real Nix.

How objects are added is in L{nixserve.store.adding}; which locks and files of Nix are honoured, at the heads of
L{nixserve.store.database}, L{nixserve.store.pathlocks} and L{nixserve.store.roots}. Signatures are not judged here,
only their form: who may add what is a matter of policy.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Sequence

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import StoreError
from nixserve.store.adding import Adder
from nixserve.store.api import (
    Closable,
    ImportWriter,
    InvalidPath,
    OpenSessions,
    PathWriter,
    StoreSession,
    addWhole,
    requireValid,
)
from nixserve.store.contents import exportStream, referencesFirst
from nixserve.store.database import Database
from nixserve.store.drvhashes import DrvHashes
from nixserve.store.files import dumpPath
from nixserve.store.layout import StoreDefaults, StoreLayout, parseStoreURI
from nixserve.store.opening import RESERVED_SIZE, prepareDirectories
from nixserve.store.pathlocks import PathLocks
from nixserve.store.roots import TempRoots
from nixserve.store.uploads import Uploads
from nixserve.store.validpaths import ValidPaths

__all__ = ["LocalSession", "LocalStore"]


class LocalStore:
    """
    L{nixserve.store.api.Store} over a store on disk.

    @ivar layout: where it lies.
    @ivar database: its database.
    @ivar validPaths: what the database says.
    """

    def __init__(self, layout: StoreLayout | str, reservedSize: int = RESERVED_SIZE) -> None:
        """
        Open the store, or make it. Waits while somebody else upgrades its database.

        @param layout: where it lies, or a URI as L{parseStoreURI} reads it. The environment changes nothing about
            what that means.
        @param reservedSize: bytes to keep for a collector on a full disk; Nix's setting gc-reserved-space.
        @raise StoreError: it cannot be opened.
        @raise nixserve.errors.UsageError: the URI names no such store.
        """
        layout = parseStoreURI(layout, StoreDefaults()) if isinstance(layout, str) else layout
        self.layout = layout
        prepareDirectories(layout, reservedSize)
        self.database = Database(layout)
        self.validPaths = ValidPaths(self.database, layout.storeDir)
        self._uploads = Uploads()
        self._drvHashes = DrvHashes()
        self._sessions = OpenSessions[LocalSession](f"the store in '{layout.stateDir}'")

    @property
    def storeDir(self) -> StoreDir:
        """The logical store directory."""
        return self.layout.storeDir

    def openSession(self) -> LocalSession:
        """
        @return: a new session. It opens nothing before it needs it.
        @raise StoreError: the store is closed.
        """
        return self._sessions.open(
            lambda: LocalSession(self.layout, self.validPaths, self._uploads, self._drvHashes, self._sessions.forget)
        )

    def close(self) -> None:
        """Close every session, then the database. Safe to call twice."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.database.close)
            for session in self._sessions.end():
                stack.callback(session.close)


class LocalSession(Closable, StoreSession):
    """
    L{nixserve.store.api.StoreSession} of a L{LocalStore}.

    Sessions share the database and what is known of derivations: none waits for what another does.
    """

    def __init__(
        self,
        layout: StoreLayout,
        validPaths: ValidPaths,
        uploads: Uploads,
        drvHashes: DrvHashes,
        onClose: Callable[[LocalSession], None],
    ) -> None:
        """
        @param uploads: what all sessions of the store are being sent.
        @param drvHashes: what they have found out about derivations.
        @param onClose: see L{Closable}.
        """
        super().__init__(onClose)
        self._layout = layout
        self._validPaths = validPaths
        self._roots = TempRoots(layout, self._isInDanger)
        self._adder = Adder(layout, validPaths, self._roots, uploads, drvHashes)
        self._streams: weakref.WeakSet[Generator[bytes, None, None]] = weakref.WeakSet()

    @property
    def storeDir(self) -> StoreDir:
        """The logical store directory."""
        return self._layout.storeDir

    def addTempRoots(self, paths: Collection[StorePath]) -> None:
        """
        See L{nixserve.store.api.StoreSession.addTempRoots} and L{TempRoots}.

        @raise StoreError: also if the store is opened read-only: roots are files.
        """
        self._requireWritable()
        self._roots.addTempRoots(paths)

    def queryValidPaths(self, paths: Collection[StorePath]) -> set[StorePath]:
        """See L{nixserve.store.api.StoreSession.queryValidPaths}."""
        self.requireOpen()
        return self._validPaths.queryValidPaths(paths)

    def queryPathInfos(self, paths: Collection[StorePath]) -> dict[StorePath, ValidPathInfo]:
        """See L{nixserve.store.api.StoreSession.queryPathInfos}. In the order of C{paths}."""
        self.requireOpen()
        return self._validPaths.queryPathInfos(paths)

    def queryClosure(self, paths: Collection[StorePath], includeOutputs: bool = False) -> set[StorePath]:
        """See L{nixserve.store.api.StoreSession.queryClosure}."""
        self.requireOpen()
        return self._validPaths.queryClosure(paths, includeOutputs)

    def narFromPath(self, path: StorePath) -> Iterator[bytes]:
        """
        See L{nixserve.store.api.StoreSession.narFromPath}. The path should be a root of this session: else a collector
        may delete it meanwhile, and the iterator fails.
        """
        return self.narsFromPaths([path])

    def narsFromPaths(self, paths: Sequence[StorePath]) -> Iterator[bytes]:
        """See L{nixserve.store.api.StoreSession.narsFromPaths}, and L{narFromPath} on roots."""
        self.requireOpen()
        valid = self._validPaths.queryValidPaths(paths)
        if not valid.issuperset(paths[:1]):
            raise InvalidPath(paths[0])
        return self._guard(self._dump(paths, valid))

    def exportPaths(self, paths: Collection[StorePath]) -> Iterator[bytes]:
        """See L{nixserve.store.api.StoreSession.exportPaths}."""
        infos = self.queryPathInfos(paths)
        requireValid(paths, infos)
        return self._guard(exportStream(referencesFirst(infos), lambda info: self._dumpOne(info.path)))

    def addToStore(self, info: ValidPathInfo) -> PathWriter:
        """
        See L{nixserve.store.api.StoreSession.addToStore}.

        @raise nixserve.errors.FormatError: a signature is malformed.
        """
        self._requireWritable()
        return self._adder.addToStore(info)

    def addSmallPaths(self, objects: Sequence[tuple[ValidPathInfo, bytes]]) -> int:
        """
        See L{nixserve.store.api.StoreSession.addSmallPaths}.

        @raise nixserve.errors.FormatError: as L{addToStore}.
        """
        self._requireWritable()
        added = self._adder.addSmallPaths(objects)
        if objects and not added:
            # Something is against the first one, or was a moment ago. The ordinary way finds what to say about it.
            addWhole(self, *objects[0])
            added = 1
        return added

    def assumeLocked(self, paths: Collection[StorePath]) -> None:
        """
        The locks of these paths are held by somebody else on behalf of this session, as by a Nix for its build hook:
        adding them takes and releases none. Who really has them sees to it that this session is the only one.
        """
        self._requireWritable()
        self._adder.lockedForUs.update(paths)

    def registerBuilt(self, infos: Collection[ValidPathInfo]) -> None:
        """
        Make valid what is in place, under the same rules as what is added.

        @raise Busy: others are writing to the database; call again.
        @raise InvalidPath: a reference is not valid.
        @raise StoreError: it is not what it is called.
        @raise nixserve.errors.FormatError: a derivation is malformed, or its outputs are not its own.
        """
        self._requireWritable()
        self._adder.registerAll(infos)

    def lockPaths(self, paths: Collection[StorePath]) -> PathLocks:
        """
        See L{Adder.lockPaths}.

        @param paths: roots of this session.
        @raise Busy: somebody holds a lock.
        """
        self._requireWritable()
        return self._adder.lockPaths(paths)

    def lockScratch(self, paths: Collection[StorePath]) -> PathLocks:
        """
        See L{Adder.lockScratch}.

        @raise Busy: a collector is at work, or somebody holds a lock; call again.
        """
        self._requireWritable()
        return self._adder.lockScratch(paths)

    def importPath(self) -> ImportWriter:
        """
        See L{nixserve.store.api.StoreSession.importPath}.

        @raise nixserve.store.api.Busy: a collector is at work; call again.
        """
        self._requireWritable()
        return self._adder.importPath()

    def _free(self) -> None:
        """
        What goes wrong with one thing does not keep the others. What the session registered is on the disk then, as
        after the end of a C{nix-store --serve}.
        """
        with contextlib.ExitStack() as stack:
            if self._adder.registered:
                stack.callback(self._validPaths.sync)
            stack.callback(self._roots.close)
            stack.callback(self._adder.close)
            for writer in list(self._adder.unfinished):
                stack.callback(writer.abort)
            for stream in list(self._streams):
                stack.callback(stream.close)

    def _requireWritable(self) -> None:
        self.requireOpen()
        if self._layout.readOnly:
            raise StoreError(f"the store in '{self._layout.stateDir}' is opened read-only")

    def _isInDanger(self, paths: Collection[StorePath]) -> bool:
        """Whether a collector at work could be about to delete one of C{paths}: see L{TempRoots}."""
        if self._validPaths.isAnyValid(paths):
            return True
        return any(os.path.lexists(self._layout.realPath(path)) for path in paths)

    def _guard(self, stream: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
        """Pass on a stream that ends with the session, and not as if it were complete."""
        self._streams.add(stream)
        return self._pass(stream)

    def _pass(self, stream: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
        # Not "yield from": whoever drops this must not close the stream, which a worker may be closing right now.
        for chunk in stream:  # noqa: UP028
            yield chunk
        # The end of the session closes a stream, which here looks like its end.
        self.requireOpen()

    def _dump(self, paths: Sequence[StorePath], valid: Collection[StorePath]) -> Generator[bytes, None, None]:
        for path in paths:
            if path not in valid:
                raise InvalidPath(path)
            yield from self._dumpOne(path)

    def _dumpOne(self, path: StorePath) -> Iterator[bytes]:
        return dumpPath(self._layout.realPath(path))

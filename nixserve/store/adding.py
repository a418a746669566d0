"""
Objects on their way into a local store, each from its NAR.

The order of steps is that of every program on the store, and is what keeps them out of each other's way (Nix 2.8,
src/libstore/local-store.cc: addToStore; export-import.cc):

  1. what is said about the object is checked; nothing is written for what cannot be;
  2. temporary root; only then
  3. valid already? the NAR is dropped, nothing is compared;
  4. the NAR is restored under a name of its own, in canonical form, hashed as it passes;
  5. hash, size and content address are compared;
  6. path lock; 7. valid now?
  8. what lies at the path is removed: it is nobody's, since the path is not valid and the lock is ours
     (L{nixserve.store.pathlocks} has the exception); the object gets its name, and for a derivation its outputs are
     checked; what the settings want on the disk is written out;
  9. one transaction makes it valid; 10. unlock.

Nix takes the lock before it restores. Its sender is as a rule a person with an own process; ours is anybody, who may
send a byte an hour. So no lock is held while somebody else is to act: whoever has sent everything is done, whatever
others do at the same path.

A failure from 8 on leaves the object without a row, and the lock file, empty. So does Nix.

Several small objects go through each step together, so that a step that costs much by itself, the transaction above
all, is made once for all of them. Nobody waits for a lock meanwhile: the first one that is held ends the batch.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from nixserve.codec import base32
from nixserve.codec.derivation import Derivation
from nixserve.codec.hashes import hashBytes
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.errors import FormatError, NixServeError, StoreError
from nixserve.store.api import Busy, PathWriter, requireValid
from nixserve.store.contents import (
    checkContentAddress,
    checkMore,
    checkNar,
    checkNewInfo,
    derivationOutputs,
    readDerivation,
)
from nixserve.store.drvhashes import DerivationMemo, DrvHashes
from nixserve.store.fileerrors import fileSystemErrors
from nixserve.store.files import deletePath, dumpPath
from nixserve.store.layout import StoreLayout
from nixserve.store.pathlocks import NoLockFile, PathLocks, moveInto, vacate
from nixserve.store.restoring import PathRestorer, restoreNar
from nixserve.store.roots import TempRoots
from nixserve.store.uploads import Uploads, UploadWait
from nixserve.store.validpaths import Outputs, ValidPaths
from nixserve.store.writers import DrainingWriter, ObjectWriter

__all__ = ["MAX_BATCH", "Adder", "LocalImportWriter", "LocalPathWriter"]

MAX_BATCH: Final = 64
"""Objects in one transaction. Each holds a lock, and that a descriptor, of which a process may have a thousand and
needs some for every session; more would not make the transaction cheaper by a hundredth."""

#: The name of what is on its way. A random hash part stands before it.
_SCRATCH_NAME: Final = "nixserve-import"


class Adder:
    """
    What one session adds objects with. Calls must not overlap.

    @ivar uploads: what all sessions of the store are being sent.
    @ivar unfinished: the writers that were neither finished nor aborted.
    @ivar registered: whether anything was made valid.
    @ivar lockedForUs: paths whose locks somebody else holds so that we may add them.
    """

    def __init__(
        self, layout: StoreLayout, validPaths: ValidPaths, roots: TempRoots, uploads: Uploads, drvHashes: DrvHashes
    ) -> None:
        self.layout = layout
        self.uploads = uploads
        self.roots = roots
        self.lockedForUs: set[StorePath] = set()
        self.unfinished: set[LocalPathWriter | LocalImportWriter] = set()
        self.registered = False
        self._validPaths = validPaths
        # A closure of derivations comes one by one, each referring to those before it.
        self._memo = DerivationMemo(drvHashes)
        hashPart = base32.encode(os.urandom(20))
        self._scratch = StorePath(f"{layout.storeDir.path}/{hashPart}-{_SCRATCH_NAME}")
        self._courtesy = UploadWait(uploads)
        self._places: dict[str, PathLocks] = {}
        self._numbers = itertools.count(1)

    def addToStore(self, info: ValidPathInfo) -> PathWriter:
        """
        Steps 1 to 3.

        @raise Busy: a collector is at work, or somebody else is sending this path and it is worth waiting for that;
            call again.
        @raise StoreError: it cannot be added.
        """
        checkNewInfo(info, self.layout.storeDir)
        self.roots.addTempRoots([info.path, self._scratch])
        if self._validPaths.isAnyValid([info.path]):
            return DrainingWriter(info)
        self._courtesy.wait(info.path)
        place = self._takePlace()
        try:
            writer = LocalPathWriter(
                self, info, place, PathRestorer(place, info.narSize, self.layout.realPath(info.path))
            )
        except BaseException:
            self.giveBack(place)
            raise
        self.unfinished.add(writer)
        self.uploads.begin(info.path, writer)
        return writer

    def addSmallPaths(self, objects: Sequence[tuple[ValidPathInfo, bytes]]) -> int:
        """
        All steps for the first few of several objects, at most L{MAX_BATCH}, up to the first that is refused or locked.

        @param objects: what is said about each, and its whole NAR.
        @return: how many of them are valid now; 0 says nothing about why.
        @raise Busy: a collector is at work, or others are writing to the database. Nothing was added.
        """
        batch = list(self._acceptable(objects[:MAX_BATCH]))
        paths = {info.path for info, _ in batch}
        self.roots.addTempRoots(paths)
        valid = self._validPaths.queryValidPaths(paths.union(*[info.references for info, _ in batch]))
        locks: dict[StorePath, PathLocks] = {}
        with contextlib.ExitStack() as stack:
            batch = list(self._lockBatch(batch, valid, locks, stack))
            for path in self._validPaths.queryValidPaths(locks):
                valid.add(path)
                locks.pop(path).unlock()
            made: list[ValidPathInfo] = []
            outputs: dict[StorePath, Outputs] = {}
            added = 0
            with contextlib.suppress(NixServeError):
                for info, nar in batch:
                    if info.path not in valid:
                        outputs[info.path] = self._make(info, nar, valid)
                        made.append(info)
                        valid.add(info.path)
                    added += 1
            try:
                if made:
                    self.writeOut([info.path for info in made])
                    self._register(made, outputs)
            except Busy:
                raise
            except StoreError:
                # It does not tell whose fault this is, and took back all.
                return 0
            for info in made:
                locks[info.path].unlock()
        return added

    def _acceptable(self, objects: Sequence[tuple[ValidPathInfo, bytes]]) -> Iterator[tuple[ValidPathInfo, bytes]]:
        """Step 1: those in front of the first that cannot be added."""
        with contextlib.suppress(NixServeError):
            for info, nar in objects:
                checkNewInfo(info, self.layout.storeDir)
                if len(nar) != info.narSize:
                    return
                yield info, nar

    def _lockBatch(
        self,
        batch: list[tuple[ValidPathInfo, bytes]],
        valid: Collection[StorePath],
        locks: dict[StorePath, PathLocks],
        stack: contextlib.ExitStack,
    ) -> Iterator[tuple[ValidPathInfo, bytes]]:
        """
        Step 6: those in front of the first whose lock is not to be had.

        @param locks: added to, for those that are not in C{valid}.
        @param stack: gives up what was locked, if it is closed before they are added.
        """
        with contextlib.suppress(StoreError):
            for info, nar in batch:
                if info.path not in valid and info.path not in locks:
                    lock = locks[info.path] = self.lockPaths([info.path])
                    stack.callback(lock.abandon)
                yield info, nar

    def lockPaths(self, paths: Collection[StorePath]) -> PathLocks:
        """
        Step 6, for objects that become valid together: all of the locks, or none. Of a path that is locked for us there
        is nothing to take and nothing to release.

        @param paths: roots of the session.
        @raise Busy: somebody holds one.
        @raise NoLockFile: a valid path lies where a lock file would be.
        """
        real = [self.layout.realPath(path) for path in paths if path not in self.lockedForUs]
        for _ in real:
            try:
                return PathLocks(real)
            except NoLockFile as error:
                if not self._clear(os.path.basename(error.lockPath)):
                    raise
        return PathLocks(real)

    def _clear(self, baseName: str) -> bool:
        """
        Remove what is left of an object that was not completed, as is done when that object is added.

        @return: whether there can be anything no more; not if it is valid, or no object can be called so.
        @raise Busy: somebody is adding it.
        """
        try:
            lock = self.lockInvalid(self.layout.storeDir.parseBaseName(baseName))
        except FormatError:
            return False
        if lock is not None:
            lock.unlock()
        return lock is not None

    def _make(self, info: ValidPathInfo, nar: bytes, valid: Collection[StorePath]) -> Outputs:
        """
        Steps 4, 5 and 8 for an object that is there whole, what it says checked before it is written.

        @return: what is registered about its outputs, if it is a derivation.
        @raise StoreError: something does not match, or the file system refuses.
        @raise FormatError: the NAR is none, or the derivation.
        """
        checkNar(info, hashBytes("sha256", nar), len(nar))
        checkContentAddress(info, lambda: [nar])
        requireValid(info.references - {info.path}, valid)
        real = self.layout.realPath(info.path)
        vacate(real)
        restoreNar(real, nar)
        return derivationOutputs(info.path, self._lookup, self.layout.storeDir, self._memo)

    def importPath(self) -> LocalImportWriter:
        """
        Begin to restore an object whose path will be known after its NAR.

        @raise Busy: a collector is at work; call again.
        """
        place = self._takePlace()
        try:
            writer = LocalImportWriter(self, place, PathRestorer(place))
        except BaseException:
            self.giveBack(place)
            raise
        self.unfinished.add(writer)
        return writer

    def _takePlace(self) -> str:
        """
        Where an object is restored before it gets its path; to be given back with L{giveBack}.

        @return: the physical path. Nothing is there.
        @raise Busy: a collector is at work.
        """
        # Roots count by hash part, so one does for the whole session.
        self.roots.addTempRoots([self._scratch])
        path = StorePath(f"{self._scratch}-{next(self._numbers)}")
        place = self.layout.realPath(path)
        self._places[place] = self._lockPlaces([path])
        return place

    def giveBack(self, place: str) -> None:
        """Nothing is at a place of L{_takePlace} any more."""
        self._places.pop(place).unlock()

    def close(self) -> None:
        """Let go of the places that could not be given back. All writers have ended. Safe to call twice."""
        while self._places:
            self._places.popitem()[1].abandon()

    def lockScratch(self, paths: Collection[StorePath]) -> PathLocks:
        """
        Reserve places in the store directory for what is no object, or none yet.

        They bear the names of objects, for any other name there, C{tmp-…} too, is junk for a collector, which some
        versions remove at once. So they are treated as objects in the making are: not valid, locked, with a temporary
        root; then nobody else has anything there.

        @return: the locks, to be given back with C{unlock} when nothing of ours is there any more.
        @raise Busy: a collector is at work, or somebody holds a lock; call again.
        @raise StoreError: one is valid.
        """
        self.roots.addTempRoots(paths)
        return self._lockPlaces(paths)

    def _lockPlaces(self, paths: Collection[StorePath]) -> PathLocks:
        """L{lockScratch} for paths that are roots."""
        locks = PathLocks([self.layout.realPath(path) for path in paths])
        try:
            for valid in sorted(self._validPaths.queryValidPaths(paths)):
                raise StoreError(f"cannot work at '{valid}', as it is a valid path")
        except BaseException:
            locks.unlock()
            raise
        return locks

    def lockInvalid(self, path: StorePath) -> PathLocks | None:
        """
        Steps 2, 3, and 6 to 8.

        @return: the lock of a path that is not valid and where nothing lies; C{None} if it is valid.
        @raise Busy: a collector is at work, or somebody has the lock.
        """
        self.roots.addTempRoots([path])
        if self._validPaths.isAnyValid([path]):
            return None
        lock = self.lockPaths([path])
        try:
            if self._validPaths.isAnyValid([path]):
                lock.unlock()
                return None
            vacate(self.layout.realPath(path))
        except BaseException:
            lock.abandon()
            raise
        return lock

    def register(self, info: ValidPathInfo) -> None:
        """
        Steps 8, for what a derivation says itself, and 9.

        @raise Busy: others are writing to the database; call again.
        @raise InvalidPath: a reference is not valid.
        @raise FormatError: a derivation is malformed, or its outputs are not its own.
        """
        self.registerAll([info])

    def registerAll(self, infos: Collection[ValidPathInfo]) -> None:
        """L{register} for objects that become valid together. They may refer to each other."""
        drvs = [info for info in infos if info.path.isDerivation]
        # The hash of one depends on those that it refers to: better "not valid" than "no such file".
        others = {path for info in drvs for path in info.references}.difference(info.path for info in infos)
        if others:
            requireValid(others, self._validPaths.queryValidPaths(others))
        outputs = {
            info.path: derivationOutputs(info.path, self._lookup, self.layout.storeDir, self._memo) for info in drvs
        }
        self._register(infos, outputs)

    def writeOut(self, paths: Collection[StorePath]) -> None:
        """
        The end of step 8: have objects on the disk, as far as the settings say. Once for each object, not at each
        attempt to register it.

        @raise StoreError: the file system refuses.
        """
        self.layout.durability.beforeRegistering([self.layout.realPath(path) for path in paths])

    def _register(self, infos: Collection[ValidPathInfo], outputs: Mapping[StorePath, Outputs]) -> None:
        self._validPaths.registerValidPaths(infos, outputs)
        self.registered = True

    def _lookup(self, path: StorePath) -> Derivation:
        """A derivation on disk, valid or not: its referrer cannot be registered if it is not."""
        return readDerivation(path, dumpPath(self.layout.realPath(path)), self.layout.storeDir)


class _Writer(ObjectWriter):
    """
    An object on its way. It holds no lock but that of the place where it is restored.
    """

    def __init__(self, adder: Adder, place: str, restorer: PathRestorer) -> None:
        super().__init__()
        self._adder = adder
        self._place: str | None = place
        self._restorer = restorer
        self._restored = False
        self._lock: PathLocks | None = None

    @property
    def received(self) -> int:
        """How many bytes of the object have come."""
        return self._restorer.narSize

    def _free(self) -> None:
        """What has no name yet is removed; what has its own stays, without a row if it was not finished."""
        self._adder.unfinished.discard(self)
        self._restorer.abort()
        if self._place is not None:
            place, self._place = self._place, None
            # It is in nobody's way: the next collector removes what is left.
            with contextlib.suppress(StoreError):
                deletePath(place)
                self._adder.giveBack(place)
        if self._lock is not None:
            self._lock.abandon()

    def _restore(self) -> str:
        """
        The end of step 4.

        @return: where the object is.
        """
        assert self._place is not None, "it has not been named"
        self._restorer.finish()
        return self._place

    def _install(self, info: ValidPathInfo) -> None:
        """
        Steps 6 to 10. After L{Busy} it goes on where it was.
        """
        if self._place is not None:
            self._lock = self._adder.lockInvalid(info.path)
            if self._lock is None:
                return
            self._rename(self._place, self._adder.layout.realPath(info.path))
            self._adder.writeOut([info.path])
        assert self._lock is not None, "it has been taken before the object got its name"
        self._adder.register(info)
        self._lock.unlock()

    def _rename(self, place: str, target: str) -> None:
        """
        Give the object its name. Directories of mode 0555 can be renamed by their owner as long as they stay in the
        same directory; only a new C{..} would have to be written into them.
        """
        with fileSystemErrors(f"cannot rename '{place}'"):
            moveInto(place, target)
        self._adder.giveBack(place)
        self._place = None


class LocalPathWriter(_Writer):
    """
    L{nixserve.store.api.PathWriter} of a path that is not valid yet.
    """

    alreadyValid = False

    def __init__(self, adder: Adder, info: ValidPathInfo, place: str, restorer: PathRestorer) -> None:
        super().__init__(adder, place, restorer)
        self._info = info

    def finish(self) -> None:
        """
        Steps 5 to 10.

        @raise Busy: a collector is at work, somebody has the lock of this path, or others have been writing to the
            database for L{nixserve.store.database.PATIENCE}; call again.
        @raise FormatError: the NAR is not complete.
        @raise StoreError: something does not match, or a reference is not valid.
        """
        with self._working(isLast=True):
            if not self._restored:
                self._check(self._restore())
                self._restored = True
            self._install(self._info)

    def _take(self, data: bytes) -> None:
        # What follows a complete NAR the parser would keep in memory.
        checkMore(self._info, self._restorer.narSize, self._restorer.finished, data)
        self._restorer.feed(data)

    def _free(self) -> None:
        self._adder.uploads.end(self._info.path, self)
        super()._free()

    def _check(self, place: str) -> None:
        checkNar(self._info, self._restorer.narHash, self._restorer.narSize)
        checkContentAddress(self._info, lambda: dumpPath(place))


class LocalImportWriter(_Writer):
    """
    L{nixserve.store.api.ImportWriter} of a store on disk.
    """

    def finish(self, path: StorePath, references: Collection[StorePath], deriver: StorePath | None) -> None:
        """
        Steps 2 to 10 for an object that is there, but for its name. No hash was announced, so none is compared.

        @raise Busy: a collector is at work, somebody is adding this path, or others are writing to the database.
            Call again with the same arguments.
        @raise FormatError: the NAR is not complete.
        @raise StoreError: a reference is not valid.
        """
        with self._working(isLast=True):
            if not self._restored:
                self._restore()
                self._restored = True
            restorer = self._restorer
            restorer.checkPaths(self._adder.layout.realPath(path))
            self._install(ValidPathInfo(path, restorer.narHash, restorer.narSize, frozenset(references), deriver))

    def _take(self, data: bytes) -> None:
        if self._restorer.finished and data:
            raise FormatError("bad archive: data after its end", offset=self._restorer.narSize)
        self._restorer.feed(data)

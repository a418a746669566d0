"""
From what a builder left behind to valid store objects.

The order of steps is Nix's (Nix 2.8, src/libstore/build/local-derivation-goal.cc, C{registerOutputs}):

  1. each output is there, is the builder's own, and nobody else can write to it; it is copied, since whoever has a
     descriptor of what the builder made can change that for ever (see L{nixserve.store.copying}), and goes;
  2. the copy is searched for references: hash parts of the input closure and of the outputs themselves;
  3. outputs are put in order, references first; a cycle cannot be registered;
  4. in that order each gets its final path. Where outputs refer to others by paths that were only lent to the builder
     (see L{OutputPlace}), these are rewritten to the final ones. A content-addressed output is hashed with its
     own hash part blanked out, then its own path is rewritten too;
  5. it is moved into place, under the lock of its path. Content-addressed ones are registered at once, also if the
     hash is not the one that was specified: then the build fails, but what it made can be looked at;
  6. the derivation's own checks on its outputs; 7. one transaction makes all valid.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from nixserve.builder.drvoptions import DerivationOptions
from nixserve.builder.outputchecks import checkOutputs
from nixserve.codec.buildresult import HASH_MISMATCH, BuildStatus
from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import BasicDerivation, OutputKind
from nixserve.codec.hashes import Hash
from nixserve.codec.nar import MAX_CHUNK
from nixserve.codec.pathinfo import CycleError, ValidPathInfo, topoSort
from nixserve.codec.references import HashRewriter, ReferenceScanner
from nixserve.codec.storepath import StorePath, outputPathName
from nixserve.errors import BuildError, FormatError, StoreError
from nixserve.store.api import Busy
from nixserve.store.contents import HashModulo, PathTooLong
from nixserve.store.copying import TooLarge, TreeCopier
from nixserve.store.files import deletePath, dumpPath
from nixserve.store.layout import StoreLayout
from nixserve.store.pathlocks import PathLocks, moveInto, vacate
from nixserve.store.restoring import restorePath
from nixserve.store.validpaths import ValidPaths

__all__ = ["BuiltOutputs", "HashMismatch", "OutputPlace", "OutputRegistrar", "Patience", "proceed", "registerOutputs"]

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

_T = TypeVar("_T")


class HashMismatch(BuildError):
    """
    The contents of a fixed output are others than its derivation states.

    @ivar specified: the hash that they were to have.
    @ivar found: the one that they have.
    """

    def __init__(self, drvPath: StorePath, specified: Hash, found: Hash) -> None:
        self.specified = specified
        self.found = found
        hashes = f"  specified: {specified.sri}\n     got:    {found.sri}"
        super().__init__(BuildStatus.OUTPUT_REJECTED, f"{HASH_MISMATCH}'{drvPath}':\n{hashes}")


class Patience(Protocol):
    """
    Tries something until it is not L{Busy} any more; gives up with an exception of its own, also if there was nothing
    to wait for, when nobody needs the result any more.
    """

    def __call__(self, attempt: Callable[[], _T], /) -> _T: ...


class OutputRegistrar(Protocol):
    """
    Who keeps paths from the garbage collector, and makes them valid; a L{nixserve.store.local.LocalSession}.
    """

    def addTempRoots(self, paths: Collection[StorePath]) -> None:
        """See L{nixserve.store.api.StoreSession.addTempRoots}."""

    def registerBuilt(self, infos: Collection[ValidPathInfo]) -> None:
        """See L{nixserve.store.local.LocalSession.registerBuilt}."""


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """
    Where a builder put an output.

    @ivar scratch: the path that it was told. Not the final one if that is not known before the build, or was valid
        already and must not be touched.
    @ivar realPath: the physical place of C{scratch}: in the sandbox's root, or in the store.
    @ivar known: the final path, if it is known before the build.
    @ivar valid: C{known} was valid before the build. What the builder made then is dropped.
    """

    scratch: StorePath
    realPath: str
    known: StorePath | None
    valid: bool = False


@dataclass(frozen=True, slots=True)
class BuiltOutputs:
    """
    A build whose builder has succeeded.

    @ivar places: for each output, by name.
    @ivar inputs: the closure of all that the build could use: nothing else can be referred to.
    @ivar workDir: a directory for outputs on their way, in that of the store or on the same file system; made if it is
        missing. Nobody but us could ever enter it.
    @ivar builderUids: the users to one of whom the outputs must belong; C{None} if that was nobody but us.
    @ivar maxSize: bytes of the NAR of an output at most; 0 for any number.
    """

    drvPath: StorePath
    drv: BasicDerivation
    options: DerivationOptions
    places: Mapping[str, OutputPlace]
    inputs: Collection[StorePath]
    workDir: str
    builderUids: range | None = None
    maxSize: int = 0


@dataclass(frozen=True, slots=True)
class _Examined:
    """
    An output after steps 1 and 2.

    @ivar realPath: where its copy is, which is all that counts from here on.
    @ivar plain: it is a file that cannot be executed.
    @ivar found: the hash parts that occur in it.
    """

    name: str
    place: OutputPlace
    realPath: str
    plain: bool
    found: frozenset[str]
    narHash: Hash
    narSize: int


def registerOutputs(
    layout: StoreLayout, validPaths: ValidPaths, session: OutputRegistrar, built: BuiltOutputs, patience: Patience
) -> dict[str, StorePath]:
    """
    Make the outputs of a build valid, all or, but for step 5, none. Blocks for as long as reading them takes.

    The locks of the known paths are the caller's. Whatever happens, what is left is the caller's to remove.

    @return: all outputs by name, those that were valid before among them.
    @raise BuildError: an output is not acceptable, in Nix's words.
    @raise StoreError: the file system or the database refuses.
    @raise FormatError: what is called like a derivation is none, or claims outputs that are not its own.
    """
    return _Registration(layout, validPaths, session, built, patience).run()


class _Registration:
    """What one call of L{registerOutputs} knows, and its steps."""

    def __init__(
        self,
        layout: StoreLayout,
        validPaths: ValidPaths,
        session: OutputRegistrar,
        built: BuiltOutputs,
        patience: Patience,
    ) -> None:
        self._layout = layout
        self._validPaths = validPaths
        self._session = session
        self._built = built
        self._patience = patience
        self._copier = TreeCopier(built.builderUids, lambda: patience(proceed), built.maxSize)
        self._inputs = {path.hashPart: path for path in built.inputs}
        self._scratches = {place.scratch.hashPart: name for name, place in built.places.items()}
        #: By the hash part of the scratch path, the final path; of outputs that have one.
        self._finals: dict[str, StorePath] = {}
        self._infos: dict[str, ValidPathInfo] = {}
        self._mismatch: HashMismatch | None = None

    def run(self) -> dict[str, StorePath]:
        """Examine, install, check and register all outputs that are not valid yet."""
        places = self._built.places
        for place in places.values():
            if place.valid and place.known is not None:
                self._finals[place.scratch.hashPart] = place.known
        examined = {name: self._examine(name, places[name]) for name in sorted(places) if not places[name].valid}
        for name in self._inOrder(examined):
            self._infos[name] = self._install(examined[name])
        if self._mismatch is None:
            checkOutputs(self._built.options, self._infos, self._finalPaths(), self._validPaths, self._layout.storeDir)
        self._register(self._infos.values())
        # Others are told of them before the session of the build ends.
        self._validPaths.sync()
        if self._mismatch is not None:
            raise self._mismatch
        return self._finalPaths()

    def _finalPaths(self) -> dict[str, StorePath]:
        return {name: self._finals[place.scratch.hashPart] for name, place in self._built.places.items()}

    # Steps 1 to 3.

    def _examine(self, name: str, place: OutputPlace) -> _Examined:
        try:
            status = os.lstat(place.realPath)
        except FileNotFoundError:
            raise _rejected(
                f"builder for '{self._built.drvPath}' failed to produce output path for output '{name}' "
                f"at '{place.scratch}'"
            ) from None
        uids = self._built.builderUids
        writable = not stat.S_ISLNK(status.st_mode) and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if writable or (uids is not None and status.st_uid not in uids):
            raise _rejected(
                f"suspicious ownership or permission on '{place.scratch}' for output '{name}'; "
                "rejecting this build output"
            )
        copy = self._copy(name, place)
        mode = os.lstat(copy).st_mode
        plain = stat.S_ISREG(mode) and not mode & stat.S_IXUSR
        scanner = ReferenceScanner([*self._inputs, *self._scratches])
        digest = hashlib.sha256()
        size = 0
        for chunk in self._dump(copy):
            scanner.feed(chunk)
            digest.update(chunk)
            size += len(chunk)
            if 0 < self._built.maxSize < size:
                raise self._tooLarge(name)
        return _Examined(name, place, copy, plain, scanner.found, Hash("sha256", digest.digest()), size)

    def _tooLarge(self, name: str) -> BuildError:
        return _rejected(
            f"output '{name}' of '{self._built.drvPath}' has more than {self._built.maxSize} bytes, the most that an "
            "output may have here"
        )

    def _copy(self, name: str, place: OutputPlace) -> str:
        """
        Put a copy in the place of what the builder made.

        @return: where it is.
        """
        copy = f"{self._built.workDir}/{place.scratch.baseName}"
        try:
            self._copier.copy(place.realPath, copy, self._layout.realPath(place.known or place.scratch))
        except TooLarge:
            # Not only when it lies there twice.
            raise self._tooLarge(name) from None
        except StoreError as error:
            if isinstance(error, PathTooLong) or str(error).startswith("invalid ownership"):
                raise _rejected(str(error)) from error
            raise
        deletePath(place.realPath)
        return copy

    def _dump(self, path: str) -> Iterator[bytes]:
        """The NAR of an output."""
        return self._patiently(dumpPath(path))

    def _patiently(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """What is read may be large, so each chunk is an occasion to give up."""
        for chunk in chunks:
            self._patience(proceed)
            yield chunk

    def _inOrder(self, examined: Mapping[str, _Examined]) -> list[str]:
        # The sort only compares its keys, so names will do as well; Nix too goes by the names here.
        graph = {
            StorePath(name): [StorePath(self._scratches[part]) for part in one.found if part in self._scratches]
            for name, one in examined.items()
        }
        try:
            return [str(name) for name in topoSort(graph)]
        except CycleError as error:
            raise _rejected(
                f"cycle detected in build of '{self._built.drvPath}' in the references of output '{error.path}' "
                f"from output '{error.parent}'"
            ) from error

    # Steps 4 and 5.

    def _install(self, output: _Examined) -> ValidPathInfo:
        """Give an output its final path and contents, and put it there."""
        known = output.place.known
        ca = self._contentAddress(output)
        references, selfReference = self._referencesOf(output)
        if self._built.drv.kind() is OutputKind.FIXED and (references or selfReference):
            raise _rejected(self._fixedReferences(references | ({output.place.scratch} if selfReference else set())))
        final = known if ca is None else self._addressedPath(output, ca, references, selfReference)
        assert final is not None, "only the paths of content-addressed outputs are not known before the build"
        narHash, narSize = self._rewrite(output, final)
        self._finals[output.place.scratch.hashPart] = final
        info = ValidPathInfo(
            path=final,
            narHash=narHash,
            narSize=narSize,
            references=frozenset(references | {final} if selfReference else references),
            deriver=self._built.drvPath,
            ultimate=True,
            ca=ca,
        )
        if final == known:
            self._move(output, final)
            if ca is not None:
                self._register([info])
        else:
            self._moveLocked(output, info)
        return info

    def _referencesOf(self, output: _Examined) -> tuple[set[StorePath], bool]:
        """
        @return: what is to be recorded as references to others, which have final paths by now; and whether the output
            refers to itself.
        """
        if output.name in self._built.options.unsafeDiscardReferences:
            return set(), False
        others = {self._finals.get(part) or self._inputs.get(part) for part in output.found}
        return {path for path in others if path is not None}, output.place.scratch.hashPart in output.found

    def _addressedPath(
        self, output: _Examined, ca: ContentAddress, references: set[StorePath], selfReference: bool
    ) -> StorePath:
        """The path that follows from the contents. That of a fixed output is compared with what was specified."""
        name = outputPathName(self._built.drv.name, output.name)
        try:
            path = self._layout.storeDir.makeContentAddressedPath(ca, name, references, selfReference)
        except FormatError as error:
            raise BuildError(BuildStatus.MISC_FAILURE, str(error)) from error
        specified = self._built.drv.outputs[output.name].contentAddress
        if specified is not None and specified.hash != ca.hash:
            self._mismatch = HashMismatch(self._built.drvPath, specified.hash, ca.hash)
        return path

    def _contentAddress(self, output: _Examined) -> ContentAddress | None:
        """
        Hash the contents as the derivation says, with the output's own hash part blanked out and those of other outputs
        as they will be; C{None} for an input-addressed output.
        """
        specification = self._built.drv.outputs[output.name]
        if not specification.hashAlgo:
            return None
        method, algo = specification.methodAndAlgo
        own = output.place.scratch.hashPart
        rewrites = self._rewritesFor(output)
        if method is ContentAddressMethod.NAR:
            if algo == "sha256" and not rewrites and own not in output.found:
                return ContentAddress(method, output.narHash)
            contents: Iterable[bytes] = self._dump(output.realPath)
        elif method in (ContentAddressMethod.FLAT, ContentAddressMethod.TEXT):
            if not output.plain:
                raise _rejected(
                    f"output path '{output.place.scratch}' should be a non-executable regular file since recursive "
                    "hashing is not enabled (outputHashMode=flat)"
                )
            contents = self._patiently(_readFile(output.realPath))
        else:
            raise BuildError(
                BuildStatus.MISC_FAILURE, f"cannot build '{self._built.drvPath}': git hashing is not supported"
            )
        modulo = HashModulo(algo, own)
        for chunk in _rewritten(contents, rewrites):
            modulo.feed(chunk)
        return ContentAddress(method, modulo.finish())

    def _rewritesFor(self, output: _Examined) -> dict[str, str]:
        """For the hash parts in an output that only stand in for others: what they must become."""
        finals = {part: self._finals[part].hashPart for part in output.found if part in self._finals}
        return {part: final for part, final in finals.items() if part != final}

    def _rewrite(self, output: _Examined, final: StorePath) -> tuple[Hash, int]:
        """
        Put final hash parts into the contents.

        @return: hash and size of the NAR.
        """
        place = output.place
        rewrites = self._rewritesFor(output)
        if place.scratch.hashPart in output.found and place.scratch.hashPart != final.hashPart:
            rewrites[place.scratch.hashPart] = final.hashPart
        if not rewrites:
            return output.narHash, output.narSize
        rewritten = output.realPath + ".rewritten"
        deletePath(rewritten)
        try:
            narHash, narSize = restorePath(rewritten, _rewritten(self._dump(output.realPath), rewrites))
        except FormatError as error:
            # Names of files may hold hash parts too, and sort differently after the change. Nix fails likewise.
            raise _rejected(
                f"cannot rewrite references in output '{output.name}' of '{self._built.drvPath}': {error}"
            ) from error
        deletePath(output.realPath)
        os.rename(rewritten, output.realPath)
        return narHash, narSize

    def _moveLocked(self, output: _Examined, info: ValidPathInfo) -> None:
        """Move an output to a path that was not known before the build, and register it under that path's lock."""
        real = self._layout.realPath(info.path)
        self._patience(lambda: self._session.addTempRoots([info.path]))
        try:
            lock = self._patience(lambda: PathLocks([real])) if self._mismatch is None else PathLocks([real])
        except Busy:
            # Whoever holds it may wait for ours. What has the wrong hash nobody waits for.
            deletePath(output.realPath)
            assert self._mismatch is not None, "for anything else there is patience"
            raise self._mismatch from None
        try:
            if self._validPaths.isAnyValid([info.path]):
                deletePath(output.realPath)
            else:
                self._move(output, info.path)
                self._register([info])
        except BaseException:
            lock.abandon()
            raise
        lock.unlock()

    def _move(self, output: _Examined, final: StorePath) -> None:
        target = self._layout.realPath(final)
        self._patience(lambda: vacate(target))
        _rename(output.realPath, target)

    def _register(self, infos: Collection[ValidPathInfo]) -> None:
        if infos:
            self._layout.durability.beforeRegistering([self._layout.realPath(info.path) for info in infos])
            self._patience(lambda: self._session.registerBuilt(infos))

    def _fixedReferences(self, references: set[StorePath]) -> str:
        return (
            f"fixed-output derivations must not reference store paths: '{self._built.drvPath}' references "
            f"{len(references)} distinct paths, e.g. '{min(references)}'"
        )


def proceed() -> None:
    """Does nothing. Tried with L{Patience}, it only sees whether the build is cancelled or out of time."""


def _rejected(message: str) -> BuildError:
    return BuildError(BuildStatus.OUTPUT_REJECTED, message)


def _rewritten(chunks: Iterable[bytes], rewrites: Mapping[str, str]) -> Iterator[bytes]:
    """The stream with hash parts replaced."""
    rewriter = HashRewriter(rewrites)
    for chunk in chunks:
        yield rewriter.feed(chunk)
    yield rewriter.finish()


def _readFile(path: str) -> Iterator[bytes]:
    """The contents of a regular file."""
    with open(os.open(path, _READ_FLAGS), "rb", buffering=0) as stream:
        while chunk := stream.read(MAX_CHUNK):
            yield chunk


def _rename(source: str, target: str) -> None:
    """
    Move an object to another directory of the same file system. Then C{..} of a directory changes, for which its owner
    needs the right to write to it; root does not.
    """
    status = os.lstat(source)
    if not stat.S_ISDIR(status.st_mode) or os.geteuid() == 0:
        moveInto(source, target)
        return
    os.chmod(source, 0o755)
    try:
        moveInto(source, target)
    except OSError:
        os.chmod(source, 0o555)
        raise
    os.chmod(target, 0o555)

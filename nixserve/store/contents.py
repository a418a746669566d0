"""
What must be true of an object before it is registered, and when it is exported, in any implementation of the store:
what is said about it, and what its contents say.

Contents come as the NAR of the object in chunks, from wherever. Nothing here blocks but through their iterator.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Final

from nixserve.codec.contentaddress import ContentAddressMethod
from nixserve.codec.derivation import (
    Derivation,
    Lookup,
    checkDerivationOutputs,
    derivationName,
    parseDerivation,
)
from nixserve.codec.hashes import Hash
from nixserve.codec.messages import ImportItem
from nixserve.codec.nar import Contents, Directory, EndDirectory, Event, Regular
from nixserve.codec.narparser import NarParser
from nixserve.codec.pathinfo import Signature, ValidPathInfo, topoSort
from nixserve.codec.serve import writeExportMarker, writeImportItem
from nixserve.codec.storepath import HASH_PART_LENGTH, MAX_NAME_LENGTH, StoreDir, StorePath
from nixserve.errors import FormatError, StoreError
from nixserve.store.drvhashes import DerivationMemo, FindingHashes
from nixserve.store.fileerrors import shortened

__all__ = [
    "MAX_DERIVATION_SIZE",
    "MAX_PATH_SIZE",
    "MAX_SELF_REFERENCES",
    "HashModulo",
    "Intake",
    "PathTooLong",
    "checkContentAddress",
    "checkMore",
    "checkNar",
    "checkNewInfo",
    "checkPathSize",
    "checkRegistrable",
    "derivationOutputs",
    "exportStream",
    "readDerivation",
    "referencesFirst",
    "sizeMismatch",
]

#: Bytes of a .drv file that are read into memory at most: as many as a single string of the protocol, in which it could
#: be asked for. The largest of Nixpkgs have some MiB.
MAX_DERIVATION_SIZE: Final = 16 * 1024 * 1024

#: Bytes in the path of a file in an object: the kernel's PATH_MAX without the NUL.
MAX_PATH_SIZE: Final = 4095

#: Occurrences of its own hash part in an object that is addressed by its contents. Each takes 8 bytes of memory and a
#: step by itself; the path of so many, without anything else, would be a quarter of a GiB.
MAX_SELF_REFERENCES: Final = 4 * 1024 * 1024

#: Offsets that are hashed together.
_OFFSETS_AT_ONCE: Final = 10_000

#: Bytes of the longest path that an object can have in the usual place.
_LONGEST_ROOT: Final = len(f"{StoreDir().path}/") + HASH_PART_LENGTH + 1 + MAX_NAME_LENGTH


class PathTooLong(StoreError):
    """The path of a file in an object is longer than the kernel takes."""


class Intake:
    """
    A NAR that is coming in: its shape, size and hash.
    """

    def __init__(self, maxSize: int | None = None) -> None:
        self._parser = NarParser(maxSize)
        self._digest = hashlib.sha256()
        # Of the directories that are open, outermost first.
        self._names: list[bytes] = []
        self._pathSize = _LONGEST_ROOT
        self.size = 0

    @property
    def finished(self) -> bool:
        """Whether the NAR is complete."""
        return self._parser.finished

    def feed(self, data: bytes) -> None:
        """
        @raise FormatError: this is no NAR, or it was complete before.
        @raise PathTooLong: that of a file in it is.
        """
        for event in self._parser.feed(data):
            self._follow(event)
        if self._parser.surplus:
            raise FormatError("bad archive: data after its end", offset=self.size)
        self.size += len(data)
        self._digest.update(data)

    def _follow(self, event: Event) -> None:
        """Note where in the tree we are."""
        if isinstance(event, EndDirectory):
            self._pathSize -= len(self._names.pop()) + 1
        elif not isinstance(event, Contents):
            checkPathSize(self._pathSize + 1 + len(event.name), b"/".join([*self._names, event.name]))
            if isinstance(event, Directory):
                self._names.append(event.name)
                self._pathSize += len(event.name) + 1

    def finish(self) -> Hash:
        """
        @return: the hash of the NAR.
        @raise FormatError: it is not complete, or was bad.
        """
        self._parser.close()
        return Hash("sha256", self._digest.digest())


class HashModulo:
    """
    The hash of a stream in which the object's own hash part counts as 32 NUL bytes. Where it stood is hashed in the
    end: C{|} and the offset for each. In a stream without it this is the plain hash.

    So an object that contains its own path can have a path computed from its contents. Source: Nix 2.8,
    src/libstore/references.cc, HashModuloSink.
    """

    def __init__(self, algo: str, hashPart: str) -> None:
        self._algo = algo
        self._digest = hashlib.new(algo, usedforsecurity=False)
        self._needle = hashPart.encode("ascii")
        self._offsets = array("Q")
        # Bytes hashed, and those after them that may be the beginning of an occurrence.
        self._hashed = 0
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """
        Take the next bytes, cut anywhere.

        @raise StoreError: the hash part occurs in it more than L{MAX_SELF_REFERENCES} times.
        """
        buffer = self._rest + data
        found = buffer.find(self._needle)
        if found >= 0:
            while found >= 0:
                self._offsets.append(self._hashed + found)
                found = buffer.find(self._needle, found + len(self._needle))
            if len(self._offsets) > MAX_SELF_REFERENCES:
                part = self._needle.decode("ascii")
                raise StoreError(f"object '{part}-…' contains its own hash part more than {MAX_SELF_REFERENCES} times")
            buffer = buffer.replace(self._needle, bytes(len(self._needle)))
        ready = max(0, len(buffer) - len(self._needle) + 1)
        self._digest.update(memoryview(buffer)[:ready])
        self._hashed += ready
        self._rest = buffer[ready:]

    def finish(self) -> Hash:
        """
        @return: the hash; the stream is at its end.
        """
        self._digest.update(self._rest)
        for start in range(0, len(self._offsets), _OFFSETS_AT_ONCE):
            offsets = self._offsets[start : start + _OFFSETS_AT_ONCE]
            self._digest.update(b"".join([b"|%d" % offset for offset in offsets]))
        return Hash(self._algo, self._digest.digest())


def checkPathSize(size: int, path: bytes) -> None:
    """
    Every file of an object must have a path that the kernel takes: Nix's collector and its verification work with whole
    paths, and fail on an object that they can neither read nor delete, now and for ever.

    @param size: of the path, in bytes.
    @param path: for the message.
    @raise PathTooLong: it is too long.
    """
    if size > MAX_PATH_SIZE:
        raise PathTooLong(
            f"cannot have '{shortened(os.fsdecode(path))}' in a store: File name too long: its path would have {size} "
            f"bytes, and at most {MAX_PATH_SIZE} are possible"
        )


def checkRegistrable(info: ValidPathInfo, storeDir: StoreDir) -> None:
    """
    @raise StoreError: the path is of another store directory, the hash is no SHA-256, or the content address does not
        give the path.
    """
    if info.path.storeDir != storeDir.path:
        raise StoreError(f"cannot register path '{info.path}' in a store whose directory is '{storeDir.path}'")
    if info.narHash.algo != "sha256":
        raise StoreError(f"cannot register path '{info.path}': its NAR hash is {info.narHash.algo}, not sha256")
    if info.ca is not None and not info.isContentAddressed(storeDir):
        raise StoreError(
            f"cannot add path '{info.path}' to the Nix store because it claims to be content-addressed but isn't"
        )


def checkNewInfo(info: ValidPathInfo, storeDir: StoreDir) -> None:
    """
    What can be checked before an object's first byte.

    @raise StoreError: as L{checkRegistrable}; or the size is not known.
    @raise nixserve.errors.FormatError: a malformed signature. Nix 2.34 refuses it as well; older ones store it, and
        then a newer one fails on each query of the path.
    """
    checkRegistrable(info, storeDir)
    if info.narSize <= 0:
        raise StoreError(f"cannot add path '{info.path}': the size of its NAR is not known")
    for signature in info.sigs:
        Signature.parse(signature)


def checkNar(info: ValidPathInfo, narHash: Hash, narSize: int) -> None:
    """
    @param narHash: of the NAR that came.
    @param narSize: its size in bytes.
    @raise StoreError: they are not as announced, in Nix's words.
    """
    if narHash != info.narHash:
        raise StoreError(f"hash mismatch importing path '{info.path}'; wanted: {info.narHash}, got: {narHash}")
    if narSize != info.narSize:
        raise sizeMismatch(info, narSize)


def sizeMismatch(info: ValidPathInfo, narSize: int) -> StoreError:
    """
    @param narSize: how many bytes came; if too many, those so far.
    @return: the error that says so.
    """
    return StoreError(f"size mismatch importing path '{info.path}'; wanted: {info.narSize}, got: {narSize}")


def checkMore(info: ValidPathInfo, size: int, isComplete: bool, more: bytes) -> None:
    """
    @param size: bytes of the NAR that have come.
    @param isComplete: whether they are a whole one.
    @param more: what comes now.
    @raise StoreError: that is more than was announced, or follows a NAR that is complete.
    """
    if size + len(more) > info.narSize or (isComplete and more):
        raise sizeMismatch(info, size + len(more))


def checkContentAddress(info: ValidPathInfo, dump: Callable[[], Iterable[bytes]]) -> None:
    """
    Make sure that the contents have the content address that the info states, if any. That it gives the path is
    checked elsewhere.

    @param info: its C{narHash} is known to be true.
    @param dump: gives the NAR; called only if the NAR's hash does not tell already.
    @raise StoreError: they have not, or the object is none that could have.
    """
    if info.ca is None:
        return
    method, stated = info.ca.method, info.ca.hash
    if method is ContentAddressMethod.NAR:
        if stated.algo == "sha256" and not info.hasSelfReference:
            found = info.narHash
        else:
            modulo = HashModulo(stated.algo, info.path.hashPart)
            for chunk in dump():
                modulo.feed(chunk)
            found = modulo.finish()
    elif method in (ContentAddressMethod.FLAT, ContentAddressMethod.TEXT):
        digest = hashlib.new(stated.algo, usedforsecurity=False)
        for piece in _fileContents(info.path, dump()):
            digest.update(piece)
        found = Hash(stated.algo, digest.digest())
    else:
        raise StoreError(f"cannot verify the content address '{info.ca}' of path '{info.path}': git is not supported")
    if found != stated:
        raise StoreError(f"ca hash mismatch importing path '{info.path}'; specified: {stated}, got: {found}")


def readDerivation(path: StorePath, dump: Iterable[bytes], storeDir: StoreDir) -> Derivation:
    """
    Read a derivation from the NAR of its .drv file.

    @raise StoreError: it is no file, or too large.
    @raise nixserve.errors.FormatError: it is no derivation.
    """
    pieces: list[bytes] = []
    size = 0
    for piece in _fileContents(path, dump):
        size += len(piece)
        if size > MAX_DERIVATION_SIZE:
            raise StoreError(f"derivation '{path}' is larger than {MAX_DERIVATION_SIZE} bytes")
        pieces.append(bytes(piece))
    return parseDerivation(b"".join(pieces), derivationName(path), storeDir)


def derivationOutputs(
    path: StorePath, lookup: Lookup, storeDir: StoreDir, memo: DerivationMemo
) -> dict[str, StorePath]:
    """
    What is registered about the outputs of a .drv: by name, those whose paths are known before the build.

    @param lookup: finds this derivation and those that it depends on.
    @param memo: what is known of derivations; what is read here is added to it.
    @return: nothing for any other path.
    @raise nixserve.errors.FormatError: it is no derivation, or states other paths than follow from it.
    """
    if not path.isDerivation:
        return {}
    drv = lookup(path)
    hashes = FindingHashes(memo, lookup, storeDir)
    try:
        checkDerivationOutputs(path, drv, hashes.lookup, storeDir, hashes)
    finally:
        hashes.keep()
    return drv.knownOutputPaths


def _fileContents(path: StorePath, dump: Iterable[bytes]) -> Iterator[bytes | memoryview]:
    """
    The contents of a NAR that is a plain file. An executable is none: its content address would not tell it from
    a file that is not.
    """
    parser = NarParser()
    plain = False
    for chunk in dump:
        for event in parser.feed(chunk):
            if isinstance(event, Contents) and plain:
                yield event.data
            elif isinstance(event, Regular) and not event.executable and not event.name:
                plain = True
            else:
                raise StoreError(f"path '{path}' is not a regular file without execute permission")
    parser.close()


# --- objects on their way out -----------------------------------------------------------------------------


def referencesFirst(infos: Mapping[StorePath, ValidPathInfo]) -> list[ValidPathInfo]:
    """The order of an export stream."""
    return [infos[path] for path in topoSort({path: info.references for path, info in infos.items()})]


def exportStream(
    infos: Iterable[ValidPathInfo], dump: Callable[[ValidPathInfo], Iterable[bytes]]
) -> Generator[bytes, None, None]:
    """
    The stream of L{nixserve.store.api.StoreSession.exportPaths}.

    @param infos: as L{referencesFirst} orders them.
    @param dump: gives the NAR of one; called for each in its turn.
    @raise StoreError: a NAR is not the one that was registered; so that damage does not spread to other stores.
    """
    for info in infos:
        yield writeExportMarker(True)
        digest = hashlib.sha256()
        for chunk in dump(info):
            digest.update(chunk)
            yield chunk
        found = Hash("sha256", digest.digest())
        if found != info.narHash:
            raise StoreError(f"hash of path '{info.path}' has changed from '{info.narHash}' to '{found}'")
        yield writeImportItem(ImportItem(info.path, info.references, info.deriver))
    yield writeExportMarker(False)

"""
Store paths: their grammar, and how they are computed.

C{<store directory>/<32 digits of Nix's base-32>-<name>}. The digits are a SHA-256, folded to 20 bytes, of a
fingerprint that says what kind of object it is, the hash that identifies it, the store directory and the name.
Sources: Nix 2.8, src/libstore/path.cc and store-api.cc; the longer names of the makers are explained there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from nixserve.codec import base32
from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.hashes import Hash, compressHash, hashBytes
from nixserve.errors import FormatError

__all__ = [
    "DRV_EXTENSION",
    "HASH_PART_LENGTH",
    "MAX_NAME_LENGTH",
    "MAX_PATH_LENGTH",
    "BadStorePath",
    "StoreDir",
    "StorePath",
    "checkName",
    "outputPathName",
]

#: Digits in the hash part: 20 bytes.
HASH_PART_LENGTH = 32

#: With hash part and dash this leaves room for ".lock" and the like within the 255 bytes of a file name.
MAX_NAME_LENGTH = 211

#: Longer texts are refused unread, in bytes of ASCII. It is Linux's PATH_MAX: no such path could ever be opened.
MAX_PATH_LENGTH = 4096

#: How the name of a derivation ends.
DRV_EXTENSION = ".drv"

_HASH_PART = f"[{base32.ALPHABET}]{{{HASH_PART_LENGTH}}}"

# Nix 2.8 allows the names '.' and '..' and those that begin with '.-' or '..-'; newer ones refuse them, and their
# collectors delete such objects as junk. So they are refused here.
_NAME = rf"(?!\.\.?(?:-|\Z))[0-9A-Za-z+._?=-]{{1,{MAX_NAME_LENGTH}}}"

_matchName = re.compile(_NAME).fullmatch
_searchForeignDigit = re.compile(f"[^{base32.ALPHABET}]").search
_searchForeignInName = re.compile(r"[^0-9A-Za-z+._?=-]").search


class BadStorePath(FormatError):
    """A text is not a store path, or not a path of this store."""


class StorePath(str):
    """
    A store path in full, as text: C{/nix/store/<hash part>-<name>}.

    Being a C{str}, it goes to the wire, to SQLite and into a set as it is, and sorts as Nix sorts. Only L{StoreDir}
    makes one from foreign text; the constructor checks nothing.
    """

    __slots__ = ()

    @property
    def storeDir(self) -> str:
        """The directory part: C{/nix/store}."""
        return self.rpartition("/")[0]

    @property
    def baseName(self) -> str:
        """C{<hash part>-<name>}."""
        return self.rpartition("/")[2]

    @property
    def hashPart(self) -> str:
        """The 32 digits, which identify the object within its store."""
        return self.baseName[:HASH_PART_LENGTH]

    @property
    def name(self) -> str:
        """What follows the hash part and the dash."""
        return self.baseName[HASH_PART_LENGTH + 1 :]

    @property
    def isDerivation(self) -> bool:
        """Whether the name ends in C{.drv}."""
        return self.endswith(DRV_EXTENSION)


@dataclass(frozen=True, slots=True)
class StoreDir:
    """
    A logical store directory, and the store paths in it. Two stores with the same one can exchange objects.

    @ivar path: an absolute path without C{.}, C{..}, doubled or trailing slashes.
    """

    path: str = "/nix/store"
    _match: Callable[[str], re.Match[str] | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or self.path == "/" or _canonPath(self.path) != self.path:
            raise FormatError(f"'{self.path}' cannot be a store directory", expected="an absolute, canonical path")
        object.__setattr__(self, "_match", re.compile(f"{re.escape(self.path)}/{_HASH_PART}-{_NAME}").fullmatch)

    def parse(self, text: str) -> StorePath:
        """
        Read the path of an object of this store.

        Like Nix, it first takes out doubled slashes, C{.} and C{..} components and a trailing slash, by text alone.

        @raise BadStorePath: it is not one. A path inside an object is not: see L{toStorePath}.
        """
        if self._match(text):
            return StorePath(text)
        return self._parseSlowly(text)

    def parseMany(self, texts: Collection[str]) -> list[StorePath]:
        """
        L{parse} each of C{texts}, in order.

        @raise BadStorePath: for the first that is none.
        """
        if all(map(self._match, texts)):
            return list(map(StorePath, texts))
        return [self.parse(text) for text in texts]

    def parseBaseName(self, baseName: str) -> StorePath:
        """
        @param baseName: C{<hash part>-<name>}.
        @raise BadStorePath: it is not that.
        """
        _checkBaseName(baseName)
        return StorePath(f"{self.path}/{baseName}")

    def isInStore(self, text: str) -> bool:
        """Whether C{text} names something below the store directory, be it an object's path or not."""
        return text.startswith(self.path + "/") and len(text) > len(self.path) + 1

    def toStorePath(self, text: str) -> StorePath:
        """
        @param text: the path of an object or of a file inside one.
        @return: the object's path.
        @raise BadStorePath: it is neither.
        """
        if not self.isInStore(text):
            raise BadStorePath(f"path '{_shortened(text)}' is not in the Nix store")
        end = text.find("/", len(self.path) + 1)
        return self.parse(text if end < 0 else text[:end])

    def makeStorePath(self, kind: str, inner: Hash, name: str) -> StorePath:
        """
        The root of all the makers below.

        @param kind: what sort of object, with what else identifies it: C{text:<reference>…}, C{source}, C{output:out}.
        @param inner: the hash of what the object is made from; its algorithm is part of the fingerprint.
        @raise BadStorePath: C{name} cannot be an object's.
        """
        checkName(name)
        fingerprint = f"{kind}:{inner.hexText}:{self.path}:{name}"
        digest = hashBytes("sha256", fingerprint.encode("utf-8")).digest
        return StorePath(f"{self.path}/{base32.encode(compressHash(digest))}-{name}")

    def makeOutputPath(self, outputName: str, inner: Hash, drvName: str) -> StorePath:
        """
        The path of an input-addressed output.

        @param inner: the derivation's masked hash, see L{nixserve.codec.derivation}.
        @param drvName: the derivation's name without C{.drv}.
        """
        return self.makeStorePath(f"output:{outputName}", inner, outputPathName(drvName, outputName))

    def makeFixedOutputPath(
        self,
        method: ContentAddressMethod,
        hash: Hash,
        name: str,
        references: Iterable[StorePath] = (),
        selfReference: bool = False,
    ) -> StorePath:
        """
        The path of an object whose content address begins with C{fixed:}.

        @param references: without the object itself.
        @raise FormatError: references where there can be none: only a NAR hashed with SHA-256 may have any.
        """
        others = sorted(set(references))
        if method is ContentAddressMethod.NAR and hash.algo == "sha256":
            return self.makeStorePath(":".join(["source", *others, *(["self"] if selfReference else [])]), hash, name)
        if others or selfReference:
            raise FormatError(f"fixed output derivation '{name}' is not allowed to refer to other store paths")
        inner = hashBytes("sha256", f"fixed:out:{method.value}{hash.hexText}:".encode("ascii"))
        return self.makeStorePath("output:out", inner, name)

    def makeTextPath(self, name: str, hash: Hash, references: Iterable[StorePath] = ()) -> StorePath:
        """
        The path of a text file, such as a .drv.

        @param hash: the SHA-256 of its bytes.
        @param references: what it refers to. It cannot refer to itself.
        """
        if hash.algo != "sha256":
            raise FormatError(f"text content address hash should use sha256, but instead uses '{hash.algo}'")
        return self.makeStorePath(":".join(["text", *sorted(set(references))]), hash, name)

    def makeContentAddressedPath(
        self, ca: ContentAddress, name: str, references: Iterable[StorePath] = (), selfReference: bool = False
    ) -> StorePath:
        """
        The path of an object with this content address.

        @param references: without the object itself.
        @raise FormatError: no object with this content address can have these references.
        """
        if ca.method is not ContentAddressMethod.TEXT:
            return self.makeFixedOutputPath(ca.method, ca.hash, name, references, selfReference)
        if selfReference:
            raise FormatError(f"text object '{name}' cannot refer to itself")
        return self.makeTextPath(name, ca.hash, references)

    def _parseSlowly(self, text: str) -> StorePath:
        if len(text) > MAX_PATH_LENGTH:
            raise BadStorePath(f"path '{_shortened(text)}' is too long", found=f"{len(text)} characters")
        if not text.startswith("/"):
            raise BadStorePath(f"not an absolute path: '{text}'")
        directory, _, baseName = _canonPath(text).rpartition("/")
        if directory != self.path:
            raise BadStorePath(f"path '{text}' is not in the Nix store")
        return self.parseBaseName(baseName)


def outputPathName(drvName: str, outputName: str) -> str:
    """
    @return: the name of an output's object: that of the derivation, with C{-<output>} for all but C{out}.
    """
    return drvName if outputName == "out" else f"{drvName}-{outputName}"


def checkName(name: str) -> None:
    """
    @raise BadStorePath: C{name} cannot be the name of an object.
    """
    if not _matchName(name):
        raise BadStorePath(f"name '{_shortened(name)}' {_nameFault(name)}")


def _checkBaseName(baseName: str) -> None:
    """Say what is wrong with the last component of a path, in Nix's words and order."""
    shown = _shortened(baseName)
    if len(baseName) < HASH_PART_LENGTH + 1:
        raise BadStorePath(f"'{shown}' is too short to be a valid store path")
    foreign = _searchForeignDigit(baseName, 0, HASH_PART_LENGTH)
    if foreign:
        raise BadStorePath(f"store path '{shown}' contains illegal base-32 character '{foreign[0]}'")
    # Nix 2.8 takes any character for the dash.
    if baseName[HASH_PART_LENGTH] != "-":
        raise BadStorePath(f"store path '{shown}' has no dash after its hash part")
    name = baseName[HASH_PART_LENGTH + 1 :]
    if not _matchName(name):
        raise BadStorePath(f"store path '{shown}' {_nameFault(name)}")


def _nameFault(name: str) -> str:
    """What is wrong with a name that is not allowed."""
    if not name:
        return "has an empty name"
    if len(name) > MAX_NAME_LENGTH:
        return f"has a name longer than {MAX_NAME_LENGTH} characters"
    foreign = _searchForeignInName(name)
    if foreign:
        return f"contains illegal character '{foreign[0]}'"
    return "has a name whose first component is '.' or '..'"


def _canonPath(text: str) -> str:
    """An absolute path without C{.}, C{..}, doubled and trailing slashes; symbolic links are not looked at."""
    # POSIX gives two leading slashes a meaning, so normpath keeps them; Nix does not.
    return posixpath.normpath("/" + text.lstrip("/"))


def _shortened(text: str) -> str:
    """C{text} for an error message, which need not carry megabytes from a peer."""
    return text if len(text) <= MAX_PATH_LENGTH else text[:MAX_PATH_LENGTH] + "…"

"""
What a store knows about one valid object, its signatures, and the order in which objects are copied.

Source: Nix 2.8, src/libstore/path-info.hh, crypto.cc and src/libutil/topo-sort.hh.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from nixserve.codec.contentaddress import ContentAddress
from nixserve.codec.hashes import Hash
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import FormatError

__all__ = ["CycleError", "Signature", "ValidPathInfo", "topoSort"]

_SIGNATURE_SIZE = 64


@dataclass(frozen=True, slots=True)
class ValidPathInfo:
    """
    What is registered about an object.

    @ivar path: the object.
    @ivar narHash: the SHA-256 of its NAR.
    @ivar narSize: the bytes of its NAR; 0 if unknown.
    @ivar references: the objects whose hash parts occur in it, itself perhaps among them.
    @ivar deriver: the derivation that it was built from, if known.
    @ivar registrationTime: when, in seconds since 1970; 0 if unknown.
    @ivar ultimate: it was built here, so it needs no signature.
    @ivar sigs: C{<key name>:<base64>} each. Kept as they came, also malformed ones: see L{Signature}.
    @ivar ca: what the path was computed from, unless from a derivation.
    """

    path: StorePath
    narHash: Hash
    narSize: int = 0
    references: frozenset[StorePath] = frozenset()
    deriver: StorePath | None = None
    registrationTime: int = 0
    ultimate: bool = False
    sigs: frozenset[str] = frozenset()
    ca: ContentAddress | None = None

    @property
    def hasSelfReference(self) -> bool:
        """Whether the object refers to itself."""
        return self.path in self.references

    def fingerprint(self) -> str:
        """
        The text that signatures sign. Deriver and content address are not covered.

        @raise FormatError: the size is not known.
        """
        if not self.narSize:
            raise FormatError(f"cannot calculate fingerprint of path '{self.path}' because its size is not known")
        return f"1;{self.path};{self.narHash};{self.narSize};{','.join(sorted(self.references))}"

    def isContentAddressed(self, storeDir: StoreDir) -> bool:
        """
        Whether the content address, the name and the references give this path. Then the path alone proves the
        contents, and no signature is needed.
        """
        if self.ca is None:
            return False
        try:
            path = storeDir.makeContentAddressedPath(
                self.ca, self.path.name, self.references - {self.path}, self.hasSelfReference
            )
        except FormatError:
            return False
        return path == self.path


@dataclass(frozen=True, slots=True)
class Signature:
    """
    An Ed25519 signature of a L{fingerprint<ValidPathInfo.fingerprint>}.

    @ivar keyName: the name of the key that made it, not empty, without a colon, blanks and control characters: in a
        database signatures stand side by side, with a blank between them.
    @ivar signature: 64 bytes.
    """

    keyName: str
    signature: bytes

    @classmethod
    def parse(cls, text: str) -> Signature:
        """
        @param text: C{<key name>:<base64>}.
        @raise FormatError: anything else; Nix from 2.34 on is as strict.
        """
        keyName, _, encoded = text.partition(":")
        if not keyName:
            raise FormatError(
                "signature is corrupt: it has no key name", expected="'<key name>:<base64>'", found=text[:200]
            )
        # Of one with a blank Nix would make two, neither of which it takes; surrogates are no text to a database.
        if " " in keyName or not keyName.isprintable():
            raise FormatError(
                f"signature by key {keyName[:200]!a} is corrupt: the name of a key has no blanks or control characters"
            )
        try:
            signature = base64.b64decode(encoded, validate=True)
        except ValueError:
            signature = b""
        # Comparing also refuses bits behind the last byte that are not zero: one signature has one text.
        if base64.b64encode(signature).decode("ascii") != encoded:
            raise FormatError(f"signature by key '{keyName:.200}' is corrupt: it is not base-64")
        if len(signature) != _SIGNATURE_SIZE:
            raise FormatError(
                f"signature by key '{keyName:.200}' is corrupt",
                expected=f"{_SIGNATURE_SIZE} bytes",
                found=f"{len(signature)} bytes",
            )
        return cls(keyName, signature)

    def __str__(self) -> str:
        """C{<key name>:<base64>}."""
        return f"{self.keyName}:{base64.b64encode(self.signature).decode('ascii')}"


class CycleError(FormatError):
    """
    Objects refer to each other in a circle, which no valid objects do.

    @ivar path: an object on the circle.
    @ivar parent: the object that led back to it.
    """

    def __init__(self, path: StorePath, parent: StorePath) -> None:
        self.path = path
        self.parent = parent
        super().__init__(f"cycle detected in the references of '{path}' from '{parent}'")


def topoSort(infos: Mapping[StorePath, Collection[StorePath]]) -> list[StorePath]:
    """
    Put objects into the order in which they can be registered: each after everything that it refers to.

    The order is the reverse of that of Nix's C{topoSort}, hence that of its exports and copies: paths and references
    are visited in sorted order, depth first.

    @param infos: the references of each object. References to itself and to objects that are no key are ignored.
    @raise CycleError: there is no such order.
    """
    ordered: list[StorePath] = []
    finished: set[StorePath] = set()
    for root in sorted(infos):
        if root not in finished:
            _visit(root, infos, finished, ordered)
    return ordered


def _visit(
    root: StorePath,
    infos: Mapping[StorePath, Collection[StorePath]],
    finished: set[StorePath],
    ordered: list[StorePath],
) -> None:
    """Append C{root} and all that it needs. The stack is a list: chains of references may be thousands long."""
    open_: dict[StorePath, Iterator[StorePath]] = {root: iter(sorted(infos[root]))}
    stack = [root]
    while stack:
        path = stack[-1]
        for reference in open_[path]:
            if reference == path or reference in finished or reference not in infos:
                continue
            if reference in open_:
                raise CycleError(reference, path)
            open_[reference] = iter(sorted(infos[reference]))
            stack.append(reference)
            break
        else:
            stack.pop()
            del open_[path]
            finished.add(path)
            ordered.append(path)

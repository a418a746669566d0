"""
Objects for stores: trees as NARs, and what is to be registered about them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from nixserve.codec.contentaddress import ContentAddressMethod
from nixserve.codec.hashes import hashBytes
from nixserve.codec.nar import Contents, Directory, EndDirectory, Event, Regular, Symlink
from nixserve.codec.narwriter import encodeNar
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.store.api import StoreSession

__all__ = ["Executable", "Tree", "addObject", "makeInfo", "makeNar"]


class Executable(bytes):
    """The contents of an executable file."""


Tree = bytes | str | Mapping[str, "Tree"]
"""A file by its contents (L{Executable} or not), a symbolic link by its target, or a directory by its entries."""


def makeNar(tree: Tree) -> bytes:
    """
    @return: the NAR of C{tree}.
    """
    return b"".join(encodeNar(_events(b"", tree)))


def _events(name: bytes, tree: Tree) -> Iterator[Event]:
    if isinstance(tree, bytes):
        yield Regular(name, isinstance(tree, Executable), len(tree))
        if tree:
            yield Contents(tree)
    elif isinstance(tree, str):
        yield Symlink(name, tree.encode())
    else:
        yield Directory(name)
        for entry, child in sorted((entry.encode(), child) for entry, child in tree.items()):
            yield from _events(entry, child)
        yield EndDirectory()


def makeInfo(
    name: str, nar: bytes, references: Collection[StorePath] = (), storeDir: StoreDir | None = None, **fields: Any
) -> ValidPathInfo:
    """
    An info that a store accepts for C{nar}. Its path follows from the contents, but it states no content address.

    @param fields: others of the info, or another path.
    """
    narHash = hashBytes("sha256", nar)
    path = (storeDir or StoreDir()).makeFixedOutputPath(ContentAddressMethod.NAR, narHash, name, references)
    info = ValidPathInfo(path, narHash, len(nar), frozenset(references), registrationTime=1_600_000_000)
    return replace(info, **fields)


def addObject(session: StoreSession, info: ValidPathInfo, nar: bytes) -> None:
    """
    Add an object at once.

    @raise NixServeError: it is refused.
    """
    writer = session.addToStore(info)
    writer.feed(nar)
    writer.finish()

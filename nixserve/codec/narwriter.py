"""
Writes NARs: the pieces that L{nixserve.store.files.dumpPath} and L{encodeNar} put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import Struct

from nixserve.codec.nar import (
    CLOSE,
    CLOSE_ENTRY,
    DIRECTORY,
    ENTRY,
    EXECUTABLE,
    MAGIC,
    MAX_ENTRY_HEADER,
    MAX_TARGET,
    PADDED_CLOSE,
    PADDED_CLOSE_ENTRY,
    PADDED_DIRECTORY,
    PADDED_EXECUTABLE,
    PADDED_REGULAR,
    PADDED_SYMLINK,
    REGULAR,
    SYMLINK,
    Contents,
    Directory,
    EndDirectory,
    Event,
    Regular,
    Symlink,
    string,
)

__all__ = [
    "MAX_NODE_HEADER",
    "directoryEnd",
    "directoryStart",
    "encodeNar",
    "regularEnd",
    "regularStart",
    "symlinkNode",
]

_U64 = Struct("<Q")
# No piece that the functions below return is longer.
MAX_NODE_HEADER = MAX_ENTRY_HEADER + MAX_TARGET + len(PADDED_CLOSE_ENTRY[7])


def _nodeStart(name: bytes, root: bytes, padded: tuple[bytes, ...]) -> bytes:
    """What leads to a node's body: the entry that names it, or for the root the magic."""
    if not name:
        return MAGIC + root
    return b"%b%b%b%b" % (ENTRY, _U64.pack(len(name)), name, padded[-len(name) & 7])


def regularStart(name: bytes, executable: bool, size: int) -> bytes:
    """
    A regular file up to where its contents begin.

    @param name: its name, or empty for the root, here and in all functions beside this.
    @param size: how many bytes of contents will follow, then L{regularEnd}.
    @return: at most L{MAX_NODE_HEADER} bytes; true of all functions beside this.
    """
    if executable:
        return _nodeStart(name, EXECUTABLE, PADDED_EXECUTABLE) + _U64.pack(size)
    return _nodeStart(name, REGULAR, PADDED_REGULAR) + _U64.pack(size)


def regularEnd(name: bytes, size: int) -> bytes:
    """What follows the C{size} bytes of contents of a regular file."""
    return PADDED_CLOSE_ENTRY[-size & 7] if name else PADDED_CLOSE[-size & 7]


def symlinkNode(name: bytes, target: bytes) -> bytes:
    """The whole of a symbolic link."""
    return _nodeStart(name, SYMLINK, PADDED_SYMLINK) + string(target) + (CLOSE_ENTRY if name else CLOSE)


def directoryStart(name: bytes) -> bytes:
    """A directory up to where its entries begin. They must be written in ascending order of their names."""
    return _nodeStart(name, DIRECTORY, PADDED_DIRECTORY)


def directoryEnd(name: bytes) -> bytes:
    """What follows the last entry of a directory."""
    return CLOSE_ENTRY if name else CLOSE


def encodeNar(events: Iterable[Event]) -> Iterator[bytes]:
    """
    Write what L{nixserve.codec.narparser.NarParser} reads. The events are believed, not checked.

    @return: the bytes in pieces, about one for each event.
    """
    directories: list[bytes] = []
    unfinished: Regular | None = None
    missing = 0
    for event in events:
        match event:
            case Contents(data):
                missing -= len(data)
                yield bytes(data)
            case Regular(name, executable, size):
                unfinished, missing = event, size
                yield regularStart(name, executable, size)
            case Symlink(name, target):
                yield symlinkNode(name, target)
            case Directory(name):
                directories.append(name)
                yield directoryStart(name)
            case EndDirectory():
                yield directoryEnd(directories.pop())
        if unfinished is not None and not missing:
            yield regularEnd(unfinished.name, unfinished.size)
            unfinished = None

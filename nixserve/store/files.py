"""
Files of store objects on disk: to NAR, into Nix's canonical form, and away. L{nixserve.store.restoring} makes them.

Everything here blocks, may be called from any thread, and treats what it walks over as hostile: names are resolved
one at a time relative to the descriptor of the directory that contains them, symbolic links are never followed, and
trees may be deeper than the call stack, than the number of descriptors a process may have, and than C{PATH_MAX}.

Paths are C{str} as C{os.fsdecode} makes them. Failures of the operating system come out as L{StoreError} with the
name of the file.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from nixserve.codec.hashes import Hash
from nixserve.codec.nar import MAX_CHUNK
from nixserve.codec.narwriter import (
    MAX_NODE_HEADER,
    directoryEnd,
    directoryStart,
    regularEnd,
    regularStart,
    symlinkNode,
)
from nixserve.errors import StoreError
from nixserve.store.walk import Walk, chmodNode, lstatNode, unsupported

__all__ = [
    "MTIME_NS",
    "SMALL_FILE",
    "canonicalisePathMetaData",
    "deletePath",
    "dumpPath",
    "hashPath",
    "sortedEntries",
]

# A file up to this size is read in one go, and joined with its neighbours where there are any.
SMALL_FILE = 64 * 1024

# Entries of a directory that are simply kept while it is dumped: as much memory as half a chunk.
_FEW = 1000

# Entries of a directory: some milliseconds.
_SORTED_AT_ONCE = 10_000

# O_NONBLOCK, so that a FIFO put in the place of a file is an error and no wait.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

# The modification time of everything in a store: one second after the epoch (Nix, local-store.cc:mtimeStore).
MTIME_NS = 1_000_000_000
# Extended attributes that stay: the default of Nix's setting ignored-acls.
_IGNORED_XATTRS = frozenset(("security.selinux", "system.nfs4_acl", "security.csm"))


class _Chunks:
    """
    Joins small pieces into chunks.

    @ivar room: how many bytes the chunk being filled can still take.
    """

    __slots__ = ("_pieces", "_size", "room")

    def __init__(self, size: int) -> None:
        self._size = self.room = size
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> bytes:
        """
        Add a piece that is not larger than a chunk.

        @return: the chunk that it did not fit into or made full, to be passed on; or nothing.
        """
        self.room -= len(piece)
        if self.room > 0:
            self._pieces.append(piece)
            return b""
        if not self._pieces or not self.room:
            self._pieces.append(piece)
            return self.flush()
        chunk = b"".join(self._pieces)
        self._pieces = [piece]
        self.room = self._size - len(piece)
        return chunk

    def flush(self) -> bytes:
        """
        @return: the pieces that make no full chunk yet, as one.
        """
        chunk = b"".join(self._pieces)
        self._pieces = []
        self.room = self._size
        return chunk


def dumpPath(path: str, chunkSize: int = MAX_CHUNK) -> Iterator[bytes]:
    """
    The NAR of a file, directory or symbolic link.

    A generator: nothing is opened before the first chunk is asked for, and C{close()} closes what is open then.

    @param path: what to dump.
    @param chunkSize: how many bytes a chunk has at most, itself at least 8 KiB. All but the last are about as large.
    @raise StoreError: something cannot be read, changes its size meanwhile, or is a socket, FIFO or device.
    """
    chunks = _Chunks(chunkSize)
    with Walk(path, "read") as walk:
        levels = [iter([(walk.base, stat.S_IFMT(lstatNode(walk.base, walk.fd).st_mode))])]
        while levels:
            # The root of a NAR has no name.
            title = b""
            for name, kind in levels[-1]:
                walk.name = name
                title = name if len(levels) > 1 else b""
                if kind == stat.S_IFREG:
                    yield from _dumpRegular(walk, name, title, chunks)
                elif kind == stat.S_IFDIR:
                    walk.enter(name)
                    levels.append(_compact(sortedEntries(walk.fd)))
                    if chunk := chunks.add(directoryStart(title)):
                        yield chunk
                    break
                elif kind == stat.S_IFLNK:
                    if chunk := chunks.add(symlinkNode(title, os.readlink(name, dir_fd=walk.fd))):
                        yield chunk
                else:
                    raise unsupported(walk.path(name))
            else:
                levels.pop()
                if levels:
                    name = walk.leave()
                    if chunk := chunks.add(directoryEnd(name if len(levels) > 1 else b"")):
                        yield chunk
    if chunk := chunks.flush():
        yield chunk


def sortedEntries(fd: int) -> list[tuple[bytes, int]]:
    """The names in a directory, as a NAR orders them, each with its file type (C{S_IF…}), 0 if a NAR has none."""
    entries = []
    with os.scandir(fd) as listing:
        for entry in listing:
            if entry.is_file(follow_symlinks=False):
                kind = stat.S_IFREG
            elif entry.is_dir(follow_symlinks=False):
                kind = stat.S_IFDIR
            elif entry.is_symlink():
                kind = stat.S_IFLNK
            else:
                kind = 0
            entries.append((os.fsencode(entry.name), kind))
    return _sorted(entries)


def _sorted(entries: list[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    """
    C{entries} in order. A list is sorted in one go, during which no other thread of the process runs: with a million of
    entries, which a builder makes in a minute, for seconds.
    """
    if len(entries) <= _SORTED_AT_ONCE:
        entries.sort()
        return entries
    pieces = [sorted(entries[start : start + _SORTED_AT_ONCE]) for start in range(0, len(entries), _SORTED_AT_ONCE)]
    return list(heapq.merge(*pieces))


def _compact(entries: list[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """
    The same in a tenth of the memory if it is much: a reader who takes his time, or many of them, in a directory with a
    million files would make us keep a hundred MiB each.
    """
    return iter(entries) if len(entries) <= _FEW else _unpack(b"".join([b"%c%b/" % (k >> 12, n) for n, k in entries]))


def _unpack(entries: bytes) -> Iterator[tuple[bytes, int]]:
    """Names and file types from one string: a byte for the type, the name, a slash."""
    start = 0
    while start < len(entries):
        end = entries.index(b"/", start + 1)
        yield entries[start + 1 : end], entries[start] << 12
        start = end + 1


def _dumpRegular(walk: Walk, name: bytes, title: bytes, chunks: _Chunks) -> Iterator[bytes]:
    """
    The part of a NAR that is a regular file.

    @param title: its name as the NAR has it.
    """
    fd = os.open(name, _READ_FLAGS, dir_fd=walk.fd)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise unsupported(walk.path(name))
        size = status.st_size
        start = regularStart(title, bool(status.st_mode & stat.S_IXUSR), size)
        # One byte more than there should be, to see whether there is.
        if size <= SMALL_FILE and size + MAX_NODE_HEADER < chunks.room:
            data = os.read(fd, size + 1)
            left = size - len(data)
            if chunk := chunks.add(start + data):
                yield chunk
        else:
            if chunk := chunks.add(start):
                yield chunk
            left = size
            while left:
                data = os.read(fd, min(left, chunks.room))
                if not data:
                    break
                left -= len(data)
                if chunk := chunks.add(data):
                    yield chunk
            left -= len(os.read(fd, 1))
        if left:
            raise StoreError(f"file '{walk.path(name)}' changed its size while it was being read")
    finally:
        os.close(fd)
    if chunk := chunks.add(regularEnd(title, size)):
        yield chunk


def hashPath(path: str) -> tuple[Hash, int]:
    """
    Hash and size, in bytes, of the NAR of C{path}.

    @raise StoreError: as L{dumpPath}.
    """
    digest = hashlib.sha256()
    size = 0
    for chunk in dumpPath(path):
        digest.update(chunk)
        size += len(chunk)
    return Hash("sha256", digest.digest()), size


def canonicalisePathMetaData(path: str) -> None:
    """
    Give a tree the metadata that everything in a store has.

      - modes: 0444, with 0111 if the owner could execute it; directories 0555
      - modification time: one second after the epoch
      - no extended attributes but a few that administrators own
      - owner: us, if it was another user

    Source: Nix 2.34, src/libstore/posix-fs-canonicalise.cc:canonicalisePathMetaData.

    @param path: the tree. Nobody else may be able to write to it any more, or a file may be changed behind our back.
    @raise StoreError: a socket, FIFO or device; the operating system refuses.
    """
    with Walk(path, "canonicalise") as walk:
        for name, left in walk.nodes():
            if not left and _canonicaliseNode(walk, name):
                walk.enter(name)


def _canonicaliseNode(walk: Walk, name: bytes) -> bool:
    """
    Canonicalise one file, not what is in it.

    @return: whether it is a directory.
    """
    status = lstatNode(name, walk.fd)
    mode = stat.S_IMODE(status.st_mode)
    directory = stat.S_ISDIR(status.st_mode)
    link = stat.S_ISLNK(status.st_mode)
    if not (directory or link or stat.S_ISREG(status.st_mode)):
        raise unsupported(walk.path(name))
    _removeXattrs(f"/proc/self/fd/{walk.fd}/".encode() + name)
    wanted = mode if link else 0o555 if directory or mode & stat.S_IXUSR else 0o444
    if mode != wanted:
        chmodNode(name, walk.fd, wanted)
    if status.st_mtime_ns != MTIME_NS:
        os.utime(name, ns=(status.st_atime_ns, MTIME_NS), dir_fd=walk.fd, follow_symlinks=False)
    if status.st_uid != os.geteuid():
        os.chown(name, os.geteuid(), os.getegid(), dir_fd=walk.fd, follow_symlinks=False)
    return directory


def _removeXattrs(path: bytes) -> None:
    """Remove the extended attributes of C{path} itself that have no place in a store."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA):
            return
        raise
    for name in names:
        if name not in _IGNORED_XATTRS:
            os.removexattr(path, name, follow_symlinks=False)


def deletePath(path: str) -> int:
    """
    Delete a tree, write-protected directories included. What is not there, or vanishes meanwhile, is fine.

    @return: how many bytes that freed: the sizes of all files whose link count was 1, or 2 (the other one being that
        in C{.links}, which goes as soon as nobody else uses it). As Nix counts.
    @raise StoreError: something cannot be deleted.
    """
    try:
        walk = Walk(path, "delete")
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return 0
        raise
    freed = 0
    with walk:
        for name, left in walk.nodes():
            with suppress(FileNotFoundError):
                if left:
                    os.rmdir(name, dir_fd=walk.fd)
                    continue
                status = lstatNode(name, walk.fd)
                if stat.S_ISDIR(status.st_mode):
                    _enterToDelete(walk, name, status.st_mode)
                else:
                    os.unlink(name, dir_fd=walk.fd)
                    freed += status.st_size if status.st_nlink <= 2 else 0
    return freed


def _enterToDelete(walk: Walk, name: bytes, mode: int) -> None:
    """Go into a directory and make sure that its entries can be listed and deleted."""
    if mode & stat.S_IRWXU != stat.S_IRWXU:
        chmodNode(name, walk.fd, stat.S_IMODE(mode) | stat.S_IRWXU)
    walk.enter(name)

"""
Files of store objects on disk: to and from NAR, into Nix's canonical form, and away.

Everything here blocks, may be called from any thread, and treats what it walks over as hostile: names are resolved
one at a time relative to the descriptor of the directory that contains them, symbolic links are never followed, and
trees may be deeper than the call stack, than the number of descriptors a process may have, and than C{PATH_MAX}.

Paths are C{str} as C{os.fsdecode} makes them. Failures of the operating system come out as L{StoreError} with the
name of the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from nixserve.codec.hashes import Hash
from nixserve.codec.nar import (
    MAX_NODE_HEADER,
    BadArchive,
    Contents,
    Directory,
    Event,
    NarParser,
    Regular,
    Symlink,
    directoryEnd,
    directoryStart,
    regularEnd,
    regularStart,
    symlinkNode,
)
from nixserve.errors import NixServeError, StoreError
from nixserve.store.walk import Walk, chmodNode, failure, lstatNode, unsupported

__all__ = [
    "CHUNK_SIZE",
    "PathRestorer",
    "canonicalisePathMetaData",
    "deletePath",
    "dumpPath",
    "hashPath",
    "restoreNar",
    "restorePath",
]

# Bytes. Large enough that what a chunk costs by itself does not count, small enough for hundreds in flight.
CHUNK_SIZE = 256 * 1024
# A file up to this size is read in one go and joined with its neighbours.
_SMALL_FILE = 64 * 1024

# O_NONBLOCK, so that a FIFO put in the place of a file is an error and no wait.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
# The kernel's PATH_MAX, without the NUL.
_MAX_PATH = 4095
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# The modification time of everything in a store: one second after the epoch (Nix, local-store.cc:mtimeStore).
_MTIME_NS = 1_000_000_000
# Extended attributes that stay: the default of Nix's setting ignored-acls.
_IGNORED_XATTRS = frozenset(("security.selinux", "system.nfs4_acl", "security.csm"))
# What a directory with this attribute hands down to all that is created in it.
_INHERITED_ACL = "system.posix_acl_default"


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
        """What there is."""
        chunk = b"".join(self._pieces)
        self._pieces = []
        self.room = self._size
        return chunk


def dumpPath(path: str, chunkSize: int = CHUNK_SIZE) -> Iterator[bytes]:
    """
    The NAR of a file, directory or symbolic link.

    A generator: nothing is opened before the first chunk is asked for, and C{close()} closes what is open then.

    @param path: what to dump.
    @param chunkSize: how many bytes a chunk has at most, itself at least 8 KiB. All but the last are about as large.
    @raise StoreError: something cannot be read, changes its size meanwhile, or is a socket, FIFO or device.
    """
    name = b""
    chunks = _Chunks(chunkSize)
    try:
        walk = Walk(path)
    except OSError as error:
        raise failure("read", path, error) from error
    with walk:
        try:
            name = walk.base
            levels = [iter([(name, stat.S_IFMT(lstatNode(name, walk.fd).st_mode))])]
            while levels:
                # The root of a NAR has no name.
                title = b""
                for name, kind in levels[-1]:
                    title = name if len(levels) > 1 else b""
                    if kind == stat.S_IFREG:
                        yield from _dumpRegular(walk, name, title, chunks)
                    elif kind == stat.S_IFDIR:
                        walk.enter(name)
                        name = b""
                        levels.append(iter(_sortedEntries(walk.fd)))
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
        except OSError as error:
            raise failure("read", walk.path(name), error) from error
    if chunk := chunks.flush():
        yield chunk


def _sortedEntries(fd: int) -> list[tuple[bytes, int]]:
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
    entries.sort()
    return entries


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
        if size <= _SMALL_FILE and size + MAX_NODE_HEADER < chunks.room:
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


class PathRestorer:
    """
    Turns a NAR that is fed to it into files, and hashes it on the way.

    What is restored is in Nix's canonical form when it is finished (see L{canonicalisePathMetaData}): modes 0444,
    or 0555 for directories and executables, and one second after the epoch as time of modification. The process's
    umask has no say in it.

    Nothing is created outside of the target, whatever the NAR holds, and nothing that exists is opened or changed.
    After an error what has been created so far stays, for the caller to delete; nothing stays open.

    No C{fsync} anywhere: Nix does none either for files of store objects by default (its setting C{fsync-metadata}
    is about the database).

    @ivar narSize: how many bytes of the NAR were fed so far; after L{finish} its size.
    """

    def __init__(self, target: str, maxSize: int | None = None) -> None:
        """
        @param target: what the root of the NAR becomes. The directory for it must exist, it itself must not.
        @param maxSize: how many bytes the NAR may have, where that is known.
        @raise StoreError: the directory that should contain C{target} cannot be opened.
        """
        self.narSize = 0
        self._target = target
        self._parser = NarParser(maxSize)
        self._digest = hashlib.sha256()
        self._narHash: Hash | None = None
        # Of the regular file being written, if any.
        self._file = -1
        self._fileMode = 0
        self._fileLeft = 0
        # Access time is nobody's concern, but must be given with the other.
        self._times = (time.time_ns(), _MTIME_NS)
        try:
            self._walk = Walk(target)
        except OSError as error:
            raise failure("write", target, error) from error
        self._name = self._walk.base
        self._open = True

    @property
    def finished(self) -> bool:
        """Whether the NAR is complete. What is fed now is surplus."""
        return self._parser.finished

    @property
    def narHash(self) -> Hash:
        """The hash of the NAR; only after L{finish}."""
        assert self._narHash is not None, "the NAR is not finished"
        return self._narHash

    def feed(self, data: bytes) -> None:
        """
        Take the next bytes of the NAR, cut anywhere. What can be written is written before this returns.

        @raise nixserve.errors.FormatError: this is no NAR, or larger than it may be.
        @raise StoreError: the file system refuses, or this restorer has failed or was ended before.
        """
        if not self._open:
            raise StoreError(f"restoring '{self._target}' has ended already")
        if self._parser.finished:
            self._parser.feed(data)
            return
        try:
            events = self._parser.feed(data)
            self._apply(events)
        except OSError as error:
            self.abort()
            raise failure("write", self._walk.path(self._name), error) from error
        except NixServeError:
            self.abort()
            raise
        if self._parser.surplus:
            data = data[: -len(self._parser.surplus)]
        # The whole chunk at once: for more than 2 KiB hashlib lets other threads run.
        self._digest.update(data)
        self.narSize += len(data)

    def takeSurplus(self) -> bytes:
        """What was fed after the end of the NAR. Whoever takes it declares that it belongs there."""
        surplus, self._parser.surplus = self._parser.surplus, b""
        return surplus

    def finish(self) -> None:
        """
        There is no more.

        @raise nixserve.errors.FormatError: the NAR is not complete, or something came after it and was not taken.
        @raise StoreError: the file system refuses, or this restorer has failed or was ended before.
        """
        if not self._open:
            raise StoreError(f"restoring '{self._target}' has ended already")
        self.abort()
        self._parser.close()
        if self._parser.surplus:
            raise BadArchive("data after its end", offset=self.narSize)
        if _handsDownAcl(self._target):
            canonicalisePathMetaData(self._target)
        self._narHash = Hash("sha256", self._digest.digest())

    def abort(self) -> None:
        """Give up. What has been created stays. Safe at any time, also twice and after L{finish}."""
        self._open = False
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)
        self._walk.close()

    def _apply(self, events: Iterable[Event]) -> None:
        """Do what the events say."""
        for event in events:
            if isinstance(event, Contents):
                self._write(event.data)
            elif isinstance(event, Regular):
                self._setName(event.name)
                self._startFile(event)
            elif isinstance(event, Directory):
                self._setName(event.name)
                self._startDirectory()
            elif isinstance(event, Symlink):
                self._setName(event.name)
                os.symlink(event.target, self._name, dir_fd=self._walk.fd)
                os.utime(self._name, ns=self._times, dir_fd=self._walk.fd, follow_symlinks=False)
            else:
                self._endDirectory()

    def _setName(self, name: bytes) -> None:
        """
        Note the name of what is created now. Its whole path must be one that the kernel takes: Nix's collector works
        with whole paths, and would fail on an object that it can neither read nor delete, now and for ever.
        """
        self._name = name or self._walk.base
        if self._walk.pathSize + 1 + len(self._name) > _MAX_PATH:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))

    def _startFile(self, event: Regular) -> None:
        """Create a file."""
        self._fileMode = 0o555 if event.executable else 0o444
        self._file = os.open(self._name, _CREATE_FLAGS, self._fileMode, dir_fd=self._walk.fd)
        self._fileLeft = event.size
        if not event.size:
            self._endFile()

    def _write(self, data: bytes | memoryview) -> None:
        """Write the next bytes of the file."""
        written = os.write(self._file, data)
        while written < len(data):
            written += os.write(self._file, memoryview(data)[written:])
        self._fileLeft -= written
        if not self._fileLeft:
            self._endFile()

    def _endFile(self) -> None:
        """The file is complete."""
        file = self._file
        # Not left to the mode that it was created with: the umask took its share of that.
        os.fchmod(file, self._fileMode)
        os.utime(file, ns=self._times)
        self._file = -1
        os.close(file)

    def _startDirectory(self) -> None:
        """Create a directory, one that we can write to, and go there."""
        name = self._name
        os.mkdir(name, 0o755, dir_fd=self._walk.fd)
        try:
            self._walk.enter(name)
        except PermissionError:
            # An umask that denies the owner.
            chmodNode(name, self._walk.fd, 0o755)
            self._walk.enter(name)
        os.fchmod(self._walk.fd, 0o755)

    def _endDirectory(self) -> None:
        """The directory is complete: nothing will be created in it any more."""
        os.fchmod(self._walk.fd, 0o555)
        os.utime(self._walk.fd, ns=self._times)
        self._name = self._walk.leave()


def _handsDownAcl(path: str) -> bool:
    """Whether what is created at C{path} gets an access control list from the directory there."""
    try:
        return _INHERITED_ACL in os.listxattr(os.path.dirname(path.rstrip("/")) or ".")
    except OSError:
        return False


def restorePath(target: str, chunks: Iterable[bytes]) -> tuple[Hash, int]:
    """
    Restore the NAR that C{chunks} yields.

    @return: hash and size, in bytes, of the NAR.
    @raise StoreError: as L{PathRestorer}.
    @raise nixserve.errors.FormatError: as L{PathRestorer}.
    """
    restorer = PathRestorer(target)
    try:
        for chunk in chunks:
            restorer.feed(chunk)
        restorer.finish()
    finally:
        restorer.abort()
    return restorer.narHash, restorer.narSize


def restoreNar(target: str, nar: bytes) -> None:
    """
    Restore a small NAR that is at hand whole, with the same result and the same care as L{PathRestorer}.

    @raise StoreError: as L{PathRestorer}.
    @raise nixserve.errors.FormatError: as L{PathRestorer}.
    """
    for executable in (False, True):
        contents = _contentsOf(nar, executable)
        if contents is not None:
            try:
                _restoreFile(target, contents, 0o555 if executable else 0o444)
            except OSError as error:
                raise failure("write", target, error) from error
            if _handsDownAcl(target):
                canonicalisePathMetaData(target)
            return
    restorePath(target, [nar])


def _contentsOf(nar: bytes, executable: bool) -> bytes | None:
    """
    @return: what is in the only file of a NAR; C{None} for anything else. Such a NAR has one form: what would be
        written for these contents.
    """
    prefix = len(regularStart(b"", executable, 0))
    size = int.from_bytes(nar[prefix - 8 : prefix], "little")
    contents = nar[prefix : prefix + size]
    if nar[:prefix] == regularStart(b"", executable, len(contents)) and nar[prefix + size :] == regularEnd(b"", size):
        return contents
    return None


def _restoreFile(target: str, contents: bytes, mode: int) -> None:
    """Create a file in canonical form, but for what it inherits."""
    file = os.open(target, _CREATE_FLAGS, mode)
    try:
        written = os.write(file, contents)
        while written < len(contents):
            written += os.write(file, memoryview(contents)[written:])
        os.fchmod(file, mode)
        os.utime(file, ns=(time.time_ns(), _MTIME_NS))
    finally:
        os.close(file)


def canonicalisePathMetaData(
    path: str, builderUids: range | None = None, inodesSeen: set[tuple[int, int]] | None = None
) -> None:
    """
    Give a tree the metadata that everything in a store has.

      - modes: 0444, with 0111 if the owner could execute it; directories 0555
      - modification time: one second after the epoch
      - no extended attributes but a few that administrators own
      - owner: us, if it was another user

    Source: Nix 2.34, src/libstore/posix-fs-canonicalise.cc:canonicalisePathMetaData.

    @param path: the tree. Nobody else may be able to write to it any more, or a file may be changed behind our back.
    @param builderUids: for the output of a build, the users that it ran as: everything must belong to them. Without
        that, C{ln /etc/shadow $out/x} would have us publish any file of the same file system.
    @param inodesSeen: for the outputs of one build, device and inode of all files that are done, here and in calls
        before: a file of ours among them is another link to one that was the builder's.
    @raise StoreError: a socket, FIFO or device; a file of somebody else; the operating system refuses.
    """
    seen = set() if inodesSeen is None else inodesSeen
    name = b""
    try:
        walk = Walk(path)
    except OSError as error:
        raise failure("canonicalise", path, error) from error
    with walk:
        try:
            levels = [[walk.base]]
            while levels:
                if levels[-1]:
                    name = levels[-1].pop()
                    if _canonicaliseNode(walk, name, builderUids, seen):
                        walk.enter(name)
                        name = b""
                        levels.append([os.fsencode(entry) for entry in os.listdir(walk.fd)])
                else:
                    levels.pop()
                    if levels:
                        name = walk.leave()
        except OSError as error:
            raise failure("canonicalise", walk.path(name), error) from error


def _canonicaliseNode(walk: Walk, name: bytes, builderUids: range | None, seen: set[tuple[int, int]]) -> bool:
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
    if builderUids is not None and status.st_uid not in builderUids:
        if directory or (status.st_dev, status.st_ino) not in seen:
            raise StoreError(f"invalid ownership on file '{walk.path(name)}': it does not belong to the builder")
        return False
    seen.add((status.st_dev, status.st_ino))
    _removeXattrs(f"/proc/self/fd/{walk.fd}/".encode() + name)
    wanted = mode if link else 0o555 if directory or mode & stat.S_IXUSR else 0o444
    if mode != wanted:
        chmodNode(name, walk.fd, wanted)
    if status.st_mtime_ns != _MTIME_NS:
        os.utime(name, ns=(status.st_atime_ns, _MTIME_NS), dir_fd=walk.fd, follow_symlinks=False)
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
    name: bytes | str = b""
    freed = 0
    try:
        walk = Walk(path)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise failure("delete", path, error) from error
    with walk:
        try:
            levels: list[list[bytes | str]] = [[walk.base]]
            while True:
                if levels[-1]:
                    name = levels[-1].pop()
                    with suppress(FileNotFoundError):
                        status = lstatNode(name, walk.fd)
                        if stat.S_ISDIR(status.st_mode):
                            _enterToDelete(walk, os.fsencode(name), status.st_mode)
                            name = b""
                            levels.append([*os.listdir(walk.fd)])
                        else:
                            os.unlink(name, dir_fd=walk.fd)
                            freed += status.st_size if status.st_nlink <= 2 else 0
                else:
                    levels.pop()
                    if not levels:
                        return freed
                    name = walk.leave()
                    with suppress(FileNotFoundError):
                        os.rmdir(name, dir_fd=walk.fd)
        except OSError as error:
            raise failure("delete", walk.path(name), error) from error


def _enterToDelete(walk: Walk, name: bytes, mode: int) -> None:
    """Go into a directory and make sure that its entries can be listed and deleted."""
    if mode & stat.S_IRWXU != stat.S_IRWXU:
        chmodNode(name, walk.fd, stat.S_IMODE(mode) | stat.S_IRWXU)
    walk.enter(name)

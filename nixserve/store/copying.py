"""
Copies of what builders leave, on inodes that no builder ever had open.

Whoever has a file open for writing changes it whatever its owner and mode become, and descriptors outlive the process
that opened them: they travel through sockets. Nor is it a proof to find nobody with the file open: a page of it that
the kernel was asked to read into, by direct or asynchronous I/O, stays writable when mapping and descriptor are gone.
So nothing that a builder made reaches the store itself. It is copied into a directory that no builder could enter, and
only the copy is looked at (CVE-2024-27297; Nix since 2.20.5 does so for fixed outputs,
src/libstore/build/local-derivation-goal.cc:registerOutputs).

As everything in L{nixserve.store.files} this blocks, may be called from any thread, and resolves names one at a time.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import closing, suppress

from nixserve.errors import StoreError
from nixserve.store.contents import MAX_PATH_SIZE, checkPathSize
from nixserve.store.files import MTIME_NS, SMALL_FILE, canonicalisePathMetaData, sortedEntries
from nixserve.store.restoring import handsDownAcl
from nixserve.store.walk import Walk, chmodNode, lstatNode, unsupported

__all__ = ["TooLarge", "TreeCopier"]

_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# The directory beside copies of which files have several names: by device and inode of the original.
_LINKS = "links"
# What one call of copy_file_range(2) is asked for, a few milliseconds' work: then there may be a reason to give up.
_PIECE = 16 * 1024 * 1024
# What the kernel or the file system answers if it does not copy from file to file.
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class TooLarge(StoreError):
    """The files of a tree have more bytes than they may."""


class TreeCopier:
    """
    Copies the outputs of one build.

    A copy has the same contents, holes and hard links, also from one output to another, and is in canonical form from
    the beginning (see L{canonicalisePathMetaData}): without extended attributes and flags of inodes too. Blocks are
    shared with the original where the file system can.
    """

    def __init__(self, uids: range | None, proceed: Callable[[], None], maxSize: int = 0) -> None:
        """
        @param uids: to one of whom everything must belong; C{None} if nobody but us could make anything. Without that,
            C{ln /etc/shadow $out/x} would have us publish any file of the same file system.
        @param proceed: called again and again; raises to give up.
        @param maxSize: bytes of the files of one tree, as a NAR counts them: holes too, and hard links again; 0 for any
            number.
        """
        self._uids = uids
        self._proceed = proceed
        self._maxSize = maxSize
        self._size = 0
        self._links = ""
        self._linked = False
        # Access time is nobody's concern, but must be given with the other.
        self._times = (time.time_ns(), MTIME_NS)

    def copy(self, source: str, target: str, realPath: str) -> None:
        """
        Copy a file, directory or symbolic link. After an error what there is of the copy is the caller's to delete.

        @param source: what to copy. None of the processes that made it may run any more.
        @param target: what it becomes. It must not exist. The directory for it must, be closed to everybody else, and
            be for the outputs of this build alone: copies of files with several links stay there under one more name,
            for the caller to delete. A builder can make more of them than fit into our memory.
        @param realPath: where it will be in the end: all its paths must be possible there.
        @raise nixserve.store.contents.PathTooLong: one is not.
        @raise TooLarge: before more is copied than may be.
        @raise StoreError: a socket, FIFO or device; a file of somebody else; the operating system refuses.
        """
        self._size = 0
        longer = len(os.fsencode(realPath)) - len(os.fsencode(target))
        with Walk(source, "copy") as origin, closing(Walk(target, "copy")) as copy:
            title = copy.base
            self._links = f"{os.path.dirname(target)}/{_LINKS}"
            levels = [[(origin.base, stat.S_IFMT(lstatNode(origin.base, origin.fd).st_mode))]]
            while levels:
                if levels[-1]:
                    name, kind = levels[-1].pop()
                    origin.name = name
                    self._proceed()
                    entry = title if len(levels) == 1 else name
                    size = copy.pathSize + 1 + len(entry) + longer
                    if size > MAX_PATH_SIZE:
                        checkPathSize(size, os.fsencode(origin.path(name)))
                    if self._copyNode(origin, copy, name, kind, entry):
                        levels.append(sortedEntries(origin.fd))
                else:
                    levels.pop()
                    if levels:
                        os.fchmod(copy.fd, 0o555)
                        os.utime(copy.fd, ns=self._times)
                        copy.leave()
                        origin.leave()
        if handsDownAcl(target):
            canonicalisePathMetaData(target)

    def _copyNode(self, origin: Walk, copy: Walk, name: bytes, kind: int, title: bytes) -> bool:
        """
        Copy one file, not what is in it. Go into a directory.

        @param kind: C{S_IF…}, which is checked again where it matters: somebody may still rename.
        @param title: the name of the copy.
        @return: whether it is a directory.
        """
        if kind == stat.S_IFREG:
            self._copyFile(origin, copy, name, title)
        elif kind == stat.S_IFDIR:
            self._enter(origin, copy, name, title)
        elif kind == stat.S_IFLNK:
            self._requireOwner(lstatNode(name, origin.fd), origin, name)
            os.symlink(os.readlink(name, dir_fd=origin.fd), title, dir_fd=copy.fd)
            os.utime(title, ns=self._times, dir_fd=copy.fd, follow_symlinks=False)
        else:
            raise unsupported(origin.path(name))
        return kind == stat.S_IFDIR

    def _requireOwner(self, status: os.stat_result, origin: Walk, name: bytes = b"") -> None:
        if self._uids is not None and status.st_uid not in self._uids:
            raise StoreError(f"invalid ownership on file '{origin.path(name)}': it does not belong to the builder")

    def _enter(self, origin: Walk, copy: Walk, name: bytes, title: bytes) -> None:
        """Make the copy of a directory and go into both."""
        try:
            origin.enter(name)
        except PermissionError:
            # Root may anyhow; anybody else is its owner.
            chmodNode(name, origin.fd, 0o700)
            origin.enter(name)
        self._requireOwner(os.fstat(origin.fd), origin)
        os.mkdir(title, 0o700, dir_fd=copy.fd)
        copy.enter(title)
        # Against an umask that denies the owner, below a directory that denies everybody else.
        os.fchmod(copy.fd, 0o700)

    def _copyFile(self, origin: Walk, copy: Walk, name: bytes, title: bytes) -> None:
        """Copy a regular file, or link to its copy."""
        try:
            source = os.open(name, _READ_FLAGS, dir_fd=origin.fd)
        except PermissionError:
            chmodNode(name, origin.fd, stat.S_IMODE(lstatNode(name, origin.fd).st_mode) | stat.S_IRUSR)
            source = os.open(name, _READ_FLAGS, dir_fd=origin.fd)
        try:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode):
                raise unsupported(origin.path(name))
            self._requireOwner(status, origin, name)
            self._size += status.st_size
            if 0 < self._maxSize < self._size:
                raise TooLarge(f"'{origin.path()}' has more than {self._maxSize} bytes")
            # Its other names may have been in an output that is copied and gone.
            if status.st_nlink > 1 or self._linked:
                self._copyLinked(source, status, copy, title)
            else:
                self._createFile(source, status, copy, title)
        finally:
            os.close(source)

    def _copyLinked(self, source: int, status: os.stat_result, copy: Walk, title: bytes) -> None:
        """A new name for the copy of a file with several, which is made for the first of them."""
        first = f"{self._links}/{status.st_dev:x}-{status.st_ino:x}"
        try:
            os.link(first, title, dst_dir_fd=copy.fd, follow_symlinks=False)
            return
        except FileNotFoundError:
            pass
        except OSError as error:
            # The original may have as many names as a file can have, and the copy has one more.
            if error.errno != errno.EMLINK:
                raise
            os.unlink(first)
        self._createFile(source, status, copy, title)
        if status.st_nlink > 1:
            if not self._linked:
                os.mkdir(self._links, 0o700)
                self._linked = True
            os.link(title, first, src_dir_fd=copy.fd, follow_symlinks=False)

    def _createFile(self, source: int, status: os.stat_result, copy: Walk, title: bytes) -> None:
        """A new file with the contents of an open one."""
        mode = 0o555 if status.st_mode & stat.S_IXUSR else 0o444
        target = os.open(title, _CREATE_FLAGS, mode, dir_fd=copy.fd)
        try:
            if status.st_size <= SMALL_FILE:
                _writeAll(target, os.read(source, SMALL_FILE), 0)
            else:
                # Holes are looked for.
                self._copyData(source, target, status.st_size)
            # Not left to the mode that it was created with: the umask took its share of that.
            os.fchmod(target, mode)
            os.utime(target, ns=self._times)
        finally:
            os.close(target)

    def _copyData(self, source: int, target: int, size: int) -> None:
        """Copy what is no hole. A file that shrinks meanwhile has holes from there on."""
        offset = 0
        with suppress(_NoMoreData):
            while offset < size:
                offset, end = _nextData(source, offset)
                while offset < min(end, size):
                    self._proceed()
                    offset += _copyPiece(source, target, offset, min(end, size) - offset)
        os.ftruncate(target, size)


class _NoMoreData(Exception):
    """There is nothing but a hole up to the end of the file."""


def _nextData(source: int, offset: int) -> tuple[int, int]:
    """
    @return: from where to where the next data are, at C{offset} or later.
    """
    try:
        start = os.lseek(source, offset, os.SEEK_DATA)
        return start, os.lseek(source, start, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise _NoMoreData from None
        raise


def _copyPiece(source: int, target: int, offset: int, size: int) -> int:
    """
    Copy from file to file at the same offset.

    @return: how many bytes, one at least.
    """
    copied = 0
    try:
        copied = os.copy_file_range(source, target, min(size, _PIECE), offset, offset)
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
    if not copied:
        data = os.pread(source, min(size, _PIECE), offset)
        if not data:
            raise _NoMoreData
        _writeAll(target, data, offset)
        copied = len(data)
    return copied


def _writeAll(target: int, data: bytes, offset: int) -> None:
    """Write all of C{data} at C{offset}."""
    written = 0
    while written < len(data):
        written += os.pwrite(target, memoryview(data)[written:], offset + written)

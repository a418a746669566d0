"""
Walking over trees on disk that somebody hostile may have made, and be changing: names are resolved one at a time,
relative to the descriptor of the directory that contains them, and symbolic links are never followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Self

from nixserve.errors import StoreError
from nixserve.store.fileerrors import fileSystemErrors, refused, shortened

__all__ = ["MAX_OPEN", "Walk", "chmodNode", "lstatNode", "unsupported"]

MAX_OPEN = 12
"""Descriptors of directories that one walk holds at most, besides the first: deeper trees are rare, and each session
may have a walk. Further down, going up costs two more calls of the system."""

_PARENT_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NODE_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Walk:
    """
    The way from the directory that contains a tree down to the current directory.

    Only the last few directories on it are open. Going back up to one that is not uses C{..} and checks where that
    led, in case somebody moves directories about.

    As a context manager it turns an C{OSError} within the block into a L{StoreError} that names the file.

    @ivar base: the name of the tree in the directory that contains it, where the walk starts.
    @ivar fd: descriptor of the current directory.
    @ivar name: of what is being worked on in the current directory; empty if that is the directory. For errors.
    @ivar pathSize: bytes of its path.
    """

    __slots__ = ("_doing", "_fds", "_ids", "_lowest", "_names", "base", "fd", "name", "pathSize")

    def __init__(self, path: str, doing: str) -> None:
        """
        @param doing: what is done to the tree, as a verb.
        @raise StoreError: the directory that contains the tree cannot be opened.
        """
        parent, base = os.path.split(os.fsencode(path).rstrip(b"/"))
        self.base = self.name = base
        self._doing = doing
        with fileSystemErrors(f"cannot {doing} '{shortened(path)}'"):
            self.fd = os.open(parent or (b"." if base else b"/"), _PARENT_FLAGS)
        # For each directory on the way its name, its descriptor or -1, and if -1 its device and inode. The first one
        # is always open; among the others those from _lowest on are.
        self._names = [parent]
        self.pathSize = len(parent)
        self._fds = [self.fd]
        self._ids: list[tuple[int, int] | None] = [None]
        self._lowest = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close()
        if isinstance(error, OSError):
            raise refused(f"cannot {self._doing} '{shortened(self.path(self.name))}'", error) from error

    def close(self) -> None:
        """Close all descriptors. Safe to call twice."""
        while self._fds:
            fd = self._fds.pop()
            if fd >= 0:
                os.close(fd)

    def path(self, name: bytes | str = b"") -> str:
        """The path of C{name} in the current directory, for a message."""
        return os.fsdecode(b"/".join([*self._names, os.fsencode(name)] if name else self._names))

    def enter(self, name: bytes) -> None:
        """Go down into a directory."""
        fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=self.fd)
        self._names.append(name)
        self.pathSize += 1 + len(name)
        self._fds.append(fd)
        self._ids.append(None)
        self.fd = fd
        if len(self._fds) - self._lowest >= MAX_OPEN:
            self._ids[self._lowest] = _identity(self._fds[self._lowest])
            os.close(self._fds[self._lowest])
            self._fds[self._lowest] = -1
            self._lowest += 1
        self.name = b""

    def leave(self) -> bytes:
        """
        Go back up.

        @return: the name of the directory left.
        """
        if self._fds[-2] < 0:
            parent = os.open(b"..", _DIRECTORY_FLAGS, dir_fd=self.fd)
            self._fds[-2] = parent
            self._lowest -= 1
            if _identity(parent) != self._ids[-2]:
                raise StoreError(f"directory '{self.path()}' was moved away while it was being read or written")
        os.close(self._fds.pop())
        self._ids.pop()
        self.fd = self._fds[-1]
        name = self.name = self._names.pop()
        self.pathSize -= 1 + len(name)
        return name

    def nodes(self) -> Iterator[tuple[bytes, bool]]:
        """
        All that is in the tree. Whoever wants to know what is in a directory calls L{enter} when it comes; when
        everything in it has come, it has been left, and comes once more.

        @return: for each its name in the current directory, and whether that is a directory that has been left.
        """
        levels: list[list[bytes | str]] = [[self.base]]
        while levels:
            if levels[-1]:
                self.name = os.fsencode(levels[-1].pop())
                yield self.name, False
                if len(self._fds) > len(levels):
                    levels.append([*os.listdir(self.fd)])
            else:
                levels.pop()
                if levels:
                    yield self.leave(), True


def _identity(fd: int) -> tuple[int, int]:
    """What tells a file from any other: device and inode."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def lstatNode(name: bytes | str, dirFd: int) -> os.stat_result:
    """The status of C{name} itself in a directory."""
    return os.stat(name, dir_fd=dirFd, follow_symlinks=False)


def unsupported(path: str) -> StoreError:
    """The error that tells of a socket, FIFO or device."""
    return StoreError(
        f"file '{path}' has an unsupported type: a store holds only files, directories and symbolic links"
    )


def chmodNode(name: bytes | str, dirFd: int, mode: int) -> None:
    """Set the mode of C{name} even if it cannot be opened; a symbolic link there is an error, not followed."""
    fd = os.open(name, _NODE_FLAGS, dir_fd=dirFd)
    try:
        # fchmod(2) refuses such a descriptor; through /proc it names exactly the file that was opened.
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)

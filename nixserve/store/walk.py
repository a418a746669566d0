"""
Walking over trees on disk that somebody hostile may have made, and be changing: names are resolved one at a time,
relative to the descriptor of the directory that contains them, and symbolic links are never followed.
"""

from __future__ import annotations

import os
from typing import Self

from nixserve.errors import StoreError

__all__ = ["MAX_OPEN", "Walk", "chmodNode", "failure", "lstatNode", "unsupported"]

MAX_OPEN = 12
"""Descriptors of directories that one walk holds at most, besides the first: deeper trees are rare, and each session
may have a walk. Further down, going up costs two more calls of the system."""

_PARENT_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Characters of each end of a long path that a message shows.
_SHOWN = 200
_NODE_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Walk:
    """
    The way from the directory that contains a tree down to the current directory.

    Only the last few directories on it are open. Going back up to one that is not uses C{..} and checks where that
    led, in case somebody moves directories about.

    @ivar base: the name of the tree in the directory that contains it, where the walk starts.
    @ivar fd: descriptor of the current directory.
    @ivar pathSize: bytes of its path.
    """

    __slots__ = ("_fds", "_ids", "_lowest", "_names", "base", "fd", "pathSize")

    def __init__(self, path: str) -> None:
        parent, base = os.path.split(os.fsencode(path).rstrip(b"/"))
        self.base = base
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

    def __exit__(self, *excInfo: object) -> None:
        self.close()

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
        name = self._names.pop()
        self.pathSize -= 1 + len(name)
        return name


def _identity(fd: int) -> tuple[int, int]:
    """What tells a file from any other: device and inode."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def lstatNode(name: bytes | str, dirFd: int) -> os.stat_result:
    """The status of C{name} itself in a directory."""
    return os.stat(name, dir_fd=dirFd, follow_symlinks=False)


def failure(doing: str, path: str, error: OSError) -> StoreError:
    """The error that tells of C{error}; of a path that would fill the screen, beginning and end."""
    if len(path) > 2 * _SHOWN:
        path = f"{path[:_SHOWN]}[...]{path[-_SHOWN:]}"
    return StoreError(f"cannot {doing} '{path}': {error.strerror}")


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

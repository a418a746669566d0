"""
Locks on store paths: whoever makes an object holds the lock of its path.

This is shared ground: the lock is C{flock(2)} on the file C{<physical path>.lock} beside the object, just as in
Nix 2.8, src/libstore/pathlocks.cc. Three rules of Nix's matter to every other program on the store:

  1. A lock file that is not empty is I{stale}: its name has been removed, and a new file may already stand in
     its place. Whoever gets the C{flock} on such a file must start over.
  2. After success the holder removes the name first, then writes one byte, then closes. In the other order a
     non-empty file could be left behind under the name, on which every version of Nix spins for ever.
  3. After failure the holder only closes: the half-made object stays for the next one, who takes the same file.

Order of locks: the temporary root of the path comes first, for a collector deletes lock files of paths without
one, held or not; never take a path lock while holding C{gc.lock}; several paths are locked in sorted order, or in
any order by whoever never waits for one while holding another.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection
from typing import Final

from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.store.opening import fileSystemErrors

__all__ = ["LOCK_SUFFIX", "PathLocks"]

LOCK_SUFFIX: Final = ".lock"

#: What is written into a removed lock file. Nix writes "d" as well, but looks at the size alone.
_STALE_TOKEN: Final = b"d"

#: How often to start over for files that others removed meanwhile. Each time somebody else finished with the
#: path, so more in one call means a crowd; let others run first.
_MAX_TRIES: Final = 16


class PathLocks:
    """
    The locks of one or more store paths, held from construction until L{unlock} or L{abandon}.

    Locks belong to open files: two of these in one process exclude each other like two processes. May be
    released from any thread.
    """

    def __init__(self, realPaths: Collection[str]) -> None:
        """
        Take all of the locks, or none.

        @param realPaths: physical paths of objects. Their temporary roots must be recorded already.
        @raise Busy: somebody holds one of them.
        @raise StoreError: the file system refuses.
        """
        self._held: list[tuple[int, str]] = []
        try:
            for path in sorted(set(realPaths)):
                self._held.append((_lock(path), path + LOCK_SUFFIX))
        except BaseException:
            self.abandon()
            raise

    def unlock(self) -> None:
        """
        Release after success: the lock files vanish. Safe to call twice.
        """
        while self._held:
            fd, lockPath = self._held.pop()
            try:
                # Failure to remove leaves an empty file, which the next one takes over: no byte then.
                with contextlib.suppress(OSError):
                    os.unlink(lockPath)
                    os.write(fd, _STALE_TOKEN)
            finally:
                os.close(fd)

    def abandon(self) -> None:
        """
        Release after failure: the lock files stay, empty, beside what was left half-made. Safe to call twice.
        """
        while self._held:
            os.close(self._held.pop()[0])


def _lock(realPath: str) -> int:
    """
    @return: a file descriptor that holds the lock of one path.
    """
    lockPath = realPath + LOCK_SUFFIX
    for _ in range(_MAX_TRIES):
        with fileSystemErrors(f"cannot open lock file '{lockPath}'"):
            fd = os.open(lockPath, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if _isOurs(fd, lockPath):
                return fd
        except BlockingIOError:
            os.close(fd)
            break
        except OSError as error:
            os.close(fd)
            raise StoreError(f"cannot lock '{lockPath}': {error.strerror}") from error
        os.close(fd)
    raise Busy(f"the lock on '{realPath}'")


def _isOurs(fd: int, lockPath: str) -> bool:
    """
    Try to lock the open file.

    @return: whether the lock counts; if not, start over with what is under the name then.
    @raise BlockingIOError: somebody else holds it.
    """
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    opened = os.fstat(fd)
    # Without a name it is stale as well: its remover may have had no room on the disk for the byte.
    if opened.st_size == 0 and opened.st_nlink:
        return True
    _removeLeftBehind(opened, lockPath)
    return False


def _removeLeftBehind(opened: os.stat_result, lockPath: str) -> None:
    """
    Remove a lock file that is not empty and yet still under its name, where nobody would ever get past it.

    Somebody wrote the byte before removing the name, or a program that is no store put something there. This is
    safe: only a holder of this very file may remove its name, and its C{flock} is ours; nobody who gets it after us
    takes it for a lock, since it is not empty. A collector removes names without asking, but not this one: the
    path has our temporary root.
    """
    with contextlib.suppress(FileNotFoundError):
        named = os.lstat(lockPath)
        if (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino):
            os.unlink(lockPath)

"""
Locks on store paths: whoever makes an object holds the lock of its path.

This is shared ground: the lock is C{flock(2)} on the file C{<physical path>.lock} beside the object, just as in
Nix 2.8, src/libstore/pathlocks.cc. Three rules of Nix's matter to every other program on the store:

  1. A lock file that is not empty is I{stale}: its name has been removed, and a new file may already stand in
     its place. Whoever gets the C{flock} on such a file must start over.
  2. After success the holder removes the name first, then writes one byte, then closes. In the other order a
     non-empty file could be left behind under the name, on which every version of Nix spins for ever.
  3. After failure the holder only closes: the half-made object stays for the next one, who takes the same file.

C{H-Cargo.lock} is the lock file of C{H-Cargo}, and the name of an object that somebody may add. Nix does not tell the
two apart; here they exclude each other:

  - A lock file is an empty file that its owner may write to, with one name, which belongs to us, to root or to the
    owner of the store directory. No object is that: its files have mode 0444 or 0555. Anything else in the place of a
    lock file is neither opened for writing nor removed, and the path cannot be locked.
  - Who adds an object called C{….lock} takes the lock whose file that would be, before the place is vacated
    (L{vacate}), and does not replace what comes to lie there later (L{moveInto}, and C{O_EXCL} where objects are
    restored).
  - Who gives a lock back looks whether the file is one still.

Order of locks: the temporary root of the path comes first, for a collector deletes lock files of paths without
one, held or not; never take a path lock while holding C{gc.lock}; several paths are locked in sorted order, or in
any order by whoever never waits for one while holding another.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Collection
from typing import Final

from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.store.fileerrors import fileSystemErrors, refused
from nixserve.store.files import deletePath

__all__ = ["LOCK_SUFFIX", "NoLockFile", "PathLocks", "moveInto", "vacate"]

LOCK_SUFFIX: Final = ".lock"

#: What is written into a removed lock file. Nix writes "d" as well, but looks at the size alone.
_STALE_TOKEN: Final = b"d"

#: How often to start over for files that others removed meanwhile. Each time somebody else finished with the
#: path, so more in one call means a crowd; let others run first.
_MAX_TRIES: Final = 16

#: Bytes in the name of a file.
_MAX_NAME: Final = 255

_EXECUTABLE: Final = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH

_OPEN_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW

#: How Nix calls the root directory of a build's sandbox, behind the name of the derivation.
_SANDBOX_SUFFIX: Final = ".drv.chroot"


class NoLockFile(StoreError):
    """
    Something else lies where the lock file of a path would be: an object, or what is left of one.

    @ivar lockPath: the physical path of the lock file.
    """

    def __init__(self, lockPath: str) -> None:
        self.lockPath = lockPath
        super().__init__(
            f"cannot lock '{lockPath.removesuffix(LOCK_SUFFIX)}': '{lockPath}' is no lock file; if it is no valid path "
            "either, a garbage collection removes it"
        )


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
        @raise NoLockFile: something else lies where a lock file would be.
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
                # Failure to remove leaves an empty file, which the next one takes over: no byte then. If others have
                # removed the name, or made an object of the file, what bears the name now is not ours.
                with contextlib.suppress(OSError):
                    status = os.fstat(fd)
                    if status.st_nlink == 1 and _hasMode(status):
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


def vacate(realPath: str) -> None:
    """
    Remove what lies where an object is to be made. It is nobody's, since the caller holds the lock of the path, and the
    path is not valid; unless it has its name from another path, whose lock file or sandbox it is.

    @param realPath: the physical path of the object.
    @raise Busy: it is a lock file that somebody holds; call again.
    @raise StoreError: it is the sandbox of a build of real Nix, or the file system refuses.
    """
    try:
        status = os.lstat(realPath)
    except FileNotFoundError:
        return
    except OSError as error:
        raise refused(f"cannot remove '{realPath}'", error) from error
    if realPath.endswith(LOCK_SUFFIX) and _isLockFile(status, realPath):
        PathLocks([realPath.removesuffix(LOCK_SUFFIX)]).unlock()
    elif realPath.endswith(_SANDBOX_SUFFIX) and stat.S_ISDIR(status.st_mode) and not status.st_mode & stat.S_IXOTH:
        # No object in the making is closed to others. Nix locks the outputs of its build, but not this.
        raise StoreError(
            f"cannot add '{realPath}': there is the sandbox of a build; if none runs, a garbage collection removes it"
        )
    else:
        deletePath(realPath)


def moveInto(source: str, realPath: str) -> None:
    """
    Give an object that is complete its name, after L{vacate}.

    @param source: on the same file system. If it is a directory elsewhere than in the store directory, its owner must
        be able to write to it.
    @raise OSError: the file system refuses.
    """
    if realPath.endswith(LOCK_SUFFIX) and not stat.S_ISDIR(os.lstat(source).st_mode):
        # A lock file may lie there since: unlike rename(2), link(2) replaces nothing.
        os.link(source, realPath, follow_symlinks=False)
        os.unlink(source)
    else:
        os.rename(source, realPath)


def _lock(realPath: str) -> int:
    """
    @return: a file descriptor that holds the lock of one path.
    """
    lockPath = realPath + LOCK_SUFFIX
    size = len(os.path.basename(os.fsencode(lockPath)))
    if size > _MAX_NAME:
        raise StoreError(
            f"cannot lock '{realPath}': the name of its lock file would have {size} bytes, over {_MAX_NAME}"
        )
    for _ in range(_MAX_TRIES):
        fd = _open(lockPath)
        if fd < 0:
            continue
        try:
            if _isOurs(fd, lockPath):
                return fd
        except BlockingIOError:
            os.close(fd)
            break
        except OSError as error:
            os.close(fd)
            raise refused(f"cannot lock '{lockPath}'", error) from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise Busy(f"the lock on '{realPath}'")


def _open(lockPath: str) -> int:
    """
    Make a lock file, or open the one that is there.

    @return: its file descriptor; -1 if it was removed meanwhile.
    @raise NoLockFile: there is something else.
    @raise StoreError: the file system refuses.
    """
    with fileSystemErrors(f"cannot open lock file '{lockPath}'"):
        try:
            return os.open(lockPath, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        with contextlib.suppress(FileNotFoundError):
            _requireLockFile(os.lstat(lockPath), lockPath)
            return os.open(lockPath, _OPEN_FLAGS)
    return -1


def _isOurs(fd: int, lockPath: str) -> bool:
    """
    Try to lock the open file.

    @return: whether the lock counts; if not, start over with what is under the name then.
    @raise BlockingIOError: somebody else holds it.
    @raise NoLockFile: it is none.
    """
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    opened = os.fstat(fd)
    # Without a name it is stale as well: its remover may have had no room on the disk for the byte.
    if not opened.st_nlink:
        return False
    _requireLockFile(opened, lockPath)
    if not opened.st_size:
        return True
    _removeLeftBehind(opened, lockPath)
    return False


def _requireLockFile(status: os.stat_result, lockPath: str) -> None:
    """
    @raise NoLockFile: this is none.
    """
    if not _isLockFile(status, lockPath):
        raise NoLockFile(lockPath)


def _isLockFile(status: os.stat_result, lockPath: str) -> bool:
    """
    @return: whether this can be a lock file, perhaps a stale one, and cannot be an object.
    """
    return (
        stat.S_ISREG(status.st_mode)
        and _hasMode(status)
        and status.st_nlink == 1
        and status.st_size <= len(_STALE_TOKEN)
        and (status.st_uid in (os.geteuid(), 0) or status.st_uid == os.stat(os.path.dirname(lockPath)).st_uid)
    )


def _hasMode(status: os.stat_result) -> bool:
    """Whether it has a mode as lock files have, 0600 from us and from Nix, and no object in canonical form."""
    return stat.S_IMODE(status.st_mode) & (stat.S_IWUSR | _EXECUTABLE) == stat.S_IWUSR


def _removeLeftBehind(opened: os.stat_result, lockPath: str) -> None:
    """
    Remove a lock file that is not empty and yet still under its name, where nobody would ever get past it.

    Somebody wrote the byte before removing the name. This is safe: only a holder of this very file may remove its name,
    and its C{flock} is ours; nobody who gets it after us takes it for a lock, since it is not empty. A collector
    removes names without asking, but not this one: the path has our temporary root.
    """
    with contextlib.suppress(FileNotFoundError):
        named = os.lstat(lockPath)
        if (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino):
            os.unlink(lockPath)

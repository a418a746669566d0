"""
Makes a store's directories, and whatever else must be so before its database can be opened.

This is shared ground: the directories, their modes and the file C{reserved} are as Nix makes them on each open
(Nix 2.8, src/libstore/local-store.cc, constructor; profiles.cc for C{per-user}).
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import stat

from nixserve.errors import StoreError
from nixserve.store.fileerrors import fileSystemErrors
from nixserve.store.layout import StoreLayout

__all__ = ["BUILD_USERS_GROUP", "RESERVED_SIZE", "prepareDirectories"]

#: The group of build users, as Nix's setting build-users-group names it by default.
BUILD_USERS_GROUP = "nixbld"

#: Bytes of the file C{reserved}; Nix's default for gc-reserved-space.
RESERVED_SIZE = 8 * 1024 * 1024

#: Build users may create outputs in a shared store directory, but not remove each other's.
_SHARED_STORE_MODE = 0o1775


def prepareDirectories(layout: StoreLayout, reservedSize: int = RESERVED_SIZE) -> None:
    """
    Make what is missing, check what is there. A store opened read-only is only checked.

    @param reservedSize: bytes to keep for a collector on a full disk.
    @raise StoreError: something is in the way, or the store is reached through a symbolic link.
    """
    if not layout.readOnly:
        _makeDirectories(layout)
        _shareStoreDir(layout)
        # The reserve only helps a later collection; a store without it works.
        with contextlib.suppress(OSError):
            _makeReserve(layout.reservedPath, reservedSize)
    if not layout.allowSymlinkedStore:
        _refuseSymlinks(layout.realStoreDir)


def _makeDirectories(layout: StoreLayout) -> None:
    with fileSystemErrors(f"cannot create the directories of the store in '{layout.stateDir}'"):
        for path in (layout.realStoreDir, layout.linksDir, layout.stateDir, layout.profilesDir):
            os.makedirs(path, exist_ok=True)
        os.makedirs(layout.tempRootsDir, exist_ok=True)
        os.makedirs(layout.dbDir, exist_ok=True)
        if not os.path.isdir(layout.gcRootsDir):
            os.makedirs(layout.gcRootsDir, exist_ok=True)
            # Nix up to 2.26 makes this link with the directory; its absence is harmless, for profiles are
            # searched for roots anyway.
            with contextlib.suppress(FileExistsError):
                os.symlink(layout.profilesDir, f"{layout.gcRootsDir}/profiles")
        for path in (f"{layout.profilesDir}/per-user", f"{layout.gcRootsDir}/per-user"):
            if not os.path.isdir(path):
                os.makedirs(path, exist_ok=True)
                os.chmod(path, 0o755)


def _shareStoreDir(layout: StoreLayout) -> None:
    """
    Give the store directory to root and the build users, as Nix does for a chroot store too.

    Only root can, and only where the group exists. In a container that lacks the group's number nothing is
    lost but builds under users of their own.
    """
    if os.geteuid() != 0:
        return
    try:
        group = grp.getgrnam(BUILD_USERS_GROUP).gr_gid
    except KeyError:
        return
    with fileSystemErrors(f"cannot change the owner of '{layout.realStoreDir}'"):
        found = os.stat(layout.realStoreDir)
        if (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, group, _SHARED_STORE_MODE):
            return
        try:
            os.chown(layout.realStoreDir, 0, group)
            os.chmod(layout.realStoreDir, _SHARED_STORE_MODE)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):
                raise


def _makeReserve(path: str, size: int) -> None:
    try:
        if os.lstat(path).st_size == size:
            return
    except FileNotFoundError:
        pass
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _refuseSymlinks(realStoreDir: str) -> None:
    """A symbolic link on the way could be turned to another place while the store is open."""
    path = realStoreDir
    with fileSystemErrors(f"cannot examine the store directory '{realStoreDir}'"):
        while path != "/":
            if stat.S_ISLNK(os.lstat(path).st_mode):
                raise StoreError(
                    f"the path '{path}' is a symlink; this is not allowed for the Nix store and its parent directories"
                )
            path = os.path.dirname(path)

"""
What survives a crash of the machine, as Nix's settings of the same names have it.

Source: Nix 2.8, src/libstore/local-store.cc (openDB, registerValidPaths), which syncs the database when the process
that wrote to it ends, and files of store objects not at all unless it is told; C{fsync-store-paths} is from Nix 2.26
(C{recursiveSync} and C{syncParent} in src/libutil/file-system.cc).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass

from nixserve.store.fileerrors import fileSystemErrors
from nixserve.store.walk import Walk, lstatNode

__all__ = ["Durability"]

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Durability:
    """
    What is written out to the disk, and when.

    @ivar fsyncMetadata: the database, at the latest when the session that changed it ends (C{fsync-metadata}).
    @ivar fsyncStorePaths: the files and directories of each object, before it is registered (C{fsync-store-paths}).
    @ivar syncBeforeRegistering: everything, with C{sync(2)}, before objects are registered
        (C{sync-before-registering}).
    """

    fsyncMetadata: bool = True
    fsyncStorePaths: bool = False
    syncBeforeRegistering: bool = False

    def beforeRegistering(self, realPaths: Collection[str]) -> None:
        """
        Write out objects that are complete and under their own names, all in one directory. Blocks on the disk.

        @param realPaths: where they are.
        @raise nixserve.errors.StoreError: the file system refuses.
        """
        if self.fsyncStorePaths and realPaths:
            for path in realPaths:
                _syncTree(path)
            # The names of the objects, once for all.
            directory = os.path.dirname(next(iter(realPaths)))
            with fileSystemErrors(f"cannot sync '{directory}'"):
                _sync(directory, _FLAGS)
        if self.syncBeforeRegistering and realPaths:
            os.sync()


def _syncTree(path: str) -> None:
    """Write out a tree: what is in a directory before the directory."""
    with Walk(path, "sync") as walk:
        for name, left in walk.nodes():
            mode = lstatNode(name, walk.fd).st_mode
            if stat.S_ISDIR(mode) and not left:
                walk.enter(name)
            elif left or stat.S_ISREG(mode):
                # A symbolic link is written out with its directory.
                _sync(name, _FLAGS | os.O_NOFOLLOW, walk.fd)


def _sync(path: bytes | str, flags: int, dirFd: int | None = None) -> None:
    fd = os.open(path, flags, dir_fd=dirFd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

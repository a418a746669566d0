"""
What one build holds while it runs: a user, a directory to work in, and the root of its sandbox.

Directories are those of Nix: C{nix-build-<name>.drv-<n>}, closed to all others; in a sandbox a directory C{build} in
it is what the builder sees, as in Nix from 2.26 on. The caller's alone is what lies around it, so that nobody gets at
files of the builder with whatever mode it gives them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from nixserve.builder.sandbox import BUILD_DIR, Sandbox
from nixserve.builder.users import BuildUser
from nixserve.errors import StoreError
from nixserve.store.fileerrors import fileSystemErrors
from nixserve.store.files import deletePath
from nixserve.store.layout import StoreLayout
from nixserve.store.ownpaths import makeOwnDirectory

__all__ = ["Workspace", "makeBuildDir"]

#: The group of builders without a sandbox where the system has no group C{nixbld}: the first of the ids that
#: L{BuildUser} takes, and nobody else.
_OWN_GROUP = 872415232

_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Workspace:
    """
    Make it with L{makeBuildDir}; L{remove} it when nothing of the build runs any more.

    @ivar outer: the directory that was made, C{inner} the one for the builder; outside of a sandbox the same.
    @ivar user: whom C{inner} belongs to.
    @ivar sandbox: C{None} if there is none.
    """

    outer: str
    inner: str
    user: BuildUser
    sandbox: Sandbox | None = field(default=None)

    @property
    def buildTop(self) -> str:
        """C{inner} as the builder sees it."""
        return BUILD_DIR if self.sandbox is not None else self.inner

    def writeFiles(self, files: Mapping[str, bytes]) -> None:
        """
        Put files into the directory, as the builder's own.

        @param files: contents by name.
        @raise StoreError: the file system refuses.
        """
        for name, data in files.items():
            path = f"{self.inner}/{name}"
            with fileSystemErrors(f"cannot write '{path}'"), open(os.open(path, _CREATE_FLAGS, 0o600), "wb") as stream:
                stream.write(data)
                os.fchmod(stream.fileno(), 0o644)
                os.fchown(stream.fileno(), self.user.uid, self.user.gid)

    def keep(self) -> None:
        """Leave the directory to people who want to know what went wrong, and let them look."""
        for path in {self.outer, self.inner}:
            with contextlib.suppress(OSError):
                os.chmod(path, 0o755)

    def remove(self, keepDirectory: bool = False) -> None:
        """
        Remove the root of the sandbox, and the directory unless it is to be kept. What cannot be removed stays, and
        is in nobody's way: names are not used twice.
        """
        if self.sandbox is not None:
            with contextlib.suppress(StoreError):
                self.sandbox.remove()
        if not keepDirectory:
            with contextlib.suppress(StoreError):
                deletePath(self.outer)


def makeBuildDir(layout: StoreLayout, parent: str, name: str, user: BuildUser, sandboxed: bool) -> Workspace:
    """
    Make the directories of a build.

    @param parent: where; made if it is missing.
    @param name: of the derivation.
    @param user: whose the build is. Without a sandbox its group becomes one that may create outputs in the store.
    @raise StoreError: the file system refuses.
    """
    with fileSystemErrors(f"cannot create a build directory in '{parent}'"):
        makeOwnDirectory(parent, 0o755, shared=True)
        outer = _makeNumbered(f"{parent}/nix-build-{name}.drv-")
        try:
            if sandboxed:
                inner = f"{outer}/build"
                os.mkdir(inner, 0o700)
            else:
                inner = outer
                user = _withStoreGroup(layout, user)
            os.chown(inner, user.uid, user.gid)
        except BaseException:
            deletePath(outer)
            raise
    return Workspace(outer, inner, user)


def _makeNumbered(prefix: str) -> str:
    for number in itertools.count():
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{prefix}{number}", 0o700)
            return f"{prefix}{number}"
    raise AssertionError("numbers do not end")


def _withStoreGroup(layout: StoreLayout, user: BuildUser) -> BuildUser:
    """
    The same user in the group that may write to the store directory. If there is no such group, one is given the
    right, as happens on opening the store where the group C{nixbld} exists (L{nixserve.store.opening}).
    """
    if not user.own:
        return user
    status = os.stat(layout.realStoreDir)
    if status.st_mode & stat.S_IWGRP and status.st_gid != 0:
        return dataclasses.replace(user, gid=status.st_gid)
    os.chown(layout.realStoreDir, -1, _OWN_GROUP)
    os.chmod(layout.realStoreDir, 0o1775)
    return dataclasses.replace(user, gid=_OWN_GROUP)

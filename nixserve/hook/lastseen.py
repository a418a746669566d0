"""
When machines were last seen at work by any of a user's build hooks.

The state directory has one empty file for each machine, whose time of change says it. Blocking for a system call; safe
from any thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from nixserve.hook.machines import Machine
from nixserve.store.fileerrors import fileSystemErrors
from nixserve.store.ownpaths import makeOwnDirectory

__all__ = ["LastSeen"]


class LastSeen:
    """
    When each machine was last seen at work: one file for each, in one directory.
    """

    def __init__(self, directory: str, clock: Callable[[], float]) -> None:
        """
        @param directory: for the files; made when it is needed.
        @param clock: seconds since the epoch.
        """
        self._directory = directory
        self._clock = clock

    def worked(self, machine: Machine) -> None:
        """
        It works now.

        @raise StoreError: the file system refuses.
        """
        path = self._path(machine)
        with fileSystemErrors(f"cannot write '{path}'"):
            makeOwnDirectory(self._directory)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                now = self._clock()
                os.utime(fd, (now, now))
            finally:
                os.close(fd)

    def isSince(self, machine: Machine, moment: float) -> bool:
        """
        Has it worked since C{moment}? A time to come counts for nothing: the clock was set back.
        """
        try:
            return moment <= os.lstat(self._path(machine)).st_mtime <= self._clock()
        except OSError:
            return False

    def _path(self, machine: Machine) -> str:
        return f"{self._directory}/{machine.fileName('.seen')}"

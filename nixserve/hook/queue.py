"""
Builds that were accepted while all slots were busy: a short queue, shared by a user's build hooks.

The state directory has a file for each place; whoever holds its C{flock(2)} has the place, so it is free again when the
process ends. Nothing says who is first: whoever finds a free slot takes it. Blocking for a few system calls.
"""

from __future__ import annotations

import fcntl
import os

from nixserve.store.opening import fileSystemErrors

__all__ = ["MAX_WAITING", "Queue", "Ticket"]

MAX_WAITING = 16
"""Builds that wait at a time: each is a process. Nix asks again every 5 seconds, so this many slots may become free
meanwhile before one stays idle."""


class Ticket:
    """A place, until L{leave} or the end of the process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def leave(self) -> None:
        """Leave the queue. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Queue:
    """
    The places.
    """

    def __init__(self, directory: str) -> None:
        """
        @param directory: for the files; made when it is needed.
        """
        self._directory = directory

    def take(self, slots: int) -> Ticket | None:
        """
        @param slots: how many there are that could be waited for: no more builds wait than that.
        @return: C{None} if all places are taken.
        @raise StoreError: the file system refuses.
        """
        with fileSystemErrors(f"cannot use the directory '{self._directory}'"):
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            for number in range(min(slots, MAX_WAITING)):
                path = f"{self._directory}/{number}"
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return Ticket(fd)
                except BlockingIOError:
                    os.close(fd)
        return None

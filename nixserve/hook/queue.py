"""
Builds that were accepted while all slots were busy: a queue, shared by a user's build hooks.

Whoever waits for the same machines, for slots of the same store, stands in one line. The state directory has files for
the places in each line and its turn, and for the places of all lines; whoever holds the C{flock(2)} of a file has the
place, or the turn, so it is free again when the process ends. Only who has the turn looks for a slot. A build that is
only being asked about looks as well, and may be before all of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence

from nixserve.hook.machines import Machine
from nixserve.store.fileerrors import fileSystemErrors
from nixserve.store.ownpaths import makeOwnDirectory

__all__ = ["MAX_WAITING", "MAX_WAITING_IN_ALL", "WAITING_PER_SLOT", "Queue", "Ticket"]

WAITING_PER_SLOT = 8
"""Builds that wait for each slot at most. A Nix that was told to wait asks again only every 5 seconds, whatever ends
meanwhile: so a slot stays idle if its builds take less than 5/8 seconds."""

MAX_WAITING = 32
"""Builds that wait in one line."""

MAX_WAITING_IN_ALL = 128
"""Builds that wait at a time. Each is two processes, of some 8 MiB together."""


class Ticket:
    """A place, until L{leave} or the end of the process."""

    def __init__(self, places: Sequence[int], turn: str) -> None:
        """
        @param places: the descriptors of their files.
        @param turn: the path of the turn's file.
        """
        self._fds = list(places)
        self._turn = turn

    def waitForTurn(self) -> None:
        """
        Wait until nobody is before this. Then the turn is held. Blocks for however long that takes.

        @raise StoreError: the file system refuses.
        """
        with fileSystemErrors(f"cannot use the file '{self._turn}'"):
            self._fds.append(_open(self._turn))
            fcntl.flock(self._fds[-1], fcntl.LOCK_EX)

    def leave(self) -> None:
        """Leave the queue. Safe to call twice."""
        while self._fds:
            os.close(self._fds.pop())


class Queue:
    """
    The places in all lines.
    """

    def __init__(self, directory: str, stateDir: str) -> None:
        """
        @param directory: for the files; made when it is needed.
        @param stateDir: the state directory of Nix's store, which has slots of its own for each machine.
        """
        self._directory = directory
        self._stateDir = stateDir

    def take(self, machines: Sequence[Machine]) -> Ticket | None:
        """
        @param machines: those that are waited for, one as good as the other.
        @return: C{None} if all places are taken.
        @raise StoreError: the file system refuses.
        """
        waitedFor = "\0".join([self._stateDir, *sorted(machine.uri for machine in machines)])
        line = f"{self._directory}/{hashlib.sha256(os.fsencode(waitedFor)).hexdigest()[:16]}"
        slots = sum(machine.maxJobs for machine in machines)
        with fileSystemErrors(f"cannot use the directory '{self._directory}'"):
            makeOwnDirectory(self._directory)
            place = _takeOne(f"{line}-", min(slots * WAITING_PER_SLOT, MAX_WAITING))
            if place is None:
                return None
            ofAll = _takeOne(f"{self._directory}/all-", MAX_WAITING_IN_ALL)
            if ofAll is None:
                os.close(place)
                return None
        return Ticket([place, ofAll], f"{line}-turn")


def _takeOne(prefix: str, count: int) -> int | None:
    """
    @return: the descriptor of the first of so many files whose lock was free.
    """
    for number in range(count):
        fd = _open(f"{prefix}{number}")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            os.close(fd)
    return None


def _open(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

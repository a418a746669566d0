"""
Slots of machines: how many builds this machine's Nix has on each, counted with locks on files.

This is shared ground with Nix's own build hook (Nix 2.8 to 2.36, src/build-remote/build-remote.cc), which may run
beside ours: in C{current-load/} of the state directory, whoever holds the C{flock(2)} of C{<machine>-<n>} has the
machine's slot C{n}, and whoever chooses holds that of C{main-lock}. The files are empty and stay; those of slots have
the time of their last use.

Blocking, safe from any thread: locks belong to open files, so threads exclude each other like processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

from nixserve.hook.choice import preference
from nixserve.hook.machines import Machine
from nixserve.store.api import Busy
from nixserve.store.fileerrors import fileSystemErrors

__all__ = ["Slot", "Slots"]

_RETRY_SECONDS = 0.01
"""Who chooses needs a millisecond for a hundred slots."""


class Slot:
    """
    One build on a machine, from L{Slots.take} to L{release} or the end of the process, however it ends.

    @ivar machine: on which the build is, or may be.
    @ivar load: how many other builds were there when it was taken.
    """

    def __init__(self, machine: Machine, fd: int, load: int) -> None:
        self.machine = machine
        self.load = load
        self._fd = fd

    def release(self) -> None:
        """The slot is free again. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Slots:
    """
    The slots of all machines.
    """

    def __init__(self, stateDir: str) -> None:
        """
        @param stateDir: the state directory of Nix's store; C{current-load} in it is made when it is needed.
        """
        self._directory = f"{stateDir}/current-load"

    def take(self, machines: Iterable[Machine], wait: bool = False) -> Slot | None:
        """
        Take a slot on the best of these machines.

        @param machines: those that are suitable, in the order of their file.
        @param wait: wait for others who are choosing.
        @return: C{None} if all slots are busy.
        @raise Busy: others are choosing, and C{wait} is false.
        @raise StoreError: the file system refuses.
        """
        with self._choosing(wait):
            best: Slot | None = None
            try:
                for machine in machines:
                    slot, load = self._try(machine)
                    if slot is None:
                        continue
                    if best is None or preference(machine, load) < preference(best.machine, best.load):
                        best, slot = slot, best
                    if slot is not None:
                        slot.release()
            except BaseException:
                if best is not None:
                    best.release()
                raise
            if best is not None:
                # Nobody reads the time but people.
                with contextlib.suppress(OSError):
                    os.utime(best._fd)
            return best

    def load(self, machine: Machine, wait: bool = False) -> int:
        """
        How many slots of a machine are busy.

        @param wait: as for L{take}.
        @raise Busy: as for L{take}.
        """
        with self._choosing(wait):
            slot, load = self._try(machine)
            if slot is not None:
                slot.release()
            return load

    @contextlib.contextmanager
    def _choosing(self, wait: bool) -> Iterator[None]:
        """Nobody else takes a slot meanwhile."""
        with fileSystemErrors(f"cannot make the directory '{self._directory}'"):
            os.makedirs(self._directory, exist_ok=True)
        fd = self._open("main-lock")
        try:
            if not _lock(fd, wait):
                raise Busy(f"the choice of another build hook ('{self._directory}/main-lock')", _RETRY_SECONDS)
            yield
        finally:
            os.close(fd)

    def _try(self, machine: Machine) -> tuple[Slot | None, int]:
        """
        Try all slots of a machine.

        @return: the first that is free, and how many are busy.
        """
        free: int | None = None
        load = 0
        try:
            for number in range(machine.maxJobs):
                fd = self._open(machine.fileName(f"-{number}"))
                if not _lock(fd, wait=False):
                    load += 1
                elif free is None:
                    free = fd
                    continue
                os.close(fd)
        except BaseException:
            if free is not None:
                os.close(free)
            raise
        return (None if free is None else Slot(machine, free, load)), load

    def _open(self, name: str) -> int:
        path = f"{self._directory}/{name}"
        with fileSystemErrors(f"cannot open the lock file '{path}'"):
            # Where the directory is open to others, a link of theirs would have us make files, and lock some, anywhere.
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock(fd: int, wait: bool) -> bool:
    """
    @return: whether the lock is ours now.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""
Machines that are put aside after a failure, and tried again later; all build hooks of a user know about them.

The state directory has per machine one file with what is known of its failures, written anew as a whole, and one file
whose C{flock(2)} is held by who tries the machine again, so that the right to try ends with the process. A machine
without failures has neither. Nothing here is Nix's: the original forgets a failure with its process, and each
derivation waits for the dead machine again.

Blocking for as long as a small file takes; safe from any thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Self

from nixserve.hook.machines import Machine
from nixserve.store.fileerrors import fileSystemErrors
from nixserve.store.ownpaths import makeOwnDirectory

__all__ = ["FIRST_PAUSE", "FORGOTTEN_AFTER", "LONGEST_PAUSE", "Aside", "Attempt", "MachineFailure"]

FIRST_PAUSE = 10.0
"""Seconds until a machine is tried again after the first failure: about what a reboot of sshd needs."""

LONGEST_PAUSE = 600.0
"""Seconds that a machine is put aside at most: the pause doubles with each failure."""

FORGOTTEN_AFTER = 3600.0
"""Seconds since the pause ended, after which a failure says nothing any more about the next."""

_MAX_TOLD = 64
"""Runs that are remembered to have heard of a failure: more do not go on at once."""

_MAX_SIZE = 64 * 1024
"""Bytes of a file that are read; ours are a few hundred."""


@dataclass(frozen=True, slots=True)
class MachineFailure:
    """
    What is known of a machine that failed.

    @ivar uri: of the machine.
    @ivar reason: of the last failure, one line.
    @ivar count: of failures without a success between them.
    @ivar failedAt: when the last was, in seconds since the epoch.
    @ivar until: when the machine may be tried again, likewise.
    @ivar told: the runs whose user has heard of this reason.
    """

    uri: str
    reason: str
    count: int
    failedAt: float
    until: float
    told: tuple[str, ...] = ()

    def isPausing(self, now: float) -> bool:
        """Is the machine to be left alone now? Not if the clock was set back since: the pause might never end."""
        return self.failedAt <= now < self.until


class Attempt:
    """
    The right to try a machine. It ends with one of the methods, with the block, or with the process.

    @ivar machine: the one that is to be tried.
    @ivar failure: why it was put aside before, or C{None}. While there is one, nobody else tries the machine.
    """

    def __init__(self, aside: Aside, machine: Machine, failure: MachineFailure | None, fd: int) -> None:
        self.machine = machine
        self.failure = failure
        self._aside = aside
        self._fd = fd

    def succeeded(self) -> None:
        """The machine works: all is forgotten."""
        if self.failure is not None:
            self._aside._forget(self.machine)
        self.leave()

    def failed(self, reason: str) -> MachineFailure:
        """
        The machine does not work: it is put aside, for longer than before. Failures of attempts that went on at
        the same time count as one.

        @param reason: for the user, without line breaks.
        """
        try:
            return self._aside._record(self.machine, reason, self.failure)
        finally:
            self.leave()

    def leave(self) -> None:
        """Nothing was tried, or it ended already. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.leave()


class Aside:
    """
    All machines that are put aside.
    """

    def __init__(self, directory: str, run: str, clock: Callable[[], float]) -> None:
        """
        @param directory: for the files; made when it is needed.
        @param run: what stands for the user's command that this hook process works for, together with others: a
            reason is told once in each run.
        @param clock: seconds since the epoch.
        """
        self._directory = directory
        self._run = run
        self._clock = clock

    def attempt(self, machine: Machine, early: bool = False) -> Attempt | None:
        """
        Ask to try a machine.

        @param early: do not wait for the end of the pause, as when there is no other machine.
        @return: C{None} if it is put aside, or somebody else is trying whether it works again.
        @raise StoreError: the file system refuses.
        """
        failure = self.failure(machine)
        if failure is None:
            return Attempt(self, machine, None, -1)
        if failure.isPausing(self._clock()) and not early:
            return None
        fd = self._open(machine, ".trying")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        with contextlib.ExitStack() as unlessTaken:
            unlessTaken.callback(os.close, fd)
            # Who tried before us may have ended a moment ago.
            latest = self.failure(machine)
            if latest is not None and latest.failedAt != failure.failedAt and latest.isPausing(self._clock()):
                return None
            unlessTaken.pop_all()
        return Attempt(self, machine, latest, fd)

    def failure(self, machine: Machine) -> MachineFailure | None:
        """
        What is known of a machine's failures; C{None} if there are none, or they are long past.

        @raise StoreError: the file system refuses.
        """
        failure = _parse(self._read(machine))
        now = self._clock()
        if failure is None or failure.uri != machine.uri or now >= failure.until + FORGOTTEN_AFTER:
            return None
        return failure

    def news(self, machine: Machine) -> MachineFailure | None:
        """
        What the user is to be told about a machine that is put aside: once in each run, and again when the reason is
        another.

        @return: C{None} if there is nothing, or it was told already.
        @raise StoreError: the file system refuses.
        """
        failure = self.failure(machine)
        if failure is None or self._run in failure.told:
            return None
        with self._writing():
            failure = self.failure(machine)
            if failure is None or self._run in failure.told:
                return None
            self._write(machine, replace(failure, told=(*failure.told, self._run)[-_MAX_TOLD:]))
        return failure

    def _record(self, machine: Machine, reason: str, before: MachineFailure | None) -> MachineFailure:
        """
        A machine failed.

        @param before: what was known when it was tried.
        """
        with self._writing():
            known = self.failure(machine)
            now = self._clock()
            count = known.count if known is not None else 1
            # Otherwise somebody else has counted this one.
            if known is not None and before is not None and known.failedAt == before.failedAt:
                count += 1
            # No further doubling than makes a difference.
            pause = min(FIRST_PAUSE * 2 ** min(count - 1, 16), LONGEST_PAUSE)
            told = known.told if known is not None and known.reason == reason else ()
            failure = MachineFailure(machine.uri, reason, count, now, now + pause, told)
            self._write(machine, failure)
        return failure

    def _forget(self, machine: Machine) -> None:
        with (
            self._writing(),
            fileSystemErrors(f"cannot remove '{self._path(machine, '.json')}'"),
            contextlib.suppress(FileNotFoundError),
        ):
            os.unlink(self._path(machine, ".json"))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Nobody else changes a file meanwhile. Held for a moment only, so others wait for it."""
        fd = self._openPath(f"{self._directory}/lock")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _read(self, machine: Machine) -> bytes:
        path = self._path(machine, ".json")
        with fileSystemErrors(f"cannot read '{path}'"):
            try:
                with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as stream:
                    return stream.read(_MAX_SIZE)
            except FileNotFoundError:
                return b""

    def _write(self, machine: Machine, failure: MachineFailure) -> None:
        """Replace the file. Within L{_writing}, so nobody else has the temporary one; after a crash of this computer
        all is long past, so nothing is synced."""
        path = self._path(machine, ".json")
        with fileSystemErrors(f"cannot write '{path}'"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with open(os.open(f"{path}.new", flags, 0o600), "w", encoding="ascii") as stream:
                json.dump(asdict(failure), stream)
            os.rename(f"{path}.new", path)

    def _path(self, machine: Machine, suffix: str) -> str:
        return f"{self._directory}/{machine.fileName(suffix)}"

    def _open(self, machine: Machine, suffix: str) -> int:
        return self._openPath(self._path(machine, suffix))

    def _openPath(self, path: str) -> int:
        with fileSystemErrors(f"cannot open the lock file '{path}'"):
            makeOwnDirectory(self._directory)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _parse(data: bytes) -> MachineFailure | None:
    """What a file says. One that says nothing of the kind is as none: it is written anew after the next failure."""
    try:
        fields = json.loads(data)
        failure = MachineFailure(**fields | {"told": tuple(map(str, fields["told"]))})
        # Raises if a number is none.
        isSane = failure.count > 0 and failure.failedAt <= failure.until <= failure.failedAt + LONGEST_PAUSE
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return failure if isSane and isinstance(failure.reason, str) else None

"""
The uid of a builder on the host.

As root, every running build has a uid that nobody else has, so that builds can neither touch nor signal each other,
the owner of an output tells who made it, and all processes of a build can be killed by their uid. The uids come from
the range that Nix's C{auto-allocate-uids} takes them from, with Nix's own locks, so that a Nix on the same machine and
state directory takes another one (Nix 2.34, src/libstore/user-lock.cc:AutoUserLock): slots of 65,536 ids from
872415232, each with a lock file C{STATE/userpool2/slot-N} under an exclusive C{flock}. The lock files stay. That keeps
apart the builds of one store only; since a build begins and ends with killing everybody under its uid, the slots are
locked in C{/run} as well, for all stores that this program serves on the machine.

Everybody else builds as themselves.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field

from nixserve.builder.spawn import killProcesses
from nixserve.store.api import Busy
from nixserve.store.fileerrors import refused
from nixserve.store.ownpaths import makeOwnDirectory

__all__ = ["BuildUser"]

# Nix's settings start-id and id-count, and AutoUserLock's maxIdsPerBuild.
_START_ID = 872415232
_ID_COUNT = 8388608
_SLOT_SIZE = 65536
_SLOTS = _ID_COUNT // _SLOT_SIZE
# For root alone: who may open these files can keep builds waiting.
_MACHINE_POOL = "/run/nixserve/userpool2"
# Builds take minutes: the rhythm of Nix's build-poll-interval would be 5 s.
_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class BuildUser:
    """
    Who a builder is on the host. Release it when nothing of the build runs any more.

    @ivar uid: the user; C{gid}: the group.
    @ivar own: nobody else runs under this uid.
    """

    uid: int
    gid: int
    own: bool
    _locks: tuple[int, ...] = field(default=(), repr=False)

    @classmethod
    def acquire(cls, stateDir: str) -> BuildUser:
        """
        Take a free uid if this process may, otherwise its own.

        @param stateDir: the state directory of the store, which a Nix beside us uses too.
        @raise Busy: all are in use.
        @raise StoreError: the lock files cannot be made.
        """
        if os.geteuid() != 0 or not _ownsRange():
            return cls(os.geteuid(), os.getegid(), False)
        pools = (os.path.join(stateDir, "userpool2"), _MACHINE_POOL)
        try:
            for pool in pools:
                makeOwnDirectory(pool, 0o755)
            for slot in range(_SLOTS):
                if locks := _lockAll([os.path.join(pool, f"slot-{slot}") for pool in pools]):
                    uid = _START_ID + slot * _SLOT_SIZE
                    return cls(uid, uid, True, locks)
        except OSError as error:
            raise refused(f"cannot lock a build user: '{error.filename}'", error) from error
        raise Busy("a free build user ID", _RETRY_SECONDS)

    def killAll(self) -> None:
        """
        Kill all processes of this user, if it is nobody else's. Blocks for some milliseconds.

        @raise nixserve.errors.BuildError: that cannot be done.
        """
        if self.own:
            killProcesses(self.uid)

    def release(self) -> None:
        """Let others have the uid. Safe to call twice."""
        locks, self._locks = self._locks, ()
        for lock in locks:
            os.close(lock)


def _lockAll(paths: list[str]) -> tuple[int, ...]:
    """
    Try to lock files, all or none.

    @return: their descriptors, none if somebody else holds one of them.
    """
    locks: list[int] = []
    try:
        for path in paths:
            locks.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        for lock in locks:
            os.close(lock)
        if isinstance(error, BlockingIOError):
            return ()
        raise
    return tuple(locks)


def _ownsRange() -> bool:
    """
    Are the ids of the range ids of this user namespace? In an unprivileged container they are not, and its root
    could not become them.
    """
    return all(_isMapped(f"/proc/self/{name}") for name in ("uid_map", "gid_map"))


def _isMapped(path: str) -> bool:
    """Does one line of a map, C{inside outside count}, hold the whole range?"""
    with open(path) as file:
        lines = [tuple(map(int, line.split())) for line in file]
    return any(first <= _START_ID and first + count >= _START_ID + _ID_COUNT for first, _, count in lines)

"""
The descriptors of the process, given out before they are used.

A process that has none left fails wherever it happens to need the next one: in the middle of somebody's upload, at a
lock, in accepting a connection. So each session and each connection that has logged in is let in only if there are as
many left for it as it can ever need, and enough are kept for what all have in common: logins, workers, builds.

Nobody, as told apart by key, gets more than half of them.
"""

from __future__ import annotations

from collections import Counter

from nixserve.errors import PolicyError
from nixserve.store.adding import MAX_BATCH
from nixserve.store.walk import MAX_OPEN

__all__ = ["CONNECTION", "SESSION", "Descriptors"]

CONNECTION = 1
"""Of a connection: its socket."""

SESSION = MAX_OPEN + 12
"""
Of a session at most: a tree that is read or written, with the directory above and a file in it; two for temporary
roots, and as much for those of a build; a conversation with a collector; two locks; the socket or the pipes that it
comes by.
"""

_WORKER = MAX_BATCH + 8
"""Of a worker in the middle of a batch: a lock for each object, and the database."""

_BUILD = 128
"""Of a build that runs: its terminal, its log, locks of its outputs, pipes to its processes, a tree."""

_COMMON = 128
"""For the rest: what listens, what the reactor wakes up by, logs, those who are logging in."""


class Descriptors:
    """
    Of one process. For the reactor's thread.

    @ivar total: how many can be given out.
    """

    def __init__(self, limit: int = 1 << 30, workers: int = 0, builds: int = 0) -> None:
        """
        @param limit: how many the process may have; without one everybody is let in.
        @param workers: how many threads there are for short work.
        @param builds: how many builds may run.
        """
        # However few there are, a server serves somebody.
        self.total = max(limit - _COMMON - workers * _WORKER - builds * _BUILD, 4 * (SESSION + CONNECTION))
        self._taken: Counter[str] = Counter()

    @property
    def sessions(self) -> int:
        """How many sessions they are for."""
        return self.total // SESSION

    def take(self, name: str, count: int) -> None:
        """
        @param name: the key that wants them.
        @raise PolicyError: there are not so many left, or not for this one.
        """
        if self._taken[name] + count > self.total // 2:
            raise PolicyError("your key has as many connections and sessions as it may have here; end some of them")
        if self._taken.total() + count > self.total:
            raise PolicyError("this server has as many connections and sessions as it can have; try again later")
        self._taken[name] += count

    def giveBack(self, name: str, count: int) -> None:
        """What L{take} gave is free again."""
        self._taken[name] -= count
        if not self._taken[name]:
            del self._taken[name]

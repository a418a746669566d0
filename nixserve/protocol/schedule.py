"""
Which session copies which path next, when several work on one closure.

A path can be added only where everything that it refers to is valid. So a session may take a path when each of its
references has arrived, by whatever session, or was taken by the same session before: one session's paths arrive in the
order in which it takes them. With a single session that is the order in which they were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from twisted.internet.defer import Deferred, succeed

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath

__all__ = ["Schedule"]


class _Path:
    """
    A path to be copied.

    @ivar dependents: indexes of those that refer to it.
    @ivar untaken: how many of its references no session has taken yet.
    @ivar unarrived: how many have not arrived.
    @ivar lanes: the sessions that have taken its references.
    """

    __slots__ = ("dependents", "info", "lanes", "taken", "unarrived", "untaken")

    def __init__(self, info: ValidPathInfo) -> None:
        self.info = info
        self.dependents: list[int] = []
        self.untaken = 0
        self.unarrived = 0
        self.lanes: set[int] = set()
        self.taken = False


class Schedule:
    """
    What is left to be copied, and by whom it may be. Sessions are numbered; here they are called lanes.

    @ivar lanes: how many there are.
    """

    def __init__(self, infos: Sequence[ValidPathInfo], lanes: int) -> None:
        """
        @param infos: references before what refers to them. References to others are not waited for.
        """
        self.lanes = lanes
        self._paths = [_Path(info) for info in infos]
        self._indexes: dict[StorePath, int] = {info.path: index for index, info in enumerate(infos)}
        for index, path in enumerate(self._paths):
            for reference in path.info.references:
                other = self._indexes.get(reference, index)
                if other != index:
                    self._paths[other].dependents.append(index)
                    path.untaken += 1
                    path.unarrived += 1
        # Heaps of indexes: what anybody may take, and what only one lane may. An entry may be out of date.
        self._free = [index for index, path in enumerate(self._paths) if not path.unarrived]
        heapify(self._free)
        self._own: list[list[int]] = [[] for _ in range(lanes)]
        self._untaken = len(self._paths)
        self._waiting: list[Deferred[None]] = []

    def take(self, lane: int, maxPaths: int, maxBytes: int) -> list[ValidPathInfo]:
        """
        @param maxBytes: the sizes of all but the last of them together stay below this.
        @return: what C{lane} is to copy next, in this order. Empty if it has to wait, or if nothing is left.
        """
        taken: list[ValidPathInfo] = []
        size = 0
        while len(taken) < maxPaths and size < maxBytes:
            index = self._next(lane)
            if index is None:
                break
            path = self._paths[index]
            path.taken = True
            self._untaken -= 1
            taken.append(path.info)
            size += path.info.narSize
            for dependent in path.dependents:
                other = self._paths[dependent]
                other.untaken -= 1
                other.lanes.add(lane)
                if not other.untaken and other.lanes == {lane}:
                    heappush(self._own[lane], dependent)
        if not self._untaken:
            self._wake()
        return taken

    def arrived(self, info: ValidPathInfo) -> None:
        """Note that the receiving store has a path."""
        freed = False
        for dependent in self._paths[self._indexes[info.path]].dependents:
            other = self._paths[dependent]
            other.unarrived -= 1
            if not other.unarrived and not other.taken:
                heappush(self._free, dependent)
                freed = True
        if freed:
            self._wake()

    @property
    def exhausted(self) -> bool:
        """Whether every path has been taken by some session."""
        return not self._untaken

    def changed(self) -> Deferred[None]:
        """Fires when a lane that found nothing to take may find something, or when nothing is left."""
        if self.exhausted:
            return succeed(None)
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def _next(self, lane: int) -> int | None:
        own, free = self._own[lane], self._free
        for heap in (own, free):
            while heap and self._paths[heap[0]].taken:
                heappop(heap)
        if not own and not free:
            return None
        return heappop(own if own and (not free or own[0] < free[0]) else free)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            if not deferred.called:
                deferred.callback(None)

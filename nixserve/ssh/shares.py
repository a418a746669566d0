"""
How much of the reactor's thread those who are logged in get, one key beside the other.

A message of 32 bytes costs some 100 microseconds, whatever it says, and the reactor reads 64 KiB of each connection at
a time. So a key with a few dozen connections could keep everybody else waiting for seconds, without ever asking for
anything that a worker does. Here each key has a share of L{SHARE_SECONDS} in each turn of the reactor. Connections with
more to do wait for the next turn, in line, and are not read from; where nobody else wants anything it comes at once.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime

__all__ = ["SHARE_SECONDS", "Sharer", "Shares"]

# Half a MiB of an upload, or some twenty small messages.
SHARE_SECONDS = 0.002


class Sharer(Protocol):
    """
    A connection that is logged in.

    @ivar share: whose share its work is part of.
    """

    share: str

    def workOn(self) -> None:
        """Work off more of what has arrived; wait again if that is not all."""


class Shares:
    """
    How much of the reactor's time the keys of one port have used.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        # Seconds in this turn of the reactor, or in this and others with little to do, by key.
        self._used: dict[str, float] = {}
        self._lines: dict[str, deque[Sharer]] = {}
        self._turn: IDelayedCall | None = None

    def left(self, share: str) -> float:
        """For how many seconds somebody may still work in this turn."""
        return SHARE_SECONDS - self._used.get(share, 0.0)

    def spend(self, share: str, seconds: float) -> None:
        """
        So long somebody has worked.

        Up to half of a share counts for the turns that follow, too: to look for the end of each turn would cost as much
        as many a message does.
        """
        used = self._used[share] = self._used.get(share, 0.0) + seconds
        if used > SHARE_SECONDS / 2:
            self._expectTurn()

    def wait(self, sharer: Sharer) -> None:
        """There is more to do than the share lasts for: go on in the next turn. Once until it comes."""
        self._lines.setdefault(sharer.share, deque()).append(sharer)
        self._expectTurn()

    def _expectTurn(self) -> None:
        if self._turn is None:
            self._turn = self._clock.callLater(0, self._nextTurn)

    def _nextTurn(self) -> None:
        self._turn = None
        self._used.clear()
        for share, line in list(self._lines.items()):
            # Who waits again meanwhile is behind the others of his key.
            while line and self.left(share) > 0:
                line.popleft().workOn()
            if not line:
                del self._lines[share]
        if self._lines:
            self._expectTurn()

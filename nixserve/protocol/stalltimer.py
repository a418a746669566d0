"""
When a peer that does nothing is given up.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from twisted.internet.interfaces import IDelayedCall, IReactorTime

__all__ = ["StallTimer"]

LOOKS = 8
"""How often a L{StallTimer} looks within the time that it allows."""


class StallTimer:
    """
    Ends what makes no progress.

    Started when the peer has to do something, stopped when it need not; every sign of life is a C{touch}. All three
    happen many times a second, so they only note the time, and one delayed call comes round to look. What moves
    without anybody noticing, bytes on their way out of a buffer, it compares with its look before: it looks
    L{LOOKS} times in the time that is allowed, so that the end comes no later than one look after it.
    """

    def __init__(
        self, clock: IReactorTime, seconds: float, stalled: Callable[[], Any], moved: Callable[[], int] = lambda: 0
    ) -> None:
        """
        @param moved: how many bytes have gone out so far.
        """
        self._clock = clock
        self._seconds = seconds
        self._stalled = stalled
        self._moved = moved
        self._seen = 0
        self._last = 0.0
        self._running = False
        self._delay: IDelayedCall | None = None
        # One for all blocks: they come a thousand times a second.
        self._within = _Stopped(self)

    def start(self) -> None:
        """The peer has to act."""
        self.touch()
        self._running = True
        if self._delay is None:
            self._seen = self._moved()
            self._delay = self._clock.callLater(self._seconds / LOOKS, self._look)

    @property
    def stopped(self) -> AbstractContextManager[None]:
        """Within the block the peer need not act; behind it, it has to."""
        return self._within

    def touch(self) -> None:
        """The peer did something: its silence is counted from now on."""
        self._last = self._clock.seconds()

    def stop(self) -> None:
        """The peer need not act."""
        self._running = False

    def shorten(self, seconds: float) -> None:
        """From now on wait no longer than this."""
        self._seconds = seconds
        if self._delay is not None:
            self._delay.reset(seconds / LOOKS)

    def close(self) -> None:
        """End for good: nobody has to act any more."""
        self._running = False
        if self._delay is not None:
            self._delay.cancel()
            self._delay = None

    def _look(self) -> None:
        self._delay = None
        seen, self._seen = self._seen, self._moved()
        if seen != self._seen or not self._running:
            self.touch()
        left = self._last + self._seconds - self._clock.seconds()
        if left > 0:
            self._delay = self._clock.callLater(min(left, self._seconds / LOOKS), self._look)
        else:
            self._stalled()


class _Stopped(AbstractContextManager[None]):
    """Whose blocks a timer does not count."""

    def __init__(self, timer: StallTimer) -> None:
        self._timer = timer

    def __enter__(self) -> None:
        self._timer.stop()

    def __exit__(self, *excInfo: object) -> None:
        self._timer.start()

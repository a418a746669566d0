"""
Turns of the workers: whose call is next when there are more than threads.

Without them one peer with many sessions, each of which asks for something, would stand before everybody else. So calls
wait in a line for each client, the lines take turns, and no client is in more than some of the threads at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from nixserve.protocol.interfaces import IWorkers

__all__ = ["Turns"]


class Turns:
    """
    The lines before some workers.
    """

    def __init__(self, reactor: IReactorTime, run: Callable[[Callable[[], Any]], Deferred[Any]], atOnce: int) -> None:
        """
        @param reactor: see L{IWorkers}.
        @param run: calls a function in a thread.
        @param atOnce: how many calls run at once: the number of the threads.
        """
        self.reactor = reactor
        self._run = run
        self._atOnce = atOnce
        self._running = 0
        # Each line with calls that may begin, once.
        self._ready: deque[_Line] = deque()
        self._lines: WeakValueDictionary[tuple[str, int], _Line] = WeakValueDictionary()

    def of(self, client: str, atOnce: int) -> IWorkers:
        """See L{ISharedWorkers}. All who ask for the same client share a line."""
        line = self._lines.get((client, atOnce))
        if line is None:
            line = self._lines[client, atOnce] = _Line(self, atOnce)
        return line

    def join(self, line: _Line) -> None:
        """Put C{line} behind the others: it has calls that may begin."""
        self._ready.append(line)
        self._next()

    def _next(self) -> None:
        while self._ready and self._running < self._atOnce:
            line = self._ready.popleft()
            function, result = line.take()
            self._running += 1
            if line.mayBegin:
                self._ready.append(line)
            self._run(function).addBoth(self._ended, line).chainDeferred(result)

    def _ended(self, outcome: Any, line: _Line) -> Any:
        self._running -= 1
        if line.giveBack():
            self._ready.append(line)
        self._next()
        return outcome


@implementer(IWorkers)
class _Line:
    """The calls of one client, in the order in which they came."""

    def __init__(self, turns: Turns, atOnce: int) -> None:
        self._atOnce = atOnce
        self.reactor = turns.reactor
        self._turns = turns
        self._waiting: deque[tuple[Callable[[], Any], Deferred[Any]]] = deque()
        self._running = 0

    @property
    def mayBegin(self) -> bool:
        """Is there a call that may begin as soon as a thread is free?"""
        return bool(self._waiting) and self._running < self._atOnce

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        """See L{IWorkers}."""
        before = self.mayBegin
        result: Deferred[Any] = Deferred()
        self._waiting.append((partial(function, *args, **kwargs) if args or kwargs else function, result))
        if self.mayBegin and not before:
            self._turns.join(self)
        return result

    def take(self) -> tuple[Callable[[], Any], Deferred[Any]]:
        """The call that has waited longest begins."""
        self._running += 1
        return self._waiting.popleft()

    def giveBack(self) -> bool:
        """
        A call has ended.

        @return: whether there is one now that may begin, and was none.
        """
        before = self.mayBegin
        self._running -= 1
        return self.mayBegin and not before

"""
Workers without threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.protocol.interfaces import ISharedWorkers, IWorkers

__all__ = ["ImmediateWorkers", "ManualWorkers"]


@implementer(ISharedWorkers)
class ImmediateWorkers:
    """
    Workers that run everything at once, in the thread that asks.

    @ivar calls: how many that were.
    """

    def __init__(self, reactor: IReactorTime | None = None) -> None:
        """
        @param reactor: by whose clock waits for locks are counted; a L{Clock} if not given.
        """
        self.reactor: IReactorTime = Clock() if reactor is None else reactor
        self.calls = 0

    def of(self, client: str, atOnce: int) -> IWorkers:
        """See L{ISharedWorkers}."""
        return self

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        """See L{IWorkers}."""
        self.calls += 1
        return maybeDeferred(function, *args, **kwargs)


@implementer(ISharedWorkers)
class ManualWorkers:
    """
    Workers that run what the test says, when it says so: a call first runs, as in a thread, and then its result
    arrives.

    @ivar waiting: the calls that have not run, the oldest first.
    """

    def __init__(self) -> None:
        self.reactor = Clock()
        self.waiting: deque[tuple[Callable[[], Any], Deferred[Any]]] = deque()

    def of(self, client: str, atOnce: int) -> IWorkers:
        """See L{ISharedWorkers}."""
        return self

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        """See L{IWorkers}."""
        deferred: Deferred[Any] = Deferred()
        self.waiting.append((partial(function, *args, **kwargs), deferred))
        return deferred

    def run(self) -> Callable[[], None]:
        """
        Run the oldest call in its thread.

        @return: what makes its result arrive.
        """
        function, deferred = self.waiting.popleft()
        try:
            value = function()
        except Exception:
            failure = Failure()
            return lambda: deferred.errback(failure)
        return lambda: deferred.callback(value)

    def step(self) -> None:
        """Run the oldest call to its end."""
        self.run()()

    def drain(self) -> None:
        """Run everything, also what follows from it."""
        while self.waiting:
            self.step()

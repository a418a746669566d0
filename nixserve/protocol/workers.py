"""
The only door from the reactor to blocking code: a bounded pool of threads of our own.

A worker is held only while it has something to do. Code that would have to wait for somebody else's lock raises
L{nixserve.store.api.Busy} instead, and the waiting happens here, on the reactor's clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.threads import deferToThreadPool
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from nixserve.protocol.interfaces import ISharedWorkers, IWorkers
from nixserve.protocol.reactors import IThreadReactor
from nixserve.protocol.turns import Turns
from nixserve.store.api import Busy

__all__ = ["Door", "Workers", "whenFired"]

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_THREADS = 8
"""Enough to keep a few disks and all cores busy; no session ever keeps one for itself."""

MAX_RETRY = 1.0
"""Seconds between two tries for a lock at most. The pause grows with the time already waited, to half of it: many
who wait long must not keep the workers busy with trying."""

WAIT_NOTICE = 2.0
"""Seconds of waiting for one lock after which whoever waits is told about it."""


@implementer(ISharedWorkers)
class Workers:
    """
    The pool, whose clients take turns.

    @ivar reactor: whose thread results come back to, and whose clock waits are counted by.
    """

    def __init__(self, reactor: IThreadReactor, threads: int = DEFAULT_THREADS) -> None:
        self.reactor = reactor
        self._pool = ThreadPool(0, threads, "nixserve")
        self._turns = Turns(reactor, partial(deferToThreadPool, reactor, self._pool), threads)
        self._own = self._turns.of("", threads)

    def start(self) -> None:
        """Begin to work; what was called before waits until now."""
        self._pool.start()

    def stop(self) -> None:
        """Finish what is under way, then end the threads. Blocks: only for the end of the process."""
        self._pool.stop()

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """
        Run C{function} in a worker.

        Cancelling gives up on the result; the function itself runs to its end.
        """
        return self._own.call(function, *args, **kwargs)

    def of(self, client: str, atOnce: int) -> IWorkers:
        """See L{ISharedWorkers}."""
        return self._turns.of(client, atOnce)


class _Call:
    """One call on its way through a door."""

    __slots__ = ("delay", "done", "function", "result", "waited")

    def __init__(self, function: Callable[[], Any], result: Deferred[Any]) -> None:
        self.function = function
        self.result = result
        self.done = False
        self.waited = 0.0
        self.delay: IDelayedCall | None = None


class Door:
    """
    One session's way to the workers: one call at a time, in order, coming back where L{Busy} says so.
    """

    def __init__(self, workers: IWorkers, onWait: Callable[[str], None] = lambda what: None) -> None:
        """
        @param onWait: called with the text of what is waited for, once for each wait that takes long.
        """
        self._workers = workers
        self._onWait = onWait
        self._waiting: deque[_Call] = deque()
        self._current: _Call | None = None

    @property
    def working(self) -> bool:
        """Is a call running, or waiting for its next try?"""
        return self._current is not None

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """
        Run C{function} in a worker after everything that was called before; again as long as it raises
        L{Busy}.

        Cancelling ends the waiting at once. A function that already runs in its thread runs to its end, and
        the door stays shut until then.
        """
        result: Deferred[T] = Deferred(lambda _: self._cancel(call))
        call = _Call(partial(function, *args, **kwargs), result)
        self._waiting.append(call)
        self._next()
        return result

    def abandon(self) -> None:
        """
        Cancel every call. What is called from now on runs after the one, if any, that runs in a thread.
        """
        for call in (*self._waiting, self._current):
            if call is not None:
                call.result.cancel()

    def _next(self) -> None:
        while self._current is None and self._waiting:
            call = self._waiting.popleft()
            if not call.done:
                self._current = call
                self._attempt(call)

    def _attempt(self, call: _Call) -> None:
        call.delay = None
        attempt = self._workers.call(call.function)
        attempt.addCallbacks(self._succeeded, self._failed, callbackArgs=(call,), errbackArgs=(call,))

    def _succeeded(self, value: Any, call: _Call) -> None:
        self._current = None
        if not call.done:
            call.done = True
            call.result.callback(value)
        self._next()

    def _failed(self, failure: Failure, call: _Call) -> None:
        busy = failure.value
        if isinstance(busy, Busy) and not call.done:
            pause = _pause(call.waited, busy.retryAfter)
            if call.waited <= WAIT_NOTICE < call.waited + pause:
                self._onWait(busy.what)
            call.waited += pause
            call.delay = self._workers.reactor.callLater(pause, self._attempt, call)
            return
        self._current = None
        if not call.done:
            call.done = True
            call.result.errback(failure)
        self._next()

    def _cancel(self, call: _Call) -> None:
        call.done = True
        if call.delay is not None:
            call.delay.cancel()
            call.delay = None
            self._current = None
            self._next()


def _pause(waited: float, retryAfter: float) -> float:
    """
    Seconds until the next try.

    @param waited: how long already.
    @param retryAfter: what L{Busy} asks for at least.
    """
    return max(retryAfter, min(waited / 2, MAX_RETRY))


def whenFired(deferred: Deferred[None]) -> Deferred[None]:
    """
    Another Deferred that fires when one does that several wait for, and that may be cancelled without touching it.
    """
    other: Deferred[None] = Deferred()
    deferred.addCallback(lambda _: other.callback(None))
    return other

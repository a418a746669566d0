"""
Runs the reactor for a command: until what it has to do is done, or somebody interrupts it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, LogEvent, LogLevel, eventAsText, globalLogBeginner
from zope.interface import implementer

from nixserve.protocol.monotonic import useMonotonicTime
from nixserve.protocol.reactors import IServiceReactor

__all__ = ["runReactor"]

T = TypeVar("T")


def runReactor(main: Callable[[IServiceReactor], Coroutine[Deferred[Any], Any, T]]) -> T:
    """
    Run C{main} in the reactor, once in the life of the process. SIGINT and SIGTERM cancel it and wait until it has
    cleaned up behind itself.

    @param main: called with the reactor.
    @return: what it returns.
    @raise KeyboardInterrupt: a signal came before it was done.
    """
    runner = cast(IServiceReactor, reactor)
    useMonotonicTime(runner)
    lines = _Warnings()
    globalLogBeginner.beginLoggingTo([lines], redirectStandardIO=False, discardBuffer=True)
    results: list[T] = []
    errors: list[BaseException] = []
    ended: Deferred[None] = Deferred()

    def start() -> None:
        running = Deferred.fromCoroutine(main(runner))
        runner.addSystemEventTrigger("before", "shutdown", interrupt, running)
        running.addCallbacks(results.append, lambda failure: errors.append(failure.value))
        running.addBoth(lambda _: ended.callback(None))
        running.addBoth(lambda _: runner.stop() if runner.running else None)

    def interrupt(running: Deferred[Any]) -> Deferred[None]:
        if not ended.called:
            errors.append(KeyboardInterrupt())
            running.cancel()
        return ended

    # What has been loaded stays: neither to be looked through again, nor taken apart at the end, which takes 50 ms.
    gc.freeze()
    runner.callWhenRunning(start)
    runner.run()
    if errors:
        for line in lines.lines:
            errors[0].add_note(line)
        raise errors[0]
    return results[0]


@implementer(ILogObserver)
class _Warnings:
    """
    Keeps what the log says from warnings on; a command has no log, but if it fails this may be why.

    @ivar lines: what has been said.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, event: LogEvent) -> None:
        if event.get("log_level", LogLevel.info) >= LogLevel.warn:
            self.lines.append(eventAsText(event, includeTimestamp=False, includeSystem=False))

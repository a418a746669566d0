"""
Runs a command between the store here and another one: sessions on both, for as long as it lasts.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, TypeVar

from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IReactorTime

from nixserve.app.react import runReactor
from nixserve.codec.terminal import MAX_LINE, onOneLine, printable
from nixserve.errors import NixServeError
from nixserve.protocol.client import ServeClient
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.reactors import IServiceReactor
from nixserve.protocol.workers import Workers
from nixserve.remote.address import RemoteAddress
from nixserve.remote.several import connectSeveral
from nixserve.store.api import Store

__all__ = ["BothSides", "RemoteLines", "withBothSides"]

T = TypeVar("T")

HOLD_SECONDS: Final = 0.2
"""How long a line of the remote waits before it is shown. A remote that fails says why right before it goes, and then
the error says it."""

MAX_HELD: Final = 1000
"""Lines that wait: what says more than this in so short a time is no last word, and is shown at once."""


@dataclass(frozen=True, slots=True)
class BothSides:
    """
    Sessions, as many here as there; the first on either side has the roots of the command.

    @ivar lines: what the other side says on standard error.
    """

    here: list[DeferredSession]
    there: list[ServeClient]
    lines: RemoteLines


def withBothSides(
    store: Store,
    address: RemoteAddress,
    work: Callable[[BothSides], Awaitable[T]],
    *,
    show: Callable[[str], None],
    sessions: int = 1,
    write: bool = True,
    onWait: Callable[[str], None] = lambda what: None,
) -> T:
    """
    Run the reactor until C{work} is done.

    @param store: the store here.
    @param show: called with each line of the remote's standard error, with its prefix, in the reactor's thread.
    @param sessions: how many on either side.
    @param write: ask for the right to change the other store.
    @param onWait: called with what is waited for here, if it takes long.
    @return: what C{work} gives.
    @raise KeyboardInterrupt: a signal came first. Nothing is left running then.
    """

    async def main(reactor: IServiceReactor) -> T:
        workers = Workers(reactor)
        workers.start()
        lines = RemoteLines(reactor, show, f"{address.name}: ")
        try:
            async with AsyncExitStack() as stack:
                there = await stack.enter_async_context(
                    connectSeveral(reactor, address, sessions, environ=os.environ, write=write, onError=lines.feed)
                )
                here = [await DeferredSession.open(store, workers, onWait) for _ in range(sessions)]
                for session in here:
                    await stack.enter_async_context(session)
                with lines:
                    return await work(BothSides(here, there, lines))
        except NixServeError as e:
            lines.end(str(e))
            raise
        finally:
            lines.end()
            workers.stop()

    return runReactor(main)


class RemoteLines:
    """
    Makes whole lines of what comes cut anywhere, and shows them after a short while. As a context manager it ends with
    the block if that fails.

    @ivar prefix: put before each line that comes.
    """

    def __init__(self, reactor: IReactorTime, show: Callable[[str], None], prefix: str) -> None:
        """
        @param reactor: for its clock.
        @param show: called with each line, without its end.
        """
        self.prefix = prefix
        self._reactor = reactor
        self._show = show
        self._rest = b""
        self._held: list[tuple[str, str]] = []
        self._waiting = False
        self._ended = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the remote's standard error. Whole lines are shown a moment later."""
        if self._ended:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            lines, self._rest = [*lines, self._rest], b""
        if lines and not self._waiting:
            self._waiting = True
            self._reactor.callLater(HOLD_SECONDS, self._waited)
        self._held += [(self.prefix, line.decode("utf-8", "replace")) for line in lines]
        if len(self._held) > MAX_HELD:
            self._release()

    def end(self, error: str = "") -> None:
        """
        Show what is left, and nothing that comes from now on.

        @param error: what has gone wrong; what this says as well is not shown.
        """
        said = onOneLine(error)
        if self._rest:
            self.feed(b"\n")
        if said:
            self._held = [held for held in self._held if printable(held[1]).strip("@ ") not in said]
        self._release()
        self._ended = True

    def __enter__(self) -> RemoteLines:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # A session that is cut says that it was interrupted, as does one that has heard the same Ctrl-C as we.
        if isinstance(error, CancelledError):
            self._held.clear()
        if error is not None:
            self.end(str(error))

    def _waited(self) -> None:
        self._waiting = False
        self._release()

    def _release(self) -> None:
        held, self._held = self._held, []
        for prefix, line in held:
            self._show(prefix + line)

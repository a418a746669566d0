"""
What people see of a copy while it lasts: lines on standard error, and on a terminal a bar below them.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from nixserve.app.facts import Emit, emitNothing
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.terminal import printable
from nixserve.protocol.copying import CopyProgress

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["CopyReport", "Screen"]

REFRESH_SECONDS: Final = 0.1
"""Between two pictures of a bar."""

_FORMAT: Final = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}, {rate_fmt}]"


class Screen:
    """
    Standard error. Lines may come at any time; a bar, of which there is one at most, stays below them.

    @ivar isTerminal: somebody is watching. Otherwise there are no bars.
    """

    def __init__(self) -> None:
        self.isTerminal = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._drawn = 0.0
        # NARs move in threads.
        self._mutex = threading.Lock()

    def line(self, text: str) -> None:
        """Show a line on standard error, above the bar if there is one."""
        with self._mutex:
            if self._bar is None:
                click.echo(text, err=True)
            else:
                self._bar.write(text, file=sys.stderr)

    def foreignLine(self, text: str) -> None:
        """Show a line of another program, with nothing in it that the terminal would obey but colours."""
        self.line(printable(text, colours=self.isTerminal))

    def waitLine(self, what: str) -> None:
        """Tell who is watching what is waited for."""
        if self.isTerminal:
            self.line(f"waiting for {what}")

    def beginBar(self, what: str, narBytes: int) -> None:
        """Draw a bar, in place of another if there is one."""
        self.endBar()
        if not self.isTerminal:
            return
        # Takes as long to import as all of click.
        from tqdm import tqdm

        # Its default is a lock between processes, which takes long to make; and a thread that draws.
        tqdm.set_lock(threading.RLock())
        tqdm.monitor_interval = 0
        with self._mutex:
            self._bar = tqdm(
                total=narBytes,
                desc=what,
                file=sys.stderr,
                unit="B",
                unit_scale=True,
                leave=False,
                bar_format=_FORMAT,
                dynamic_ncols=True,
            )

    def moveBar(self, size: int, beside: str = "") -> None:
        """
        It is C{size} bytes further. In any thread.

        @param beside: what stands behind the bytes, if it is new.
        """
        with self._mutex:
            if self._bar is None:
                return
            self._bar.n += size
            if beside:
                self._bar.set_postfix_str(beside, refresh=False)
            now = time.monotonic()
            if now - self._drawn >= REFRESH_SECONDS:
                self._drawn = now
                self._bar.refresh()

    def endBar(self) -> None:
        """Remove it, if there is one."""
        with self._mutex:
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.close()


class CopyReport(CopyProgress):
    """
    Tells of a copy, and of several one after the other: as a bar and as facts.

    @ivar paths: how many have been copied.
    """

    def __init__(self, screen: Screen, what: str, emit: Emit = emitNothing, listPaths: bool = False) -> None:
        """
        @param what: stands before the bar.
        @param listPaths: also emit a fact for each path that will be copied.
        """
        self.paths = 0
        self._screen = screen
        self._what = what
        self._emit = emit
        self._listPaths = listPaths
        self._done = 0
        self._all = 0

    def planned(self, infos: Sequence[ValidPathInfo], present: int) -> None:
        """See L{CopyProgress}."""
        narBytes = sum(info.narSize for info in infos)
        self._emit({"event": "planned", "paths": len(infos), "narBytes": narBytes, "present": present})
        if self._listPaths:
            for info in infos:
                self._emit({"event": "missing", **_pathFacts(info)})
        elif infos:
            self._done, self._all = 0, len(infos)
            self._screen.beginBar(self._what, narBytes)
            self._screen.moveBar(0, self._counts())

    def moved(self, size: int) -> None:
        """See L{CopyProgress}."""
        self._screen.moveBar(size)

    def copied(self, info: ValidPathInfo) -> None:
        """See L{CopyProgress}."""
        self.paths += 1
        self._done += 1
        self._screen.moveBar(0, self._counts())
        self._emit({"event": "copied", **_pathFacts(info)})
        if self._done == self._all:
            self._screen.endBar()

    def _counts(self) -> str:
        return f"{self._done}/{self._all} path{'s' * (self._all != 1)}"


def _pathFacts(info: ValidPathInfo) -> dict[str, Any]:
    return {"path": info.path, "narSize": info.narSize}

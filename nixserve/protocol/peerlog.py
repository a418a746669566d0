"""
What goes to the log about a peer: nothing of its words but escaped and cut, and no more than a budget of bytes.

A peer decides how often something has to be said of it. So each line is paid for, out of a L{LogBudget} that fills up
again slowly; when it is spent one line says so, and the next one that is written says how many were not. Budgets stand
above each other: a connection's is part of its address's or its key's, and that of all who have not logged in is above
those of the addresses, since who has many connections or addresses must not write more than who has one.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

from twisted.logger import Logger, LogLevel, formatEvent
from twisted.python.failure import Failure

from nixserve.codec.text import shownText

__all__ = ["CONNECTION", "KEY", "SOURCE", "STRANGERS", "LogBudget", "LogBudgets", "PeerLog", "Rate"]

Rate = tuple[int, float]
"""Bytes at once, and bytes a second after that."""

# Some 25 lines; a session takes three. 100 bytes a second are 9 MB a day, for whom the operator can lock out.
CONNECTION: Rate = (6_000, 100.0)
KEY: Rate = (60_000, 500.0)
SOURCE: Rate = (30_000, 50.0)
# All who have no key: 17 MB a day.
STRANGERS: Rate = (300_000, 200.0)

# Of budgets by name; who is forgotten starts anew, under the budget above.
_MAX_KEPT = 1024
# Of a traceback: about 2 kB.
_MAX_FRAMES = 16
# Time, level and name of the logger, as twistd writes them in front of each line.
_OVERHEAD = 80


class LogBudget:
    """
    How many bytes may be logged about somebody.

    @ivar who: whom it is about, for the line that says that it is spent.
    @ivar above: of which this one is a part.
    @ivar missed: lines that were not written since the last one that was.
    """

    def __init__(
        self, who: str, rate: Rate, seconds: Callable[[], float] = time.monotonic, above: LogBudget | None = None
    ) -> None:
        """
        @param seconds: the time on a monotonic clock.
        """
        self.who = who
        self.above = above
        self.missed = 0
        self._most, self._perSecond = rate
        self._left = float(self._most)
        self._seconds = seconds
        self._then = seconds()

    def spentAt(self, size: int) -> LogBudget | None:
        """
        Pay for a line, here and in every budget above.

        @return: C{None}, or the budget that has not enough left: nothing is paid then.
        """
        chain = list(self._chain())
        for budget in chain:
            if budget._refilled() < size:
                return budget
        for budget in chain:
            budget._left -= size
        return None

    def takeMissed(self) -> int:
        """How many lines were not written, here and above, since this was last asked."""
        missed = sum(budget.missed for budget in self._chain())
        for budget in self._chain():
            budget.missed = 0
        return missed

    def _chain(self) -> Iterator[LogBudget]:
        budget: LogBudget | None = self
        while budget is not None:
            yield budget
            budget = budget.above

    def _refilled(self) -> float:
        now = self._seconds()
        self._left = min(float(self._most), self._left + max(0.0, now - self._then) * self._perSecond)
        self._then = now
        return self._left


class LogBudgets:
    """
    The budgets of an endpoint: one for each address, one for each key, made when they are first needed.
    """

    def __init__(self, seconds: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._strangers = LogBudget("those who have not logged in", STRANGERS, seconds)
        self._kept: OrderedDict[str, LogBudget] = OrderedDict()

    def connection(self, who: str, source: str) -> LogBudget:
        """That of a new connection from C{source}, which has not logged in."""
        return LogBudget(who, CONNECTION, self._seconds, self._named(source, SOURCE, self._strangers))

    def known(self, who: str) -> LogBudget:
        """That of everybody who logged in with a key, or as a local user."""
        return self._named(who, KEY, None)

    def _named(self, who: str, rate: Rate, above: LogBudget | None) -> LogBudget:
        budget = self._kept.get(who)
        if budget is None:
            budget = self._kept[who] = LogBudget(who, rate, self._seconds, above)
        self._kept.move_to_end(who)
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return budget


class PeerLog:
    """
    A logger for what concerns one peer. What fields an event has is made L{shownText}; only numbers stay what they are,
    and dataclasses such as L{nixserve.protocol.policy.Peer}, whose makers see to that themselves.
    """

    def __init__(self, logger: Logger, budget: LogBudget | None = None) -> None:
        """
        @param budget: without, every line is written.
        """
        self._logger = logger
        self.budget = budget

    def info(self, text: str, **facts: Any) -> None:
        """As L{Logger.info}."""
        self._write(LogLevel.info, text, facts)

    def warn(self, text: str, **facts: Any) -> None:
        """As L{Logger.warn}."""
        self._write(LogLevel.warn, text, facts)

    def failure(self, text: str, failure: Failure | None = None, **facts: Any) -> None:
        """As L{Logger.failure}; the words of the error, which may be the peer's, are shown as any others."""
        shown = _shownFailure(Failure() if failure is None else failure)
        self._write(LogLevel.critical, text, facts, shown)

    def close(self) -> None:
        """Nothing more will be written: say what was not."""
        own = self.budget
        if own is not None and own.missed:
            # A connection's: it is spent, so this one is paid for above.
            self.budget = own.above
            self.info("{count} lines about {who} were not written", count=own.missed, who=own.who)

    def _write(self, level: Any, text: str, facts: dict[str, Any], failure: Failure | None = None) -> None:
        event = {name: _shown(value) for name, value in facts.items()}
        traceback = ""
        if failure is not None:
            event["log_failure"], traceback = failure, failure.getTraceback()
        budget = self.budget
        if budget is None:
            self._logger.emit(level, text, **event)
            return
        size = len(formatEvent({**event, "log_format": text})) + len(traceback) + _OVERHEAD
        spent = budget.spentAt(size)
        if spent is None:
            if missed := budget.takeMissed():
                text, event["missed"] = text + " ({missed} lines before this one were not written)", missed
            self._logger.emit(level, text, **event)
            return
        if not spent.missed:
            self._logger.warn("there is too much to say about {who}: for now nothing more is written", who=spent.who)
        spent.missed += 1


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, int | float) or is_dataclass(value):
        return value
    return shownText(value if isinstance(value, str | bytes) else str(value))


class _ShownError(Exception):
    """Stands for an error in a log: its words, shown."""


def _shownFailure(failure: Failure) -> Failure:
    """The same failure, of the same type and with its innermost frames, but with no word of a peer's as it was."""
    shown = copy.copy(failure)
    shown.frames = failure.frames[-_MAX_FRAMES:]
    shown.value = _ShownError(shownText(failure.getErrorMessage()))
    return shown

"""
How much may be logged about whom. Free of Twisted.

A peer decides how often something has to be said of it. So each line is paid for, out of a budget that fills up again
slowly. Budgets stand above each other: a connection's is part of its address's or its key's, and that of all who have
not logged in is above those of the addresses, since who has many connections or addresses must not write more than who
has one.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

__all__ = ["CONNECTION", "KEY", "SOURCE", "STRANGERS", "LogBudget", "LogBudgets", "Rate"]

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

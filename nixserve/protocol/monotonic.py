"""
Time that nobody sets.

Twisted's reactors count by the wall clock (26.4, internet/base.py: C{ReactorBase.seconds}). Once that is set back by an
hour, by hand or by the first NTP packet of a machine without a battery, whatever is due comes an hour late: lock waits,
keepalives, limits on logins, stall timers.
"""

from __future__ import annotations

import time

from twisted.internet.interfaces import IDelayedCall, IReactorTime

__all__ = ["useMonotonicTime"]


def useMonotonicTime(reactor: IReactorTime) -> None:
    """
    Have a reactor count by the monotonic clock, as all processes do that are ours alone. What is due already stays due
    when it was. Safe to call twice.

    In somebody else's program this is for him to decide: whoever adds C{reactor.seconds()} to a date would be wrong.

    @param reactor: one of Twisted's own.
    """
    before = reactor.seconds
    if before is time.monotonic:
        return
    now = before()
    pending: list[tuple[IDelayedCall, float]] = [(call, call.getTime() - now) for call in reactor.getDelayedCalls()]
    reactor.seconds = time.monotonic  # type: ignore[method-assign]
    for call, left in pending:
        # Each has a clock of its own, from when it was made.
        call.seconds = time.monotonic  # type: ignore[attr-defined]
        call.reset(max(0.0, left))

"""
Connections that have not logged in: how many, for how long, and who is next.

A connection costs little as long as it says nothing, and a login costs some 20 ms of the reactor's thread. So:

  - What arrives before the login is worked off in turns, a piece of L{TURN_BYTES} at a time, one address after the
    other. Who has to wait for a turn is not read from. After each turn as much time as it took belongs to everybody
    else: strangers get half of the thread at most, and a burst of honest logins waits in line.
  - The clock of a login counts how long the client was waited for. It ticks on the reactor: a tick that comes late
    counts as one, and who stands in line is not counted. A server that is busy locks nobody out.
  - Nobody is turned away for coming last. Whoever comes when there are too many takes the place of who has kept us
    waiting longest: beyond L{MAX_PER_SOURCE} of one address that of its own, if it has been waited for at least for
    L{PATIENCE_SECONDS}; beyond L{MAX_LOGINS} that of the address that has most, even if all of its connections stand
    in line.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from typing import Protocol

from twisted.internet.interfaces import IDelayedCall, IReactorTime

__all__ = [
    "LOGIN_SECONDS",
    "MAX_LOGINS",
    "MAX_PER_SOURCE",
    "PATIENCE_SECONDS",
    "TICK_SECONDS",
    "TURN_BYTES",
    "Admission",
    "Newcomer",
    "sourceOf",
]

# How long a client may be waited for until it has logged in; sshd's LoginGraceTime is four times that.
LOGIN_SECONDS = 30
# A quarter of the descriptors that a process has by default.
MAX_LOGINS = 256
# More than one machine ever begins at once, with a hook for each of its builds.
MAX_PER_SOURCE = 128
# A client that is there answers within a round trip, unless it asks a person to touch a key.
PATIENCE_SECONDS = 5
TICK_SECONDS = 1
# The longest message of an honest login is its first, of 1.5 KiB. Of the shortest that are so many about 250.
TURN_BYTES = 4096
# After a turn that took longer (the reactor was held up by something else) the next one does not wait longer.
_MAX_PAUSE = 0.25


class Newcomer(Protocol):
    """
    A connection that has not logged in.

    @ivar source: where it comes from, as L{sourceOf} has it.
    """

    source: str

    def takeTurn(self) -> None:
        """Work off a piece of what has arrived; ask for another turn if there is more."""

    def turnAway(self, reason: str) -> None:
        """Say why, and disconnect. (It has left by then.)"""


def sourceOf(host: str) -> str:
    """
    Whom connections from an IP address count for: that address, or for IPv6 its network of 64 bits, which is what one
    customer gets. For sockets without an address, the empty string.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


class Admission:
    """
    The connections of one port that have not logged in.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        # For how many ticks each has been waited for, in the order in which they came.
        self._waitedFor: dict[Newcomer, int] = {}
        # By source.
        self._line: OrderedDict[str, deque[Newcomer]] = OrderedDict()
        self._standing: set[Newcomer] = set()
        self._turn: IDelayedCall | None = None
        self._notBefore = 0.0
        self._tick: IDelayedCall | None = None

    def __len__(self) -> int:
        return len(self._waitedFor)

    def __contains__(self, newcomer: object) -> bool:
        return newcomer in self._waitedFor

    # Coming and going

    def enter(self, newcomer: Newcomer) -> None:
        """Count a new connection; where there are too many now, one is turned away."""
        self._waitedFor[newcomer] = 0
        if self._tick is None:
            self._tick = self._clock.callLater(TICK_SECONDS, self._ticked)
        siblings = [other for other in self._waitedFor if other.source == newcomer.source]
        if len(siblings) > MAX_PER_SOURCE:
            slowest = self._slowest(siblings)
            if slowest is not None and self._waitedFor[slowest] * TICK_SECONDS >= PATIENCE_SECONDS:
                self._turnAway(slowest, "too many connections from its address have not logged in")
        if len(self._waitedFor) > MAX_LOGINS:
            self._turnAway(self._fromTheLargestCrowd(), "too many connections have not logged in")

    def leave(self, newcomer: Newcomer) -> None:
        """Somebody has logged in, or is gone."""
        self._waitedFor.pop(newcomer, None)
        self._standing.discard(newcomer)
        if not self._waitedFor and self._tick is not None:
            self._tick.cancel()
            self._tick = None

    def _turnAway(self, newcomer: Newcomer, reason: str) -> None:
        self.leave(newcomer)
        newcomer.turnAway(reason)

    def _fromTheLargestCrowd(self) -> Newcomer:
        """
        The slowest of the sources that have most, which may be who has just come; if all of these wait for us, who of
        them came last. Never one of another source: who keeps the whole line busy by himself shuts out nobody else.
        """
        counts = Counter(newcomer.source for newcomer in self._waitedFor)
        most = max(counts.values())
        crowd = [newcomer for newcomer in self._waitedFor if counts[newcomer.source] == most]
        return self._slowest(crowd) or crowd[-1]

    def _slowest(self, newcomers: Iterable[Newcomer]) -> Newcomer | None:
        """Who has been waited for longest, and of these who came first; not one that waits for us."""
        return max(
            (one for one in newcomers if one not in self._standing), key=self._waitedFor.__getitem__, default=None
        )

    # The clock of the logins

    def _ticked(self) -> None:
        self._tick = self._clock.callLater(TICK_SECONDS, self._ticked)
        for newcomer in [one for one in self._waitedFor if one not in self._standing]:
            self._waitedFor[newcomer] += 1
            if self._waitedFor[newcomer] * TICK_SECONDS >= LOGIN_SECONDS:
                self._turnAway(newcomer, f"the login took too long: more than {LOGIN_SECONDS} s")

    # The line

    def wantTurn(self, newcomer: Newcomer) -> None:
        """
        Let somebody take a turn when it is due: at once if nobody stands in line.
        """
        if newcomer in self._standing or newcomer not in self._waitedFor:
            return
        self._standing.add(newcomer)
        self._line.setdefault(newcomer.source, deque()).append(newcomer)
        if self._turn is None:
            self._nextTurn()

    def _nextTurn(self) -> None:
        """Give turns until it is everybody else's."""
        self._turn = None
        wait = self._notBefore - self._clock.seconds()
        if self._line and wait > 0:
            self._turn = self._clock.callLater(wait, self._nextTurn)
        elif (newcomer := self._takeNext()) is not None:
            begun = self._clock.seconds()
            # Whoever asks for a turn meanwhile stands in line.
            self._turn = self._clock.callLater(0, self._nextTurn)
            newcomer.takeTurn()
            now = self._clock.seconds()
            self._notBefore = now + min(now - begun, _MAX_PAUSE)

    def _takeNext(self) -> Newcomer | None:
        """The next one of the source whose turn it is."""
        while self._line:
            source, waiting = next(iter(self._line.items()))
            newcomer = waiting.popleft()
            if waiting:
                self._line.move_to_end(source)
            else:
                del self._line[source]
            if newcomer in self._standing:
                self._standing.discard(newcomer)
                return newcomer
        return None

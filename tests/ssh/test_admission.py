"""
Who is let to log in, and when.
"""

import pytest
from twisted.internet.task import Clock

from nixserve.ssh.admission import (
    LOGIN_SECONDS,
    MAX_LOGINS,
    MAX_PER_SOURCE,
    PATIENCE_SECONDS,
    TICK_SECONDS,
    Admission,
    sourceOf,
)


class Somebody:
    """Records its turns; each takes some time, and there may be more to do after it."""

    def __init__(self, admission, source="a", clock=None, takes=0.0, more=0, order=None):
        self.admission, self.source, self.clock = admission, source, clock
        self.takes, self.more = takes, more
        self.order = [] if order is None else order
        self.reason = None
        admission.enter(self)

    def takeTurn(self):
        self.order.append(self.source)
        if self.takes:
            self.clock.advanceTime(self.takes)
        if self.more:
            self.more -= 1
            self.admission.wantTurn(self)

    def turnAway(self, reason):
        self.reason = reason


class StoppableClock(Clock):
    """A clock that can also go on while the reactor is busy."""

    def advanceTime(self, seconds):
        self.rightNow += seconds


@pytest.fixture
def clock():
    return StoppableClock()


@pytest.fixture
def admission(clock):
    return Admission(clock)


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("/a/socket", ""),
    ],
)
def test_sources(host, source):
    """An address counts for itself, of IPv6 for its network of 64 bits."""
    assert sourceOf(host) == source


def test_firstTurnIsAtOnce(admission):
    """Who comes alone does not wait."""
    one = Somebody(admission)
    admission.wantTurn(one)
    assert one.order == ["a"]


def test_turnsGoRound(admission, clock):
    """One address after the other, however many connections each has."""
    order = []
    first = Somebody(admission, "busy", order=order)
    admission.wantTurn(first)
    for newcomer in [Somebody(admission, "busy", order=order) for _ in range(5)]:
        admission.wantTurn(newcomer)
    admission.wantTurn(Somebody(admission, "honest", order=order))
    clock.pump([0] * 10)
    assert order == ["busy", "busy", "honest", "busy", "busy", "busy", "busy"]


def test_halfOfTheTimeIsOthers(admission, clock):
    """After a turn as much time as it took passes before the next one."""
    one = Somebody(admission, clock=clock, takes=0.1, more=3)
    admission.wantTurn(one)
    assert len(one.order) == 1
    clock.pump([0, 0, 0.05])
    assert len(one.order) == 1
    clock.advance(0.06)
    assert len(one.order) == 2


def test_whoStandsInLineLosesNoTime(admission, clock):
    """The clock of a login does not run while the server has not got round to it."""
    one, other = Somebody(admission), Somebody(admission, "b")
    admission.wantTurn(one)
    admission.wantTurn(other)
    # The reactor comes to ticks and to nothing else.
    for _ in range(2 * LOGIN_SECONDS):
        admission._ticked()
    assert one.reason is not None
    assert other.reason is None
    assert list(admission._waitedFor) == [other]


def test_lateTicks(admission, clock):
    """A reactor that is held up for a minute at a time locks nobody out."""
    one = Somebody(admission)
    for _ in range(LOGIN_SECONDS - 1):
        clock.advance(60)
    assert one.reason is None
    clock.advance(TICK_SECONDS)
    assert "too long" in one.reason


def test_burst(admission):
    """As many as there is room for come at once from one address, and nobody is turned away."""
    burst = [Somebody(admission) for _ in range(MAX_LOGINS)]
    assert not any(one.reason for one in burst)


def test_tooManyOfOneAddress(admission, clock):
    """Beyond so many of an address its slowest make room, first come first; those of others stay."""
    other = Somebody(admission, "b")
    idle = [Somebody(admission) for _ in range(MAX_PER_SOURCE)]
    clock.pump([TICK_SECONDS] * PATIENCE_SECONDS)
    for count in range(1, 4):
        Somebody(admission)
        assert [one.reason is not None for one in idle] == [True] * count + [False] * (MAX_PER_SOURCE - count)
    assert other.reason is None
    assert len(admission) == MAX_PER_SOURCE + 1


def test_floodOfConnections(admission):
    """Beyond so many at all, the address that has most makes room; a single one of another address is never it."""
    honest = Somebody(admission, "honest")
    flood = [Somebody(admission, "flood") for _ in range(2 * MAX_LOGINS)]
    assert honest.reason is None
    assert len(admission) == MAX_LOGINS
    assert sum(one.reason is not None for one in flood) == MAX_LOGINS + 1
    assert flood[-1].reason is None


def test_manyAddresses(admission, clock):
    """When each address has one connection, the one that has been waited for longest makes room, not one in line."""
    admission.wantTurn(Somebody(admission, "somebody"))
    honest = Somebody(admission, "honest")
    admission.wantTurn(honest)
    idle = [Somebody(admission, str(number)) for number in range(MAX_LOGINS - 3)]
    admission._ticked()
    late = Somebody(admission, "late")
    admission.leave(next(one for one in admission._waitedFor if one.source == "somebody"))
    newcomers = [Somebody(admission, f"new {number}") for number in range(3)]
    assert [one.reason is not None for one in idle] == [True, True] + [False] * (MAX_LOGINS - 5)
    assert not any(one.reason for one in (honest, late, *newcomers))


def test_everybodyStandsInLine(admission):
    """When all who are there wait for us, who comes last is turned away: there is nobody who keeps us waiting."""
    burst = [Somebody(admission) for _ in range(MAX_LOGINS)]
    for one in burst:
        admission.wantTurn(one)
    late = Somebody(admission)
    # The first one has had its turn.
    assert [one.reason is not None for one in (*burst, late)] == [True] + [False] * MAX_LOGINS
    admission.wantTurn(late)
    last = Somebody(admission)
    assert last.reason is not None
    assert late.reason is None


def test_busyFlood(admission, clock):
    """An address whose connections all stand in line, always, shuts out nobody who comes from elsewhere."""
    flood = [Somebody(admission, "flood", more=MAX_LOGINS) for _ in range(MAX_LOGINS)]
    for one in flood:
        admission.wantTurn(one)
    honest = [Somebody(admission, "honest", more=4) for _ in range(3)]
    assert not any(one.reason for one in honest)
    for one in honest:
        admission.wantTurn(one)
    for _ in range(40):
        again = Somebody(admission, "flood", more=MAX_LOGINS)
        admission.wantTurn(again)
        clock.advance(0)
    assert not any(one.reason for one in honest)
    assert [len(one.order) for one in honest] == [5, 5, 5]


def test_nobodyIsForgotten(admission, clock):
    """When all have left nothing ticks any more."""
    one = Somebody(admission)
    admission.leave(one)
    admission.wantTurn(one)
    assert one.order == []
    assert clock.getDelayedCalls() == []

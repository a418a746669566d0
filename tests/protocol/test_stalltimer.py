"""L{nixserve.protocol.stalltimer}: when a peer that does nothing is given up."""

import pytest
from twisted.internet.task import Clock

from nixserve.protocol.stalltimer import StallTimer


def test_stallTimer():
    """It goes off when nothing has been heard for its time, counted from the last sign of life."""
    clock, stalls = Clock(), []
    timer = StallTimer(clock, 10, lambda: stalls.append(clock.seconds()))
    timer.start()
    clock.advance(9)
    timer.touch()
    clock.pump([1] * 8)
    assert stalls == []
    timer.start()
    clock.pump([1] * 9)
    assert stalls == []
    clock.pump([1] * 100)
    assert stalls == [27]


def test_stoppedStallTimer():
    """Stopped, it never goes off, however often and long; started again it counts from there."""
    clock, stalls = Clock(), []
    timer = StallTimer(clock, 10, lambda: stalls.append(clock.seconds()))
    timer.stop()
    timer.start()
    clock.advance(5)
    timer.stop()
    timer.stop()
    clock.pump([1] * 100)
    assert stalls == []
    timer.start()
    clock.pump([1] * 9)
    assert stalls == []
    clock.pump([1] * 11)
    assert len(stalls) == 1


def test_closedStallTimer():
    """Closed, it leaves nothing behind; it may be closed twice."""
    clock = Clock()
    timer = StallTimer(clock, 10, lambda: None)
    timer.close()
    timer.start()
    timer.close()
    timer.close()
    assert clock.getDelayedCalls() == []


def test_stoppedWithin():
    """Within a block it does not go off; from there on it counts, also if the block fails."""
    clock, stalls = Clock(), []
    timer = StallTimer(clock, 10, lambda: stalls.append(clock.seconds()))
    timer.start()
    for _ in range(2):
        with pytest.raises(KeyError), timer.stopped:
            clock.pump([1] * 100)
            raise KeyError
        clock.pump([1] * 9)
    assert stalls == []
    clock.pump([1] * 2)
    assert len(stalls) == 1

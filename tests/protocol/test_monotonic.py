"""
L{nixserve.protocol.monotonic}.
"""

import time

from twisted.internet.epollreactor import EPollReactor

from nixserve.protocol.monotonic import useMonotonicTime


def closed(reactor):
    """Give back what a reactor that never ran has open."""
    reactor.removeAll()
    reactor._poller.close()


def test_whatIsDueStaysDue():
    """What was to come before the change of clocks comes when it was due, in order; doing it twice changes nothing."""
    reactor = EPollReactor()
    try:
        came = []
        calls = [reactor.callLater(seconds, came.append, seconds) for seconds in (500, 0, 1000, 2)]
        # One that the reactor has in its heap, one that it has only heard of.
        reactor.runUntilCurrent()
        calls.append(reactor.callLater(700, came.append, 700))
        useMonotonicTime(reactor)
        useMonotonicTime(reactor)
        assert reactor.seconds is time.monotonic
        left = [call.getTime() - time.monotonic() for call in (calls[0], calls[2], calls[4])]
        assert all(due - 60 < found <= due for due, found in zip((500, 1000, 700), left, strict=True))
        assert [call.func for call in reactor.getDelayedCalls()] == [came.append] * 4
        times = sorted(call.getTime() for call in reactor.getDelayedCalls())
        reactor.runUntilCurrent()
        assert came == [0]
        assert reactor.timeout() <= 2
        assert sorted(call.getTime() for call in reactor.getDelayedCalls()) == times
        calls[2].reset(1)
        assert calls[2].getTime() <= time.monotonic() + 1
    finally:
        closed(reactor)

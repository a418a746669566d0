"""
Waiting for what happens in a reactor.
"""

from twisted.internet.defer import Deferred


def sleep(reactor, seconds):
    """A Deferred that fires then."""
    result = Deferred()
    reactor.callLater(seconds, result.callback, None)
    return result


async def within(reactor, seconds, deferred):
    """Await, but fail after some seconds."""
    return await deferred.addTimeout(seconds, reactor)


async def until(reactor, condition, seconds=10.0):
    """Wait until a condition holds."""
    end = reactor.seconds() + seconds
    while not condition():
        assert reactor.seconds() < end, "the condition did not come true"
        await sleep(reactor, 0.01)

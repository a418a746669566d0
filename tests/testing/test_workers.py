"""
Workers without threads.
"""

import pytest
from zope.interface.verify import verifyObject

from nixserve.protocol.interfaces import ISharedWorkers, IWorkers
from nixserve.testing import ImmediateWorkers, ManualWorkers, result


@pytest.mark.parametrize("kind", [ImmediateWorkers, ManualWorkers])
def test_areWorkers(kind):
    """Both are workers that clients share, whose time passes when it is told to."""
    workers = kind()
    assert verifyObject(ISharedWorkers, workers) and verifyObject(IWorkers, workers.of("somebody", 1))
    assert workers.reactor.seconds() == 0


def test_atOnce():
    """A call has its result, good or bad, when it returns."""
    workers = ImmediateWorkers()
    assert result(workers.call(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        result(workers.call(divmod, 7, 0))
    assert workers.calls == 2


def test_whenTold():
    """A call runs when it is told to, the oldest first, and its result arrives when that is told to."""
    workers, ran = ManualWorkers(), []
    first, second = workers.call(ran.append, 1), workers.call(divmod, 7, 0)
    assert ran == [] and len(workers.waiting) == 2
    arrive = workers.run()
    assert ran == [1] and not first.called
    arrive()
    assert first.called and not second.called
    workers.step()
    with pytest.raises(ZeroDivisionError):
        result(second)


def test_drains():
    """What follows from a result is run as well."""
    workers, ran = ManualWorkers(), []
    workers.call(ran.append, 1).addCallback(lambda _: workers.call(ran.append, 2))
    workers.drain()
    assert ran == [1, 2] and not workers.waiting

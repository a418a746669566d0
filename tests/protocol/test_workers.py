"""The door to blocking code: order, waiting for locks, giving up."""

import threading
from itertools import pairwise

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, gatherResults
from twisted.internet.threads import deferToThread

from nixserve.protocol.workers import MAX_RETRY, WAIT_NOTICE, Door, Workers
from nixserve.store.api import Busy
from nixserve.testing import ImmediateWorkers, ManualWorkers, result


class Lock:
    """Somebody else's lock."""

    def __init__(self, times=10**9, retryAfter=0.02):
        self.times = times
        self.retryAfter = retryAfter
        self.tries = []

    def take(self, clock):
        """Try to get it."""
        self.tries.append(clock.seconds())
        if len(self.tries) <= self.times:
            raise Busy("the lock on 'x'", self.retryAfter)
        return "mine"


def test_callsAndFailures():
    """What a function returns or raises comes back; arguments arrive."""
    door = Door(ImmediateWorkers())
    assert result(door.call(lambda a, b=0: (a, b), 1, b=2)) == (1, 2)
    with pytest.raises(ZeroDivisionError):
        result(door.call(lambda: 1 / 0))
    assert result(door.call(lambda: 3)) == 3


def test_oneAtATimeInOrder():
    """A call begins when the one before it is over, failed or not."""
    workers, done = ManualWorkers(), []
    door = Door(workers)
    results = [door.call(done.append, 1), door.call(lambda: 1 / 0), door.call(done.append, 3)]
    arrive = workers.run()
    assert (done, len(workers.waiting)) == ([1], 0)
    arrive()
    assert len(workers.waiting) == 1 and not results[1].called
    workers.drain()
    assert done == [1, 3]
    assert [one.called for one in results] == [True] * 3
    results[1].addErrback(lambda failure: failure.trap(ZeroDivisionError))


def test_callsFromResults():
    """What is called when a result arrives waits behind what was called before."""
    workers, done = ManualWorkers(), []
    door = Door(workers)
    door.call(done.append, 1).addCallback(lambda _: door.call(done.append, 3))
    door.call(done.append, 2)
    workers.drain()
    assert done == [1, 2, 3]


def test_busyIsTriedAgain():
    """Busy never reaches the caller: the call is made again, with growing pauses, until it is not busy."""
    workers = ImmediateWorkers()
    clock, lock = workers.reactor, Lock(times=20)
    waiting = Door(workers).call(lock.take, clock)
    while not waiting.called:
        clock.advance(0.001)
    assert result(waiting) == "mine"
    pauses = [b - a for a, b in pairwise(lock.tries)]
    assert pauses[0] == pytest.approx(0.02, abs=0.002)
    assert all(b >= a - 0.002 for a, b in pairwise(pauses))
    assert pauses[-1] == pytest.approx(MAX_RETRY, abs=0.002)


def test_busyMayAskForMore():
    """A pause is never shorter than Busy asks for."""
    workers = ImmediateWorkers()
    lock = Lock(times=3, retryAfter=7.0)
    waiting = Door(workers).call(lock.take, workers.reactor)
    workers.reactor.pump([6.9, 0.2, 6.9, 0.2, 6.9, 0.2])
    assert result(waiting) == "mine" and len(lock.tries) == 4


def test_noticeOfWaiting():
    """Who waits longer than two seconds is told once what for; a short wait says nothing."""
    for seconds, notices in ((WAIT_NOTICE - 0.1, []), (60.0, ["the lock on 'x'"])):
        workers, told = ImmediateWorkers(), []
        waiting = Door(workers, told.append).call(Lock().take, workers.reactor)
        workers.reactor.pump([0.1] * round(seconds * 10))
        assert told == notices
        waiting.addErrback(lambda _: None)
        waiting.cancel()


def test_othersWaitBehindBusy():
    """A call that waits for a lock keeps its place."""
    workers, done = ImmediateWorkers(), []
    door = Door(workers)
    lock = Lock(times=1)
    door.call(lock.take, workers.reactor).addCallback(done.append)
    door.call(lambda: "second").addCallback(done.append)
    assert done == []
    workers.reactor.advance(0.03)
    assert done == ["mine", "second"]


def test_cancelWhileWaitingForLock():
    """Cancelling ends the waiting at once, and the next call begins."""
    workers = ImmediateWorkers()
    lock = Lock()
    door = Door(workers)
    waiting, following = door.call(lock.take, workers.reactor), door.call(lambda: 2)
    waiting.cancel()
    with pytest.raises(CancelledError):
        result(waiting)
    assert result(following) == 2
    workers.reactor.advance(10)
    assert len(lock.tries) == 1
    assert workers.reactor.getDelayedCalls() == []


def test_cancelWhileRunning():
    """A function that runs in its thread runs to its end, and the door stays shut until then."""
    workers, done = ManualWorkers(), []
    door = Door(workers)
    running = door.call(done.append, 1)
    arrive = workers.run()
    running.cancel()
    with pytest.raises(CancelledError):
        result(running)
    following = door.call(done.append, 2)
    assert not workers.waiting
    arrive()
    workers.drain()
    assert done == [1, 2] and following.called


@pytest.mark.parametrize("raises", [Busy("x"), ValueError("lost")])
def test_cancelWhileRunningAndFailing(raises):
    """What a cancelled call raises in its thread is dropped, Busy is not tried again."""
    workers = ManualWorkers()
    door = Door(workers)

    def fails():
        raise raises

    running = door.call(fails)
    arrive = workers.run()
    running.cancel()
    arrive()
    with pytest.raises(CancelledError):
        result(running)
    assert workers.reactor.getDelayedCalls() == [] and not workers.waiting


def test_cancelBeforeItsTurn():
    """A call that is cancelled before its turn is never made."""
    workers, done = ManualWorkers(), []
    door = Door(workers)
    door.call(done.append, 1)
    second = door.call(done.append, 2)
    door.call(done.append, 3)
    second.cancel()
    with pytest.raises(CancelledError):
        result(second)
    workers.drain()
    assert done == [1, 3]


@pytest.mark.parametrize("state", ["running", "busy", "queued"])
def test_abandon(state):
    """Giving up cancels everything; what is called afterwards still waits for what runs in a thread."""
    workers, done = ManualWorkers(), []
    door = Door(workers)
    lock = Lock()
    first = door.call(lock.take, workers.reactor)
    second = door.call(done.append, 2)
    if state == "running":
        arrive = workers.run()
    elif state == "busy":
        workers.step()
    door.abandon()
    for one in (first, second):
        with pytest.raises(CancelledError):
            result(one)
    last = door.call(done.append, "last")
    if state == "running":
        assert not workers.waiting
        arrive()
    workers.drain()
    assert done == ["last"] and last.called
    assert len(lock.tries) == 1 and workers.reactor.getDelayedCalls() == []


@pytest_twisted.inlineCallbacks
def test_threads():
    """Functions run in other threads, several at once, and results arrive in the reactor's."""
    workers = Workers(reactor, 4)
    meeting = threading.Barrier(4, timeout=10)

    def meet():
        meeting.wait()
        return threading.current_thread()

    early = workers.call(threading.current_thread)
    workers.start()
    try:
        threads = yield gatherResults([workers.call(meet) for _ in range(4)])
        assert len(set(threads)) == 4 and threading.current_thread() not in threads
        assert (yield early) is not threading.current_thread()
        failing = workers.call(lambda: 1 / 0)
        failing.addErrback(lambda failure: (failure.type, threading.current_thread()))
        assert (yield failing) == (ZeroDivisionError, threading.current_thread())
    finally:
        yield deferToThread(workers.stop)

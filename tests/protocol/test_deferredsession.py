"""A session of a blocking store as Deferreds: what is passed on, and what closing gives up."""

import threading

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred

from nixserve.codec.hashes import hashBytes
from nixserve.errors import StoreError
from nixserve.protocol.deferredsession import DeferredSession, openSession
from nixserve.store.api import Busy
from nixserve.store.memory import MemoryStore
from nixserve.testing import FakeStore, ImmediateWorkers, ManualWorkers, addObject, makeInfo, makeNar, result

NAR = makeNar(b"contents")
LIB = makeInfo("lib", NAR)
APP = makeInfo("app", NAR, [LIB.path])
NOWHERE = makeInfo("nowhere", NAR)


def makeStore():
    """A store in which C{APP} refers to C{LIB}."""
    store = MemoryStore()
    session = store.openSession()
    for info in (LIB, APP):
        addObject(session, info, NAR)
    session.close()
    return store


def test_passesOn():
    """Every method is the session's, in a worker."""
    store, workers = makeStore(), ManualWorkers()
    opening = DeferredSession.open(store, workers)
    workers.drain()
    here = result(opening)
    assert here.storeDir == store.storeDir

    def blocking(deferred):
        assert not deferred.called
        workers.drain()
        return result(deferred)

    assert blocking(here.queryValidPaths([APP.path, NOWHERE.path])) == {APP.path}
    infos = blocking(here.queryPathInfos([APP.path, NOWHERE.path]))
    assert infos.keys() == {APP.path} and infos[APP.path].references == {LIB.path}
    assert blocking(here.queryClosure([APP.path])) == {APP.path, LIB.path}
    assert blocking(here.call(hashBytes, "sha256", NAR)) == LIB.narHash
    assert blocking(here.addTempRoots([LIB.path])) is None
    assert store.collectGarbage() == {APP.path}
    assert blocking(here.close()) is None
    assert store.collectGarbage() == {LIB.path}


def test_closureWithOutputs():
    """Whether outputs belong to a closure is passed on."""
    store = FakeStore()
    here = result(DeferredSession.open(store, ImmediateWorkers()))
    result(here.queryClosure([], includeOutputs=True))
    result(here.queryClosure([]))
    assert store.calls[1:] == [("queryClosure", ([], True)), ("queryClosure", ([], False))]


def test_openingFails():
    """A store that cannot be opened says why."""
    store = FakeStore()
    store.fail("openSession", StoreError("no such store"))
    with pytest.raises(StoreError, match="no such store"):
        result(DeferredSession.open(store, ImmediateWorkers()))


def test_waitsForLocks():
    """Somebody else's lock is waited for; who opened the session hears of it if that takes long."""
    store, workers, waits = FakeStore(), ImmediateWorkers(), []
    opening = DeferredSession.open(store, workers, waits.append)
    store.fail("addTempRoots", *[Busy("the collector")] * 50)
    rooted = result(opening).addTempRoots([])
    while not rooted.called:
        workers.reactor.advance(0.1)
    assert waits == ["the collector"]


def test_closeGivesUp():
    """Closing waits for nobody's lock: what does is cancelled, with all behind it, and the session is closed."""
    store, workers = FakeStore(), ImmediateWorkers()
    here = result(DeferredSession.open(store, workers))
    store.fail("addTempRoots", *[Busy("the collector")] * 1000)
    pending = [here.addTempRoots([]), here.queryValidPaths([])]
    closing = here.close()
    for one in pending:
        with pytest.raises(CancelledError):
            result(one)
    assert result(closing) is None
    assert store.names == ["openSession", "addTempRoots", "close"] and not workers.reactor.getDelayedCalls()


def test_closeWaitsForTheWorker():
    """What runs in a thread is not interrupted, but nobody hears of it, and the session is closed after it."""
    store, workers = FakeStore(), ManualWorkers()
    opening = DeferredSession.open(store, workers)
    workers.drain()
    here = result(opening)
    asking = here.queryValidPaths([])
    arrive = workers.run()
    closing = here.close()
    with pytest.raises(CancelledError):
        result(asking)
    assert not workers.waiting and not closing.called
    arrive()
    workers.drain()
    assert result(closing) is None and store.names == ["openSession", "queryValidPaths", "close"]


@pytest.mark.parametrize("fails", [False, True])
def test_onClose(fails):
    """Who wants to know hears once that the session has been closed, also if that fails."""
    store, closed = FakeStore(), []
    here = result(DeferredSession.open(store, ImmediateWorkers()))
    here = DeferredSession(here.door, here.session, lambda: closed.append(store.names))
    store.fail("close", *([StoreError("a full disk")] if fails else []))
    closing = here.close()
    if fails:
        with pytest.raises(StoreError, match="a full disk"):
            result(closing)
    result(here.close())
    assert closed == [["openSession", "close"]]


@pytest.mark.parametrize("error", [None, StoreError("something else")])
def test_asyncWith(error):
    """The session is closed at the end of the block, whatever ends it, and the block's exception goes on."""
    store = FakeStore()

    async def block():
        async with await DeferredSession.open(store, ImmediateWorkers()) as here:
            assert await here.queryValidPaths([]) == set()
            if error is not None:
                raise error

    done = Deferred.fromCoroutine(block())
    if error is None:
        result(done)
    else:
        with pytest.raises(StoreError, match="something else"):
            result(done)
    assert store.names == ["openSession", "queryValidPaths", "close"]


def threads():
    """The threads of all workers."""
    return [thread for thread in threading.enumerate() if "nixserve" in thread.name]


@pytest_twisted.ensureDeferred
async def test_ownThreads():
    """A session with threads of its own works in them, and they end with it."""
    before = threads()
    here = await openSession(reactor, makeStore())
    assert await here.call(threading.current_thread) in set(threads()) - set(before)
    assert await here.queryValidPaths([APP.path]) == {APP.path}
    await here.close()
    assert threads() == before


@pytest_twisted.ensureDeferred
async def test_ownThreadsOfNoSession():
    """If there is no session there are no threads."""
    before, store = threads(), makeStore()
    store.close()
    with pytest.raises(StoreError, match="the store is closed"):
        await openSession(reactor, store)
    assert threads() == before

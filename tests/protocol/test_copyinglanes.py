"""Closures over several sessions at once: who copies what, and how all of it ends when one of them does."""

import gc
from collections import Counter
from itertools import cycle

import pytest
from twisted.internet.defer import CancelledError

from nixserve.errors import RemoteError
from nixserve.protocol import transfers
from nixserve.protocol.copying import CopyProgress, copyClosure
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.workers import Door
from nixserve.store.memory import MemoryStore
from nixserve.testing import ImmediateWorkers, Joined, ManualWorkers, addObject, makeInfo, makeNar

WIDTH = 9
"""Objects in a layer of L{makeLayers}: more than one session takes at once."""


@pytest.fixture(autouse=True)
def circlesAreCollected(logged):
    """A failure that nobody handled is logged when what holds it is gone, which may be a circle."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def fewPathsAtATime(monkeypatch):
    """Sessions take so little at once that there is something for each."""
    monkeypatch.setattr(transfers, "SHARED_BATCH_BYTES", 1)
    monkeypatch.setattr(transfers, "MAX_REQUESTED", 3)


class Lanes(CopyProgress):
    """
    A store here and one there, with several sessions between them.

    @ivar carried: how often each path has been sent or asked for, by lane.
    @ivar asked: how often what is valid there has been asked for, by lane.
    @ivar used: which of the sessions here have read or written NARs.
    @ivar done: what the receiving store has got.
    """

    def __init__(self, copy, lanes=3, workers=None):
        """
        @param workers: where the sessions here block; at once, if not given.
        """
        self.local, self.remote = MemoryStore(), MemoryStore()
        self.lanes = [Joined(self.remote) for _ in range(lanes)]
        workers = workers or ImmediateWorkers()
        self.heres = [DeferredSession(Door(workers), self.local.openSession()) for _ in self.lanes]
        self.clients = [lane.client for lane in self.lanes]
        self.source, self.target = (self.local, self.remote) if copy is upload else (self.remote, self.local)
        self.carried = [Counter() for _ in self.lanes]
        self.asked = [0 for _ in self.lanes]
        self.used = set()
        self.done = []
        for number, client in enumerate(self.clients):
            self._spyThere(number, client)
        for number, here in enumerate(self.heres):
            for name in ("narFromPath", "addToStore", "addSmallPaths"):
                self._spyHere(number, here.session, name)

    def _spyHere(self, number, session, name):
        method = getattr(session, name)
        setattr(session, name, lambda *args: self.used.add(number) or method(*args))

    def _spyThere(self, number, client):
        # Why there is no version is also why there is no copy.
        client.ready.addErrback(lambda _: None)
        add, dump, query = client.addToStoreNars, client.dumpStorePath, client.queryValidPaths

        def addToStoreNars(infos, *args):
            self.carried[number].update(info.path for info in infos)
            return add(infos, *args)

        def dumpStorePath(path, sink):
            self.carried[number][path] += 1
            return dump(path, sink)

        def queryValidPaths(*args, **flags):
            self.asked[number] += 1
            return query(*args, **flags)

        client.addToStoreNars, client.dumpStorePath = addToStoreNars, dumpStorePath
        client.queryValidPaths = queryValidPaths

    def copied(self, info):
        """See L{CopyProgress}."""
        self.done.append(info)

    def turn(self):
        """What is on its way goes once in each direction, over each session."""
        moved = [lane.turn() for lane in self.lanes]
        return any(moved)

    def half(self):
        """Things move until some paths are there and every session has others under way."""
        lanes = cycle(self.lanes)
        while not self.done or not all(carried.keys() - {info.path for info in self.done} for carried in self.carried):
            next(lanes).turn()

    def flush(self):
        """Everything moves until nothing does, also what waits for a lock."""
        for _ in range(10):
            while self.turn():
                pass
            for lane in self.lanes:
                lane.clock.advance(1)

    def result(self, deferred):
        """What it has fired with, when nothing moves any more."""
        self.flush()
        return self.lanes[0].result(deferred)

    def valid(self):
        """What the receiving store has."""
        return self.target.openSession().queryValidPaths([*self.source._objects])


def upload(lanes, paths, **options):
    """Copy there."""
    return copyClosure(lanes.heres, lanes.clients, paths, progress=lanes, **options)


def download(lanes, paths, **options):
    """Copy here."""
    return copyClosure(lanes.clients, lanes.heres, paths, progress=lanes, **options)


BOTH = pytest.mark.parametrize("copy", [upload, download])


def makeLayers(store, layers, width=WIDTH, size=10):
    """
    Put objects into a store, of which each refers to all in the layer before.

    @return: their infos, references first.
    """
    session, infos, references = store.openSession(), [], ()
    for layer in range(layers):
        for number in range(width):
            name = f"object-{layer}-{number}"
            nar = makeNar(name.encode() * size)
            infos.append(makeInfo(name, nar, references))
            addObject(session, infos[-1], nar)
        references = [info.path for info in infos[-width:]]
    session.close()
    return infos


def wanted(infos):
    """What refers to all others."""
    return [info.path for info in infos[-WIDTH:]]


@pytest.mark.parametrize("size", [10, 10_000])
@pytest.mark.parametrize("lanes", [2, 3])
@BOTH
def test_lanes(copy, lanes, size):
    """Several sessions share a closure, whoever has the references; each path goes once, by one of them."""
    joined = Lanes(copy, lanes)
    infos = makeLayers(joined.source, 4, size=size)
    copied = joined.result(copy(joined, wanted(infos)))
    assert joined.valid() == {info.path for info in infos} and copied.present == 0
    assert sum(joined.carried, Counter()) == Counter(info.path for info in infos)
    assert all(joined.carried) and joined.used == set(range(lanes))
    assert len(joined.done) == len(copied.infos) == len(infos) and set(joined.done) == set(copied.infos)
    assert joined.asked == [1] + [0] * (lanes - 1)


@BOTH
def test_fewerSessionsHere(copy):
    """One session here reads for several of the remote; it writes for one only, since it does one thing at a time."""
    joined = Lanes(copy)
    infos = makeLayers(joined.source, 4)
    del joined.heres[1:]
    joined.result(copy(joined, wanted(infos)))
    assert joined.valid() == {info.path for info in infos}
    assert [bool(carried) for carried in joined.carried] == [True, copy is upload, copy is upload]


@BOTH
def test_lanesWithNothingToDo(copy):
    """Sessions for which nothing is left end with the others, and go on to be of use."""
    joined = Lanes(copy)
    infos = makeLayers(joined.source, 3, width=1)
    copied = joined.result(copy(joined, [infos[-1].path]))
    assert len(copied.infos) == len(joined.done) == 3
    for client in joined.clients:
        assert len(joined.result(client.queryClosure([infos[-1].path]))) == 3


@pytest.mark.parametrize("lane", range(3))
@BOTH
def test_oneLaneIsCut(copy, lane):
    """If one session is lost half way, the copy fails at once and cuts the others; what is there is there whole."""
    joined = Lanes(copy)
    infos = makeLayers(joined.source, 4, size=10_000)
    copied = copy(joined, wanted(infos))
    joined.half()
    joined.lanes[lane].cut()
    # Nobody waits for what the others have under way.
    with pytest.raises(RemoteError):
        joined.lanes[lane].result(copied)
    assert all(one.pair.clientSide.aborted or one.pair.over for one in joined.lanes)
    joined.flush()
    for one in joined.lanes:
        with pytest.raises(RemoteError):
            joined.result(one.client.queryValidPaths([]))
    references = {info.path: info.references for info in infos}
    valid = joined.valid()
    assert valid < references.keys() and all(references[path] <= valid for path in valid)


@BOTH
def test_waitingLaneEnds(copy):
    """A session that waits for what another one copies does not wait for ever when that one is lost."""
    joined = Lanes(copy, 2)
    infos = makeLayers(joined.source, 20, width=1)
    copied = copy(joined, [infos[-1].path])
    while not joined.done:
        assert joined.turn()
    assert not joined.carried[1]
    joined.lanes[0].cut()
    with pytest.raises(RemoteError):
        joined.result(copied)
    assert joined.lanes[1].pair.over


@pytest.mark.parametrize("size", [10, 10_000])
def test_nothingIsHeardAfterTheEnd(size):
    """What a session is storing when another one is lost is no longer part of the copy, which has failed by then."""
    workers = ManualWorkers()
    joined = Lanes(download, workers=workers)
    infos = makeLayers(joined.source, 2, size=size)
    copied = download(joined, wanted(infos))
    while not (workers.waiting and all(joined.carried)):
        workers.drain()
        joined.turn()
    joined.lanes[0].cut()
    with pytest.raises(RemoteError):
        joined.result(copied)
    done = list(joined.done)
    workers.drain()
    joined.flush()
    assert joined.done == done and not workers.waiting


@pytest.mark.parametrize("turns", range(6))
@BOTH
def test_cancelLanes(copy, turns):
    """Cancelled at any moment, a copy ends at once and cuts all its sessions."""
    joined = Lanes(copy)
    infos = makeLayers(joined.source, 4, size=10_000)
    copied = copy(joined, wanted(infos))
    for _ in range(turns):
        joined.turn()
    copied.cancel()
    with pytest.raises(CancelledError):
        joined.lanes[0].result(copied)
    assert all(lane.pair.clientSide.aborted for lane in joined.lanes)


@BOTH
def test_failureCutsAllLanes(copy):
    """What fails before anything moves cuts the sessions that were to help, too."""
    joined = Lanes(copy)
    makeLayers(joined.source, 1)
    nowhere = makeInfo("nowhere", b"").path
    with pytest.raises(Exception, match=f"path '{nowhere}' is not valid"):
        joined.result(copy(joined, [nowhere]))
    assert all(lane.pair.over for lane in joined.lanes)

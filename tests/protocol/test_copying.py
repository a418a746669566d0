"""
Closures between stores, client and server joined in memory: what travels, in which order, and what failures leave.
"""

import gc
from collections import Counter
from dataclasses import replace

import pytest
from twisted.internet.defer import CancelledError

from nixserve.codec.hashes import hashBytes
from nixserve.errors import RemoteError, StoreError, UsageError
from nixserve.protocol import transfers
from nixserve.protocol.copying import Copied, CopyProgress, MissingReference, copyClosure
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.workers import Door
from nixserve.store.api import Busy, InvalidPath
from nixserve.testing import FakeStore, Joined, ManualWorkers, addObject, makeInfo, makeNar, result


@pytest.fixture(autouse=True)
def circlesAreCollected(logged):
    """A failure that nobody handled is logged when what holds it is gone, which may be a circle."""
    yield
    gc.collect()


def uploadClosure(client, here, paths, progress, **options):
    """Copy there."""
    return copyClosure(here, client, paths, progress=progress, **options)


def downloadClosure(client, here, paths, progress, **options):
    """Copy here."""
    return copyClosure(client, here, paths, progress=progress, **options)


class Recorder(CopyProgress):
    """Keeps what it is told."""

    def __init__(self):
        self.plan, self.present, self.bytes, self.done = None, None, 0, []

    def planned(self, infos, present):
        self.plan, self.present = list(infos), present

    def moved(self, size):
        self.bytes += size

    def copied(self, info):
        self.done.append(info)


class Copying:
    """
    A local and a remote store with a client's session between them.

    @ivar session: on the local one.
    @ivar dumped: what the client has asked for.
    """

    def __init__(self, cut=1 << 20, announced=0x208):
        self.local, self.remote = FakeStore(), FakeStore()
        joined = Joined(self.remote, piece=cut)
        self.client, self.workers, self.pair, self.turn = joined.client, joined.workers, joined.pair, joined.turn
        # Why there is no version is also why there is no copy.
        self.client.ready.addErrback(lambda _: None)
        self.dumped, dump = [], self.client.dumpStorePath
        self.client.dumpStorePath = lambda path, sink: self.dumped.append(path) or dump(path, sink)
        joined.server._connection.announced = joined.server._connection.version = announced
        self.session = self.local.openSession()
        self.progress = Recorder()

    @property
    def here(self):
        """The session of the local store."""
        return DeferredSession(Door(self.workers), self.session)

    def begin(self, copy, *paths, **options):
        """Start to copy."""
        return copy(self.client, self.here, list(paths), self.progress, **options)

    def run(self, copy, *paths, **options):
        """Copy, to the end, whatever has to be waited for."""
        copied = self.begin(copy, *paths, **options)
        for _ in range(10):
            self.pair.flush()
            self.workers.reactor.advance(1)
        return result(copied)


LARGE = 70_000
"""A size above which NARs are not kept until they are complete."""


def makeClosure(count, size=1000):
    """Objects of which each refers to the one before it, references first, as pairs of info and NAR."""
    closure, references = [], ()
    for number in range(count):
        nar = makeNar({"number": str(number).encode() * size, "link": str(number)})
        info = makeInfo(f"object-{number}", nar, references)
        references = (info.path,)
        closure.append((info, nar))
    return closure


def add(store, closure):
    """Put it into a store, which does not take notice; gives the infos."""
    session = store.inner.openSession()
    for info, nar in closure:
        addObject(session, info, nar)
    session.close()
    return [info for info, _ in closure]


def sides(copying, copy):
    """The store that is read and the one that is written."""
    both = copying.local, copying.remote
    return both if copy is uploadClosure else both[::-1]


BOTH = pytest.mark.parametrize("copy", [uploadClosure, downloadClosure])


def timeless(infos):
    """All but the times of registration, which do not travel."""
    return [replace(info, registrationTime=0) for info in infos]


@BOTH
@pytest.mark.parametrize("cut", [1 << 20, 1000, 7])
def test_copies(copy, cut):
    """The whole closure arrives, references first, with all that was registered about it; in pieces of any size."""
    joined = Copying(cut)
    source, target = sides(joined, copy)
    infos = add(source, makeClosure(10, size=100))
    copied = joined.run(copy, infos[-1].path)
    assert (timeless(copied.infos), copied.present) == (timeless(infos), 0)
    assert copied.narBytes == joined.progress.bytes == sum(info.narSize for info in infos)
    assert joined.progress.plan == joined.progress.done == list(copied.infos)
    session = target.openSession()
    assert timeless(session.queryPathInfos([info.path for info in infos]).values()) == timeless(infos)
    for info in infos:
        assert hashBytes("sha256", b"".join(session.narFromPath(info.path))) == info.narHash


@BOTH
def test_onlyWhatIsMissing(copy):
    """What is there is neither sent nor asked for."""
    joined = Copying()
    source, target = sides(joined, copy)
    closure = makeClosure(10, LARGE)
    infos = add(source, closure)
    add(target, closure[:7])
    copied = joined.run(copy, infos[-1].path)
    assert (timeless(copied.infos), copied.present) == (timeless(infos[7:]), 7)
    assert joined.remote.names.count("addToStore") == (3 if copy is uploadClosure else 0)
    assert len(joined.dumped) == (3 if copy is downloadClosure else 0)
    again = joined.run(copy, infos[-1].path)
    assert again == Copied((), 10)


def test_uploadAsksOnce():
    """One question for a whole closure, which makes all of it roots there; then everything without waiting."""
    joined = Copying()
    infos = add(joined.local, makeClosure(50, LARGE))
    copying = joined.begin(uploadClosure, infos[-1].path)
    # The question out and its answer back; then nothing more is delivered to the client.
    joined.turn()
    assert joined.remote.names.count("queryValidPaths") == joined.remote.names.count("addTempRoots") == 1
    joined.pair.clientSide.paused = True
    joined.pair.flush()
    assert joined.remote.names.count("addToStore") == 50
    assert joined.progress.done == []
    joined.pair.clientSide.paused = False
    joined.pair.flush()
    assert timeless(result(copying).infos) == timeless(infos)


@pytest.mark.parametrize(
    ("limit", "nars", "ahead"), [("MAX_REQUESTED", 8, 8), ("MAX_BYTES_AHEAD", 8, 8), ("MAX_BYTES_AHEAD", 1, 2)]
)
def test_downloadAsksAhead(monkeypatch, limit, nars, ahead):
    """
    NARs are requested before the ones before them have come, as far as the limits allow, and one in any case.
    """
    joined = Copying()
    infos = add(joined.remote, makeClosure(50, size=1))
    size = sum(info.narSize for info in infos[:nars])
    monkeypatch.setattr(transfers, limit, nars if limit == "MAX_REQUESTED" else size)
    monkeypatch.setattr(transfers, "MAX_SMALL_NAR", 0)
    copied = joined.begin(downloadClosure, infos[-1].path)
    for _ in range(3):
        joined.turn()
    joined.pair.clientSide.paused = True
    joined.pair.flush()
    assert joined.progress.done and len(joined.dumped) - len(joined.progress.done) == ahead
    joined.pair.clientSide.paused = False
    joined.pair.flush()
    assert timeless(result(copied).infos) == timeless(infos)


def test_downloadWaitsForTheStore(monkeypatch):
    """While the store here works on one NAR little of the next is taken; the remote has to wait with the rest."""
    monkeypatch.setattr(transfers, "MAX_QUEUED", LARGE)
    joined, manual = Copying(cut=5000), ManualWorkers()
    infos = add(joined.remote, makeClosure(3, 3 * LARGE))
    copied = copyClosure(
        joined.client, DeferredSession(Door(manual), joined.session), [infos[-1].path], progress=joined.progress
    )
    while not joined.dumped:
        manual.drain()
        joined.turn()
    joined.pair.flush()
    assert joined.pair.clientSide.paused and joined.progress.bytes <= infos[0].narSize + LARGE + 5000
    joined.pair.flush(manual.drain)
    assert timeless(result(copied).infos) == timeless(infos)


def test_manyUploads(monkeypatch):
    """More paths than may be under way at once go all the same."""
    monkeypatch.setattr(transfers, "MAX_BATCH_PATHS", 4)
    joined = Copying()
    infos = add(joined.local, makeClosure(50, size=1))
    assert timeless(joined.run(uploadClosure, infos[-1].path).infos) == timeless(infos)


def test_uploadsUnderWay(monkeypatch):
    """When the connection breaks everything that was not acknowledged has failed with it, and with nothing else."""
    monkeypatch.setattr(transfers, "MAX_BATCH_PATHS", 1)
    joined = Copying()
    infos = add(joined.local, makeClosure(50, LARGE))
    copied = joined.begin(uploadClosure, infos[-1].path)
    joined.turn()
    joined.pair.clientSide.paused = True
    joined.pair.flush()
    assert joined.remote.names.count("addToStore") == transfers.MAX_BATCHES
    joined.pair.lose()
    with pytest.raises(RemoteError):
        result(copied)


@pytest.mark.parametrize("most", [4, 1])
def test_smallOnesInParts(monkeypatch, most):
    """Small paths are registered so many at once at most; what a turn has left out, for a lock, comes in the next."""
    monkeypatch.setattr(transfers, "MAX_SMALL_BATCH", 4)
    joined, manual, batches = Copying(), ManualWorkers(), []
    infos = add(joined.remote, makeClosure(50, size=1))
    addSmallPaths = joined.session.addSmallPaths
    joined.session.addSmallPaths = lambda objects: batches.append(len(objects)) or addSmallPaths(objects[:most])
    copied = copyClosure(joined.client, DeferredSession(Door(manual), joined.session), [infos[-1].path])
    for _ in range(10):
        joined.pair.flush(manual.drain)
    assert timeless(result(copied).infos) == timeless(infos) == timeless(joined.local.valid(infos))
    assert max(batches) == 4


def test_smallOnesTogether():
    """Small paths that come while a worker is busy are registered in its next turn, all at once."""
    joined, manual = Copying(), ManualWorkers()
    infos = add(joined.remote, makeClosure(50, size=1))
    copied = copyClosure(joined.client, DeferredSession(Door(manual), joined.session), [infos[-1].path])
    for _ in range(10):
        joined.pair.flush(manual.drain)
    assert timeless(result(copied).infos) == timeless(infos)
    calls = Counter(joined.local.names)
    assert calls["addToStore"] == 0 and 1 <= calls["addSmallPaths"] < 10


@BOTH
def test_noClosure(copy):
    """Without the closure only the paths given go, where what they refer to is or goes too; else that is said first."""
    joined = Copying()
    source, target = sides(joined, copy)
    closure = makeClosure(3)
    infos = add(source, closure)
    with pytest.raises(MissingReference, match=f"'{infos[2].path}' refers to '{infos[1].path}', which") as raised:
        joined.run(copy, infos[2].path, closure=False)
    assert (raised.value.path, raised.value.reference) == (infos[2].path, infos[1].path)
    assert isinstance(raised.value, UsageError)
    assert target.valid(infos) == []
    joined = Copying()
    source, target = sides(joined, copy)
    add(source, closure)
    add(target, closure[:2])
    assert timeless(joined.run(copy, infos[2].path, closure=False).infos) == timeless(infos[2:])
    assert target.valid(infos) == infos
    joined = Copying()
    source, target = sides(joined, copy)
    add(source, closure)
    add(target, closure[:1])
    both = [infos[2].path, infos[1].path]
    assert timeless(joined.run(copy, *both, closure=False).infos) == timeless(infos[1:])
    assert target.valid(infos) == infos


class Collector(Recorder):
    """Has the collector of a store run exactly between question and copy."""

    def __init__(self, store):
        super().__init__()
        self.store = store

    def planned(self, infos, present):
        super().planned(infos, present)
        self.store.inner.collectGarbage()


@pytest.mark.parametrize("options", [{}, {"closure": False}])
@BOTH
def test_collectorBetween(copy, options):
    """What the receiving store was found to have stays there, whatever its collector does before the copy."""
    joined = Copying()
    source, target = sides(joined, copy)
    closure = makeClosure(3)
    infos = add(source, closure)
    add(target, closure[:2])
    joined.progress = Collector(target)
    assert timeless(joined.run(copy, infos[2].path, **options).infos) == timeless(infos[2:])
    assert target.valid(infos) == infos


@BOTH
def test_dryRun(copy):
    """A dry run says what would be copied, moves nothing and makes nothing a root."""
    joined = Copying()
    source, target = sides(joined, copy)
    closure = makeClosure(5)
    infos = add(source, closure)
    add(target, closure[:2])
    copied = joined.run(copy, infos[-1].path, dryRun=True)
    assert (timeless(copied.infos), copied.present) == (timeless(infos[2:]), 2)
    assert target.valid(infos) == infos[:2] and joined.progress.bytes == 0
    assert "addTempRoots" not in joined.local.names


def test_flags():
    """Whether to substitute, and whether outputs belong to a closure, is passed on; only a dry run does not lock."""
    joined = Copying()
    infos = add(joined.local, makeClosure(2))
    asked = []
    query, closure = joined.client.queryValidPaths, joined.client.queryClosure
    joined.client.queryValidPaths = lambda paths, **flags: asked.append(flags) or query(paths, **flags)
    joined.client.queryClosure = lambda paths, outputs: asked.append(outputs) or closure(paths, outputs)
    joined.run(uploadClosure, infos[-1].path, substitute=True)
    joined.run(uploadClosure, infos[-1].path, closure=False)
    joined.run(uploadClosure, infos[-1].path, closure=False, substitute=True, dryRun=True)
    joined.run(downloadClosure, infos[-1].path, includeOutputs=True)
    assert asked == [
        {"lock": True, "substitute": True},
        {"lock": True, "substitute": False},
        {"lock": False, "substitute": True},
        *({"lock": True}, True),
    ]


def test_oldServer():
    """A server below 2.5 gets everything in one export stream; one below 2.4 cannot be downloaded from."""
    joined = Copying(announced=0x204)
    infos = add(joined.local, makeClosure(5))
    copied = joined.run(uploadClosure, infos[-1].path)
    assert timeless(copied.infos) == timeless(infos) and joined.progress.done == list(copied.infos)
    assert joined.remote.names.count("importPath") == 5 and joined.progress.bytes > copied.narBytes
    joined = Copying(announced=0x203)
    infos = add(joined.remote, makeClosure(2))
    with pytest.raises(RemoteError, match="protocol without hashes"):
        joined.run(downloadClosure, infos[-1].path)


@BOTH
def test_waitsForLocks(copy):
    """A lock that somebody else holds, or a collector at work, is waited for."""
    joined = Copying()
    source, target = sides(joined, copy)
    infos = add(source, makeClosure(3, LARGE))
    target.fail("addTempRoots", Busy("a collector"))
    target.fail("addToStore", Busy("a lock"), Busy("a lock"))
    assert timeless(joined.run(copy, infos[-1].path).infos) == timeless(infos)
    assert target.names.count("addTempRoots") > 1 and target.names.count("addToStore") == 3 + 2


@BOTH
def test_invalidPath(copy):
    """A path that the source lacks is an error that names it, and nothing is copied."""
    joined = Copying()
    ((info, _),) = makeClosure(1)
    with pytest.raises((InvalidPath, RemoteError), match=f"path '{info.path}' is not valid"):
        joined.run(copy, info.path)


@BOTH
def test_failureHalfWay(copy):
    """If the store that receives fails, what came before stays, with its closure; the reason is said."""
    joined = Copying()
    source, target = sides(joined, copy)
    infos = add(source, makeClosure(10, LARGE))
    target.fail("addToStore", None, None, StoreError("the disk is full"))
    with pytest.raises((StoreError, RemoteError), match="the disk is full"):
        joined.run(copy, infos[-1].path)
    joined.session.close()
    assert target.valid(infos) == infos[:2]
    assert joined.pair.clientSide.aborted


@BOTH
def test_damage(copy):
    """A NAR that is not what is registered about it is found by the store that receives, which takes nothing of it."""
    joined = Copying()
    source, target = sides(joined, copy)
    ((info, nar),) = makeClosure(1)
    add(source, [(info, nar)])
    wrong = replace(info, narHash=hashBytes("sha256", b"something else"))
    source.inner._objects[info.path] = replace(source.inner._objects[info.path], info=wrong)
    with pytest.raises((StoreError, RemoteError), match="hash mismatch importing path"):
        joined.run(copy, info.path)
    assert target.valid([info]) == []


def test_tooLong():
    """A remote that sends more than it announced is cut off."""
    joined = Copying()
    closure = makeClosure(2, size=100_000)
    infos = add(joined.remote, closure)
    wrong = replace(infos[1], narSize=10)
    joined.remote.inner._objects[wrong.path] = replace(joined.remote.inner._objects[wrong.path], info=wrong)
    with pytest.raises((StoreError, RemoteError), match="size mismatch importing path"):
        joined.run(downloadClosure, wrong.path)
    assert joined.pair.clientSide.aborted
    # Nothing beyond what was announced has been kept.
    assert joined.progress.bytes <= infos[0].narSize + wrong.narSize


@pytest.mark.parametrize("difference", [-8, 8])
@pytest.mark.parametrize("position", [0, 1])
def test_changedHere(difference, position):
    """
    A NAR that has not the size that is registered for it is never sent as if it were the next path's: the error names
    the path, of what was sent before it some may be there, and no byte goes beyond what is registered.
    """
    joined = Copying()
    closure = makeClosure(2)
    infos = add(joined.local, closure)
    wrong = replace(infos[position], narSize=infos[position].narSize + difference)
    joined.local.inner._objects[wrong.path] = replace(joined.local.inner._objects[wrong.path], info=wrong)
    with pytest.raises(StoreError, match=f"'{wrong.path}' has changed since it was registered"):
        joined.run(uploadClosure, infos[-1].path)
    valid = joined.remote.valid(infos)
    assert valid == infos[: len(valid)] and len(valid) <= position
    assert joined.progress.bytes <= sum(info.narSize for info in [*infos[:position], wrong])


@BOTH
@pytest.mark.parametrize("size", [1000, LARGE])
@pytest.mark.parametrize("turns", range(6))
def test_connectionLost(copy, turns, size):
    """Whenever the connection breaks, the copy fails soon, and the receiving store has whole closures only."""
    joined = Copying(cut=4096)
    source, target = sides(joined, copy)
    infos = add(source, makeClosure(10, size))
    copied = joined.begin(copy, infos[-1].path)
    for _ in range(turns):
        joined.turn()
    joined.pair.lose()
    with pytest.raises(RemoteError):
        result(copied)
    joined.session.close()
    valid = target.valid(infos)
    assert valid == infos[: len(valid)]


@BOTH
@pytest.mark.parametrize("turns", range(6))
def test_cancel(copy, turns):
    """Cancelled at any moment, a copy ends at once and cuts the connection."""
    joined = Copying(cut=4096)
    source, _ = sides(joined, copy)
    infos = add(source, makeClosure(10))
    copied = joined.begin(copy, infos[-1].path)
    for _ in range(turns):
        joined.turn()
    copied.cancel()
    with pytest.raises(CancelledError):
        result(copied)
    assert joined.pair.clientSide.aborted
    joined.pair.flush()

"""
What the build hook does once there is a machine: inputs that go there once, outputs that come back under Nix's locks,
and all that Nix hears meanwhile. The whole of it, with real Nix, is in tests/interop.
"""

import fcntl
import json
import os

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock, deferLater
from twisted.python.failure import Failure

from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import BasicDerivation, DerivationOutput
from nixserve.codec.hashes import hashBytes
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import RemoteError
from nixserve.hook import inputs, pipes
from nixserve.hook.activities import CopyActivities
from nixserve.hook.claims import Claims
from nixserve.hook.conversation import HookLog
from nixserve.hook.inputs import PATIENCE_SECONDS, sendInputs
from nixserve.hook.outputs import fetchOutputs, knownOutputs
from nixserve.hook.pipes import PipeToNix, whenReadable
from nixserve.protocol.buildoutputs import outputsOf
from nixserve.protocol.copying import CopyProgress
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.store.api import InvalidPath
from nixserve.store.memory import MemoryStore
from nixserve.testing import FakeStore, ImmediateWorkers, Joined, addObject, makeInfo, makeNar
from tests.hook.machinelist import machine


class Recorder(CopyProgress):
    """
    Keeps the names of what was sent.

    @ivar meanwhile: called when it is known what is to be sent.
    """

    def __init__(self, meanwhile=lambda: None):
        self.names = []
        self.meanwhile = meanwhile

    def planned(self, infos, present):
        """See L{CopyProgress}."""
        self.meanwhile()

    def copied(self, info):
        """See L{CopyProgress}."""
        self.names.append(info.path.name)


class Side:
    """
    A store here with a chain of paths, each of which refers to the one before it, and machines.

    @ivar paths: of the chain, the first first.
    @ivar infos: theirs.
    """

    def __init__(self, directory, names="abcd"):
        self.clock = Clock()
        self.directory = str(directory)
        self.store = MemoryStore()
        self.there = MemoryStore()
        self.infos, self.nars = [], {}
        with_ = self.store.openSession()
        for name in names:
            nar = makeNar(name.encode())
            info = makeInfo(name, nar, [info.path for info in self.infos[-1:]])
            addObject(with_, info, nar)
            self.infos.append(info)
            self.nars[info.path] = nar
        self.session = with_
        self.paths = [info.path for info in self.infos]

    def joined(self, **options):
        """A session on the machine."""
        joined = Joined(self.there, workers=ImmediateWorkers(self.clock), **options)
        joined.flush()
        return joined

    def here(self):
        """A session here."""
        fired = []
        DeferredSession.open(self.store, ImmediateWorkers(self.clock)).addCallback(fired.append)
        return fired[0]

    def claims(self):
        """Those of one process."""
        return Claims(self.directory, machine())

    @property
    def unclaimed(self):
        """Whether nobody claims anything of the chain."""
        with self.claims() as other:
            return other.claim(self.infos) == self.infos

    def send(self, joined, claims, progress, **options):
        """Begin to send the chain."""
        options = {"substitute": False, "progress": progress} | options
        return Deferred.fromCoroutine(sendInputs(self.clock, self.here(), joined.client, self.paths, claims, **options))

    @property
    def arrived(self):
        """What the machine has."""
        return self.there.openSession().queryValidPaths(self.paths)


def plain(*paths):
    """Outputs of which nobody knows what is in them."""
    return {path: DerivationOutput(path) for path in paths}


@pytest.fixture
def side(tmp_path):
    """A store with four paths."""
    return Side(tmp_path)


def test_sends(side):
    """What the machine lacks goes there, references first, and claims end with it."""
    addObject(side.there.openSession(), side.infos[0], side.nars[side.paths[0]])
    joined, claims, sent = side.joined(), side.claims(), Recorder()
    joined.result(side.send(joined, claims, sent))
    assert sent.names == ["b", "c", "d"] and side.arrived == set(side.paths)
    assert side.unclaimed


def test_sendsNothing(side):
    """What is there is not sent, nor are others asked whether they do."""
    for info in side.infos:
        addObject(side.there.openSession(), info, side.nars[info.path])
    joined, sent = side.joined(), Recorder()
    joined.result(side.send(joined, side.claims(), sent))
    assert sent.names == []


def test_missingHere(side):
    """An input that is on neither side is an error."""
    side.paths.append(makeInfo("nowhere", makeNar(b"")).path)
    joined = side.joined()
    with pytest.raises(InvalidPath, match="nowhere"):
        joined.result(side.send(joined, side.claims(), Recorder()))


def test_waits(side):
    """
    What somebody else is sending is waited for, with all that needs it; once it is there the rest goes.
    """
    other, claims, sent, waited = side.claims(), side.claims(), Recorder(), []
    other.claim(side.infos[:1])
    joined = side.joined()
    sending = side.send(joined, claims, sent, onWait=waited.append)
    joined.flush()
    assert sent.names == [] and waited == [side.paths[0]] and not sending.called
    addObject(side.there.openSession(), side.infos[0], side.nars[side.paths[0]])
    other.release(side.paths[0])
    for _ in range(20):
        side.clock.advance(0.1)
        joined.flush()
    joined.result(sending)
    assert sent.names == ["b", "c", "d"] and side.arrived == set(side.paths)


def test_otherGivesUp(side):
    """What somebody else has not sent after all is sent."""
    other, sent = side.claims(), Recorder()
    other.claim(side.infos[:1])
    joined = side.joined()
    sending = side.send(joined, side.claims(), sent)
    joined.flush()
    other.close()
    for _ in range(20):
        side.clock.advance(0.1)
        joined.flush()
    joined.result(sending)
    assert sent.names == ["a", "b", "c", "d"]


def test_patience(side):
    """Who waited too long sends the path as well."""
    other, sent = side.claims(), Recorder()
    other.claim(side.infos[:1])
    joined = side.joined()
    sending = side.send(joined, side.claims(), sent)
    joined.flush()
    for _ in range(int(PATIENCE_SECONDS) + 10):
        side.clock.advance(1)
        joined.flush()
    joined.result(sending)
    assert sent.names == ["a", "b", "c", "d"] and side.arrived == set(side.paths)


def test_arrivesBetween(side, monkeypatch):
    """What somebody has sent between question and claim does not go twice."""
    claims, sent = side.claims(), Recorder()
    original = claims.claim

    def claim(missing):
        if missing[0].path == side.paths[0]:
            addObject(side.there.openSession(), side.infos[0], side.nars[side.paths[0]])
        return original(missing)

    monkeypatch.setattr(claims, "claim", claim)
    joined = side.joined()
    joined.result(side.send(joined, claims, sent))
    assert sent.names == ["b", "c", "d"]


def test_arrivedIsReleased(side, monkeypatch):
    """What turns out to be there already after it was claimed is no longer in anybody's way."""
    claims, other = side.claims(), side.claims()
    original = claims.claim

    def claim(missing):
        addObject(side.there.openSession(), side.infos[0], side.nars[side.paths[0]])
        return original(missing)

    monkeypatch.setattr(claims, "claim", claim)
    joined = side.joined()
    joined.result(side.send(joined, claims, Recorder(lambda: other.check(side.paths[0]))))
    assert side.unclaimed


@pytest.mark.parametrize("substitute", [True, False])
def test_questions(side, monkeypatch, substitute):
    """
    Whatever the machine is asked about it is to keep; and whether to try its own substituters, it is told with the
    first question.
    """
    joined, asked = side.joined(), []
    original = joined.client.queryValidPaths

    def query(paths, lock=False, substitute=False):
        asked.append((len(paths), lock, substitute))
        return original(paths, lock, substitute)

    monkeypatch.setattr(joined.client, "queryValidPaths", query)
    joined.result(side.send(joined, side.claims(), Recorder(), substitute=substitute))
    assert asked == [(4, True, substitute), (4, True, False)]


def test_oldMachine(side):
    """A machine whose protocol has nothing for one path at a time gets all of them as one stream."""
    there = FakeStore()
    side.there = there.inner
    joined = Joined(there, workers=ImmediateWorkers(side.clock))
    joined.server._connection.announced = joined.server._connection.version = 0x204
    claims, sent = side.claims(), Recorder()
    joined.result(side.send(joined, claims, sent))
    assert sent.names == ["a", "b", "c", "d"] and side.arrived == set(side.paths)
    assert there.names.count("importPath") == 4 and side.unclaimed


def test_fewAtATime(side, monkeypatch):
    """What cannot be claimed at once is claimed later."""
    monkeypatch.setattr("nixserve.hook.claims.MAX_CLAIMED", 1)
    joined, sent = side.joined(), Recorder()
    joined.result(side.send(joined, side.claims(), sent))
    assert sent.names == ["a", "b", "c", "d"]
    assert inputs.PATIENCE_SECONDS > 60


def made(side, name="made", references=None, ca=None):
    """An output on the machine, which has what it refers to."""
    nar = makeNar(name.encode())
    info = makeInfo(name, nar, side.paths[-1:] if references is None else references, ca=ca)
    there = side.there.openSession()
    for each in side.infos:
        addObject(there, each, side.nars[each.path])
    addObject(there, info, nar)
    return info


def fetch(side, outputs):
    """
    Have outputs here.

    @return: the names of those that came.
    """
    joined, fetched = side.joined(), Recorder()
    joined.result(Deferred.fromCoroutine(fetchOutputs(side.here(), joined.client, outputs, fetched)))
    return fetched.names


def test_fetches(side):
    """Outputs come that are not here, in the order in which they refer to each other."""
    low = made(side, "low")
    top = made(side, "top", [low.path, side.paths[0]])
    assert fetch(side, plain(top.path, low.path)) == ["low", "top"]
    assert fetch(side, plain(top.path, low.path)) == []
    assert side.store.openSession().queryValidPaths([low.path, top.path]) == {low.path, top.path}


def test_fetchesNothingElse(side):
    """
    What is no output does not come: an input is here, so an output that refers to anything else is a machine's means to
    make paths valid here that nobody has asked it for.
    """
    evil = made(side, "evil", [])
    top = made(side, "top", [evil.path])
    with pytest.raises(RemoteError, match=f"'{top.path}' refers to '{evil.path}', which is neither an output of the"):
        fetch(side, plain(top.path))
    assert not side.store.openSession().queryValidPaths([evil.path, top.path])


def test_floatingOutputThatIsHere(side):
    """A floating output that is here is held to what its derivation says of it like one that comes."""
    floating = DerivationOutput(None, "r:sha256")
    ca = ContentAddress(ContentAddressMethod.NAR, hashBytes("sha256", makeNar(b"good")))
    good = made(side, "good", [], ca)
    assert fetch(side, {good.path: floating}) == ["good"]
    assert fetch(side, {good.path: floating}) == []
    with pytest.raises(RemoteError, match=f"the content address of '{side.paths[0]}' is none, but its derivation asks"):
        fetch(side, {side.paths[0]: floating})


def test_keptHere(side):
    """
    What of the outputs, or of what they refer to, was here when it was asked for is not lost to a collector that runs
    before the rest has come.
    """
    info = made(side)
    old = makeInfo("old", makeNar(b"old"))
    addObject(side.session, old, makeNar(b"old"))
    side.session.close()
    joined, fetched, here = side.joined(), Recorder(side.store.collectGarbage), side.here()
    joined.result(Deferred.fromCoroutine(fetchOutputs(here, joined.client, plain(info.path, old.path), fetched)))
    assert fetched.names == ["made"]
    expected = {info.path, old.path, *side.paths}
    assert side.store.openSession().queryValidPaths(expected) == expected


def test_fetchesNothing(side):
    """An output that the machine has not got after all is an error."""
    joined = side.joined()
    lost = makeInfo("lost", makeNar(b"")).path
    with pytest.raises(RemoteError, match=r"lost.* is not there after the build"):
        joined.result(Deferred.fromCoroutine(fetchOutputs(side.here(), joined.client, plain(lost), Recorder())))


def test_outputs():
    """All known outputs come back, and of the others those that are wanted."""
    drvPath, known, found = (StorePath(f"/nix/store/{'0' * 32}-{name}") for name in ("x.drv", "known", "x"))
    floating = DerivationOutput(None, "r:sha256")
    drv = BasicDerivation("x", {"out": DerivationOutput(known)}, frozenset(), "x", "x", (), {})
    assert knownOutputs(drv) == {known}
    assert outputsOf("m", drvPath, drv, BuildResult(BuildStatus.BUILT), [], StoreDir()) == {"out": known}
    drv = BasicDerivation("x", {"out": floating, "dev": floating}, frozenset(), "x", "x", (), {})
    result = BuildResult(BuildStatus.BUILT, builtOutputs={"out": Realisation(found)})
    assert outputsOf("m", drvPath, drv, result, ["out"], StoreDir()) == {"out": found}
    with pytest.raises(RemoteError, match=f"m does not say where the output 'dev' of '{drvPath}' is"):
        outputsOf("m", drvPath, drv, result, ["dev"], StoreDir())


def test_activities():
    """One activity for a copy and one for each path, each begun once and ended once."""
    lines = []
    infos = [makeInfo(name, makeNar(name.encode())) for name in "ab"]
    activities = CopyActivities(HookLog(3, 1), lines.append, "", "ssh://m")
    activities.planned(infos, 0)
    activities.copied(infos[0])
    activities.planned(infos[1:], 0)
    activities.copied(infos[1])
    activities.end()
    said = [json.loads(line[5:]) for line in b"".join(lines).splitlines()]
    started = [value["id"] for value in said if value["action"] == "start"]
    assert sorted(started) == sorted(value["id"] for value in said if value["action"] == "stop")
    assert [value["fields"] for value in said if value["action"] == "result"] == [[1, 2, 1, 0], [1, 1, 0, 0]]
    texts = [value["text"] for value in said if value["action"] == "start"]
    assert texts[:2] == ["copying 2 paths", f"copying path '{infos[0].path}' to 'ssh://m'"]


# --- pipes ------------------------------------------------------------------------------------------------


async def readAll(descriptor):
    """Everything up to the end."""
    got = b""
    while True:
        await whenReadable(reactor, descriptor).addTimeout(10, reactor)
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return got
        got += chunk


@pytest_twisted.ensureDeferred
async def test_pipe():
    """Everything gets through, whatever its bytes, also to a reader that is slow; then the pipe is closed."""
    reading, writing = os.pipe()
    data = bytes(range(256)) * 8192
    pipe = PipeToNix(reactor, writing, lambda: pytest.fail("nobody is gone"))
    pipe.write(data)
    ended = pipe.finish()
    got = await readAll(reading)
    await ended
    assert got == data
    os.close(reading)


@pytest_twisted.ensureDeferred
async def test_pipeOverflows(monkeypatch):
    """What a reader that has stopped does not take is dropped, and it is told how much."""
    monkeypatch.setattr(pipes, "MAX_PENDING", 4 << 20)
    reading, writing = os.pipe()
    pipe = PipeToNix(reactor, writing, lambda: None)
    for _ in range(10):
        pipe.write(b"x" * (1 << 20))
    ended = pipe.finish()
    got = await readAll(reading)
    await ended
    assert b"bytes were dropped here" in got
    assert got.count(b"x") < 6 << 20
    os.close(reading)


@pytest_twisted.ensureDeferred
async def test_readerGone():
    """Who reads the pipe being gone is told once, without anything being written; and writing does no harm then."""
    reading, writing = os.pipe()
    gone = Deferred()
    pipe = PipeToNix(reactor, writing, lambda: gone.callback(None))
    os.close(reading)
    await gone.addTimeout(5, reactor)
    pipe.write(b"x")
    await pipe.finish()
    with pytest.raises(OSError, match="Bad file descriptor"):
        fcntl.fcntl(writing, fcntl.F_GETFD)


@pytest_twisted.ensureDeferred
async def test_endsOnce():
    """A reactor that stops ends what has ended already: by then the descriptor may be somebody else's."""
    reading, writing = os.pipe()
    pipe = PipeToNix(reactor, writing, lambda: None)
    await pipe.finish()
    os.dup2(reading, writing)
    pipe._stream.connectionLost(Failure(ConnectionDone()))
    os.close(writing)
    os.close(reading)


@pytest_twisted.ensureDeferred
async def test_notAPipe(tmp_path):
    """A file takes everything at once."""
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    pipe = PipeToNix(reactor, descriptor, lambda: pytest.fail("nobody is gone"))
    pipe.write(b"some")
    pipe.write(b"thing")
    await pipe.finish()
    assert (tmp_path / "file").read_bytes() == b"something"


@pytest_twisted.ensureDeferred
async def test_whenReadable():
    """Data, and the end, can be waited for; giving up leaves nothing behind."""
    reading, writing = os.pipe()
    waiting = whenReadable(reactor, reading)
    await deferLater(reactor, 0.01)
    assert not waiting.called
    os.write(writing, b"x")
    await waiting.addTimeout(5, reactor)
    os.read(reading, 1)
    given = whenReadable(reactor, reading)
    given.addErrback(lambda _: None)
    given.cancel()
    os.close(writing)
    await whenReadable(reactor, reading).addTimeout(5, reactor)
    os.close(reading)

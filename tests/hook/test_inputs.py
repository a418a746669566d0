"""
What the build hook does once there is a machine: inputs that go there once, outputs that come back under Nix's locks,
and all that Nix hears meanwhile. The whole of it, with real Nix, is in tests/interop.
"""

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import DerivationOutput
from nixserve.codec.hashes import hashBytes
from nixserve.errors import RemoteError
from nixserve.hook import inputs
from nixserve.hook.claims import Claims
from nixserve.hook.inputs import PATIENCE_SECONDS, sendInputs
from nixserve.hook.outputs import fetchOutputs
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


def questions(joined, monkeypatch):
    """
    What the machine is asked about valid paths from now on: how many, whether it is to keep them, whether it is to try
    its own substituters.
    """
    asked, original = [], joined.client.queryValidPaths

    def query(paths, lock=False, substitute=False):
        asked.append((len(paths), lock, substitute))
        return original(paths, lock, substitute)

    monkeypatch.setattr(joined.client, "queryValidPaths", query)
    return asked


@pytest.mark.parametrize("substitute", [True, False])
def test_questions(side, monkeypatch, substitute):
    """
    Whatever the machine is asked about it is to keep; and whether to try its own substituters, it is told with the
    first question.
    """
    joined = side.joined()
    asked = questions(joined, monkeypatch)
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


def test_keptThere(side, monkeypatch):
    """The machine is asked once for outputs, and keeps them."""
    outputs = plain(made(side, "low").path, made(side, "top").path)
    joined = side.joined()
    asked = questions(joined, monkeypatch)
    joined.result(Deferred.fromCoroutine(fetchOutputs(side.here(), joined.client, outputs, Recorder())))
    assert asked == [(2, True, False)]


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

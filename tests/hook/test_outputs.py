"""
L{nixserve.hook.outputs}: what a build has made comes here, and nothing else.
"""

import pytest
from twisted.internet.defer import Deferred

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import DerivationOutput
from nixserve.codec.hashes import hashBytes
from nixserve.errors import RemoteError
from nixserve.hook.outputs import fetchOutputs
from nixserve.store.api import InvalidPath
from nixserve.testing import addObject, makeInfo, makeNar
from tests.hook.machineside import Recorder, Side, questions


@pytest.fixture
def side(tmp_path):
    """A store with four paths."""
    return Side(tmp_path)


def plain(*paths):
    """Outputs of which nobody knows what is in them."""
    return {path: DerivationOutput(path) for path in paths}


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


def test_damageHere(side):
    """What goes wrong in the store here is not told of the machine, which would be put aside for it."""
    top = made(side, "top")
    joined, lost = side.joined(), side.paths[-1]
    damage = Recorder(lambda: side.store._objects.pop(lost))
    with pytest.raises(InvalidPath) as raised:
        joined.result(Deferred.fromCoroutine(fetchOutputs(side.here(), joined.client, plain(top.path), damage)))
    assert raised.value.path == lost


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

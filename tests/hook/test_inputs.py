"""
L{nixserve.hook.inputs}: what a build needs goes to the machine once. The whole of a build, with real Nix, is in
tests/interop.
"""

import pytest

from nixserve.hook import inputs
from nixserve.hook.inputs import PATIENCE_SECONDS
from nixserve.store.api import InvalidPath
from nixserve.testing import FakeStore, ImmediateWorkers, Joined, addObject, makeInfo, makeNar
from tests.hook.machineside import Recorder, Side, questions


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

"""
L{nixserve.protocol.descriptors}: who is let in as long as there are descriptors.
"""

import os

import pytest
from twisted.internet.task import Clock

from nixserve.errors import PolicyError
from nixserve.protocol.descriptors import CONNECTION, SESSION, Descriptors
from nixserve.protocol.policy import EVERYTHING, Peer
from nixserve.protocol.sessions import ServeSessions
from nixserve.store.files import deletePath
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.store.memory import MemoryStore
from nixserve.testing import ImmediateWorkers, addObject, makeInfo, makeNar


def fill(descriptors, name, count=SESSION):
    """Take as often as it goes; how often, and what is said then."""
    for taken in range(10_000):
        try:
            descriptors.take(name, count)
        except PolicyError as error:
            return taken, str(error)
    raise AssertionError("there is no end")


def test_nobodyGetsAll():
    """One key gets half of what there is, two get all; what is given back can be had again."""
    descriptors = Descriptors(4096, workers=8, builds=3)
    most = descriptors.total // 2 // SESSION
    assert fill(descriptors, "greedy") == (
        most,
        "your key has as many connections and sessions as it may have here; end some of them",
    )
    assert fill(descriptors, "honest")[0] == most
    descriptors.giveBack("honest", SESSION)
    left = descriptors.total - (2 * most - 1) * SESSION
    assert fill(descriptors, "third") == (
        left // SESSION,
        "this server has as many connections and sessions as it can have; try again later",
    )
    descriptors.giveBack("greedy", SESSION)
    descriptors.take("fourth", CONNECTION)


def test_reserve():
    """What all have in common is not given out, and even with next to nothing somebody is served."""
    assert Descriptors(4096).total > Descriptors(4096, workers=8).total > Descriptors(4096, workers=8, builds=3).total
    assert Descriptors(4096, workers=8, builds=3).sessions > 100
    few = Descriptors(64, workers=8, builds=64)
    few.take("a", SESSION)
    few.take("b", SESSION)


def test_sessions():
    """A session that finds none is refused before it begins; the end of another makes room."""
    workers = ImmediateWorkers(Clock())
    descriptors = Descriptors(64)
    sessions = ServeSessions(MemoryStore(), workers, workers.reactor, descriptors=descriptors)
    peers = [Peer("here", "a key", number) for number in range(3)]
    first = sessions.buildSession(EVERYTHING, peers[0])
    sessions.buildSession(EVERYTHING, peers[1])
    with pytest.raises(PolicyError, match="your key has as many"):
        sessions.buildSession(EVERYTHING, peers[2])
    assert len(sessions) == 2
    first.stop()
    assert len(sessions) == 1
    sessions.buildSession(EVERYTHING, peers[2])
    sessions.buildSession(EVERYTHING, Peer("there", "", 4))


def test_whatASessionNeeds(tmp_path):
    """A session needs no more than it is given, however deep the trees are that it reads and writes."""
    store = LocalStore(StoreLayout.underRoot(str(tmp_path)), reservedSize=0)
    tree = b"x" * 1000
    for _ in range(60):
        tree = {"d": tree}
    nar = makeNar(tree)
    idle = store.openSession()
    addObject(idle, makeInfo("a", nar), nar)
    before = len(os.listdir("/proc/self/fd"))
    session, most = store.openSession(), 0
    for begin in (lambda: session.addToStore(makeInfo("b", nar)), session.importPath):
        writer = begin()
        for start in range(0, len(nar), 100):
            writer.feed(nar[start : start + 100])
            most = max(most, len(os.listdir("/proc/self/fd")) - before)
        writer.abort()
    stream = session.narFromPath(makeInfo("a", nar).path)
    for _ in stream:
        most = max(most, len(os.listdir("/proc/self/fd")) - before)
    # The socket or the pipes, the roots of a build, and the conversation with a collector come on top.
    assert most + 4 + 2 + 1 <= SESSION
    session.close()
    idle.close()
    store.close()
    deletePath(store.layout.realStoreDir)

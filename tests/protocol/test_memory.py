"""The memory that the sessions of a key may use: who waits, who goes on, who is refused."""

import itertools

import pytest
from twisted.internet.task import Clock

from nixserve.errors import PolicyError
from nixserve.protocol.limits import Limits
from nixserve.protocol.memory import LOOK_SECONDS, Memory

MIB = 1024 * 1024


class World:
    """One process's memory, of which a key may use 10 MiB, and all that are not trusted 40."""

    def __init__(self):
        self.clock = Clock()
        self.memory = Memory(self.clock, Limits(keyMemory=10 * MIB, untrustedMemory=40 * MIB))

    def session(self, key="key", trusted=True, held=0):
        """A session that begins."""
        return Holder(self, key, trusted, held)

    def later(self):
        """The time passes after which those who wait look again."""
        self.clock.advance(LOOK_SECONDS)


class Holder:
    """A session, in MiB."""

    def __init__(self, world, key, trusted, held):
        self.held = held
        self.account = world.memory.open(key, trusted, lambda: int(self.held * MIB))
        self.account.measure()
        self.waiting = None

    def grow(self, held, more=0):
        """
        It comes to hold so much, and asks for room.

        @return: whether it may go on.
        """
        self.held = held
        self.waiting = self.account.wait(more * MIB)
        return self.goesOn

    @property
    def goesOn(self):
        """Does it not wait?"""
        return self.waiting is None or self.waiting.called

    def done(self):
        """Its request is over."""
        self.held = 0
        self.account.requestEnds()


def test_roomForAll():
    """While there is room nobody waits."""
    world = World()
    sessions = [world.session() for _ in range(10)]
    assert all(session.grow(0.5) for session in sessions)
    assert world.clock.getDelayedCalls() == []


def test_oneOfManyHalfRequestsGoesOn():
    """
    When half requests of one key fill its memory all wait but the first, which may have as much again. Then it is the
    turn of the next: none waits for ever.
    """
    world = World()
    sessions = [world.session() for _ in range(10)]
    assert all(session.grow(1) for session in sessions)
    assert [session.grow(1.1) for session in sessions] == [True] + [False] * 9
    assert sessions[0].grow(9.9)
    assert not any(session.goesOn for session in sessions[1:])
    for first, second in itertools.pairwise(sessions):
        first.done()
        assert second.goesOn and second.grow(9.9)
    sessions[-1].done()
    assert world.clock.getDelayedCalls() == []


def test_tooMuchByItself():
    """A request that would not find room even if it were alone is refused, with the setting that says so."""
    world = World()
    with pytest.raises(PolicyError, match=r"more memory than the 10 MiB .*'max-key-memory'"):
        world.session().grow(5, more=6)
    small = Limits(keyMemory=100 * MIB, untrustedMemory=16 * MIB)
    with pytest.raises(PolicyError, match=r"more memory than the 4 MiB .*'max-untrusted-memory'"):
        Memory(Clock(), small).open("key", False, lambda: 5 * MIB).wait(0)


def test_keysHaveTheirOwn():
    """What one key uses up is not missed by another."""
    world = World()
    assert world.session("a").grow(9)
    assert world.session("b").grow(9)
    assert world.session("b", trusted=False).grow(9)


def test_untrustedKeysShare():
    """
    All keys without the right trust have one memory together. When it is full, a key that has less than an equal part
    of it finds room all the same, and who is trusted does not notice.
    """
    world = World()
    full = [world.session(key, trusted=False, held=10) for key in "abcd"]
    assert full[0].grow(10)
    modest, greedy = world.session("e", trusted=False), world.session("e", trusted=False)
    assert modest.grow(4, more=3)
    assert modest.grow(7)
    # Somebody is first in the line.
    assert full[1].grow(10)
    assert not greedy.grow(0, more=3)
    assert world.session("f", trusted=True).grow(9)
    modest.done()
    assert greedy.goesOn


def test_readersMakeRoomSilently():
    """Replies that are being read make room without anybody saying so: who waits looks again."""
    world = World()
    reader, first, waiting = world.session(held=9), world.session(), world.session()
    assert first.grow(0, more=2) and not waiting.grow(0, more=2)
    reader.held = 1
    world.later()
    assert waiting.goesOn
    assert world.clock.getDelayedCalls() == []


def test_endsMakeRoom():
    """A session that ends, also one that waits, frees what it held and its place."""
    world = World()
    sessions = [world.session(held=5) for _ in range(4)]
    assert [session.grow(5) for session in sessions] == [True, False, False, False]
    sessions[1].account.close()
    sessions[0].account.close()
    assert sessions[2].goesOn
    for session in sessions[2:]:
        session.account.close()
    assert world.memory._keys == {}
    assert world.clock.getDelayedCalls() == []


def test_goingOnToTheEnd():
    """Whoever goes on may end in the same moment, and so let the next one go on."""
    world = World()
    sessions = [world.session(held=5) for _ in range(10)]
    assert [session.grow(5) for session in sessions] == [True] + [False] * 9
    for session in sessions[1:]:
        session.waiting.addCallback(lambda _, session=session: session.account.close())
    sessions[0].account.close()
    assert all(session.goesOn for session in sessions)
    assert world.memory._keys == {} and world.clock.getDelayedCalls() == []


def test_givingUp():
    """Who no longer waits is not called, and keeps nobody from going on."""
    world = World()
    first, second, third = (world.session(held=4) for _ in range(3))
    assert [session.grow(4) for session in (first, second, third)] == [True, False, False]
    second.waiting.addErrback(lambda failure: None)
    second.waiting.cancel()
    first.done()
    assert third.goesOn


def test_growingLeavesHalf():
    """What only makes a session faster is taken from one half, so that requests find the other."""
    world = World()
    session = world.session(held=2)
    assert session.account.mayGrow(3 * MIB)
    assert not session.account.mayGrow(4 * MIB)

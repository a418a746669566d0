"""Which session copies what: nobody begins what refers to something that may not be there by then."""

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from nixserve.protocol.schedule import Schedule
from nixserve.testing import makeInfo, makeNar


def makeInfos(*references, size=1):
    """Infos of which each refers to those with these indexes."""
    infos = []
    for number, others in enumerate(references):
        nar = makeNar(b"%d" % number * size)
        infos.append(makeInfo(f"object-{number}", nar, [infos[other].path for other in others]))
    return infos


def names(infos):
    """Numbers, for people."""
    return [int(info.path.name.removeprefix("object-")) for info in infos]


def test_oneLane():
    """One session takes everything at once, in the order given, also what refers to what it has just taken."""
    infos = makeInfos([], [0], [], [1, 2], [0])
    schedule = Schedule(infos, 1)
    assert schedule.take(0, 100, 1 << 30) == infos
    assert schedule.exhausted and schedule.take(0, 100, 1 << 30) == []


def test_limits():
    """A batch ends with the path that reaches a limit."""
    infos = makeInfos([], [], [], size=1000)
    assert names(Schedule(infos, 1).take(0, 2, 1 << 30)) == [0, 1]
    assert names(Schedule(infos, 1).take(0, 9, infos[0].narSize + 1)) == [0, 1]
    assert names(Schedule(infos, 1).take(0, 9, 1)) == [0]


def test_twoLanes():
    """What refers to another session's path waits until that has arrived; its own it may follow at once."""
    infos = makeInfos([], [], [0, 1], [0])
    schedule = Schedule(infos, 2)
    assert names(schedule.take(0, 1, 1 << 30)) == [0]
    assert names(schedule.take(1, 100, 1 << 30)) == [1]
    assert names(schedule.take(1, 100, 1 << 30)) == []
    assert names(schedule.take(0, 100, 1 << 30)) == [3]
    changed = schedule.changed()
    schedule.arrived(infos[1])
    assert not changed.called and names(schedule.take(1, 100, 1 << 30)) == []
    schedule.arrived(infos[0])
    assert changed.called and names(schedule.take(1, 100, 1 << 30)) == [2]
    assert schedule.exhausted


def test_selfReference():
    """A path that refers to itself, or to what is not copied, waits for nothing."""
    info = makeInfo("object-0", makeNar(b"x"))
    selfish = type(info)(info.path, info.narHash, info.narSize, frozenset([info.path]))
    assert Schedule([selfish], 2).take(1, 1, 1) == [selfish]


def test_whoWaitsHearsOfTheEnd():
    """A session that waits is told when there is nothing left to wait for."""
    infos = makeInfos([], [0])
    schedule = Schedule(infos, 2)
    assert names(schedule.take(0, 1, 1)) == [0]
    changed = schedule.changed()
    assert isinstance(changed, Deferred) and not changed.called
    assert names(schedule.take(0, 9, 1 << 30)) == [1]
    assert changed.called and schedule.changed().called


@given(st.data())
def test_everythingInOrder(data):
    """
    However many sessions take whatever comes, in any order: everything is taken once, and whatever it refers to had
    arrived then, or was taken by the same session before.
    """
    count = data.draw(st.integers(0, 12))
    references = [data.draw(st.sets(st.integers(0, index - 1))) if index else set() for index in range(count)]
    infos = makeInfos(*references)
    lanes = data.draw(st.integers(1, 3))
    schedule = Schedule(infos, lanes)
    underWay, taken, arrived = [[] for _ in range(lanes)], {}, set()
    while len(arrived) < count:
        lane = data.draw(st.integers(0, lanes - 1))
        for info in schedule.take(lane, data.draw(st.integers(1, 4)), 1 << 30):
            assert info.path not in taken
            taken[info.path] = lane
            assert all(other in arrived or taken.get(other) == lane for other in info.references)
            underWay[lane].append(info)
        busy = [queue for queue in underWay if queue]
        assert busy or lanes > 1
        if busy:
            queue = data.draw(st.sampled_from(busy))
            info = queue.pop(0)
            schedule.arrived(info)
            arrived.add(info.path)
    assert schedule.exhausted

"""
L{nixserve.hook.queue}: who waits for a slot, among threads and processes.
"""

import os
import threading

import pytest

from nixserve.errors import StoreError
from nixserve.hook.queue import MAX_WAITING, MAX_WAITING_IN_ALL, WAITING_PER_SLOT, Queue
from tests.hook.machinelist import machine, machines
from tests.otherprocess import otherProcess

ONE = [machine("ssh://h1 - - 1")]


@pytest.fixture
def queue(tmp_path):
    """An empty one."""
    return Queue(str(tmp_path / "queue"), "/nix/var/nix")


def inBackground(function):
    """Run something that may block. @return: an event: it is done."""
    done = threading.Event()
    threading.Thread(target=lambda: (function(), done.set()), daemon=True).start()
    return done


def test_places(queue):
    """So many may wait for each slot; a place that is left is free again."""
    tickets = [queue.take(ONE) for _ in range(WAITING_PER_SLOT)]
    assert None not in tickets
    assert queue.take(ONE) is None
    tickets[3].leave()
    tickets[3].leave()
    assert queue.take(ONE) is not None
    assert queue.take(ONE) is None
    # Others have places of their own.
    assert queue.take([machine("ssh://h2 - - 1")]) is not None


def test_bounds(queue):
    """There are never more than so many, whatever the machines have, in a line and in all."""
    many = [machine(f"ssh://h{number} - - 1000") for number in range(MAX_WAITING_IN_ALL // MAX_WAITING + 1)]
    for one in many[:-1]:
        assert [queue.take([one]) is None for _ in range(MAX_WAITING + 1)] == [False] * MAX_WAITING + [True]
    assert queue.take(many[-1:]) is None


def test_turns(queue):
    """One at a time has the turn; when it leaves, the next one has it."""
    first, second = queue.take(ONE), queue.take(ONE)
    first.waitForTurn()
    done = inBackground(second.waitForTurn)
    assert not done.wait(0.1)
    first.leave()
    assert done.wait(5)
    second.leave()


def test_otherMachines(queue):
    """Who waits for other machines is before or behind nobody; their order in the file does not matter."""
    h1, h2 = machines("ssh://h1\nssh://h2")
    both = queue.take([h1, h2])
    both.waitForTurn()
    for others in ([h1], [h2]):
        assert inBackground(queue.take(others).waitForTurn).wait(5)
    same = queue.take([h2, h1])
    done = inBackground(same.waitForTurn)
    assert not done.wait(0.1)
    both.leave()
    assert done.wait(5)
    same.leave()


def test_otherStores(queue, tmp_path):
    """Another store has other slots on the same machines."""
    ours = queue.take(ONE)
    ours.waitForTurn()
    assert inBackground(Queue(str(tmp_path / "queue"), "/elsewhere").take(ONE).waitForTurn).wait(5)
    ours.leave()


def test_processEnds(queue, tmp_path):
    """The end of a process, however it ends, frees its place and its turn."""
    code = (
        "import sys; from nixserve.hook.queue import Queue; from tests.hook.machinelist import machine;"
        "ticket = Queue(sys.argv[1], '/nix/var/nix').take([machine('ssh://h1 - - 1')]); ticket.waitForTurn()"
    )
    with otherProcess(code, tmp_path / "queue"):
        tickets = [queue.take(ONE) for _ in range(WAITING_PER_SLOT)]
        assert tickets.pop() is None
        done = inBackground(tickets[0].waitForTurn)
        assert not done.wait(0.1)
    assert done.wait(5)
    assert queue.take(ONE) is not None


def test_private(queue, tmp_path):
    """What is made is this user's alone; what cannot be made is named."""
    queue.take(ONE).waitForTurn()
    directory = tmp_path / "queue"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    os.symlink("/etc/passwd", tmp_path / "other")
    with pytest.raises(StoreError, match=f"cannot use the directory '{tmp_path}/other'"):
        Queue(str(tmp_path / "other"), "/nix/var/nix").take(ONE)
    (tmp_path / "other").unlink()
    (tmp_path / "other").mkdir()
    os.symlink("/etc/passwd", tmp_path / "other" / "all-0")
    with pytest.raises(StoreError, match="Too many levels of symbolic links"):
        Queue(str(tmp_path / "other"), "/nix/var/nix").take(ONE)

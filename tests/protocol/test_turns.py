"""Whose call is next when there are more than threads."""

import pytest

from nixserve.protocol.turns import Turns
from nixserve.testing import ManualWorkers, result


class Shared:
    """Turns before workers that obey."""

    def __init__(self, atOnce):
        self.workers = ManualWorkers()
        self.turns = Turns(self.workers.reactor, self.workers.call, atOnce)
        self.done = []

    def call(self, client, what, atOnce=2):
        """A client's call, which notes that it has run."""
        return self.turns.of(client, atOnce).call(self.done.append, what)


def test_clientsTakeTurns():
    """Whoever has one call waits for one of each other client at most, however many those have."""
    shared = Shared(1)
    for n in range(100):
        shared.call("crowd", f"crowd {n}")
    shared.call("other", "other 0")
    shared.call("other", "other 1")
    shared.call("third", "third")
    for _ in range(6):
        assert len(shared.workers.waiting) == 1
        shared.workers.step()
    assert shared.done == ["crowd 0", "crowd 1", "other 0", "third", "crowd 2", "other 1"]
    shared.workers.drain()
    assert shared.done[6:] == [f"crowd {n}" for n in range(3, 100)]


def test_clientHasItsShareOfTheThreads():
    """One client is at work in as many threads as it may be, whatever it asks for; the others find one free."""
    shared = Shared(4)
    for n in range(100):
        shared.call("crowd", n)
    assert len(shared.workers.waiting) == 2
    shared.call("other", "other")
    assert len(shared.workers.waiting) == 3
    # Those who ask for the same client are one.
    shared.call("crowd", "late")
    assert len(shared.workers.waiting) == 3
    arrive = shared.workers.run()
    assert len(shared.workers.waiting) == 2
    arrive()
    assert len(shared.workers.waiting) == 3
    shared.workers.drain()
    assert len(shared.done) == 102


def test_resultsAndFailuresArrive():
    """What a call returns or raises comes back, and a failure frees its thread too."""
    shared = Shared(1)
    line = shared.turns.of("a", 1)
    failed, returned = line.call(lambda: 1 / 0), line.call(lambda a, b: a + b, 1, b=2)
    shared.workers.step()
    with pytest.raises(ZeroDivisionError):
        result(failed)
    assert not returned.called
    shared.workers.step()
    assert result(returned) == 3


def test_callsFromResults():
    """Who calls again when a result arrives goes behind the others."""
    shared = Shared(1)
    shared.call("a", "a 0").addCallback(lambda _: shared.call("a", "a 1"))
    shared.call("b", "b 0")
    shared.workers.drain()
    assert shared.done == ["a 0", "b 0", "a 1"]


def test_linesAreForgotten():
    """Clients that are gone leave nothing behind."""
    shared = Shared(2)
    for n in range(100):
        shared.call(f"client {n}", n)
    shared.workers.drain()
    assert len(shared.turns._lines) == 0

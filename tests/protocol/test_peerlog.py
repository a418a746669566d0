"""
Lines about peers: shown, and within a budget.
"""

import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger, capturedLogs, formatEvent
from twisted.python.failure import Failure

from nixserve.protocol.logbudget import CONNECTION, SOURCE, STRANGERS, LogBudget, LogBudgets
from nixserve.protocol.peerlog import PeerLog
from nixserve.protocol.policy import Peer


def texts(events):
    return [formatEvent(event) for event in events]


def test_wordsOfOthers():
    """Strings, bytes, errors and lists are shown; numbers and peers stay what they are."""
    peer = Peer("here", "key", 7)
    with capturedLogs() as events:
        PeerLog(Logger()).warn(
            "{peer.session} {a} {b} {c} {d}", peer=peer, a="\x1b", b=b"\x07", c=ValueError("\r"), d=["\x9b"]
        )
    assert texts(events) == [r"7 \x1b \x07 \r ['\x9b']"]
    assert events[0]["peer"] is peer


def test_tracebacksWithoutWordsOfOthers():
    """A failure keeps its type and its frames, and its words are shown."""
    try:
        raise KeyError("\x1b" * 1000)
    except KeyError:
        failure = Failure()
    with capturedLogs() as events:
        PeerLog(Logger()).failure("it broke", failure)
    shown = events[0]["log_failure"]
    assert shown.check(KeyError)
    assert "\x1b" not in shown.getTraceback()
    assert "test_tracebacksWithoutWordsOfOthers" in shown.getTraceback()
    assert len(shown.getTraceback()) < 1000


def test_deepTracebacks():
    """Of a deep recursion the innermost frames are logged, within the budget of a connection."""

    def deep(count):
        return deep(count - 1) if count else 1 / 0

    log = PeerLog(Logger(), LogBudget("x", CONNECTION, Clock().seconds))
    with capturedLogs() as events:
        try:
            deep(500)
        except ZeroDivisionError:
            log.failure("it broke")
    assert events[0]["log_failure"].check(ZeroDivisionError)


def test_spentBudget():
    """When it is spent one line says so; later the next one says how many were not written."""
    clock = Clock()
    log = PeerLog(Logger(), LogBudget("the peer", (1000, 10.0), clock.seconds))
    with capturedLogs() as events:
        for _ in range(1000):
            log.info("something")
    assert texts(events)[-1] == "there is too much to say about the peer: for now nothing more is written"
    assert sum(map(len, texts(events))) < 1100
    written = len(events) - 1
    clock.advance(60)
    with capturedLogs() as events:
        log.info("something")
        log.info("else")
    assert texts(events) == [f"something ({1000 - written} lines before this one were not written)", "else"]


def test_whatWasNotWrittenIsCounted():
    """At the end of a connection a line says how many were not written."""
    budgets = LogBudgets(Clock().seconds)
    log = PeerLog(Logger(), budgets.connection("192.0.2.1:5", "192.0.2.1"))
    with capturedLogs() as events:
        for _ in range(1000):
            log.info("something")
        log.close()
        log.close()
    assert texts(events)[-1].endswith("lines about 192.0.2.1:5 were not written")
    assert "lines about" not in texts(events)[-2]


@pytest.mark.parametrize(("sources", "most"), [(1, SOURCE[0]), (5000, STRANGERS[0])])
def test_manyConnections(sources, most):
    """Many connections of an address have what one address has, and many addresses what all strangers have."""
    budgets = LogBudgets(Clock().seconds)
    with capturedLogs() as events:
        for number in range(20_000):
            source = f"address {number % sources}"
            PeerLog(Logger(), budgets.connection(f"{source}:{number}", source)).warn("{x}", x="x" * 100)
    assert 0.9 * most < sum(len(text) + 80 for text in texts(events)) < 1.1 * most

"""
How much of the reactor's time each key gets.
"""

import pytest
import pytest_twisted
from twisted.conch.ssh.common import NS
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from nixserve.ssh import shares as sharesModule
from nixserve.ssh.shares import SHARE_SECONDS, Shares
from tests.ssh.loopback import Recorder, Server, clientFactory
from tests.waiting import until


class Turns:
    """A reactor that does what is due when it is told to, and not what comes up meanwhile."""

    def __init__(self):
        self.due = []

    def callLater(self, delay, function):
        self.due.append(function)
        return function

    def turn(self):
        due, self.due = self.due, []
        for function in due:
            function()


class Busy:
    """A connection with so many pieces of work, each of which takes as long as a share lasts."""

    def __init__(self, shares, share, pieces, order):
        self.shares, self.share, self.pieces, self.order = shares, share, pieces, order

    def workOn(self):
        self.order.append(self.share)
        self.shares.spend(self.share, SHARE_SECONDS)
        self.pieces -= 1
        if self.pieces:
            self.shares.wait(self)


def test_onePieceOfEachKey():
    """However many connections a key has, in each turn of the reactor it works no longer than others."""
    clock = Turns()
    shares, order = Shares(clock), []
    for _ in range(50):
        shares.wait(Busy(shares, "flood", 2, order))
    shares.wait(Busy(shares, "honest", 2, order))
    clock.turn()
    assert order == ["flood", "honest"]
    clock.turn()
    assert order == ["flood", "honest"] * 2
    for _ in range(99):
        clock.turn()
    assert order.count("flood") == 100
    assert not clock.due


def test_whoHasWorkedWaits():
    """What is left of a share is for this turn alone."""
    clock = Turns()
    shares = Shares(clock)
    assert shares.left("a") == SHARE_SECONDS
    shares.spend("a", SHARE_SECONDS)
    assert (shares.left("a"), shares.left("b")) == (0, SHARE_SECONDS)
    clock.turn()
    assert shares.left("a") == SHARE_SECONDS


def test_littleWorkExpectsNoTurn():
    """Small messages of somebody who is alone cost no turn of the reactor each, and use up no share for good."""
    clock = Turns()
    shares = Shares(clock)
    turns = 0
    for _ in range(100):
        assert shares.left("a") > 0
        shares.spend("a", SHARE_SECONDS / 10)
        turns += len(clock.due)
        clock.turn()
    assert turns < 20


@pytest.fixture
def server(tmp_path, monkeypatch):
    """One in which a share is over at once."""
    monkeypatch.setattr(sharesModule, "SHARE_SECONDS", 1e-9)
    server = Server(reactor, tmp_path)
    yield server
    pytest_twisted.blockon(Deferred.fromCoroutine(server.stop()))


@pytest_twisted.ensureDeferred
async def test_floodOfMessages(server):
    """Thousands of messages that say nothing do not stand before what another connection asks for; all are heard."""
    flood, honest = Recorder(), Recorder()
    await server.endpoint().connect(clientFactory(flood))
    (connection,) = server.factory.connections
    await server.endpoint().connect(clientFactory(honest))
    honest.transport.write(b"echo\n")
    await until(reactor, lambda: server.sessions.all[1].mode is not None)
    many, before = 4000, connection.incomingPacketSequence
    for _ in range(many):
        flood.transport.conn.transport.sendPacket(2, NS(b"nothing"))
    await until(reactor, lambda: connection.incomingPacketSequence > before)
    honest.transport.write(b"answer me")
    await until(reactor, lambda: honest.data == b"answer me")
    assert connection.incomingPacketSequence < before + many
    await until(reactor, lambda: connection.incomingPacketSequence == before + many)
    flood.transport.write(b"echo\nstill there")
    await until(reactor, lambda: flood.data == b"still there")

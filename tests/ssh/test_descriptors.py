"""
Connections that have logged in cost descriptors, and are counted.
"""

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from nixserve.errors import PolicyError
from nixserve.protocol.descriptors import Descriptors
from nixserve.ssh.client import SSHError
from tests.ssh.loopback import Recorder, Server, clientFactory
from tests.waiting import until, within


@pytest.fixture
def server(tmp_path):
    """A server with few descriptors."""
    server = Server(reactor, tmp_path)
    server.realm = server.factory.portal.realm
    server.realm.descriptors = Descriptors()
    server.realm.descriptors.total = 5
    yield server
    pytest_twisted.blockon(Deferred.fromCoroutine(server.stop()))


async def connect(server):
    """A connected client protocol."""
    recorder = Recorder()
    await within(reactor, 20, server.endpoint().connect(clientFactory(recorder)))
    return recorder


@pytest_twisted.ensureDeferred
async def test_connectionsOfOneKey(server):
    """One key has so many connections; one more is told why it is disconnected, and one that ends makes room."""
    recorders = [await connect(server) for _ in range(2)]
    with pytest.raises(SSHError, match="your key has as many connections and sessions as it may have here"):
        await connect(server)
    await until(reactor, lambda: len(server.factory.connections) == 2)
    recorders[0].transport.abortConnection()
    await until(reactor, lambda: len(server.factory.connections) == 1)
    await connect(server)
    assert server.realm.descriptors._taken.total() == 2


@pytest_twisted.ensureDeferred
async def test_refusedSession(server, monkeypatch):
    """A session for which there is no room is one line of error and a status, and the connection stays."""

    def refuse(policy, peer):
        raise PolicyError("there are too many")

    monkeypatch.setattr(server.sessions, "buildSession", refuse)
    recorder = await connect(server)
    await within(reactor, 20, recorder.ended)
    assert recorder.errors == b"error: there are too many\n"
    assert len(server.factory.connections) == 1

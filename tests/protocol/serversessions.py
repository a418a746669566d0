"""
Sessions of the server, each with everything around it.
"""

from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from nixserve.protocol.limits import MAX_SMALL_NAR
from nixserve.protocol.policy import EVERYTHING, Peer
from nixserve.protocol.server import ServeServer
from nixserve.testing import FakeStore, ImmediateWorkers, RecordingTransport
from tests.protocol.vectorstore import storeWith
from tests.vectors.serve.messages import CLIENT_MAGIC, SERVER_MAGIC, nar, narInfo, wire

HELLO = CLIENT_MAGIC + wire(0x207)
ANSWER = SERVER_MAGIC + wire(0x208)

# An object whose NAR is too large to be kept until it is complete.
LARGE_CONTENTS = bytes(2 * MAX_SMALL_NAR)
LARGE = narInfo("large", LARGE_CONTENTS)
ADD_LARGE = wire(9, LARGE.path, "", LARGE.narHash.hex, [], 0, LARGE.narSize, 0, [], "") + nar(LARGE_CONTENTS)


class Session:
    """One session with everything around it."""

    def __init__(self, store=None, workers=None, policy=EVERYTHING, capacity=1 << 60):
        self.store = store or FakeStore()
        self.workers = workers or ImmediateWorkers()
        self.clock = self.workers.reactor
        self.transport = RecordingTransport(capacity)
        self.server = ServeServer(self.store, self.workers, policy, Peer("here", "key", 7), self.clock)
        self.server.makeConnection(self.transport)

    def send(self, *pieces):
        """The client writes."""
        for piece in pieces:
            self.server.dataReceived(piece)
        return self

    def eof(self):
        """The client ends its side."""
        self.server.readConnectionLost()
        return self

    def lose(self, reason=None):
        """The connection is gone."""
        self.server.connectionLost(Failure(reason or ConnectionDone()))
        return self

    def step(self, count=1):
        """Workers run."""
        for _ in range(count):
            self.workers.step()
        return self

    def drain(self):
        """Workers run until nothing is left."""
        self.workers.drain()
        return self

    @property
    def replies(self):
        """What was written behind the hello."""
        assert self.transport.written.startswith(ANSWER)
        return bytes(self.transport.written[len(ANSWER) :])

    @property
    def errors(self):
        """Standard error."""
        return self.transport.errors.decode()

    def ended(self, status, error=""):
        """Check that the session has ended, and that it ended once and cleanly."""
        assert (self.transport.status, self.errors) == (status, error)
        assert self.server.ended.called
        assert self.store.names.count("close") == len(self.store.sessions) <= 1
        if self.store.sessions:
            assert self.store.calls[-1][0] == "close"
        assert self.transport.exits == 1 and self.transport.late == b""
        assert self.clock.getDelayedCalls() == []
        return self


def sessionOf(*infos, **more):
    """A session on a store with some paths."""
    return Session(storeWith(*infos), **more)

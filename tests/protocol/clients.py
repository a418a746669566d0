"""
Clients: joined to our server in memory, and alone.
"""

from nixserve import testing
from nixserve.protocol.client import ServeClient
from nixserve.protocol.policy import EVERYTHING
from nixserve.protocol.workers import Door
from nixserve.testing import ImmediateWorkers, ManualWorkers, RecordingTransport, result
from tests.protocol.vectorstore import storeWith
from tests.vectors.serve.messages import CONTENTS, SERVER_MAGIC, STORE_DIR, nar, wire

ANSWER = SERVER_MAGIC + wire(0x208)
"""What a server of ours begins with."""

CLIENTS = []
"""All that L{clientOf} and L{Joined} have made, until somebody takes them away."""


def clientOf(*arguments):
    """A client, whose C{ready} need not be of interest."""
    CLIENTS.append(ServeClient(STORE_DIR, *arguments))
    return CLIENTS[-1]


class Joined(testing.Joined):
    """A client and a server with everything around them."""

    def __init__(self, *infos, policy=EVERYTHING, cut=1 << 20, workers=None):
        workers = workers or ImmediateWorkers()
        super().__init__(storeWith(*infos), policy=policy, piece=cut, workers=workers, name="")
        CLIENTS.append(self.client)
        # What the client sends comes from a store of its own.
        self.clientWorkers = ManualWorkers()
        self.door = Door(self.clientWorkers)

    def work(self):
        """Workers of both sides run."""
        self.clientWorkers.drain()
        super().work()

    def add(self, info, *chunks):
        """Send a path."""
        chunks = chunks or [nar(CONTENTS[info.path])]
        return self.client.addToStoreNar(info, self.door, lambda: iter(chunks))


def alone(**arguments):
    """A client that has been greeted, with a transport that records what follows."""
    client, transport = ServeClient(STORE_DIR, **arguments), RecordingTransport()
    client.makeConnection(transport)
    client.dataReceived(ANSWER)
    assert result(client.ready) == client.version == 0x208
    del transport.written[:]
    return client, transport

"""
A client that goes away after any byte of a conversation: the session ends as real Nix's would, and what had been
completed by then is there, nothing else.

In this process and on one thread, for speed; that the real process does the same is seen in the conversations with both
servers.
"""

import pytest
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher

from nixserve.protocol.policy import EVERYTHING, Peer
from nixserve.protocol.server import ServeServer
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.testing import ImmediateWorkers, RecordingTransport, makeInfo, makeNar
from tests.interop.conversations import (
    addToStoreNar,
    converse,
    dumpStorePath,
    exportItem,
    hello,
    importPaths,
    queryClosure,
    queryPathInfos,
    queryValidPaths,
)
from tests.interop.stores import assertVerified, isSent, temporaryRoots


class Script:
    """
    A conversation about two objects of its own, so that any number can follow each other on one store.

    @ivar data: all of it.
    @ivar boundaries: where one command ends and the next begins.
    @ivar added: the objects, each with the offset from which on it is complete.
    """

    def __init__(self, number):
        nar = makeNar({"file": b"some text", "link": "file"})
        first = makeInfo(f"eof-{number:05}-a", nar)
        second = makeInfo(f"eof-{number:05}-b", nar, [first.path])
        commands = [
            hello(),
            queryValidPaths([first.path, second.path]),
            addToStoreNar(first, nar),
            importPaths(exportItem(nar, second.path, [first.path])),
            queryPathInfos([first.path, second.path]),
            queryClosure([second.path]),
            dumpStorePath(first.path),
        ]
        self.data = b"".join(commands)
        self.boundaries = [len(b"".join(commands[: end + 1])) for end in range(len(commands))]
        # The last word of an export stream says that no more objects follow: this one is complete before.
        self.added = {first.path: self.boundaries[2], second.path: self.boundaries[3] - 8}

    def expectedStatus(self, size):
        """What real Nix does at an end of input there: between commands, and within a number of one, all is well."""
        return 0 if any(0 <= size - boundary < 8 for boundary in self.boundaries) else 1


@pytest.fixture
def quiet():
    """No log: it would have an event or more for each byte."""
    observers = list(globalLogPublisher._observers)
    for observer in observers:
        globalLogPublisher.removeObserver(observer)
    yield
    for observer in observers:
        globalLogPublisher.addObserver(observer)


def play(store, data, pieces):
    """Feed a session some bytes in pieces of some size, then the end of input."""
    transport = RecordingTransport()
    server = ServeServer(store, ImmediateWorkers(), EVERYTHING, Peer("test"), Clock())
    server.makeConnection(transport)
    for start in range(0, len(data), pieces):
        server.dataReceived(data[start : start + pieces])
    server.readConnectionLost()
    assert server.ended.called
    return transport


@pytest.mark.parametrize("pieces", [1 << 20, 7])
def test_everyByte(nix, directory, pieces, quiet):
    """At every byte: status, at most one line of error, what is registered, no root and no lock left."""
    root = directory / "root"
    store = LocalStore(StoreLayout.underRoot(str(root)))
    try:
        for size in range(len(Script(0).data) + 1):
            script = Script(size)
            transport = play(store, script.data[:size], pieces)
            status = script.expectedStatus(size)
            assert (size, transport.status) == (size, status)
            assert transport.errors == (b"error: unexpected end-of-file\n" if status else b""), size
            session = store.openSession()
            expected = {path for path, complete in script.added.items() if size >= complete}
            assert session.queryValidPaths(script.added) == expected, size
            session.close()
            assert temporaryRoots(root) == []
            assert not any(isSent(root, path) for path in script.added)
    finally:
        store.close()
    assertVerified(nix, root)


def test_expectation(nix, directory):
    """What is expected above is what real Nix does."""
    script = Script(0)
    sizes = [
        0,
        4,
        8,
        15,
        *range(16, len(script.data) + 1, 37),
        *script.boundaries,
        *(end + 5 for end in script.boundaries),
    ]
    for size in sorted(set(sizes)):
        root = directory / str(size)
        outcome = converse(nix, ["nix-store", "--serve", "--write", "--store", root], script.data[:size])
        assert (size, outcome.status) == (size, script.expectedStatus(min(size, len(script.data))))
        valid = {
            path
            for path in script.added
            if nix.run("nix-store", "--check-validity", path, store=root, check=False).returncode == 0
        }
        assert valid == {path for path, complete in script.added.items() if size >= complete}

"""The client's requests that are more than one message, cancelling, and the end of a session."""

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ProcessDone, ProcessTerminated
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from nixserve.codec.messages import BuildOptions, ImportItem
from nixserve.codec.serve import writeExportMarker, writeImportItem
from nixserve.errors import LocalProtocolError, RemoteError
from nixserve.protocol.client import CLOSE_SECONDS, RemoteFailure, ServeClient
from nixserve.protocol.workers import Door
from nixserve.testing import ImmediateWorkers, ManualWorkers, RecordingTransport, result
from tests.protocol.clients import ANSWER, Joined, alone
from tests.vectors.serve.messages import (
    APP,
    CLIENT_MAGIC,
    CONTENTS,
    DERIVATION,
    LIB,
    ONES_DRV,
    STORE_DIR,
    ZEROS,
    nar,
    wire,
)

NARS = [nar(CONTENTS[LIB.path]), nar(CONTENTS[APP.path])]


# --- several paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_addToStoreNars(size):
    """The NARs of several paths come in pieces cut anywhere; each path arrives with its own, and is acknowledged."""
    joined = Joined(workers=ManualWorkers())
    together = b"".join(NARS)
    pieces = [together[start : start + size] for start in range(0, len(together), size)]
    acknowledged = []
    added = joined.client.addToStoreNars([LIB, APP], joined.door, lambda: iter(pieces), acknowledged.append)
    assert joined.result(added) is None and acknowledged == [LIB, APP]
    assert joined.store.inner.lookUp([LIB.path])[LIB.path].nar == NARS[0]
    assert joined.store.inner.lookUp([APP.path])[APP.path].nar == NARS[1]


def test_nothingToAdd():
    """No paths are no request."""
    client, transport = alone()
    assert result(client.addToStoreNars([], Door(ImmediateWorkers()), lambda: iter([]))) is None
    assert transport.written == b""


def test_narMissing():
    """Paths without a NAR are noticed before anything else is sent in its place."""
    joined = Joined()
    added = joined.client.addToStoreNars([LIB, APP], joined.door, lambda: iter(NARS[:1]))
    later = joined.client.queryValidPaths([])
    joined.flush()
    with pytest.raises(LocalProtocolError, match="or before the last"):
        result(added)
    with pytest.raises(RemoteError):
        result(later)


def test_refusalNamesThePath():
    """The error says which path the remote was at, and what it said."""
    client, _ = alone(name="ssh://host")
    added = client.addToStoreNars([LIB, APP], Door(ImmediateWorkers()), lambda: iter(NARS))
    client.dataReceived(wire(1))
    client.errorReceived(b"error: no space left\n")
    client.connectionLost(Failure(ProcessTerminated(1)))
    with pytest.raises(RemoteFailure) as caught:
        result(added)
    assert str(caught.value) == f"ssh://host: adding '{APP.path}': the remote said: error: no space left"
    assert (caught.value.path, caught.value.said) == (APP.path, "error: no space left")


# --- export streams -------------------------------------------------------------------------------------------


def stream():
    """An export stream of two objects, in the pieces that a store gives."""
    pieces = []
    for info, archive in zip([LIB, APP], NARS, strict=True):
        pieces += [writeExportMarker(True), archive, writeImportItem(ImportItem(info.path, info.references, None))]
    return [*pieces, writeExportMarker(False)]


def test_importPaths():
    """An export stream is sent as it is, and what is asked behind it follows it."""
    joined = Joined(workers=ManualWorkers())
    imported = joined.client.importPaths(joined.door, lambda: iter(stream()))
    later = joined.client.queryValidPaths([LIB.path, APP.path])
    assert joined.result(imported) is None
    assert result(later) == {LIB.path, APP.path}


def test_exportPaths():
    """The NARs of an export stream and what each of them is arrive in order; replies behind it are told apart."""
    joined = Joined(LIB, APP)
    seen, data = [], bytearray()

    def item(found):
        seen.append((found.path, bytes(data)))
        data.clear()

    exported = joined.client.exportPaths([APP.path, LIB.path], data.extend, item)
    later = joined.client.queryValidPaths([LIB.path])
    assert joined.result(exported) is None and result(later) == {LIB.path}
    assert seen == [(LIB.path, NARS[0]), (APP.path, NARS[1])] and not data


# --- cancelling -----------------------------------------------------------------------------------------------


def test_cancelledQuery():
    """A query that is given up costs nobody else anything: the answer is passed over."""
    client, transport = alone()
    first, second = client.queryValidPaths([ZEROS]), client.queryValidPaths([])
    first.cancel()
    client.dataReceived(wire([ZEROS], []))
    with pytest.raises(CancelledError):
        result(first)
    assert result(second) == frozenset() and not transport.aborted


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.dumpStorePath(LIB.path, lambda data: None),
        lambda client: client.exportPaths([LIB.path], lambda data: None, lambda item: None),
        lambda client: client.buildDerivation(ONES_DRV, DERIVATION, BuildOptions()),
        lambda client: client.buildPaths([str(ONES_DRV)]),
        lambda client: client.addToStoreNars([LIB], Door(ManualWorkers()), lambda: iter(NARS)),
        lambda client: client.addToStoreNars([LIB], Door(ImmediateWorkers()), lambda: iter(NARS[:1])),
        lambda client: client.importPaths(Door(ManualWorkers()), lambda: iter(stream())),
    ],
)
def test_cancelledUnderWay(ask):
    """What cannot be stopped otherwise is stopped by cutting the connection; the others hear why."""
    client, transport = alone()
    given, other = ask(client), client.queryValidPaths([])
    given.cancel()
    with pytest.raises(CancelledError):
        result(given)
    with pytest.raises(RemoteError, match="has been cancelled"):
        result(other)
    assert transport.aborted and transport.late == b""
    client.connectionLost()


def test_cancelledBeforeItsTurn():
    """What waits for its turn to be sent can be taken back without harm."""
    client, transport = alone()
    workers = ManualWorkers()
    first = client.addToStoreNars([LIB], Door(workers), lambda: iter(NARS[:1]))
    requests = [
        client.buildDerivation(ONES_DRV, DERIVATION),
        client.dumpStorePath(LIB.path, lambda data: None),
        client.addToStoreNars([APP], Door(workers), lambda: iter(NARS[1:])),
        client.queryClosure([ZEROS]),
    ]
    last = client.queryValidPaths([ZEROS])
    for request in requests:
        request.cancel()
        with pytest.raises(CancelledError):
            result(request)
    workers.drain()
    client.dataReceived(wire(1, [ZEROS]))
    assert result(first) is None and result(last) == {ZEROS} and not transport.aborted
    assert transport.written.endswith(NARS[0] + wire(1, 0, 0, [ZEROS]))


def test_cancelledBeforeTheHello():
    """A build that waits for the version can be taken back too."""
    client, transport = ServeClient(STORE_DIR), RecordingTransport()
    client.makeConnection(transport)
    build = client.buildPaths([str(ONES_DRV)])
    build.cancel()
    with pytest.raises(CancelledError):
        result(build)
    later = client.queryValidPaths([])
    client.dataReceived(ANSWER + wire([]))
    assert result(later) == frozenset() and not transport.aborted
    assert transport.written == CLIENT_MAGIC + wire(0x208, 1, 0, 0, [])


# --- the end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (ProcessTerminated(255), "it exited with status 255"),
        (ProcessTerminated(None, 9), "it was killed by signal 9"),
        (ProcessDone(0), "it ended the session"),
        (ConnectionDone(), "it ended the session"),
        (OSError(5, "bad wire"), "bad wire"),
    ],
)
def test_howItEnded(reason, text):
    """A remote that says nothing is at least described."""
    client, _ = alone(name="ssh://host")
    request = client.dumpStorePath(LIB.path, lambda data: None)
    client.dataReceived(NARS[0][:20])
    client.connectionLost(Failure(reason))
    with pytest.raises(RemoteError, match=text) as caught:
        result(request)
    assert str(caught.value).startswith(f"ssh://host: fetching '{LIB.path}': unexpected end-of-file: ")


def test_closeLosesPatience():
    """A remote that does not end when it should is cut off after a while; one that does is not."""
    clock = Clock()
    client, transport = alone(clock=clock)
    closed = client.close()
    clock.advance(CLOSE_SECONDS - 0.1)
    assert not transport.aborted and not closed.called
    clock.advance(0.2)
    assert transport.aborted and transport.late == b""
    client.connectionLost()
    assert result(closed) is None
    client, transport = alone(clock=clock)
    closed = client.close()
    client.connectionLost()
    assert result(closed) is None and not clock.getDelayedCalls()


def test_block():
    """The session ends with its block: in order, or at once if something went wrong in it."""
    joined = Joined(LIB)

    async def inOrder():
        async with joined.client as client:
            return await client.queryValidPaths([LIB.path])

    assert joined.result(Deferred.fromCoroutine(inOrder())) == {LIB.path}
    assert joined.pair.serverSide.status == 0 and not joined.pair.clientSide.aborted
    joined = Joined(LIB)

    async def failing():
        async with joined.client:
            raise ValueError("my own")

    failed = Deferred.fromCoroutine(failing())
    joined.flush()
    with pytest.raises(ValueError, match="my own"):
        result(failed)
    assert joined.pair.clientSide.aborted
    joined.client.ready.addErrback(lambda _: None)

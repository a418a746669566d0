"""The client, joined to our server in memory, and alone with what a bad server says."""

import pytest
from twisted.internet.error import ConnectionDone, ProcessTerminated
from twisted.python.failure import Failure

from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.messages import BuildDerivation, BuildOptions, BuildPaths, BuildPathsResult, Command
from nixserve.codec.serve import writeReply, writeRequest
from nixserve.errors import LocalProtocolError, NixServeError, RemoteError
from nixserve.protocol.client import MAX_REMOTE_ERROR, MAX_SAID_LINES, ServeClient
from nixserve.protocol.policy import READ_ONLY
from nixserve.testing import ImmediateWorkers, ManualWorkers, RecordingTransport, result
from tests.protocol.clients import ANSWER, CLIENTS, Joined, clientOf
from tests.vectors.serve.messages import (
    APP,
    CLIENT_MAGIC,
    CONTENTS,
    DERIVATION,
    LIB,
    ONES_DRV,
    SERVER_MAGIC,
    STORE_DIR,
    ZEROS,
    nar,
    narInfo,
    path,
    wire,
)

CHUNK = bytes(256 * 1024)


@pytest.fixture(autouse=True)
def readyIsOfNoInterest(logged):
    """That a client did not become ready is a failure which its test need not handle."""
    yield
    while CLIENTS:
        CLIENTS.pop().ready.addErrback(lambda failure: None)


@pytest.fixture(params=[(1 << 20, ImmediateWorkers), (1, ImmediateWorkers), (1000, ManualWorkers)])
def joined(request):
    """A pair, with bytes cut in several ways and workers of both kinds."""
    cut, workers = request.param
    return Joined(LIB, APP, cut=cut, workers=workers())


def test_ready(joined):
    """The version that both speak."""
    assert joined.result(joined.client.ready) == 0x208


def test_queries(joined):
    """Every query says what is there."""
    client = joined.client
    asked = [LIB.path, APP.path, path("missing")]
    assert joined.result(client.queryValidPaths(asked)) == {LIB.path, APP.path}
    infos = joined.result(client.queryPathInfos(asked))
    assert infos.keys() == {LIB.path, APP.path}
    assert infos[APP.path].narHash == APP.narHash and infos[APP.path].references == APP.references
    assert joined.result(client.queryClosure([APP.path])) == {LIB.path, APP.path}
    assert joined.result(client.queryClosure([LIB.path], includeOutputs=True)) == {LIB.path}
    assert joined.result(client.queryPathInfos([])) == {}


def test_flagsTravel():
    """What the client asks for is what the server hears."""
    transport = RecordingTransport()
    client = ServeClient(STORE_DIR)
    client.makeConnection(transport)
    for request in (
        client.queryValidPaths([ZEROS], lock=True),
        client.queryValidPaths([ZEROS], substitute=True),
        client.queryClosure([ZEROS], includeOutputs=True),
    ):
        assert not request.called
    assert transport.written == CLIENT_MAGIC + wire(0x208) + wire(1, 1, 0, [ZEROS], 1, 0, 1, [ZEROS], 7, 1, [ZEROS])


def test_dumpStorePath(joined):
    """A NAR arrives whole, in order, before the Deferred fires."""
    pieces = []
    assert joined.result(joined.client.dumpStorePath(APP.path, pieces.append)) is None
    assert b"".join(pieces) == nar(CONTENTS[APP.path])


def test_addToStoreNar():
    """A path arrives with all that is known about it."""
    joined = Joined(workers=ManualWorkers())
    assert joined.result(joined.add(LIB)) is None
    assert joined.store.inner.lookUp([LIB.path])[LIB.path].info == LIB


def test_pipelining():
    """Requests are sent without waiting for replies; each gets its own, in order."""
    joined = Joined(workers=ManualWorkers())
    done, pieces = [], []
    requests = [
        joined.client.queryValidPaths([LIB.path]),
        joined.add(LIB),
        joined.add(APP),
        joined.client.queryValidPaths([LIB.path, APP.path]),
        joined.client.dumpStorePath(LIB.path, pieces.append),
        joined.client.queryClosure([APP.path]),
    ]
    for number, request in enumerate(requests):
        request.addCallback(lambda value, number=number: done.append((number, value)))
    joined.clientWorkers.drain()
    assert joined.pair.clientSide.written.endswith(wire(3, LIB.path, 7, 0, [APP.path]))
    assert done == []
    joined.flush()
    both = {LIB.path, APP.path}
    assert done == [(0, frozenset()), (1, None), (2, None), (3, both), (4, None), (5, both)]
    assert b"".join(pieces) == nar(CONTENTS[LIB.path])


def test_requestsFromReplies():
    """A reply may lead to the next request."""
    joined = Joined(LIB)
    second = joined.client.queryValidPaths([LIB.path]).addCallback(joined.client.queryPathInfos)
    assert joined.result(second).keys() == {LIB.path}


def test_requestsBeforeTheHello():
    """Requests made before the server has said anything are sent at once."""
    joined = Joined(LIB)
    request = joined.client.queryValidPaths([LIB.path])
    assert joined.pair.clientSide.written == CLIENT_MAGIC + wire(0x208) + wire(1, 0, 0, [LIB.path])
    assert joined.result(request) == {LIB.path}


def test_slowServer():
    """A server that takes nothing stops the reading on our side."""
    joined = Joined(workers=ManualWorkers())
    big = narInfo("big", bytes(64 * len(CHUNK)))
    archive = nar(bytes(64 * len(CHUNK)))
    read = []

    def chunks():
        for start in range(0, len(archive), len(CHUNK)):
            read.append(start)
            yield archive[start : start + len(CHUNK)]

    added = joined.client.addToStoreNar(big, joined.door, chunks)
    joined.clientWorkers.drain()
    assert len(read) == 4
    joined.flush()
    assert result(added) is None and len(read) == 65
    assert joined.pair.clientSide.mostUnread < 1 << 20
    assert list(joined.store.inner.lookUp([big.path])) == [big.path]


def test_close():
    """Closing ends the session on the other side too, and may be done twice."""
    joined = Joined(LIB)
    joined.result(joined.client.queryValidPaths([LIB.path]))
    first, second = joined.client.close(), joined.client.close()
    joined.flush()
    assert result(first) is None and result(second) is None
    assert joined.pair.serverSide.status == 0 and joined.server.ended.called
    assert result(joined.client.close()) is None
    with pytest.raises(NixServeError):
        result(joined.client.queryValidPaths([]))


def test_remoteRefuses():
    """Every request fails with what the remote says, those under way, those not sent, and those made later."""
    joined = Joined(LIB, policy=READ_ONLY)
    before = joined.client.queryValidPaths([LIB.path])
    failing = [
        joined.add(APP),
        joined.client.queryValidPaths([LIB.path]),
        joined.client.dumpStorePath(LIB.path, lambda data: None),
        joined.add(LIB),
    ]
    joined.flush()
    assert result(before) == {LIB.path}
    for request in (*failing, joined.client.queryValidPaths([]), joined.add(LIB)):
        with pytest.raises(RemoteError, match="the remote said: error: importing paths is not allowed"):
            result(request)
    assert joined.said == b"error: importing paths is not allowed\n"
    assert result(joined.client.close()) is None


def test_requestsBehindAStuckNar():
    """Requests that wait behind a NAR whose sending is stuck fail too when the connection goes."""
    joined = Joined()
    joined.pair.clientSide.capacity = 1
    requests = [joined.add(LIB, *[CHUNK] * 9), joined.add(APP), joined.client.queryValidPaths([])]
    joined.clientWorkers.drain()
    joined.pair.lose()
    for request in requests:
        with pytest.raises(RemoteError):
            result(request)
    joined.clientWorkers.drain()
    assert joined.pair.clientSide.producer is None


@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        ([nar(b"hi\n")[:-8]], "the NARs end 8 bytes early"),
        ([nar(b"hi\n"), b"12345678"], "more bytes of NARs than their sizes say"),
    ],
)
def test_narOfAnotherSize(chunks, text):
    """A NAR that does not have its size kills the session: the server would take the rest for something else."""
    joined = Joined()
    added, later = joined.add(LIB, *chunks), joined.client.queryValidPaths([])
    joined.flush()
    with pytest.raises(LocalProtocolError, match=text):
        result(added)
    with pytest.raises(RemoteError, match=text):
        result(later)
    assert joined.pair.clientSide.aborted and joined.server.ended.called


def test_readingFails():
    """What cannot be read on our side is what its sender hears, and the session is over for the others."""
    joined = Joined()

    def chunks():
        yield nar(b"hi\n")[:50]
        raise OSError(5, "bad disk")

    added, later = joined.client.addToStoreNar(LIB, joined.door, chunks), joined.client.queryValidPaths([])
    joined.flush()
    with pytest.raises(OSError, match="bad disk"):
        result(added)
    with pytest.raises(RemoteError, match="bad disk"):
        result(later)
    assert joined.store.valid([LIB]) == []


def test_lostConnection():
    """A connection that breaks fails what was asked."""
    joined = Joined(LIB, workers=ManualWorkers())
    request = joined.client.queryValidPaths([LIB.path])
    joined.pair.lose()
    joined.work()
    with pytest.raises(RemoteError, match="unexpected end-of-file"):
        result(request)
    with pytest.raises(RemoteError):
        result(joined.client.ready)
    assert joined.client.ended.called and joined.server.ended.called


# --- alone --------------------------------------------------------------------------------------------------


def alone():
    """A client with a transport that records."""
    client, transport = clientOf(), RecordingTransport()
    client.makeConnection(transport)
    return client, transport


def test_textInsteadOfHello():
    """What a login shell says is in the error, and the connection is aborted; what comes then is not kept."""
    client, transport = alone()
    request = client.queryValidPaths([])
    client.dataReceived(b"This account is currently not available.\n")
    for deferred in (client.ready, request):
        with pytest.raises(RemoteError, match="protocol mismatch, got b'This account"):
            result(deferred)
    assert transport.aborted
    buffered = client._connection.buffered
    client.dataReceived(b"more")
    assert client._connection.buffered == buffered
    client.connectionLost(Failure(ConnectionDone()))
    assert transport.late == b""


def test_errorTextExplains():
    """What the remote said on standard error is the reason, not what it broke by going away."""
    client, _ = alone()
    client.errorReceived(b"bash: nix-sto")
    client.errorReceived(b"re: command not found\n")
    client.connectionLost(Failure(ProcessTerminated(127)))
    with pytest.raises(RemoteError, match=r"^the remote said: bash: nix-store: command not found$"):
        result(client.ready)


def test_errorTextIsBounded():
    """Of much that was said the end is kept, of which an error shows the last lines."""
    client, _ = alone()
    for n in range(10_000):
        client.errorReceived(b"line %d\n" % n)
    client.connectionLost()
    with pytest.raises(RemoteError) as caught:
        result(client.ready)
    assert caught.value.said.splitlines() == [f"line {n}" for n in range(10_000 - MAX_SAID_LINES, 10_000)]
    assert str(caught.value) == f"the remote said: {caught.value.said}"


def test_errorTextWithoutLinesIsBounded():
    """Much that was said in one line is cut."""
    client, _ = alone()
    for _ in range(10):
        client.errorReceived(b"x" * MAX_REMOTE_ERROR)
    client.connectionLost()
    with pytest.raises(RemoteError) as caught:
        result(client.ready)
    assert caught.value.said == "x" * MAX_REMOTE_ERROR


def test_errorTextMayBeAnyBytes():
    """What is no text is replaced and not an error."""
    client, _ = alone()
    client.errorReceived(b"\xff\xfe")
    client.connectionLost()
    with pytest.raises(RemoteError, match="\ufffd\ufffd"):
        result(client.ready)


BUILDS = [BuildDerivation(ONES_DRV, DERIVATION, BuildOptions(keepFailed=True)), BuildPaths((str(ONES_DRV),))]


def test_builds():
    """Builds are asked for with their options, and what comes of them is the result, failures too."""
    client, transport = alone()
    client.dataReceived(ANSWER)
    assert result(client.ready) == 0x208
    del transport.written[:]
    derivation = client.buildDerivation(ONES_DRV, DERIVATION, BuildOptions(keepFailed=True))
    paths = client.buildPaths([str(ONES_DRV)])
    assert transport.written == b"".join(writeRequest(request, 0x208) for request in BUILDS)
    built = BuildResult(BuildStatus.BUILT, "", 1, False, 10, 20, {"out": Realisation(ZEROS)})
    failed = BuildPathsResult(100, "build of '/nix/store/x.drv' failed")
    client.dataReceived(writeReply(Command.BUILD_DERIVATION, built, 0x208))
    client.dataReceived(writeReply(Command.BUILD_PATHS, failed, 0x208))
    assert result(derivation) == built and result(paths) == failed


@pytest.mark.parametrize("version", [0x201, 0x206, 0x208])
def test_buildsBeforeTheHello(version):
    """What looks different in each version, and all behind it, waits until the version is known."""
    client, transport = alone()
    client.buildDerivation(ONES_DRV, DERIVATION, BuildOptions(keepFailed=True))
    client.queryValidPaths([ZEROS])
    assert transport.written == CLIENT_MAGIC + wire(0x208)
    client.dataReceived(SERVER_MAGIC + wire(version))
    assert result(client.ready) == version
    expected = CLIENT_MAGIC + wire(0x208) + writeRequest(BUILDS[0], version) + wire(1, 0, 0, [ZEROS])
    assert transport.written == expected


def test_buildsWithoutAHello():
    """Builds fail like everything else if there is never a version."""
    client, transport = alone()
    requests = [client.buildPaths([str(ZEROS)]), client.buildDerivation(ONES_DRV, DERIVATION)]
    client.connectionLost(Failure(ProcessTerminated(127)))
    for deferred in (client.ready, *requests):
        with pytest.raises(RemoteError):
            result(deferred)
    assert transport.written == CLIENT_MAGIC + wire(0x208)


def test_everybodyIsFailedByABadReply():
    """A reply that breaks a rule fails all requests, the connection is aborted."""
    client, transport = alone()
    requests = [client.queryValidPaths([]), client.queryClosure([])]
    client.dataReceived(ANSWER + b"Cannot allocate memory\n")
    assert result(client.ready) == 0x208
    for request in requests:
        with pytest.raises(RemoteError, match="the text 'Cannot a'"):
            result(request)
    assert transport.aborted
    client.connectionLost()
    assert client.ended.called and transport.late == b""


def test_surplusBytes():
    """Bytes that nobody asked for kill the connection."""
    client, transport = alone()
    request = client.queryValidPaths([])
    client.dataReceived(ANSWER + wire([]) + b"x")
    assert result(request) == frozenset() and transport.aborted
    with pytest.raises(RemoteError, match="a reply that nobody asked for"):
        result(client.queryValidPaths([]))
    result(client.ready)
    assert transport.late == b""


def test_oldServer():
    """A server of another major version is refused by what it says."""
    client, _ = alone()
    client.dataReceived(SERVER_MAGIC + wire(0x101))
    with pytest.raises(RemoteError, match=r"unsupported 'nix-store --serve' protocol version 1\.1"):
        result(client.ready)


def test_cancelledRequest():
    """A request that is cancelled no longer matters; those behind it get their own replies."""
    client, _ = alone()
    first, second = client.queryValidPaths([]), client.queryClosure([])
    first.addErrback(lambda failure: None)
    first.cancel()
    client.dataReceived(ANSWER + wire([]) + wire([ZEROS]))
    assert result(second) == {ZEROS}
    result(client.ready)


def test_connectionLostWithoutRequests():
    """A connection that ends while nothing is asked is no failure, but nothing can be asked any more."""
    client, _ = alone()
    client.dataReceived(ANSWER)
    result(client.ready)
    client.connectionLost()
    assert client.ended.called

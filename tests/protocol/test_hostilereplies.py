"""
A remote that answers more than it was asked, or without end: the client keeps nothing but answers to its questions,
and no reply is larger than the question allows.
"""

import itertools

import pytest
from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.messages import Command
from nixserve.codec.serve import (
    EXPORT_MAGIC,
    MAX_ERROR_SIZE,
    MAX_INFOS_ASKED,
    MAX_SIGNATURE_SIZE,
    MAX_SIGNATURES,
    readRequest,
    writeReply,
)
from nixserve.codec.wire import MAX_REPLY_SIZE, MAX_SET_SIZE, Reader
from nixserve.errors import RemoteError
from nixserve.protocol.client import ServeClient
from nixserve.protocol.copying import copyClosure
from nixserve.store.memory import MemoryStore
from nixserve.testing import Joined, RecordingTransport, addObject, makeInfo, makeNar, result
from tests.protocol.clients import alone
from tests.vectors.serve.messages import DERIVATION, LIB, ONES_DRV, SERVER_MAGIC, STORE_DIR, ZEROS, nar, path, wire

PIECE = 256 * 1024
ONES = path("ones")
DIGEST = "sha256:" + "0" * 52


def info(path, references=(), sigs=(), ca=""):
    """A path info on the wire."""
    return wire(path, "", list(references), 120, 120, DIGEST, ca, list(sigs))


def attack(client, transport, reply):
    """
    Send a reply, cut anywhere, until the client has had enough.

    @return: how many bytes it took.
    """
    sent, pending = 0, bytearray()
    for piece in itertools.chain(reply, [None]):
        pending += piece or b""
        if (len(pending) >= PIECE or piece is None) and not transport.aborted:
            client.dataReceived(bytes(pending))
            sent += len(pending)
            pending.clear()
        if transport.aborted:
            break
    client.connectionLost(Failure(ConnectionDone()))
    return sent


def refused(ask, reply, match, most=2 * PIECE):
    """The client ends the session for C{match}, before it has taken C{most} bytes."""
    client, transport = alone()
    asked = ask(client)
    sent = attack(client, transport, reply)
    with pytest.raises(RemoteError, match=match) as caught:
        result(asked)
    assert transport.aborted and transport.late == b"" and sent <= most
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def infos(*paths):
    """Asks for path infos."""
    return lambda client: client.queryPathInfos(paths)


def build(client):
    """Asks for a build."""
    return client.buildDerivation(ONES_DRV, DERIVATION)


def endless(make):
    """Things one behind the other, without end."""
    return (make(path(f"endless-{number}")) for number in itertools.count())


def test_validPathsNobodyAskedAbout():
    """What is valid is among what was asked about, and no more than that."""
    ask = lambda client: client.queryValidPaths([ZEROS])  # noqa: E731
    refused(ask, [wire([ONES])], f"says that '{ONES}' is valid, which it was not asked about")
    refused(ask, [wire([ZEROS, ONES])], "a set of 2 elements is refused, the limit is 1")
    refused(ask, itertools.chain([wire(MAX_SET_SIZE)], endless(wire)), "the limit is 1")


def test_infosNobodyAskedAbout():
    """Path infos are of paths that were asked about, each once, however many come."""
    refused(infos(ZEROS), [info(ONES)], f"describes '{ONES}' although it was not asked about it")
    refused(infos(ZEROS), [info(ZEROS), info(ZEROS)], f"describes '{ZEROS}' twice")
    refused(infos(ZEROS), endless(info), "although it was not asked about it")


def test_endlessSignatures():
    """Signatures are few and short."""
    long, many = ["k:" + "x" * MAX_SIGNATURE_SIZE], (f"k{n}:x" for n in range(MAX_SIGNATURES + 1))
    refused(infos(ZEROS), [info(ZEROS, sigs=long)], f"the limit is {MAX_SIGNATURE_SIZE}")
    refused(infos(ZEROS), [info(ZEROS, sigs=many)], f"the limit is {MAX_SIGNATURES}")
    refused(infos(ZEROS), [info(ZEROS, sigs=["x" * (16 << 20)])], f"the limit is {MAX_SIGNATURE_SIZE}", 17 << 20)


def test_endlessReferences():
    """All infos together have as much room as was asked for, so a single one cannot have a million long references."""
    begin = wire(ZEROS, "", MAX_SET_SIZE)[:-8] + wire(MAX_SET_SIZE)
    refused(
        infos(ZEROS), itertools.chain([begin], endless(wire)), r"a reply of more than \d+ bytes is refused", 9 << 20
    )


def test_endlessClosure():
    """A closure has the room of half a million paths."""
    ask = lambda client: client.queryClosure([ZEROS])  # noqa: E731
    reply = itertools.chain([wire(MAX_SET_SIZE)], itertools.repeat(wire(ZEROS) * 1000))
    refused(ask, reply, f"a reply of more than {MAX_REPLY_SIZE} bytes is refused", MAX_REPLY_SIZE + 2 * PIECE)


def test_outputsNobodyAskedFor():
    """A build has no more outputs than the derivation, and each is described in a few words."""
    begin = wire(0, "", 0, 0, 0, 0)
    refused(build, [begin, wire(MAX_SET_SIZE)], f"the limit is {len(DERIVATION.outputs)}")
    refused(build, [begin, wire(1, "x" * 5000)], "a string of 5000 bytes is refused")
    refused(build, [begin, wire(1, "out", ZEROS, MAX_SET_SIZE)], f"the limit is {MAX_SIGNATURES}")


def test_outputsThatAreNoText():
    """What JSON can spell and nobody can pass on is no name of an output's path."""
    client, transport = ServeClient(STORE_DIR), RecordingTransport()
    client.makeConnection(transport)
    client.dataReceived(SERVER_MAGIC + wire(0x207))
    built = build(client)
    client.dataReceived(wire(0, "", 0, 0, 0, 0, 1, "sha256:x!out", '{"outPath":"\\ud800x"}'))
    with pytest.raises(RemoteError, match="a built output is not described as it should be") as caught:
        result(built)
    assert transport.aborted and str(caught.value).encode()


def test_longErrors():
    """Of the text of a failure its beginning is kept."""
    client, _ = alone()
    built, paths = build(client), client.buildPaths([str(ONES_DRV)])
    client.dataReceived(wire(BuildStatus.PERMANENT_FAILURE, "x" * (1 << 20), 0, 0, 0, 0, 0) + wire(1, "y" * (1 << 20)))
    assert result(built).errorMsg == "x" * MAX_ERROR_SIZE and result(paths).errorMsg == "y" * MAX_ERROR_SIZE


def test_exportsNobodyAskedFor():
    """An export stream holds what was asked for, each once."""
    item = wire(1) + nar(b"hi\n") + wire(EXPORT_MAGIC, LIB.path, [], "", 0)
    for asked, stream in (([ZEROS], [item]), ([LIB.path], [item, item])):
        ask = lambda client, asked=asked: client.exportPaths(asked, lambda data: None, lambda item: None)  # noqa: E731
        refused(ask, stream, f"exports '{LIB.path}', which it was not asked for, or twice")


def test_repliesThatNobodyAskedFor():
    """Bytes that answer nothing end the session."""
    client, transport = alone()
    client.dataReceived(wire([ZEROS]))
    assert transport.aborted
    with pytest.raises(RemoteError, match="a reply that nobody asked for"):
        result(client.queryValidPaths([]))
    assert transport.late == b""


def test_whatTheRemoteSaysHidesNothing():
    """Why this side has ended a session is told, whatever the remote has said before."""
    client, _ = alone(name="ssh://evil")
    asked = client.queryValidPaths([ZEROS])
    client.errorReceived(b"done\n")
    client.dataReceived(wire([ONES]))
    with pytest.raises(RemoteError) as caught:
        result(asked)
    assert f"that '{ONES}' is valid, which it was not asked about; the remote said: done" in str(caught.value)


def test_manyInfosAreAskedForInParts():
    """Many infos are asked for in several requests, so that none of the replies may be large, and come together."""
    client, transport = alone()
    paths = [path(f"number-{number}") for number in range(2 * MAX_INFOS_ASKED + 1)]
    asked = client.queryPathInfos(paths)
    reader, sizes, seen = Reader(), [], set()
    reader.feed(bytes(transport.written))
    while reader.available:
        reader.take(8)
        with pytest.raises(StopIteration) as stop:
            next(readRequest(reader, Command.QUERY_PATH_INFOS, 0x208, client.storeDir))
        sizes.append(len(stop.value.value.paths))
        seen |= stop.value.value.paths
        infos = {each: makeInfo("x", b"x", path=each) for each in stop.value.value.paths}
        client.dataReceived(writeReply(Command.QUERY_PATH_INFOS, infos, 0x208))
    assert sizes == [MAX_INFOS_ASKED, MAX_INFOS_ASKED, 1] and seen == set(paths)
    assert asked.called and result(asked).keys() == set(paths)


def test_manyLargeInfos(monkeypatch):
    """What may be said of a crowd of paths is bounded as a whole, although each of the replies is none too large."""
    monkeypatch.setattr("nixserve.protocol.client.MAX_INFOS_SPACE", 3 << 20)
    paths = sorted(path(f"number-{number}") for number in range(5 * MAX_INFOS_ASKED))
    batches = [paths[start : start + MAX_INFOS_ASKED] for start in range(0, len(paths), MAX_INFOS_ASKED)]
    sigs = [f"key-{number}:" + "x" * 100 for number in range(8)]
    replies = (b"".join(info(each, sigs=sigs) for each in batch) + wire("") for batch in batches)
    refused(infos(*paths), replies, f"what it says of {len(paths)} paths takes up more than", 4 << 20)
    client, transport = alone()
    asked = client.queryPathInfos(paths)
    for batch in batches:
        client.dataReceived(b"".join(map(info, batch)) + wire(""))
    assert result(asked).keys() == set(paths) and not transport.aborted


def test_closureThatIsNone():
    """What a copy is told about refers to nothing outside of what was called the closure."""
    there, here, archive = MemoryStore(), MemoryStore(), makeNar(b"x")
    session = there.openSession()
    low = makeInfo("low", archive)
    top = makeInfo("top", archive, [low.path])
    addObject(session, low, archive)
    addObject(session, top, archive)
    joined = Joined(there)
    kind = type(session)
    honest, kind.queryClosure = kind.queryClosure, lambda *args: {top.path}
    try:
        with pytest.raises(RemoteError, match=f"'{top.path}' refers to '{low.path}', but left that out of the closure"):
            joined.result(copyClosure(joined.client, joined.session(here), [top.path]))
    finally:
        kind.queryClosure = honest
    assert not here.openSession().queryValidPaths([top.path])

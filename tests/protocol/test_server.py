"""One session of the server: what it answers, whom it slows down, and every way in which it ends."""

import tracemalloc
from dataclasses import replace

import pytest
from twisted.internet.error import ConnectionDone, ConnectionLost, ProcessTerminated
from twisted.logger import formatEvent

from nixserve.codec.hashes import Hash
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.errors import StoreError
from nixserve.protocol import commands
from nixserve.protocol.commands import MAX_POSTPONED, Commands
from nixserve.protocol.conversation import MAX_UNREAD, STALL_SECONDS
from nixserve.protocol.policy import EVERYTHING, NOTHING, READ_ONLY, Peer, Policy, Right
from nixserve.protocol.sessions import ServeSessions
from nixserve.protocol.streams import MAX_QUEUED, READ_AHEAD
from nixserve.store.api import Busy, InvalidPath
from nixserve.testing import FakeStore, ImmediateWorkers, ManualWorkers, RecordingTransport, result
from tests.protocol.serversessions import ADD_LARGE, ANSWER, HELLO, LARGE, Session, sessionOf
from tests.vectors.serve.messages import (
    APP,
    CLIENT_MAGIC,
    CONTENTS,
    IMPORTED,
    LIB,
    ZEROS,
    addRequest,
    captured,
    exportItem,
    nar,
    narInfo,
    path,
    wire,
)

CHUNK = bytes(256 * 1024)


# --- conversations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minor", range(8))
@pytest.mark.parametrize("size", [1 << 20, 1, 100])
def test_answersAsRealNix(minor, size):
    """Byte for byte what Nix 2.8 answers to a whole conversation, at each version and in any cut."""
    request, reply = captured(f"conversation-2.{minor}")
    session = Session()
    session.send(*[request[i : i + size] for i in range(0, len(request), size)]).eof().ended(0)
    assert session.transport.written[:16] == ANSWER
    assert session.transport.written[16:] == reply[16:]
    assert session.store.valid([LIB, APP, IMPORTED]) == [LIB, APP, IMPORTED]


def test_handshake():
    """The hello comes after eight bytes, before the client's version."""
    session = Session().send(CLIENT_MAGIC[:7])
    assert session.transport.written == b""
    session.send(CLIENT_MAGIC[7:])
    assert session.transport.written == ANSWER
    session.send(wire(0x207)).eof().ended(0)


@pytest.mark.parametrize("version", [0x100, 0x200, 0x2FF, 0x300])
def test_anyClientVersion(version):
    """Every version is served."""
    session = Session().send(CLIENT_MAGIC + wire(version, 1, 0, 0, [])).eof().ended(0)
    assert session.replies == wire([])


def test_wrongMagic():
    """Another magic gets a line and not a byte."""
    session = Session().send(b"SSH-2.0-OpenSSH\r\n").ended(1, "error: protocol mismatch\n")
    assert session.transport.written == b""


def test_endOfInputAtEveryByte():
    """
    Wherever the client's bytes end: exit 0 exactly where real Nix has it, else one line and exit 1; and what was not
    complete is not registered.
    """
    script = HELLO + addRequest(LIB) + wire(4) + exportItem(IMPORTED) + wire(0) + wire(3, LIB.path)
    starts = [len(HELLO), len(HELLO + addRequest(LIB)), len(script) - len(wire(3, LIB.path)), len(script)]
    clean = {start + more for start in starts for more in range(8)}
    imported = len(HELLO + addRequest(LIB) + wire(4) + exportItem(IMPORTED))
    for end in range(len(script) + 1):
        session = Session().send(script[:end]).eof()
        if end in clean:
            session.ended(0)
        else:
            session.ended(1, "error: unexpected end-of-file\n")
        assert session.store.valid([LIB]) == [LIB] * (end >= starts[1]), end
        assert session.store.valid([IMPORTED]) == [IMPORTED] * (end >= imported), end
    assert session.transport.written.endswith(nar(CONTENTS[LIB.path]))


def test_pipelining():
    """Requests that arrive together are answered in order, with slow workers too."""
    requests = wire(3, LIB.path) + wire(3, APP.path) + wire(7, 0, [APP.path]) + wire(1, 0, 0, [path("x")])
    session = sessionOf(LIB, APP, workers=ManualWorkers())
    session.send(HELLO + requests).eof().drain().ended(0)
    dumps = nar(CONTENTS[LIB.path]) + nar(CONTENTS[APP.path])
    assert session.replies == dumps + wire(sorted([LIB.path, APP.path])) + wire([])


def test_addToStoreNar():
    """A path is registered as it was described, before the answer: a large one while it comes, a small one whole."""
    for info, request, last in ((LIB, addRequest(LIB), "addSmallPaths"), (LARGE, ADD_LARGE, "finish")):
        session = Session(workers=ManualWorkers()).send(HELLO + request)
        while session.store.names[-1:] != [last]:
            assert session.transport.written in (b"", ANSWER)
            session.step()
        session.drain()
        assert session.replies == wire(1)
        found = session.store.inner.lookUp([info.path])[info.path].info
        assert replace(found, registrationTime=0) == replace(info, registrationTime=0)


def test_stillOpenAfterTheReply():
    """A session goes on until the client ends it."""
    session = Session().send(HELLO + wire(1, 0, 0, []))
    assert session.transport.status is None and not session.server.ended.called
    session.send(wire(2, [])).eof().ended(0)


# --- rights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (4, "importing paths is not allowed"),
        (9, "importing paths is not allowed"),
        (6, "building paths is not allowed"),
        (8, "building paths is not allowed"),
    ],
)
def test_readOnly(command, text):
    """Commands that change the store are refused in Nix's words when their number is there, before their body."""
    session = Session(policy=READ_ONLY).send(HELLO + wire(command)[:7])
    assert session.transport.status is None
    session.send(wire(command)[7:]).ended(1, f"error: {text}\n")
    assert session.transport.written == ANSWER
    assert session.store.names == ["openSession", "close"]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (1, "querying paths is not allowed"),
        (2, "querying paths is not allowed"),
        (3, "reading paths is not allowed"),
        (4, "importing paths is not allowed"),
        (5, "reading paths is not allowed"),
        (6, "building paths is not allowed"),
        (7, "querying paths is not allowed"),
        (8, "building paths is not allowed"),
        (9, "importing paths is not allowed"),
    ],
)
def test_nothingAllowed(command, text):
    """Who has no rights gets nothing, command by command."""
    Session(policy=NOTHING).send(HELLO + wire(command)).ended(1, f"error: {text}\n")


def test_forgottenCommandNeedsTrust(monkeypatch):
    """A command that nobody thought of needs the right to everything."""
    monkeypatch.setattr(Commands, "REQUIRED", {})
    Session(policy=READ_ONLY).send(HELLO + wire(2)).ended(1, "error: QUERY_PATH_INFOS is not allowed\n")
    Session().send(HELLO + wire(2, [])).eof().ended(0)


@pytest.mark.parametrize("flags", [(0, 0), (1, 1)])
@pytest.mark.parametrize(("policy", "rooted"), [(READ_ONLY, False), (EVERYTHING, True)])
def test_queriesRootWhatTheyAskFor(policy, rooted, flags):
    """Paths that a writer asks about become roots before the answer is found, with the flag or without; a reader's
    flags are ignored."""
    session = sessionOf(LIB, policy=policy).send(HELLO + wire(1, *flags, [LIB.path]))
    calls = session.store.calls[1:]
    roots = [("addTempRoots", (frozenset({LIB.path}),))] if rooted else []
    assert [(name, (frozenset(args[0]),)) for name, args in calls] == [
        *roots, ("queryValidPaths", (frozenset({LIB.path}),)),
    ]  # fmt: skip
    assert session.replies == wire([LIB.path])
    session.eof().ended(0)


@pytest.mark.parametrize(
    ("request_", "call"),
    [
        (wire(2, [LIB.path]), "queryPathInfos"),
        (wire(3, LIB.path), "narsFromPaths"),
        (wire(5, 0, [LIB.path]), "exportPaths"),
        (wire(7, 0, [LIB.path]), "queryClosure"),
    ],
)
def test_everyQueryRoots(request_, call):
    """So does every command that says what is there."""
    session = sessionOf(LIB).send(HELLO + request_).eof().ended(0)
    assert session.store.names == ["openSession", "addTempRoots", call, "close"]
    session = sessionOf(LIB, policy=READ_ONLY).send(HELLO + request_).eof().ended(0)
    assert session.store.names == ["openSession", call, "close"]


def test_rootsLastAsLongAsTheSession():
    """What a client was told to be there stays there until it leaves."""
    session = sessionOf(LIB).send(HELLO + wire(1, 0, 0, [LIB.path]))
    assert session.store.inner.collectGarbage() == set()
    session.eof().ended(0)
    assert session.store.inner.collectGarbage() == {LIB.path}


@pytest.mark.parametrize(
    "body",
    [
        wire(6, [path("a.drv")], 0, 0, 0, 0, 0, 0),
        wire(8, path("a.drv"), [("out", ZEROS, "", "")], [], "", "", [], [], 0, 0, 0, 0, 0, 0),
    ],
)
def test_nobodyBuilds(body):
    """A server that is told to build nothing refuses builds with what to do instead."""
    session = Session().send(HELLO + body)
    assert "does not build" in session.errors and session.errors.count("\n") == 1
    session.ended(1, session.errors)


# --- failures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (wire(0), "unknown serve command 0"),
        (wire(10), "unknown serve command 10"),
        (wire(3, "/x/y"), "path '/x/y' is not in the Nix store"),
        (wire(3, path("x")), f"path '{path('x')}' is not valid"),
        (wire(5, 0, [path("x")]), f"path '{path('x')}' is not valid"),
        (wire(7, 0, [path("x")]), f"path '{path('x')}' is not valid"),
        (wire(4, 2), "input doesn't look like something created by 'nix-store --export' at offset 24"),
    ],
)
def test_refusals(data, text):
    """What is wrong is one line and exit status 1, with nothing on standard output; what follows is not read."""
    session = Session().send(HELLO + data + wire(1, 0, 0, [])).send(wire(1, 0, 0, []))
    session.ended(1, f"error: {text}\n")
    assert session.transport.written == ANSWER


FAILING = [
    ("openSession", b""),
    ("addTempRoots", wire(1, 0, 0, [])),
    ("queryValidPaths", wire(1, 0, 0, [])),
    ("queryPathInfos", wire(2, [LIB.path])),
    ("queryClosure", wire(7, 0, [])),
    ("narsFromPaths", wire(3, LIB.path)),
    ("exportPaths", wire(5, 0, [])),
    ("addSmallPaths", addRequest(LIB)),
    ("addToStore", ADD_LARGE),
    ("feed", ADD_LARGE),
    ("finish", ADD_LARGE),
    ("importPath", wire(4) + exportItem(LIB) + wire(0)),
    ("feed", wire(4) + exportItem(LIB) + wire(0)),
    ("finish", wire(4) + exportItem(LIB) + wire(0)),
]
ERRORS = [
    (StoreError("two\nlines"), "error: two lines\n"),
    (InvalidPath(LIB.path), f"error: path '{LIB.path}' is not valid\n"),
    (OSError(28, "No space left on device", "/secret"), "error: No space left on device\n"),
    (
        StoreError(f"cannot rename '/secret/store/{LIB.path.baseName}' to '/secret/x': No space left on device"),
        f"error: cannot rename '{LIB.path}' to '[a path of the server]': No space left on device\n",
    ),
    (
        KeyError("secret"),
        "error: internal error; the log of the server has more about session 7\n",
    ),
]


@pytest.mark.parametrize("workers", [ImmediateWorkers, ManualWorkers])
@pytest.mark.parametrize(("error", "line"), ERRORS, ids=["store", "path", "system", "file", "bug"])
@pytest.mark.parametrize(("call", "request_"), FAILING)
def test_failuresInTheStore(call, request_, error, line, workers, logged):
    """Whatever fails wherever: one line, exit status 1, everything freed; a bug tells the peer nothing of itself."""
    store = FakeStore()
    store.fail(call, error)
    session = Session(store, workers()).send(HELLO + request_)
    if isinstance(session.workers, ManualWorkers):
        session.drain()
    session.ended(1, line)
    assert session.store.valid([LIB, LARGE]) == []
    assert "secret" not in session.errors
    assert [event for event in logged if str(event.get("log_level")).endswith(("warn>", "critical>"))]


def test_failureWhileTheNarArrives():
    """A NAR that cannot be stored ends the session at once, though more of it is on its way."""
    info = ValidPathInfo(path=ZEROS, narHash=Hash("sha256", bytes(32)), narSize=1 << 30)
    session = Session().send(HELLO + wire(9, info.path, "", info.narHash.hex, [], 0, info.narSize, 0, [], ""))
    assert session.transport.status is None
    session.send(b"this is not a NAR")
    assert "bad archive" in session.errors
    session.send(CHUNK).ended(1, session.errors)


@pytest.mark.parametrize("workers", [ImmediateWorkers, ManualWorkers])
def test_wrongHash(workers):
    """A NAR that is not what was said is not registered."""
    session = Session(workers=workers())
    session.send(HELLO + addRequest(LIB, "0" * 64) + wire(1, 0, 0, []))
    if workers is ManualWorkers:
        session.drain()
    assert "hash mismatch importing path" in session.errors
    session.ended(1, session.errors)
    assert session.replies == b"" and session.store.valid([LIB]) == []


def test_importKeepsWhatWasComplete():
    """Objects of an export stream are registered as they come: a later one that fails takes none of them back."""
    session = Session().send(HELLO + wire(4) + exportItem(LIB) + exportItem(APP)[:60] + b"garbage!" * 20)
    assert "bad archive" in session.errors
    session.ended(1, session.errors)
    assert session.store.valid([LIB, APP]) == [LIB]


def test_readingFailsHalfway():
    """If a path cannot be read to its end the client sees part of a NAR, the line, and the end."""
    session = Session(workers=ManualWorkers())
    session.store.madeUp[ZEROS] = [CHUNK, CHUNK, CHUNK, OSError(5, "Input/output error")]
    session.send(HELLO + wire(3, ZEROS) + wire(1, 0, 0, [])).drain().ended(1, "error: Input/output error\n")
    assert session.replies == CHUNK * 3


def test_refusalsAreLogged(logged):
    """What is refused is in the log with who, what and why."""
    Session(policy=READ_ONLY).send(HELLO + wire(4))
    (event,) = [event for event in logged if "refused" in str(event.get("log_format"))]
    assert (event["peer"], event["key"], event["command"]) == (Peer("here", "key", 7), "key", "IMPORT_PATHS")
    assert str(event["error"]) == "importing paths is not allowed"


@pytest.mark.parametrize(
    "words",
    [
        HELLO + wire(1, 0, 0, ["\x1b]0;evil\x07\r"]),
        HELLO + wire(3, "/nix/store/\x1b]0;evil\x07\r"),
        HELLO + wire(4, 1) + b"\x1b]0;evil\x07\r" * 100,
        b"\x1b]0;evil\x07\r" * 10,
    ],
)
def test_wordsOfPeersInTheLog(logged, words):
    """Whatever a peer breaks the rules with, the log has no byte of it as it is."""
    Session().send(words)
    texts = [formatEvent(event) for event in logged] + [
        event["log_failure"].getTraceback() for event in logged if "log_failure" in event
    ]
    assert any("refused" in text or "failed" in text for text in texts)
    assert all(text.replace("\n", "").isprintable() for text in texts)


# --- clients that do not wait -------------------------------------------------------------------------------


def smallObjects(count, size=10):
    """Objects, each but the first referring to the one before, and the requests to add them."""
    infos, requests = [], []
    for number in range(count):
        data = b"%d" % number + bytes(size)
        info = narInfo(f"x{number}", data, *[before.path for before in infos[-1:]])
        infos.append(info)
        requests.append(
            wire(9, info.path, "", info.narHash.hex, sorted(info.references), 0, info.narSize, 0, [], "") + nar(data)
        )
    return infos, requests


def batches(session, name="addSmallPaths"):
    """How many objects each call was about."""
    return [len(args[0]) for called, args in session.store.calls if called == name]


@pytest.mark.parametrize("workers", [ImmediateWorkers, ManualWorkers])
def test_smallPathsTogether(workers):
    """Small paths that are here already are added in one turn of a worker, and each is acknowledged."""
    infos, requests = smallObjects(40)
    session = Session(workers=workers()).send(HELLO)
    if workers is ManualWorkers:
        session.drain()
    session.send(b"".join(requests))
    if workers is ManualWorkers:
        assert len(session.workers.waiting) == 1 and session.replies == b""
        session.step()
        assert not session.workers.waiting
    assert batches(session) == [40]
    assert session.replies == wire(1) * 40
    assert len(session.store.valid(infos)) == 40
    session.eof()
    if workers is ManualWorkers:
        session.drain()
    session.ended(0)


def test_eachAtOnceForAClientThatWaits():
    """Nothing waits for a request that is not here: one path is answered as soon as it is complete."""
    _, requests = smallObjects(3)
    session = Session().send(HELLO)
    for number, request in enumerate(requests):
        session.send(request[:-1])
        assert session.replies == wire(1) * number
        session.send(request[-1:])
        assert session.replies == wire(1) * (number + 1)
    session.send(requests[0] + requests[1][:100])
    assert session.replies == wire(1) * 4
    assert batches(session) == [1] * 4
    session.lose().ended(1)


def test_batchesAreBounded(monkeypatch):
    """However much comes, only so many paths and bytes are kept."""
    _, requests = smallObjects(MAX_POSTPONED + 10)
    session = Session().send(HELLO + b"".join(requests)).eof().ended(0)
    assert batches(session) == [MAX_POSTPONED, 10]
    _, requests = smallObjects(50, size=60_000)
    session = Session().send(HELLO + b"".join(requests)).eof().ended(0)
    assert batches(session) == [18, 18, 14]
    assert session.replies == wire(1) * 50
    monkeypatch.setattr(commands, "MAX_POSTPONED", 2)
    session = sessionOf(LIB).send(HELLO + wire(3, LIB.path) * 5).eof().ended(0)
    assert batches(session, "narsFromPaths") == [2, 2, 1]
    assert session.replies == nar(CONTENTS[LIB.path]) * 5


def test_batchInParts():
    """A store that adds fewer at once is called again for the rest; what it has added is acknowledged meanwhile."""
    infos, requests = smallObjects(5)
    session = Session(workers=ManualWorkers()).send(HELLO).drain()
    (inner,) = session.store.sessions
    addSmallPaths, asked = inner.addSmallPaths, []
    inner.addSmallPaths = lambda objects: asked.append(len(objects)) or addSmallPaths(objects[:2])
    session.send(b"".join(requests))
    for acknowledged in (2, 4, 5):
        session.step()
        assert session.replies == wire(1) * acknowledged
    assert asked == [5, 3, 1]
    assert len(session.store.valid(infos)) == 5


@pytest.mark.parametrize("cut", [1 << 20, 1, 97])
def test_refusedAmongSmallOnes(cut):
    """Those before one that is refused are added and acknowledged, those behind it are not even looked at."""
    infos, requests = smallObjects(5)
    requests[3] = requests[3].replace(infos[3].narHash.hex.encode(), b"0" * 64)
    data = HELLO + b"".join(requests)
    session = Session().send(*[data[start : start + cut] for start in range(0, len(data), cut)])
    assert f"hash mismatch importing path '{infos[3].path}'" in session.errors
    session.ended(1, session.errors)
    assert session.replies == wire(1) * 3
    assert session.store.valid(infos) == infos[:3]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (wire(17), "unknown serve command 17"),
        (wire(9, "/x/y"), "path '/x/y' is not in the Nix store"),
        (wire(6), "building paths is not allowed"),
        (wire(9)[:9], "unexpected end-of-file"),
        (wire(9), "unexpected end-of-file"),
        (wire(3, path("missing")), f"path '{path('missing')}' is not valid"),
    ],
)
@pytest.mark.parametrize("workers", [ImmediateWorkers, ManualWorkers])
def test_badRequestBehindSmallOnes(data, text, workers, logged):
    """What is wrong with a request is said after those before it have been answered."""
    infos, requests = smallObjects(3)
    session = Session(workers=workers(), policy=Policy(frozenset({Right.READ, Right.WRITE})))
    session.send(HELLO + b"".join(requests) + wire(3, infos[0].path) + data).eof()
    if workers is ManualWorkers:
        session.drain()
    session.ended(1, f"error: {text}\n")
    assert session.replies == wire(1) * 3 + nar(b"0" + bytes(10))
    assert session.store.valid(infos) == infos


def test_refusedInABatchIsLogged(logged):
    """The log says which command it was, whatever has been read meanwhile."""
    session = Session().send(HELLO + addRequest(LIB, "0" * 64) + wire(3))
    session.ended(1, session.errors)
    (event,) = [event for event in logged if str(event.get("log_level")).endswith("warn>")]
    assert event["command"] == "ADD_TO_STORE_NAR" and session.replies == b""


def test_largeBehindSmall():
    """A large path behind small ones comes after them, and may refer to them; a small one behind it likewise."""
    _, requests = smallObjects(3)
    session = Session(workers=ManualWorkers())
    session.send(HELLO + requests[0] + requests[1] + ADD_LARGE + requests[2]).eof().drain().ended(0)
    names = [name for name in session.store.names if name in ("addSmallPaths", "finish")]
    assert names == ["addSmallPaths", "finish", "addSmallPaths"]
    assert session.replies == wire(1) * 4


def test_mixedRequests():
    """Whatever is mixed, each reply comes in its turn and knows of what came before."""
    infos, requests = smallObjects(2)
    session = Session(workers=ManualWorkers())
    query, dump = wire(1, 0, 0, [infos[1].path]), wire(3, infos[0].path)
    session.send(HELLO + query + requests[0] + dump + requests[1] + query + dump + dump).eof().drain().ended(0)
    archive = nar(b"0" + bytes(10))
    assert session.replies == wire([]) + wire(1) + archive + wire(1) + wire([infos[1].path]) + archive * 2


def test_floodOfSmallPathsIsBounded():
    """A client that sends without end is paused while a worker is busy, with little kept, and then goes on."""
    _, requests = smallObjects(3000)
    session = Session(workers=ManualWorkers()).send(HELLO).drain()
    waiting = iter(requests)
    sent = 0
    for request in waiting:
        session.send(request)
        sent += len(request)
        if session.transport.paused:
            break
    assert MAX_UNREAD < sent <= MAX_UNREAD + 2 * len(requests[-1])
    assert batches(session) == []
    session.drain()
    assert not session.transport.paused
    session.send(*waiting).eof().drain().ended(0)
    assert max(batches(session)) <= MAX_POSTPONED
    assert session.replies == wire(1) * 3000


def test_dumpsTogether():
    """The NARs of several requests that are here already come out of one turn of a worker, as one piece."""
    session = sessionOf(LIB, APP, workers=ManualWorkers()).send(HELLO).drain()
    session.send(wire(3, LIB.path) + wire(3, APP.path) + wire(3, LIB.path) + wire(3, APP.path)[:20])
    session.step()
    assert not session.workers.waiting
    dumps = nar(CONTENTS[LIB.path]) + nar(CONTENTS[APP.path]) + nar(CONTENTS[LIB.path])
    assert session.replies == dumps
    assert ("narsFromPaths", ([LIB.path, APP.path, LIB.path],)) in session.store.calls
    session.send(wire(3, APP.path)[20:]).drain()
    assert session.replies == dumps + nar(CONTENTS[APP.path])
    session.eof().drain().ended(0)


def test_invalidAmongDumps():
    """The NARs before a path that is not valid are sent, then the error."""
    session = sessionOf(LIB).send(HELLO + wire(3, LIB.path) * 2 + wire(3, path("x")) + wire(3, LIB.path))
    session.ended(1, f"error: path '{path('x')}' is not valid\n")
    assert session.replies == nar(CONTENTS[LIB.path]) * 2


def test_lockedAmongSmallOnes():
    """One that another session is adding is waited for, with those before it acknowledged."""
    infos, requests = smallObjects(3)
    session = Session()
    other = session.store.inner.openSession()
    writer = other.addToStore(infos[1])
    session.send(HELLO + b"".join(requests))
    session.clock.pump([0.1] * 50)
    assert session.replies == wire(1)
    assert session.errors == f"waiting for the lock on '{infos[1].path}'...\n"
    writer.abort()
    session.clock.pump([1] * 3)
    assert session.replies == wire(1) * 3
    assert session.store.valid(infos) == infos


# --- waiting for locks --------------------------------------------------------------------------------------


def test_busy():
    """A lock that somebody else holds is waited for without a worker, and after two seconds the client is told."""
    session = sessionOf(LIB)
    session.store.fail("addTempRoots", *[Busy("the garbage collector")] * 12)
    session.send(HELLO + wire(1, 1, 0, [LIB.path]))
    assert session.replies == b"" and session.transport.status is None
    calls = session.workers.calls
    session.clock.pump([0.1] * 12)
    assert session.workers.calls - calls <= 12 and session.errors == ""
    session.clock.pump([0.1] * 50)
    assert session.errors == "waiting for the garbage collector...\n"
    assert session.replies == wire([LIB.path])
    session.eof()
    assert session.transport.status == 0 and session.server.ended.called


@pytest.mark.parametrize(
    ("call", "request_"),
    [
        ("addTempRoots", wire(1, 1, 0, [LIB.path])),
        ("addTempRoots", wire(3, LIB.path)),
        ("addSmallPaths", addRequest(LIB)),
        ("addToStore", ADD_LARGE),
        ("addToStore", ADD_LARGE[:-20]),
        ("finish", wire(4) + exportItem(LIB)),
    ],
)
@pytest.mark.parametrize("how", ["lose", "stop"])
def test_endsWhileWaitingForALock(call, request_, how):
    """A session that ends while it waits for a lock frees everything at once and stops waiting."""
    session = sessionOf()
    session.store.fail(call, *[Busy("a lock")] * 10_000)
    session.send(HELLO + request_)
    session.clock.pump([0.01] * 20)
    tries = session.store.names.count(call)
    assert tries > 1 and not session.server.ended.called
    if how == "lose":
        session.lose().ended(1)
    else:
        session.server.stop()
        session.ended(1, "error: the server is being stopped; try again later\n")
    session.clock.pump([1] * 20)
    assert session.store.names.count(call) == tries


def test_lockOfAnotherSession():
    """Two sessions that add the same path: the second waits, then finds it there."""
    store = FakeStore()
    first, second = Session(store), Session(store)
    first.send(HELLO + ADD_LARGE[:-8])
    second.send(HELLO + ADD_LARGE)
    second.clock.pump([0.1] * 5)
    assert second.replies == b"" and first.replies == b""
    first.send(ADD_LARGE[-8:])
    assert first.replies == wire(1)
    second.clock.pump([0.1] * 20)
    assert second.replies == wire(1)


def test_lockIsFreedByTheEnd():
    """A path that a lost session was adding can be added by the next."""
    store = FakeStore()
    first, second = Session(store), Session(store)
    first.send(HELLO + ADD_LARGE[:-8])
    second.send(HELLO + ADD_LARGE)
    assert second.replies == b""
    first.lose()
    second.clock.pump([0.1] * 5)
    assert second.replies == wire(1) and store.valid([LARGE]) == [LARGE]


# --- slow peers ---------------------------------------------------------------------------------------------

BIG_SIZE = 64 * 1024 * 1024
BIG = wire(9, ZEROS, "", "0" * 64, [], 0, BIG_SIZE, 0, [], "")
BIG_NAR = wire("nix-archive-1", "(", "type", "regular", "contents", 0)[:-8] + wire(BIG_SIZE - 200)


def test_slowStorePausesThePeer():
    """While a worker is busy with a NAR the session takes one MiB and a chunk, then nothing until it comes back."""
    session = Session(workers=ManualWorkers()).send(HELLO).drain()
    session.send(BIG + BIG_NAR)
    sent = 0
    for _ in range(20):
        arrive = session.workers.run() if session.workers.waiting else lambda: None
        before = sent
        while not session.transport.paused:
            session.send(bytes(32768))
            sent += 32768
            assert sent - before <= MAX_QUEUED + 32768
            assert session.server._commands._inflow._queued <= MAX_QUEUED + 32768
        arrive()
    assert sent > 10 * MAX_QUEUED
    session.lose().drain()
    assert session.server.ended.called


def test_slowStoreHoldsLittleMemory():
    """A large NAR costs a few MiB, however long it is."""
    session = Session(workers=ManualWorkers()).send(HELLO).drain()
    session.store.perform = lambda name, function, args: None if name == "feed" else function()
    session.send(BIG + BIG_NAR).drain()
    tracemalloc.start()
    try:
        for _ in range(48 * 4):
            if session.transport.paused:
                session.drain()
            session.send(bytes(262144))
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_QUEUED
    finally:
        tracemalloc.stop()
    session.lose().drain()


@pytest.mark.parametrize("size", [100, 32768, 3 * MAX_UNREAD])
def test_requestsBehindABusyOneAreBounded(size):
    """A client that pipelines without end is paused when 256 KiB are unread, and resumed when they are."""
    session = Session(workers=ManualWorkers()).send(HELLO).drain()
    request = wire(1, 0, 0, [])
    flood = request * (size // len(request) + 1)
    session.send(request)
    sent = 0
    while not session.transport.paused:
        session.send(flood)
        sent += len(flood)
        assert sent <= MAX_UNREAD + len(flood)
    assert session.server._connection.buffered <= MAX_UNREAD + len(flood)
    session.drain()
    assert not session.transport.paused
    assert len(session.replies) == 8 * (1 + sent // len(request))
    session.lose().drain()


def test_pausedForTwoReasons():
    """
    A session that was paused for what is unread stays paused when that becomes a NAR for which there is no room.
    """
    session = Session(workers=ManualWorkers()).send(HELLO).drain()
    session.send(wire(1, 0, 0, []))
    session.send(BIG + BIG_NAR + bytes(MAX_QUEUED + MAX_UNREAD))
    assert session.transport.paused
    session.step()
    assert session.server._commands._inflow is not None and session.transport.paused
    session.step()
    assert not session.transport.paused
    while not session.transport.paused:
        session.send(bytes(32768))
        assert session.server._commands._inflow._queued <= MAX_QUEUED + 32768
    session.lose().drain()


def test_slowReaderPausesTheStore():
    """A client that does not read stops the reading of files; it goes on where it stopped."""
    session = Session(workers=ManualWorkers(), capacity=64 * 1024)
    session.store.madeUp[ZEROS] = [CHUNK] * 100
    session.send(HELLO + wire(3, ZEROS) + wire(1, 0, 0, [])).drain()
    assert session.store.chunksRead == 2 * READ_AHEAD // len(CHUNK)
    assert len(session.replies) == READ_AHEAD
    while session.transport.unsent:
        session.transport.take()
        session.drain()
        assert session.transport.mostUnread <= READ_AHEAD + 64 * 1024 + len(ANSWER)
    assert session.replies == CHUNK * 100 + wire([])
    session.eof().drain().ended(0)


def test_readerThatNeverReads():
    """A client that does not read for ten minutes is given up."""
    session = Session(workers=ManualWorkers(), capacity=64 * 1024)
    session.store.madeUp[ZEROS] = [CHUNK] * 100
    session.send(HELLO + wire(3, ZEROS)).drain()
    session.clock.pump([10] * int(STALL_SECONDS / 10 * 2))
    session.drain()
    assert "nothing has moved for too long" in session.errors
    session.ended(1, session.errors)


@pytest.mark.parametrize("data", [wire(9), wire(1, 0)[:9], BIG + BIG_NAR + bytes(100), wire(4, 1), wire(4, 1) + b"\r"])
def test_writerThatStalls(data):
    """A client that stops in the middle of a request is given up after ten minutes, not before."""
    session = Session().send(HELLO).send(data)
    for _ in range(3):
        session.clock.pump([60] * 9)
        session.send(b"")
    session.clock.pump([60] * 9)
    assert session.transport.status is None
    session.clock.pump([60] * 15)
    session.ended(1, "error: nothing has moved for too long in the middle of a request; giving up\n")


def halfClosedDownload():
    """A session whose client has asked for something large, sent EOF, and reads."""
    session = Session(workers=ManualWorkers(), capacity=64 * 1024)
    session.store.madeUp[ZEROS] = [CHUNK] * 100
    return session.send(HELLO + wire(3, ZEROS)).drain().eof()


def test_halfClosedReaderThatStops():
    """
    A client that has sent EOF and reads nothing any more is dead: it is given up within half of the five seconds that
    are promised.
    """
    session = halfClosedDownload()
    session.clock.pump([0.25] * 10)
    session.drain()
    session.ended(1, "error: nothing has moved for too long in the middle of a request; giving up\n")


def test_halfClosedReaderThatStopsSoon():
    """The time counts from the last byte that moved, not from when that was noticed."""
    session = halfClosedDownload()
    session.clock.advance(0.1)
    session.transport.take(1000)
    session.clock.pump([0.05] * 50)
    session.drain()
    session.ended(1, "error: nothing has moved for too long in the middle of a request; giving up\n")


def test_halfClosedReaderThatIsSlow():
    """One that goes on reading, however slowly, gets everything."""
    session = halfClosedDownload()
    for _ in range(60):
        session.clock.pump([0.1] * 19)
        session.transport.take(1000)
    assert session.transport.status is None
    while session.transport.unsent:
        session.transport.take()
        session.drain()
    assert session.replies == CHUNK * 100
    session.ended(0)


def test_idleClientMayStay():
    """Between requests a client may be silent as long as it likes."""
    for request in (wire(1, 0, 0, []), wire(3, LIB.path), addRequest(LIB), ADD_LARGE, wire(4, 0)):
        session = sessionOf(LIB).send(HELLO + request * 2)
        session.clock.pump([600] * 100)
        assert session.transport.status is None
        session.send(wire(1, 0, 0, [])).eof().ended(0)


def test_slowStoreIsNotTheClientsFault():
    """A query that takes an hour is no stall."""
    session = Session(workers=ManualWorkers()).send(HELLO).drain()
    session.send(wire(1, 0, 0, []))
    session.clock.pump([60] * 60)
    assert session.transport.status is None
    session.drain().eof().drain().ended(0)


def test_heldLockIsNotTheClientsFault():
    """A lock that somebody holds for an hour, while the client waits to send more, is no stall either."""
    session = Session().send(HELLO)
    session.store.fail("addToStore", *[Busy("the lock on 'x'", 1.0)] * 10_000)
    session.send(BIG + BIG_NAR + bytes(2 * MAX_QUEUED))
    session.clock.pump([60] * 60)
    assert session.transport.paused and session.transport.status is None
    session.lose()
    assert session.server.ended.called


def test_sessionThatNeverBegan():
    """A session that was given out and never connected does not keep the server from stopping."""
    sessions = ServeSessions(FakeStore(), ImmediateWorkers(), ImmediateWorkers().reactor)
    sessions.buildSession(EVERYTHING, Peer("nowhere"))
    assert len(sessions) == 1
    assert sessions.stop().called
    assert len(sessions) == 0


# --- ends ---------------------------------------------------------------------------------------------------


STATES = {
    "before the handshake": (b"", 0),
    "while the session opens": (b"", None),
    "inside the handshake": (CLIENT_MAGIC[:5], 0),
    "after the hello": (CLIENT_MAGIC, 0),
    "between requests": (HELLO, 0),
    "inside a request": (HELLO + wire(1, 0), 0),
    "while a query is answered": (HELLO + wire(1, 0, 0, []), None),
    "inside a NAR": (HELLO + BIG + BIG_NAR, 0),
    "inside a NAR that is being written": (HELLO + BIG + BIG_NAR + CHUNK, None),
    "while a NAR is finished": (HELLO + ADD_LARGE, None),
    "while small ones are added": (HELLO + addRequest(LIB) + addRequest(APP)[:200], None),
    "inside an export stream": (HELLO + wire(4), 0),
    "inside a NAR of an export stream": (HELLO + wire(4) + exportItem(LIB)[:60], 0),
    "behind a NAR of an export stream": (HELLO + wire(4) + exportItem(LIB)[:-10], 0),
    "while a stream is read": (HELLO + wire(3, ZEROS), None),
}


def inState(name):
    """
    A session in a state, and what makes the result of the call arrive that runs in a thread, if one does.
    """
    data, running = STATES[name]
    session = Session(workers=ManualWorkers())
    session.store.madeUp[ZEROS] = [CHUNK] * 10
    if name == "while the session opens":
        return session, session.workers.run()
    session.drain().send(data)
    arrive = None
    if running is None:
        arrive = session.workers.run()
    else:
        session.drain()
    return session, arrive


@pytest.mark.parametrize("reason", [ConnectionDone(), ConnectionLost("reset"), ProcessTerminated(1)])
@pytest.mark.parametrize("state", STATES)
def test_connectionLost(state, reason, logged):
    """
    The connection goes away: everything is freed once, after what runs in a thread; nothing is written any more; and
    the log does not call it a bug.
    """
    session, arrive = inState(state)
    before = bytes(session.transport.written)
    session.lose(reason)
    if arrive is not None:
        assert not session.server.ended.called and "close" not in session.store.names
        arrive()
    session.drain().ended(1)
    assert session.transport.written == before
    session.lose(reason).send(b"more")
    session.eof()
    assert not session.workers.waiting and session.transport.exits == 1
    assert not [event for event in logged if event.get("log_failure")]
    assert session.store.valid([LARGE]) == [LARGE] * (
        state == "while a NAR is finished" and "finish" in session.store.names
    )
    assert session.store.valid([LIB, APP]) == [LIB] * (state == "while small ones are added")


@pytest.mark.parametrize("state", STATES)
def test_stop(state):
    """The server goes down: likewise, and the client is told."""
    session, arrive = inState(state)
    session.server.stop()
    if arrive is not None:
        arrive()
    session.drain().ended(1, "error: the server is being stopped; try again later\n")
    session.server.stop()
    session.lose()
    assert session.transport.exits == 1


@pytest.mark.parametrize("state", STATES)
def test_endOfInput(state):
    """The client ends its side: what it asked for completely is still answered, then the session ends."""
    session, arrive = inState(state)
    session.eof()
    if arrive is not None:
        arrive()
    session.drain()
    complete = ("between requests", "while a query is answered", "while a NAR is finished", "while a stream is read")
    if state in complete:
        session.ended(0)
    else:
        session.ended(1, "error: unexpected end-of-file\n")
    session.lose()
    assert session.transport.exits == 1


def test_closedForWriting():
    """A client that reads nothing more ends the session: every answer would be lost."""
    session = Session(workers=ManualWorkers()).drain().send(HELLO + wire(1, 0, 0, []))
    session.server.writeConnectionLost()
    session.drain().ended(1)


def test_firstCauseCounts():
    """What ended the session is what is reported, whatever happens then."""
    session = Session(workers=ManualWorkers()).drain().send(HELLO + wire(1, 0, 0, []))
    session.server.stop()
    session.lose()
    session.drain().ended(1, "error: the server is being stopped; try again later\n")


def test_lostConnectionStopsPipelinedRequests():
    """Requests that lie unread when the connection goes are not carried out."""
    session = sessionOf(LIB, workers=ManualWorkers()).drain()
    session.send(HELLO + wire(1, 0, 0, [LIB.path]) + addRequest(APP) + wire(3, LIB.path) * 5)
    arrive = session.workers.run()
    session.lose()
    arrive()
    session.drain().ended(1)
    assert session.store.names == ["openSession", "addTempRoots", "queryValidPaths", "close"]


def test_bytesAfterTheEnd():
    """What comes after a refusal is neither kept nor in the way of the end."""
    session = sessionOf(policy=READ_ONLY).send(HELLO + addRequest(APP))
    session.send(*[bytes(64 * 1024)] * 32)
    assert session.server._connection.buffered < 64 * 1024 and not session.transport.paused
    session.ended(1, "error: importing paths is not allowed\n")


@pytest.mark.parametrize("working", [True, False])
def test_interruptsTheStore(working):
    """A call that waits for somebody far away is told when the session ends; a session at rest need not be told."""
    session, interrupted = sessionOf(LIB, workers=ManualWorkers()).drain(), []
    session.store.sessions[0].interrupt = lambda: interrupted.append(1)
    session.send(HELLO + wire(1, 0, 0, [LIB.path]))
    if not working:
        session.drain()
    arrive = session.workers.run() if working else lambda: None
    session.lose()
    assert interrupted == [1] * working
    arrive()
    session.drain().ended(1)


def test_closingFails(logged):
    """If the store cannot free the session, the log says so, and the session has ended."""
    session = Session()
    session.store.fail("close", OSError("no"))
    session.send(HELLO).eof()
    assert session.server.ended.called and session.transport.status == 0
    assert [event for event in logged if "closing session" in str(event.get("log_format"))]


# --- all sessions -------------------------------------------------------------------------------------------


def test_sessions():
    """A service counts its sessions, and stopping ends them all and waits for what they hold."""
    store, workers = FakeStore(), ManualWorkers()
    sessions = ServeSessions(store, workers, workers.reactor, lambda uri: uri == "auto")
    assert sessions.isServed("auto") and not sessions.isServed("/other")
    transports = [RecordingTransport() for _ in range(3)]
    servers = [sessions.buildSession(READ_ONLY, Peer("here", session=n)) for n in range(3)]
    for server, transport in zip(servers, transports, strict=True):
        server.makeConnection(transport)
    workers.drain()
    servers[0].readConnectionLost()
    workers.drain()
    assert len(sessions) == 2 and transports[0].status == 1
    stopped = sessions.stop()
    assert not stopped.called
    workers.drain()
    assert result(stopped) is None and len(sessions) == 0
    assert [transport.errors for transport in transports[1:]] == [
        b"error: the server is being stopped; try again later\n"
    ] * 2
    assert store.names.count("close") == 3


def test_noSessions():
    """Without sessions there is nothing to wait for, and no other store is served unless told."""
    sessions = ServeSessions(FakeStore(), ImmediateWorkers(), ImmediateWorkers().reactor)
    assert result(sessions.stop()) is None
    assert not sessions.isServed("auto")


def test_waitTellsNoPath():
    """Who waits for a lock hears of which object, not where it lies."""
    store = FakeStore()
    store.fail("queryValidPaths", *[Busy(f"the lock on '/secret/store/{LIB.path.baseName}'")] * 500)
    session = Session(store).send(HELLO, wire(1, 0, 0, [LIB.path]))
    session.clock.pump([0.05] * 200)
    assert session.errors == f"waiting for the lock on '{LIB.path}'...\n"
    session.lose()

"""The states of the protocol: what each side says and hears, in any cut, and where a conversation may end."""

import random

import pytest

from nixserve.codec import connection, serve
from nixserve.codec.buildresult import BuildResult
from nixserve.codec.connection import ClientConnection, ServerConnection
from nixserve.codec.events import (
    NEED_DATA,
    PAUSED,
    EndOfExport,
    EndOfImport,
    EndOfInput,
    EndOfNar,
    Hello,
    ImportedItem,
    NarData,
    Reply,
    RequestStarted,
    VersionAgreed,
)
from nixserve.codec.messages import (
    AddToStoreNar,
    BuildPaths,
    BuildPathsResult,
    Command,
    DumpStorePath,
    ExportPaths,
    ImportItem,
    ImportPaths,
    QueryClosure,
    QueryPathInfos,
    QueryValidPaths,
)
from nixserve.codec.states import CLIENT_RECEIVING, CLIENT_SENDING, SERVER_POSTPONED, SERVER_STEPS, State
from nixserve.codec.wire import MAX_REQUEST_SIZE
from nixserve.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from tests.vectors.serve.messages import (
    APP,
    CLIENT_MAGIC,
    CONTENTS,
    IMPORTED,
    LIB,
    SERVER_MAGIC,
    STORE_DIR,
    ZEROS,
    addRequest,
    captured,
    conversation,
    exportItem,
    nar,
    path,
    wire,
)

HELLO = CLIENT_MAGIC + wire(0x207)
ANSWER = SERVER_MAGIC + wire(0x208)


def bytewise(data):
    """C{data} cut after each byte."""
    return [data[i : i + 1] for i in range(len(data))]


def joined(events):
    """Events with the pieces of each NAR joined."""
    result = []
    for event in events:
        if isinstance(event, NarData) and result and isinstance(result[-1], NarData):
            result[-1] = NarData(result[-1].data + event.data)
        else:
            result.append(event)
    return result


class Server:
    """A server that answers every request with nothing."""

    EMPTY = {Command.QUERY_PATH_INFOS: {}, Command.BUILD_PATHS: BuildPathsResult()}

    def __init__(self):
        self.connection = ServerConnection(STORE_DIR)
        self.events = []
        self.sent = b""
        self.error = None

    def answer(self):
        """What the conversation needs to go on."""
        machine = self.connection
        if machine.state is State.HELLO:
            self.sent += machine.sendHello()
            return
        command = next(e.command for e in reversed(self.events) if isinstance(e, RequestStarted))
        if command in (Command.DUMP_STORE_PATH, Command.EXPORT_PATHS):
            machine.startStream()
            machine.endStream()
        elif command is Command.BUILD_DERIVATION:
            self.sent += machine.sendReply(BuildResult(9))
        elif command in (Command.ADD_TO_STORE_NAR, Command.IMPORT_PATHS):
            self.sent += machine.sendReply(None)
        else:
            self.sent += machine.sendReply(self.EMPTY.get(command, frozenset()))

    def run(self):
        """Take events until there are no more."""
        try:
            while (event := self.connection.nextEvent()) is not NEED_DATA:
                if event is PAUSED:
                    self.answer()
                else:
                    self.events.append(event)
                    if isinstance(event, EndOfInput):
                        return
        except RemoteProtocolError as e:
            self.error = str(e)

    def feed(self, *pieces, eof=False):
        """Bytes arrive."""
        for piece in pieces:
            self.connection.receiveData(piece)
            self.run()
        if eof and self.error is None:
            self.connection.receiveEOF()
            self.run()
        return self


def converse(*pieces):
    """A server that has heard everything, to the end."""
    return Server().feed(*pieces, eof=True)


# --- the tables ---------------------------------------------------------------------------------------------


def test_tablesAreConnected():
    """Every state that a step leads to is left by another, or is an end; every state can be reached."""
    for table, start in ((SERVER_STEPS, State.MAGIC), (CLIENT_SENDING, State.HELLO), (CLIENT_RECEIVING, State.MAGIC)):
        left = {state for state, _ in table}
        reached = set(table.values())
        assert left - reached == {start}
        assert reached - left == {State.CLOSED}
    # Postponed replies begin and end anywhere: this one goes in a circle.
    assert {state for state, _ in SERVER_POSTPONED} == set(SERVER_POSTPONED.values()) == {State.IDLE, State.STREAM}


# --- handshake ----------------------------------------------------------------------------------------------


def test_answersAfterEightBytes():
    """The server says hello when it has the client's magic, before it has its version."""
    server = ServerConnection(STORE_DIR)
    server.receiveData(CLIENT_MAGIC[:7])
    assert server.nextEvent() is NEED_DATA
    server.receiveData(CLIENT_MAGIC[7:])
    assert server.nextEvent() == Hello()
    assert server.nextEvent() is PAUSED
    assert server.sendHello() == ANSWER
    assert server.nextEvent() is NEED_DATA
    server.receiveData(wire(0x207))
    assert server.nextEvent() == VersionAgreed(0x207)


@pytest.mark.parametrize(
    ("said", "spoken"),
    [
        *((version, version) for version in (0, 0x100, 0x200, 0x204, 0x207, 0x208)),
        *((version, 0x208) for version in (0x2FF, 0x300, 2**32 - 1)),
    ],
)
def test_anyClientVersion(said, spoken):
    """Every client is served, at the lower of both versions; the major part is not checked."""
    server = converse(CLIENT_MAGIC + wire(said, 1, 0, 0, []))
    assert server.events[1] == VersionAgreed(spoken)
    assert server.events[3] == QueryValidPaths(frozenset())
    assert server.sent == ANSWER + wire([])
    assert server.error is None


@pytest.mark.parametrize("magic", [SERVER_MAGIC, bytes(8), b"SSH-2.0-", b"\xff" * 8, CLIENT_MAGIC[:7] + b"\1"])
def test_wrongMagic(magic):
    """Another magic ends the conversation before anything is said."""
    for pieces in ([magic + wire(0x207)], bytewise(magic + wire(0x207))):
        server = Server().feed(*pieces)
        assert (server.error, server.sent, server.events) == ("protocol mismatch", b"", [])
        with pytest.raises(RemoteProtocolError, match="protocol mismatch"):
            server.connection.nextEvent()
        with pytest.raises(LocalProtocolError):
            server.connection.sendHello()


def test_versionHas32Bits():
    """A version that does not fit is refused as Nix refuses it."""
    assert "is too large" in converse(CLIENT_MAGIC + wire(2**32)).error


# --- the server ---------------------------------------------------------------------------------------------

SCRIPTS = {f"conversation-2.{minor}": conversation(minor) for minor in (0, 4, 7, 8)}


def clean(script):
    """
    After how many bytes of C{script} the end of input is clean: nothing but the bytes between two requests, and
    1 to 7 bytes of a command.
    """
    machine = Server()
    places = set()
    for position, piece in enumerate(bytewise(script), 1):
        machine.feed(piece)
        if machine.connection.state is State.IDLE:
            places.add(position)
    return places


@pytest.mark.parametrize("name", SCRIPTS)
def test_wholeAndInPieces(name):
    """What is heard does not depend on how it is cut."""
    script = SCRIPTS[name]
    whole = converse(script)
    assert whole.error is None and isinstance(whole.events[-1], EndOfInput)
    source = random.Random(1)
    for _ in range(5):
        places = sorted(source.randrange(len(script)) for _ in range(20))
        pieces = [script[a:b] for a, b in zip([0, *places], [*places, len(script)], strict=True)]
        cut = converse(*pieces)
        assert joined(cut.events) == joined(whole.events) and cut.sent == whole.sent
    cut = converse(*bytewise(script))
    assert joined(cut.events) == joined(whole.events) and cut.sent == whole.sent


def test_hearsTheWholeConversation():
    """Every request of a real conversation with its NARs, in order."""
    server = converse(conversation(7))
    heard = joined(server.events)
    assert [event.command for event in heard if isinstance(event, RequestStarted)] == [
        1, 9, 9, 9, 4, 4, 1, 2, 2, 3, 7, 7, 5, 5, 3,
    ]  # fmt: skip
    assert [e.data for e in heard if isinstance(e, NarData)] == [
        nar(CONTENTS[info.path]) for info in (LIB, APP, LIB, IMPORTED, LIB)
    ]
    assert [e.item for e in heard if isinstance(e, ImportedItem)] == [
        ImportItem(IMPORTED.path, IMPORTED.references, None),
        ImportItem(LIB.path, frozenset(), None),
    ]
    assert sum(isinstance(event, EndOfImport) for event in heard) == 2


def test_endOfInputAtEveryByte():
    """The end of input is clean between requests and inside the number of a command, as with Nix, nowhere else."""
    script = conversation(7)
    ends = clean(script)
    # Between requests, and after 1 to 7 bytes of the number of the next command.
    assert len(ends) == 8 * 15 + 1
    for length in range(len(script) + 1):
        server = converse(script[:length])
        if length in ends:
            assert server.error is None and isinstance(server.events[-1], EndOfInput), length
            assert server.connection.state is State.CLOSED
        else:
            assert server.error == "unexpected end-of-file", length
            assert server.connection.state is State.FAILED


def test_endOfInputIsRepeated():
    """Whoever asks again hears again that nothing follows."""
    server = converse(HELLO)
    assert server.connection.nextEvent() == server.connection.nextEvent() == EndOfInput()


def test_endOfInputWaitsForReply():
    """The end of input behind a request is heard after its reply."""
    server = ServerConnection(STORE_DIR)
    server.receiveData(HELLO + wire(7, 0, []))
    server.receiveEOF()
    assert server.nextEvent() == Hello()
    assert server.nextEvent() is PAUSED
    server.sendHello()
    assert [server.nextEvent() for _ in range(3)][1:] == [
        RequestStarted(Command.QUERY_CLOSURE),
        QueryClosure(frozenset()),
    ]
    assert server.nextEvent() is PAUSED
    server.sendReply(frozenset())
    assert server.nextEvent() == EndOfInput()


def test_commandIsHeardBeforeItsBody():
    """A command can be refused by its number alone."""
    for command in Command:
        server = Server().feed(HELLO + wire(command))
        assert RequestStarted(command) in server.events
        assert server.error is None


def test_nextRequestWaits():
    """What arrives behind a request stays unread until the reply is out."""
    server = ServerConnection(STORE_DIR)
    server.receiveData(HELLO + wire(7, 0, []) + wire(2, []))
    heard = []
    while (event := server.nextEvent()) is not PAUSED or server.state is State.HELLO:
        heard.append(event)
        if event is PAUSED:
            server.sendHello()
    assert heard[-1] == QueryClosure(frozenset())
    assert server.buffered == len(wire(2, []))
    server.receiveData(b"more")
    assert server.nextEvent() is PAUSED
    assert server.buffered == len(wire(2, [])) + 4


def test_lengthDelimitsNarOfAddToStoreNar():
    """The NAR of AddToStoreNar ends where its size says, whatever it holds; the next request follows."""
    garbage = bytes(range(256)) * 3
    request = wire(9, ZEROS, "", "0" * 64, [], 0, len(garbage), 0, [], "")
    server = converse(HELLO + request + garbage + wire(2, []))
    heard = joined(server.events)
    assert NarData(garbage) in heard
    assert heard[heard.index(NarData(garbage)) + 1] == EndOfNar()
    assert RequestStarted(Command.QUERY_PATH_INFOS) in heard


def test_narsComeInBoundedPieces():
    """However much arrives at once, no event holds more than 256 KiB of a NAR."""
    size = 3 * connection.MAX_CHUNK + 5
    request = wire(9, ZEROS, "", "0" * 64, [], 0, size, 0, [], "")
    server = Server().feed(HELLO + request + bytes(size))
    pieces = [len(event.data) for event in server.events if isinstance(event, NarData)]
    assert pieces == [connection.MAX_CHUNK] * 3 + [5]
    big = nar(bytes(size))
    server = Server().feed(HELLO + wire(4, 1) + big)
    assert max(len(event.data) for event in server.events if isinstance(event, NarData)) == connection.MAX_CHUNK
    assert joined(server.events)[-2:] == [NarData(big), EndOfNar()]


def test_narsPassAsTheyCome():
    """Nothing of a NAR is kept back for more of it to arrive."""
    data = nar(b"x" * 1000)
    for request in (wire(9, ZEROS, "", "0" * 64, [], 0, len(data), 0, [], ""), wire(4, 1)):
        server = Server().feed(HELLO + request + data[:500])
        assert joined(server.events)[-1] == NarData(data[:500])


def test_manyImportsInOnePiece():
    """A thousand small objects that arrive at once are told apart, in time that grows with their number only."""
    stream = exportItem(LIB) * 5000
    server = converse(HELLO + wire(4) + stream + wire(0))
    assert sum(isinstance(event, ImportedItem) for event in server.events) == 5000
    assert server.error is None


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (wire(10), "unknown serve command 10"),
        (wire(2**32), f"serialised integer {2**32} is too large"),
        (wire(4, 2), "doesn't look like something created by 'nix-store --export'"),
        (wire(4, 1) + nar(b"x") + wire(1), "Nix archive cannot be imported; wrong format"),
        (wire(4, 1) + b"\x0d" + bytes(30), "bad archive"),
        (wire(3, "/nix/store/short"), "'short' is too short to be a valid store path"),
        (wire(3, "/x/y"), "path '/x/y' is not in the Nix store"),
        (wire(3, ZEROS)[:-1] + b"x", "non-zero padding"),
        (b"Permission denied", "the text 'Permissi'"),
    ],
)
def test_brokenRequests(data, text):
    """What breaks a rule is the peer's error, the same in any cut, and the connection stays dead."""
    errors = set()
    for pieces in ([HELLO + data], bytewise(HELLO + data)):
        server = Server().feed(*pieces)
        assert text in server.error
        errors.add(server.error)
        assert server.connection.state is State.FAILED
        with pytest.raises(RemoteProtocolError):
            server.connection.nextEvent()
        with pytest.raises(LocalProtocolError):
            server.connection.sendReply(frozenset())
    assert len(errors) == 1


def test_requestOverTheLimit():
    """A request of more than 128 MiB is refused as soon as its lengths add up to that; the next one begins anew."""
    server = ServerConnection(STORE_DIR)
    machine = Server()
    machine.connection = server
    machine.feed(HELLO + wire(8, path("a.drv"), [], [], "", "", 16))
    text = wire(bytes(15 * 1024 * 1024))
    for _ in range(8):
        machine.feed(text)
        assert machine.error is None
    machine.feed(wire(15 * 1024 * 1024))
    assert f"a request of more than {MAX_REQUEST_SIZE} bytes is refused" in machine.error


def test_limitIsForOneRequest():
    """Requests do not add up, and neither do the objects of an export stream or the bytes of NARs."""
    machine = Server().feed(HELLO)
    reader = machine.connection._reader
    for _ in range(3):
        machine.feed(addRequest(LIB))
    machine.feed(wire(4) + exportItem(LIB) * 2 + wire(0) + wire(1, 0, 0, [ZEROS]))
    assert machine.error is None
    assert reader._allowance == MAX_REQUEST_SIZE


def test_misuseOfServer():
    """What the state does not allow is our own error, and names the step and the state."""
    server = ServerConnection(STORE_DIR)
    with pytest.raises(LocalProtocolError, match="hello is not possible before the peer's magic"):
        server.sendHello()
    for misuse in (lambda: server.sendReply(frozenset()), server.startStream, server.endStream):
        with pytest.raises(LocalProtocolError):
            misuse()
    machine = Server()
    machine.connection = server
    machine.feed(HELLO)
    server.receiveData(wire(3, ZEROS))
    assert server.nextEvent() == RequestStarted(Command.DUMP_STORE_PATH)
    with pytest.raises(LocalProtocolError):
        server.startStream()
    assert server.nextEvent() == DumpStorePath(ZEROS)
    with pytest.raises(LocalProtocolError, match="the reply to DUMP_STORE_PATH is a stream"):
        server.sendReply(None)
    server.startStream()
    with pytest.raises(LocalProtocolError):
        server.startStream()
    server.endStream()
    assert server.nextEvent() is NEED_DATA


def serverAfter(*requests):
    """A server that has said hello and read some requests, each of whose replies it has postponed."""
    server = ServerConnection(STORE_DIR)
    server.receiveData(HELLO + b"".join(requests))
    left = len(requests)
    while left:
        if server.nextEvent() is PAUSED:
            if server.state is State.HELLO:
                server.sendHello()
            else:
                server.postponeReply()
                left -= 1
    return server


def test_postponedReplies():
    """Later requests are read before the replies to those before them, which then come in order."""
    server = serverAfter(addRequest(LIB), wire(1, 0, 0, []), addRequest(APP))
    assert server.postponed == 3 and server.nextEvent() is NEED_DATA
    server.receiveData(wire(2, []))
    assert server.nextEvent() == RequestStarted(Command.QUERY_PATH_INFOS)
    server.nextEvent()
    assert server.nextEvent() is PAUSED
    sent = [server.sendReply(value) for value in (None, frozenset(), None)]
    assert sent == [wire(1), wire([]), wire(1)] and server.postponed == 0
    assert server.nextEvent() is PAUSED
    assert server.sendReply({}) == wire("")
    assert server.nextEvent() is NEED_DATA


def test_postponedStreams():
    """Several streams that follow each other are one to the owner; a reply to something else is none of them."""
    dump = wire(3, ZEROS)
    server = serverAfter(dump, dump, addRequest(LIB), dump)
    with pytest.raises(LocalProtocolError, match="the reply to DUMP_STORE_PATH is a stream"):
        server.sendReply(None)
    with pytest.raises(LocalProtocolError, match=r"3 streams are no reply to DUMP_STORE_PATH, .*ADD_TO_STORE_NAR"):
        server.startStream(3)
    server.startStream(2)
    for misuse in (lambda: server.startStream(2), lambda: server.sendReply(None)):
        with pytest.raises(LocalProtocolError):
            misuse()
    server.endStream()
    with pytest.raises(LocalProtocolError, match="1 streams are no reply to ADD_TO_STORE_NAR"):
        server.startStream()
    assert server.sendReply(None) == wire(1)
    with pytest.raises(LocalProtocolError):
        server.startStream(2)
    server.startStream()
    server.endStream()
    with pytest.raises(LocalProtocolError):
        server.endStream()
    assert server.nextEvent() is NEED_DATA


def test_repliesBehindTheEnd():
    """What was postponed can still be answered when the client has ended, or has broken a rule."""
    server = serverAfter(addRequest(LIB))
    server.receiveEOF()
    assert server.nextEvent() == EndOfInput()
    assert server.sendReply(None) == wire(1)
    server = serverAfter(addRequest(LIB))
    server.receiveData(wire(17))
    with pytest.raises(RemoteProtocolError):
        server.nextEvent()
    assert server.sendReply(None) == wire(1)
    with pytest.raises(LocalProtocolError):
        server.sendReply(None)


def test_misuseOfPostponing():
    """Only the reply to a complete request can be postponed, once."""
    server = serverAfter(wire(1, 0, 0, []))
    with pytest.raises(LocalProtocolError, match="postponed reply is not possible between requests"):
        server.postponeReply()
    server.receiveData(addRequest(LIB)[:-8])
    while server.nextEvent() is not NEED_DATA:
        with pytest.raises(LocalProtocolError):
            server.postponeReply()


# --- the client ---------------------------------------------------------------------------------------------


class Client:
    """A client that has said hello."""

    def __init__(self, announced=0x207):
        self.connection = ClientConnection(STORE_DIR, announced)
        self.sent = self.connection.sendHello()
        self.events = []
        self.error = None

    def send(self, request):
        """Ask something."""
        self.sent += self.connection.sendRequest(request)
        return self

    def feed(self, *pieces, eof=False):
        """Bytes arrive."""
        try:
            for piece in pieces:
                self.connection.receiveData(piece)
                self.run()
            if eof:
                self.connection.receiveEOF()
                self.run()
        except RemoteProtocolError as e:
            self.error = str(e)
        return self

    def run(self):
        """Take events until there are no more."""
        while (event := self.connection.nextEvent()) is not NEED_DATA:
            self.events.append(event)
            if isinstance(event, EndOfInput):
                return


def scriptedClient(minor):
    """A client that has asked what L{conversation} asks."""
    client = Client(0x200 | minor)
    machine = client.connection
    everything = [APP.path, IMPORTED.path, LIB.path]
    client.send(QueryValidPaths(frozenset(everything), lock=True))
    for info in (LIB, APP, LIB):
        client.send(AddToStoreNar(info))
        client.sent += machine.sendNarData(nar(CONTENTS[info.path])[:100])
        client.sent += machine.sendNarData(nar(CONTENTS[info.path])[100:])
        machine.endNar()
    client.send(ImportPaths())
    for info in (IMPORTED, LIB):
        client.sent += serve.writeExportMarker(True) + nar(CONTENTS[info.path])
        client.sent += serve.writeImportItem(ImportItem(info.path, info.references, info.deriver))
    client.sent += serve.writeExportMarker(False)
    machine.endImport()
    client.send(ImportPaths())
    client.sent += serve.writeExportMarker(False)
    machine.endImport()
    client.send(QueryValidPaths(frozenset([*everything, path("missing")]), substitute=True))
    client.send(QueryPathInfos(frozenset([*everything, path("missing")])))
    client.send(QueryPathInfos(frozenset()))
    client.send(DumpStorePath(APP.path))
    client.send(QueryClosure(frozenset({APP.path})))
    client.send(QueryClosure(frozenset({IMPORTED.path}), includeOutputs=True))
    client.send(ExportPaths(tuple(everything), True))
    client.send(ExportPaths(()))
    client.send(DumpStorePath(LIB.path))
    return client


@pytest.mark.parametrize("minor", range(8))
def test_realServer(minor):
    """What real Nix 2.8 answered to a whole conversation is understood, in any cut, at each version."""
    _, reply = captured(f"conversation-2.{minor}")
    whole = scriptedClient(minor).feed(reply, eof=True)
    assert whole.error is None
    heard = joined(whole.events)
    assert heard[0] == VersionAgreed(0x200 | minor)
    assert isinstance(heard[-1], EndOfInput)
    replies = [event.value for event in heard if isinstance(event, Reply)]
    assert replies[:6] == [frozenset(), None, None, None, None, None]
    everything = frozenset({APP.path, IMPORTED.path, LIB.path})
    assert replies[6] == everything
    infos = replies[7]
    assert infos.keys() == everything
    assert infos[APP.path].references == {LIB.path, APP.path} and infos[APP.path].deriver == APP.deriver
    if minor >= 4:
        assert infos[APP.path].narHash == APP.narHash and infos[APP.path].sigs == APP.sigs
        assert infos[IMPORTED.path].narHash == IMPORTED.narHash and infos[IMPORTED.path].narSize == IMPORTED.narSize
    assert replies[8:] == [{}, {APP.path, LIB.path}, {IMPORTED.path, LIB.path}]
    nars = [event.data for event in heard if isinstance(event, NarData)]
    dumped = [nar(CONTENTS[info.path]) for info in (APP, APP, IMPORTED, LIB, LIB)]
    assert sorted(nars) == sorted(dumped) and nars[0] == dumped[0] and nars[-1] == dumped[-1]
    # References first: whatever the order, lib is before the others.
    items = [event.item.path for event in heard if isinstance(event, ImportedItem)]
    assert set(items) == everything and items[0] == LIB.path
    assert sum(isinstance(event, EndOfExport) for event in heard) == 2
    cut = scriptedClient(minor).feed(*bytewise(reply), eof=True)
    assert cut.error is None and joined(cut.events) == heard


def test_clientSaysWhatTheScriptSays():
    """
    The client's bytes are those of the script, except that its sets are sorted, its flags 0 or 1, and the hash bare.
    """
    client = scriptedClient(7)
    server, scripted = converse(client.sent), converse(conversation(7))
    assert server.error is None
    assert joined(server.events) == joined(scripted.events)


def test_repliesAreReadByTheLowerVersion():
    """A client that announces less hears replies of its own version."""
    client = Client(0x203).send(QueryPathInfos(frozenset({ZEROS})))
    client.feed(ANSWER + wire(ZEROS, "", [], 7, 7, ""))
    assert client.events[0] == VersionAgreed(0x203)
    assert client.events[1].value[ZEROS].narSize == 7


@pytest.mark.parametrize("version", [0x200, 0x203, 0x205, 0x208, 0x2FF])
def test_serverVersions(version):
    """Every 2.x is accepted."""
    client = Client(0x208).feed(SERVER_MAGIC + wire(version))
    assert client.events == [VersionAgreed(min(version, 0x208))] and client.error is None


@pytest.mark.parametrize(("version", "text"), [(0x300, "3.0"), (0x107, "1.7"), (0x10207, "258.7")])
def test_otherMajorVersions(version, text):
    """Another major version is none that we speak."""
    client = Client().feed(SERVER_MAGIC + wire(version))
    assert client.error == f"unsupported 'nix-store --serve' protocol version {text}"


def test_textBeforeTheMagic():
    """What a login shell says instead is in the error, also when it is shorter than the magic."""
    said = b"This account is currently not available.\n"
    assert Client().feed(said).error == f"protocol mismatch, got {said!r}"
    assert Client().feed(b"no!\n", eof=True).error == "protocol mismatch, got b'no!\\n'"
    assert len(Client().feed(b"x" * 100_000).error) < 1100


@pytest.mark.parametrize("data", [b"", ANSWER[:8], ANSWER[:15]])
def test_endOfInputInTheHandshake(data):
    """A server that ends before it has said its version has failed."""
    assert Client().feed(data, eof=True).error == "unexpected end-of-file"


def test_endOfInputAtEveryByteOfReplies():
    """The end of input is clean only where no reply is owed."""
    _, reply = captured("conversation-2.7")
    for length in range(len(reply)):
        error = scriptedClient(7).feed(reply[:length], eof=True).error
        assert error == (
            "protocol mismatch, got " + repr(reply[:length]) if 0 < length < 8 else "unexpected end-of-file"
        )
    assert Client().feed(ANSWER, eof=True).events == [VersionAgreed(0x207), EndOfInput()]


def test_surplusBytes():
    """Bytes that answer nothing are an error: Nix 2.4 to 2.8 send such to clients that announce 2.1 to 2.5."""
    assert Client().feed(ANSWER + b"x").error == "the remote sent a reply that nobody asked for"
    client = Client().send(QueryClosure(frozenset()))
    assert client.feed(ANSWER + wire([]) + wire([])).error == "the remote sent a reply that nobody asked for"
    assert Client().feed(ANSWER + b"x", eof=True).error == "the remote sent a reply that nobody asked for"


def test_requestsBeforeTheVersionIsKnown():
    """All but builds may be sent at once, behind the hello."""
    client = Client()
    with pytest.raises(LocalProtocolError, match="BUILD_PATHS cannot be sent before the version is known"):
        client.send(BuildPaths(()))
    client.send(QueryClosure(frozenset()))
    client.feed(ANSWER + wire([]))
    client.send(BuildPaths(())).feed(wire(0))
    assert [event.value for event in client.events[1:]] == [frozenset(), BuildPathsResult()]


def test_repliesComeInOrder():
    """Each reply belongs to the oldest request."""
    requests = [QueryClosure(frozenset({ZEROS})), QueryValidPaths(frozenset()), DumpStorePath(ZEROS)]
    client = Client()
    for request in requests:
        client.send(request)
    client.feed(ANSWER + wire([ZEROS]) + wire([]) + nar(b"x"))
    assert joined(client.events)[1:] == [
        Reply(requests[0], frozenset({ZEROS})),
        Reply(requests[1], frozenset()),
        NarData(nar(b"x")),
        EndOfNar(),
    ]


def test_narMustHaveItsSize():
    """The client sends exactly as many bytes of a NAR as it has announced, and nothing in between."""
    client = Client().send(AddToStoreNar(LIB))
    machine = client.connection
    size = LIB.narSize
    assert machine.sendNarData(bytes(size - 1)) == bytes(size - 1)
    with pytest.raises(LocalProtocolError, match=f"the NAR ends {1} bytes early"):
        machine.endNar()
    with pytest.raises(LocalProtocolError, match="2 bytes of NAR where 1 are left"):
        machine.sendNarData(b"xx")
    with pytest.raises(LocalProtocolError):
        client.send(QueryClosure(frozenset()))
    machine.sendNarData(b"x")
    machine.endNar()
    with pytest.raises(LocalProtocolError):
        machine.sendNarData(b"")
    client.send(QueryClosure(frozenset()))


def test_nothingFollowsTheEnd():
    """After its own end of input a client asks nothing more, but hears replies."""
    client = Client().send(QueryClosure(frozenset()))
    client.connection.sendEOF()
    with pytest.raises(LocalProtocolError):
        client.send(QueryClosure(frozenset()))
    client.feed(ANSWER + wire([]), eof=True)
    assert isinstance(client.events[-1], EndOfInput)


def test_brokenReply():
    """A reply that breaks a rule kills the connection, with the text if there is one."""
    client = Client().send(QueryClosure(frozenset()))
    client.feed(ANSWER + b"error: no space left on device\n")
    assert "the text 'error: n'" in client.error
    for misuse in (lambda: client.send(QueryClosure(frozenset())), client.connection.sendEOF):
        with pytest.raises(LocalProtocolError):
            misuse()
    with pytest.raises(ProtocolError):
        client.connection.nextEvent()


def test_badNarInReply():
    """What should be a NAR and is none kills the connection."""
    for request in (DumpStorePath(ZEROS), ExportPaths((ZEROS,))):
        marker = wire(1) if isinstance(request, ExportPaths) else b""
        client = Client().send(request).feed(ANSWER + marker + b"not a NAR at all")
        assert "bad archive" in client.error


def test_replyInPieces():
    """A reply in pieces is what a reply at once is; until its end nothing else is possible."""
    server = ServerConnection(STORE_DIR)
    server.receiveData(HELLO)
    assert isinstance(server.nextEvent(), Hello)
    server.sendHello()
    server.receiveData(wire(1, 0, 0, [ZEROS]) + wire(3, ZEROS))
    while not isinstance(server.nextEvent(), QueryValidPaths):
        pass
    encode = server.startReply()
    assert b"".join(encode({ZEROS})) == wire([ZEROS])
    for misuse in (server.startReply, lambda: server.sendReply(frozenset())):
        with pytest.raises(LocalProtocolError):
            misuse()
    assert server.nextEvent() is PAUSED
    server.endStream()
    while not isinstance(server.nextEvent(), DumpStorePath):
        pass
    with pytest.raises(LocalProtocolError, match="the reply to DUMP_STORE_PATH is a stream"):
        server.startReply()


def test_requestSize():
    """What has arrived of a request counts until it is answered."""
    server = ServerConnection(STORE_DIR)
    server.receiveData(HELLO)
    assert isinstance(server.nextEvent(), Hello)
    server.sendHello()
    assert isinstance(server.nextEvent(), VersionAgreed) and server.requestSize == 0
    request = wire(1, 0, 0, [ZEROS])
    server.receiveData(request[:-1])
    while server.nextEvent() is not NEED_DATA:
        pass
    assert server.requestSize == len(request)
    server.receiveData(request[-1:])
    assert isinstance(server.nextEvent(), QueryValidPaths) and server.requestSize == len(request)
    server.sendReply(frozenset())
    assert server.requestSize == 0

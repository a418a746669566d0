"""Whatever bytes arrive at either end or at the relay: events or our errors, and the same whole as in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.buildresult import BuildResult
from nixserve.codec.connection import ClientConnection, ServerConnection
from nixserve.codec.events import (
    NEED_DATA,
    PAUSED,
    EndOfExport,
    EndOfInput,
    EndOfNar,
    ImportedItem,
    NarData,
    Reply,
    RequestStarted,
)
from nixserve.codec.messages import (
    BuildDerivation,
    BuildPaths,
    BuildPathsResult,
    Command,
    DumpStorePath,
    ExportPaths,
    QueryClosure,
    QueryPathInfos,
)
from nixserve.codec.relay import FrameReader, RelayHeader, encodeFrame
from nixserve.codec.states import State
from nixserve.errors import FormatError, RemoteProtocolError
from tests.vectors.serve.messages import (
    CLIENT_MAGIC,
    DERIVATION,
    LIB,
    ONES_DRV,
    REPLIES,
    REQUESTS,
    SERVER_MAGIC,
    STORE_DIR,
    ZEROS,
    conversation,
    exportItem,
    nar,
    wire,
)


def joined(events):
    """Events with the pieces of each NAR joined."""
    result = []
    for event in events:
        if isinstance(event, NarData) and result and isinstance(result[-1], NarData):
            result[-1] = NarData(result[-1].data + event.data)
        else:
            result.append(event)
    return result


def replyTo(server, command):
    """Answer with nothing."""
    if command in (Command.DUMP_STORE_PATH, Command.EXPORT_PATHS):
        server.startStream()
        server.endStream()
    else:
        value = {
            Command.QUERY_PATH_INFOS: {},
            Command.BUILD_PATHS: BuildPathsResult(),
            Command.BUILD_DERIVATION: BuildResult(0),
            Command.ADD_TO_STORE_NAR: None,
            Command.IMPORT_PATHS: None,
        }.get(command, frozenset())
        server.sendReply(value)


def serverHears(pieces):
    """
    All that can be seen of a server, up to its end or its error. The bytes of a NAR in front of an error depend on the
    cut: a piece of a bad NAR is refused as a whole.
    """
    server = ServerConnection(STORE_DIR)
    command = None
    events = []
    try:
        for piece in (*pieces, None):
            if piece is None:
                server.receiveEOF()
            else:
                server.receiveData(piece)
            while (event := server.nextEvent()) is not NEED_DATA and not isinstance(event, EndOfInput):
                if event is not PAUSED:
                    events.append(event)
                    if isinstance(event, RequestStarted):
                        command = event.command
                elif server.state is State.HELLO:
                    server.sendHello()
                else:
                    replyTo(server, command)
    except RemoteProtocolError as e:
        return [event for event in events if not isinstance(event, NarData)], str(e)
    assert server.state is State.CLOSED
    return joined(events), ""


ASKED = [
    QueryClosure(frozenset({ZEROS})),
    DumpStorePath(ZEROS),
    QueryPathInfos(frozenset({ZEROS})),
    ExportPaths((ZEROS,)),
    BuildPaths(()),
    BuildDerivation(ONES_DRV, DERIVATION),
]


def clientHears(pieces, asked):
    """All that can be seen of a client that has asked C{asked}, likewise. Up to its end it has every reply."""
    client = ClientConnection(STORE_DIR)
    client.sendHello()
    client.receiveData(SERVER_MAGIC + wire(0x207))
    events = [client.nextEvent()]
    for request in asked:
        client.sendRequest(request)
    try:
        for piece in (*pieces, None):
            if piece is None:
                client.receiveEOF()
            else:
                client.receiveData(piece)
            while (event := client.nextEvent()) is not NEED_DATA and not isinstance(event, EndOfInput):
                events.append(event)
    except RemoteProtocolError as e:
        return [event for event in events if not isinstance(event, NarData)], str(e)
    assert isinstance(event, EndOfInput)
    assertAnswered(events, asked)
    return joined(events), ""


def assertAnswered(events, asked):
    """There is a reply to each of the requests, in order, and no other."""
    dumps = [request for request in asked if isinstance(request, DumpStorePath)]
    replies = [event.request for event in events if isinstance(event, Reply | EndOfExport)]
    exported = sum(isinstance(event, ImportedItem) for event in events)
    assert events.count(EndOfNar()) - exported == len(dumps)
    assert replies == [request for request in asked if request not in dumps]


@st.composite
def mutated(draw, originals):
    """Real bytes with a few overwritten, removed, inserted or repeated."""
    data = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 8, 16, 24, 100])))
        middle = draw(
            st.one_of(
                st.binary(max_size=9),
                st.sampled_from([wire(n) for n in (0, 1, 2, 9, 10, 45, 4096, 2**24, 2**32, 2**63, 2**64 - 1)]),
                st.just(data[start:end] * 2),
            )
        )
        data = data[:start] + middle + data[end:]
    return data


def pieces(data, cuts):
    """C{data} cut at C{cuts}."""
    places = sorted(min(cut, len(data)) for cut in cuts)
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


cuts = st.lists(st.integers(0, 4000), max_size=6)
bodies = [row.data for row in REQUESTS]
requests = st.lists(mutated(bodies), max_size=3).map(lambda parts: CLIENT_MAGIC + wire(0x207) + b"".join(parts))
fromClients = st.one_of(requests, mutated([conversation(7), conversation(0)]), st.binary(max_size=100))
answers = [*[row.data for row in REPLIES if row.minor == 7], nar(b"x"), exportItem(LIB) + wire(0), wire("")]
fromServers = st.lists(mutated(answers), max_size=4).map(b"".join) | st.binary(max_size=100)


@given(fromClients, cuts)
def test_server(data, cuts):
    """A server hears the same whole, cut anywhere, and byte by byte; nothing but our error comes out."""
    whole = serverHears([data])
    assert serverHears(pieces(data, cuts)) == whole
    assert serverHears([data[i : i + 1] for i in range(len(data))]) == whole


@given(fromServers, st.lists(st.sampled_from(ASKED), max_size=4), cuts)
def test_client(data, asked, cuts):
    """A client hears the same whole, cut anywhere, and byte by byte; nothing but our error comes out."""
    whole = clientHears([data], asked)
    assert clientHears(pieces(data, cuts), asked) == whole
    assert clientHears([data[i : i + 1] for i in range(len(data))], asked) == whole


@given(st.binary(max_size=100) | mutated([SERVER_MAGIC + wire(0x208), b"motd\n" * 5]), cuts)
def test_clientsHandshake(data, cuts):
    """Whatever is said instead of a hello is an error that shows its beginning, or the version."""

    def hear(parts):
        client = ClientConnection(STORE_DIR)
        client.sendHello()
        try:
            for part in parts:
                client.receiveData(part)
            client.receiveEOF()
            return client.nextEvent(), client.nextEvent()
        except RemoteProtocolError as e:
            return str(e)

    assert hear(pieces(data, cuts)) == hear([data])


def framesOf(parts):
    """Frames, and the error if there is one."""
    reader = FrameReader()
    frames = []
    try:
        for part in parts:
            for frame in reader.feed(part):
                frames.append(frame)
    except FormatError:
        return frames, True
    return frames, False


frames = st.lists(
    st.builds(encodeFrame, st.integers(0, 5), st.binary(max_size=20)) | st.binary(max_size=12), max_size=6
).map(b"".join)


@given(frames, cuts)
def test_frames(data, cuts):
    """Frames are the same in any cut."""
    whole = framesOf([data])
    assert framesOf(pieces(data, cuts)) == whole
    assert framesOf([data[i : i + 1] for i in range(len(data))]) == whole


@given(st.binary(max_size=100) | mutated([RelayHeader("read,write", "local?root=/x").encode()]))
def test_relayHeader(line):
    """A header is read or refused; what is read is written back to the same meaning."""
    try:
        header = RelayHeader.decode(line)
    except FormatError:
        return
    assert RelayHeader.decode(header.encode()) == header

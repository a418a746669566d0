"""The messages of the serve protocol: every one at every version, both directions, in any cut."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec import serve
from nixserve.codec.aterm import MAX_STRINGS
from nixserve.codec.buildresult import BuildResult
from nixserve.codec.hashes import Hash
from nixserve.codec.messages import (
    AddToStoreNar,
    BuildDerivation,
    BuildOptions,
    BuildPaths,
    Command,
    DumpStorePath,
    ImportItem,
    ImportPaths,
    QueryClosure,
    QueryPathInfos,
    QueryValidPaths,
)
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir
from nixserve.codec.wire import MAX_SET_SIZE, Reader
from nixserve.errors import FormatError
from tests import strategies
from tests.vectors.serve.messages import (
    COUNTING,
    DERIVATION,
    LIB,
    MINORS,
    ONES_DRV,
    OPTIONS,
    REPLIES,
    REQUESTS,
    STORE_DIR,
    ZEROS,
    path,
    wire,
)

NAMES = {row.name: row for row in [*REQUESTS, *REPLIES]}


def cuts(data):
    """C{data} whole, bytewise, and in pieces of random sizes that are always the same."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    source = random.Random(len(data))
    for _ in range(3):
        places = sorted(source.randrange(len(data) + 1) for _ in range(6))
        yield [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def parse(begin, pieces):
    """
    @return: the value, and what is left behind it; C{None} if it needs more.
    """
    reader = Reader()
    running = begin(reader)
    pieces = list(pieces)
    try:
        while True:
            next(running)
            if not pieces:
                return None
            reader.feed(pieces.pop(0))
    except StopIteration as stop:
        return stop.value, reader.take(1 << 20) + b"".join(pieces)


def requestOf(row):
    """What the reply of a row may have been asked for."""
    match row.command:
        case Command.QUERY_VALID_PATHS:
            return QueryValidPaths(row.value)
        case Command.QUERY_PATH_INFOS:
            return QueryPathInfos(frozenset(row.value))
        case Command.QUERY_CLOSURE:
            return QueryClosure(frozenset())
        case Command.BUILD_DERIVATION:
            return BuildDerivation(ONES_DRV, DERIVATION)
        case Command.BUILD_PATHS:
            return BuildPaths(())
        case Command.IMPORT_PATHS:
            return ImportPaths()
        case Command.ADD_TO_STORE_NAR:
            return AddToStoreNar(LIB)


def readerOf(row):
    """How the bytes of a row are read."""
    version = 0x200 | row.minor

    def request(reader):
        command = yield from serve.readCommand(reader)
        return (yield from serve.readRequest(reader, command, version, STORE_DIR))

    def reply(reader):
        return (yield from serve.readReply(reader, requestOf(row), version, STORE_DIR))

    return request if row.command is None else reply


def refused(data, minor=7):
    """The error that a request gives."""
    row = REQUESTS[0]._replace(minor=minor)
    errors = set()
    for pieces in cuts(data):
        with pytest.raises(FormatError) as caught:
            parse(readerOf(row), pieces)
        errors.add(str(caught.value))
    assert len(errors) == 1, errors
    return errors.pop()


def test_tableIsWhole():
    """Every command is in the table at every version, as request and, where it has one, as reply."""
    requests = {(row.value.command, row.minor) for row in REQUESTS}
    assert requests == {(command, minor) for command in Command for minor in MINORS}
    streams = {Command.DUMP_STORE_PATH, Command.EXPORT_PATHS}
    replies = {(row.command, row.minor) for row in REPLIES}
    wanted = {(command, minor) for command in Command for minor in MINORS if command not in streams}
    assert replies == wanted - {(Command.BUILD_DERIVATION, 0)}


@pytest.mark.parametrize("name", NAMES)
def test_reads(name):
    """The bytes give the value, whole, one at a time, in random pieces, and with bytes behind them."""
    row = NAMES[name]
    for pieces in cuts(row.data):
        assert parse(readerOf(row), pieces) == (row.value, b"")
        assert parse(readerOf(row), [*pieces, b"behind"]) == (row.value, b"behind")
    assert parse(readerOf(row), [row.data + b"behind"]) == (row.value, b"behind")


@pytest.mark.parametrize("name", NAMES)
def test_needsEveryByte(name):
    """Without its last byte there is no value."""
    row = NAMES[name]
    assert parse(readerOf(row), [row.data[:-1]]) is None


@pytest.mark.parametrize("name", NAMES)
def test_writes(name):
    """The value gives the bytes."""
    row = NAMES[name]
    value = row.value if row.written is None else row.written
    if row.command is None:
        assert serve.writeRequest(value, 0x200 | row.minor) == row.data
    else:
        assert serve.writeReply(row.command, value, 0x200 | row.minor) == row.data


@pytest.mark.parametrize(
    ("minor", "length"), [(0, 16), (1, 16), (2, 24), (3, 40), (4, 40), (5, 40), (6, 40), (7, 48), (8, 48)]
)
def test_lengthOfBuildOptions(minor, length):
    """Options grow with the version."""
    data = serve.writeRequest(BuildPaths((), OPTIONS), 0x200 | minor)
    assert len(data) == 16 + length


def test_buildOptionsExample():
    """3600 s of silence, two hours in all, and the failed build kept."""
    data = bytes.fromhex(
        "100e000000000000 201c000000000000 0000000000000000 0000000000000000 0000000000000000 0100000000000000"
    )
    options = BuildOptions(3600, 7200, keepFailed=True)
    assert serve.writeRequest(BuildPaths((), options), 0x207) == wire(6, 0) + data


def test_queryValidPathsExample():
    """One path, locked: the bytes that real clients send."""
    data = bytes.fromhex(
        "0100000000000000 0100000000000000 0000000000000000 0100000000000000"
        "2d00000000000000 2f6e69782f73746f 72652f3030303030 3030303030303030"
        "3030303030303030 3030303030303030 3030302d61000000"
    )
    request = QueryValidPaths(frozenset({ZEROS}), lock=True)
    assert serve.writeRequest(request, 0x207) == data
    assert parse(readerOf(REQUESTS[0]), [data]) == (request, b"")


def test_minorOf():
    """Only the minor part of a version matters."""
    assert [serve.minorOf(version) for version in (0x207, 0x100, 0x300, 0x2FF)] == [7, 0, 0, 255]


def test_whatVersionsHave():
    """A version has all commands but the youngest, which came with 2.5, and tells hashes from 2.4 on."""
    lacking = {
        serve.versionText(version): [command.name for command in Command if not serve.hasCommand(version, command)]
        for version in (0x200, 0x204, 0x205, 0x208)
    }
    assert lacking == {"2.0": ["ADD_TO_STORE_NAR"], "2.4": ["ADD_TO_STORE_NAR"], "2.5": [], "2.8": []}
    assert [serve.hasHashes(version) for version in (0x203, 0x204, 0x208)] == [False, True, True]


def test_commandNames():
    """The name of each command is Nix's, with a small letter."""
    assert [command.camelName for command in Command] == [
        "queryValidPaths", "queryPathInfos", "dumpStorePath", "importPaths", "exportPaths",
        "buildPaths", "queryClosure", "buildDerivation", "addToStoreNar",
    ]  # fmt: skip


def test_versionIsNeededForBuildsOnly():
    """Only requests with options differ by version."""
    assert {row.value.command for row in REQUESTS if serve.dependsOnVersion(row.value)} == {
        Command.BUILD_PATHS,
        Command.BUILD_DERIVATION,
    }


@pytest.mark.parametrize("number", [0, 10, 11, 255, 2**32 - 1])
def test_unknownCommand(number):
    """Another number is refused in Nix's words."""
    assert refused(wire(number)) == f"unknown serve command {number}"


def test_commandsHave32Bits():
    """A command is read into 32 bits."""
    assert refused(wire(2**32)) == f"serialised integer {2**32} is too large at offset 0"


@pytest.mark.parametrize(
    "data",
    [
        wire(1, 2**32, 0, []),
        wire(1, 0, 2**32, []),
        wire(5, 2**32, []),
        wire(6, [], 2**32, 0, 0, 0, 0, 0),
        wire(6, [], 0, 2**32, 0, 0, 0, 0),
        wire(6, [], 0, 0, 0, 2**32, 0, 0),
        wire(6, [], 0, 0, 0, 0, 2**32, 0),
        wire(6, [], 0, 0, 0, 0, 0, 2**32),
        wire(7, 2**32, []),
        wire(9, ZEROS, "", COUNTING.hex, [], 0, 1, 2**32, [], ""),
    ],
)
def test_fieldsOf32Bits(data):
    """Flags and seconds are read into 32 bits, in every place."""
    assert refused(data).startswith(f"serialised integer {2**32} is too large")


@pytest.mark.parametrize("code", [1, 2, 3, 5, 7, 8, 9])
@pytest.mark.parametrize(
    "bad",
    ["", "/x/y", "short", "/nix/store/short", "/nix/store", f"{ZEROS}\0", str(ZEROS)[:-2], "\udcff"],
)
def test_foreignPaths(code, bad):
    """What is no path of the store is refused in every command."""
    before = {1: (0, 0), 5: (0,), 7: (0,)}.get(code, ())
    data = wire(code, *before, bad if code in (3, 8, 9) else [bad])
    data += wire([], [], "", "", [], [], 0, 0, 0, 0, 0, 0, 0, 0, 0)
    text = refused(data)
    if bad == "/x/y":
        assert "path '/x/y' is not in the Nix store" in text
    if bad == "/nix/store/short":
        assert "too short to be a valid store path" in text


def test_otherStoreDirectory():
    """Paths are those of the store served, not of any."""
    reader = Reader()
    reader.feed(wire(ZEROS))
    with pytest.raises(FormatError, match="is not in the Nix store"):
        next(serve.readRequest(reader, Command.DUMP_STORE_PATH, 0x207, StoreDir("/gnu/store")))


def test_pathsMayBeUnsortedAndRepeated():
    """Readers take sets in any order and with repetitions."""
    request, _ = parse(readerOf(REQUESTS[0]), [wire(2, [ZEROS, path("b"), ZEROS, path("a"), path("b")])])
    assert request.paths == {ZEROS, path("a"), path("b")}


def test_mapsMayBeUnsorted():
    """Outputs and environment are read in any order."""
    data = wire(
        8, ONES_DRV, [("out", ZEROS, "", ""), ("dev", path("dev"), "", "")], [], "", "", [], [("b", "1"), ("a", "2")],
        *[0] * 6,
    )  # fmt: skip
    request, _ = parse(readerOf(REQUESTS[0]._replace(minor=7)), [data])
    assert set(request.drv.outputs) == {"out", "dev"}
    assert request.drv.env == {"a": "2", "b": "1"}


FORMS = [
    COUNTING.hex,
    COUNTING.hex.upper(),
    COUNTING.nix32,
    COUNTING.base64,
    f"sha256:{COUNTING.hex}",
    f"sha256:{COUNTING.nix32}",
    f"sha256:{COUNTING.base64}",
    COUNTING.sri,
]


@pytest.mark.parametrize("form", FORMS)
def test_formsOfNarHash(form):
    """AddToStoreNar takes the hash bare, with its algorithm, and as SRI."""
    request, _ = parse(readerOf(REQUESTS[0]), [wire(9, ZEROS, "", form, [], 0, 1, 0, [], "")])
    assert request == AddToStoreNar(ValidPathInfo(path=ZEROS, narHash=COUNTING, narSize=1))


@pytest.mark.parametrize("form", ["", "x", COUNTING.hex[:-1], "md5:" + "0" * 32, "sha1-" + "A" * 27 + "=", "sha256:"])
def test_badNarHash(form):
    """Another algorithm or length is refused."""
    assert "hash" in refused(wire(9, ZEROS, "", form, [], 0, 1, 0, [], ""))


def test_narSizeIsNeeded():
    """A size of nothing is what ancient clients send."""
    data = wire(9, ZEROS, "", COUNTING.hex, [], 0, 0, 0, [], "")
    assert "narInfo is too old and missing the narSize field" in refused(data)


@pytest.mark.parametrize(("time", "size"), [(2**63, 1), (0, 2**63), (2**64 - 1, 2**64 - 1)])
def test_sizesAndTimesHave63Bits(time, size):
    """What does not fit into the database is refused here."""
    assert "out of range" in refused(wire(9, ZEROS, "", COUNTING.hex, [], time, size, 0, [], ""))


@pytest.mark.parametrize("sig", ["", "x", ":AAAA", "key:", "key:AAAA", "key:!"])
def test_badSignatures(sig):
    """A malformed signature is refused: stored, it would break every later query of Nix 2.34."""
    assert "signature" in refused(wire(9, ZEROS, "", COUNTING.hex, [], 0, 1, 0, [sig], ""))


@pytest.mark.parametrize("ca", ["x", "fixed:", "fixed:sha256:xyz", f"text:{COUNTING.hex}", "recursive:sha256:"])
def test_badContentAddress(ca):
    """An unknown content address is refused."""
    refused(wire(9, ZEROS, "", COUNTING.hex, [], 0, 1, 0, [], ca))


def test_drvPathMustBeADerivation():
    """A derivation is named by a path that ends in '.drv'."""
    assert "is not a valid derivation path" in refused(wire(8, ZEROS))


@pytest.mark.parametrize("form", [COUNTING.hex, COUNTING.nix32, COUNTING.base64])
def test_formsOfFixedOutputHash(form):
    """The hash of a fixed output comes bare in any base, and is kept in hex."""
    data = wire(8, ONES_DRV, [("out", ZEROS, "r:sha256", form)], [], "", "", [], [], *[0] * 6)
    request, _ = parse(readerOf(REQUESTS[0]._replace(minor=7)), [data])
    assert request.drv.outputs["out"].hash == COUNTING.hex


@pytest.mark.parametrize(
    "output",
    [
        ("out", ZEROS, "r:sha256", ""),
        ("out", ZEROS, "r:sha256", "impure"),
        ("out", "", "r:sha256", COUNTING.hex),
        ("out", ZEROS, "", COUNTING.hex),
        ("out", "", "r:sha257", ""),
        ("out", "", "x:sha256", ""),
        ("out", ZEROS, "sha256", "zz"),
    ],
)
def test_badOutputs(output):
    """Outputs whose three strings contradict each other are refused."""
    refused(wire(8, ONES_DRV, [output], [], "", "", [], [], *[0] * 6))


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        (wire(1, 0, 0, MAX_SET_SIZE + 1), MAX_SET_SIZE),
        (wire(2, MAX_SET_SIZE + 1), MAX_SET_SIZE),
        (wire(5, 0, MAX_SET_SIZE + 1), MAX_SET_SIZE),
        (wire(6, 2**64 - 1), MAX_SET_SIZE),
        (wire(7, 0, 2**40), MAX_SET_SIZE),
        (wire(8, ONES_DRV, MAX_STRINGS + 1), MAX_STRINGS),
        (wire(8, ONES_DRV, [], [], "", "", MAX_STRINGS + 1), MAX_STRINGS),
        (wire(8, ONES_DRV, [], [], "", "", [], MAX_STRINGS + 1), MAX_STRINGS),
        (wire(9, ZEROS, "", COUNTING.hex, MAX_SET_SIZE + 1), MAX_SET_SIZE),
    ],
)
def test_tooManyElements(data, limit):
    """Every count has its limit, and is refused when it is read."""
    assert f"is refused, the limit is {limit} at" in refused(data)


@pytest.mark.parametrize(
    "data",
    [
        wire(3, 4097),
        wire(1, 0, 0, 1, 4097),
        wire(6, 1, 4097),
        wire(9, ZEROS, 4097),
        wire(9, ZEROS, "", 4097),
        wire(9, ZEROS, "", COUNTING.hex, 1, 4097),
        wire(9, ZEROS, "", COUNTING.hex, [], 0, 1, 0, [], 4097),
        wire(8, ONES_DRV, 1, "out", 4097),
    ],
)
def test_tooLongPaths(data):
    """Paths, hashes and content addresses have at most 4 KiB."""
    assert "a string of 4097 bytes is refused, the limit is 4096" in refused(data)


def test_nonZeroPaddingEverywhere():
    """Padding is checked in each string of a request."""
    row = NAMES["buildDerivation-2.7"]
    clean = wire(8, ONES_DRV, [("a", ZEROS, "", "")], [path("x")], "p", "b", ["a"], [("k", "v")], *[0] * 6)
    refusals = 0
    for position in range(8, len(clean)):
        # Padding is where changing a zero byte to 0x80 leaves all lengths alone: behind a string not full to 8.
        if clean[position] == 0 and clean[position - 1] not in (0, *range(1, 64)):
            bad = clean[:position] + b"\x80" + clean[position + 1 :]
            for pieces in cuts(bad):
                with pytest.raises(FormatError, match="non-zero padding"):
                    parse(readerOf(row), pieces)
            refusals += 1
    assert refusals == 9


def test_repliesThatAreRefused():
    """What is no reply is an error of the format, with the text if it is text."""
    for command in (Command.ADD_TO_STORE_NAR, Command.IMPORT_PATHS):
        row = REPLIES[0]._replace(command=command)
        with pytest.raises(FormatError, match="expected 1, found 0"):
            parse(readerOf(row), [wire(0)])
        with pytest.raises(FormatError, match="the text 'cannot a'"):
            parse(readerOf(row), [b"cannot add path"])
    row = REPLIES[0]._replace(command=Command.QUERY_PATH_INFOS, value={ZEROS}, minor=7)
    for data in (wire("short"), wire(ZEROS, "", [], 0, 0, ""), wire(ZEROS, "", [], 0, 0, COUNTING.hex)):
        with pytest.raises(FormatError):
            parse(readerOf(row), [data])


def test_unknownStatusIsKept():
    """A number that we do not know is the peer's business."""
    row = REPLIES[0]._replace(command=Command.BUILD_DERIVATION, minor=1)
    assert parse(readerOf(row), [wire(2**40, "")]) == (BuildResult(2**40), b"")


EXPORTED = bytes.fromhex(
    "0100000000000000"
    "0d00000000000000 6e69782d61726368 6976652d31000000 0100000000000000 2800000000000000 0400000000000000"
    "7479706500000000 0700000000000000 726567756c617200 0800000000000000 636f6e74656e7473 0300000000000000"
    "68690a0000000000 0100000000000000 2900000000000000 4e49584500000000 2d00000000000000 2f6e69782f73746f"
    "72652f3030303030 3030303030303030 3030303030303030 3030303030303030 3030302d61000000 0000000000000000"
    "0000000000000000 0000000000000000 0000000000000000"
)


def test_exportStreamExample():
    """The stream of one small file: 224 bytes, of which the NAR is 120 without its marker."""
    assert len(EXPORTED) == 232 - 8
    item = ImportItem(ZEROS, frozenset(), None)
    narEnd = EXPORTED.index(b"NIXE")
    assert serve.writeExportMarker(True) == EXPORTED[:8]
    assert serve.writeImportItem(item) + serve.writeExportMarker(False) == EXPORTED[narEnd:]
    for pieces in cuts(EXPORTED[narEnd:]):
        assert parse(lambda reader: serve.readImportItem(reader, STORE_DIR), pieces) == (item, bytes(8))


def test_exportItem():
    """References, deriver, and a signature of the old kind, which is skipped."""
    refs = sorted([path("a"), path("b")])
    data = wire(0x4558494E, ZEROS, refs, ONES_DRV, 1, "signature of 1.x")
    item = ImportItem(ZEROS, frozenset(refs), ONES_DRV)
    for pieces in cuts(data):
        assert parse(lambda reader: serve.readImportItem(reader, STORE_DIR), pieces) == (item, b"")
    assert serve.writeImportItem(item) == wire(0x4558494E, ZEROS, refs, ONES_DRV, 0)


def test_badExportStreams():
    """Markers and magic are checked, in Nix's words."""
    for marker in (2, 2**40):
        with pytest.raises(FormatError, match="doesn't look like something created by 'nix-store --export'"):
            parse(serve.readExportMarker, [wire(marker)])
    with pytest.raises(FormatError, match="Nix archive cannot be imported; wrong format"):
        parse(lambda reader: serve.readImportItem(reader, STORE_DIR), [wire(0x4558494F)])


@given(strategies.pathInfos(), st.integers(4, 8))
def test_pathInfosRoundTrip(info, minor):
    """Every info comes back but for its time and the flag C{ultimate}, which do not travel in replies."""
    data = serve.writeReply(Command.QUERY_PATH_INFOS, {info.path: info}, 0x200 | minor)
    row = REPLIES[0]._replace(command=Command.QUERY_PATH_INFOS, value={info.path}, minor=minor)
    ((read,), rest) = (parse(readerOf(row), [data])[0].values(), b"")
    assert (read.path, read.narHash, read.narSize, read.references) == (
        info.path,
        info.narHash,
        info.narSize,
        info.references,
    )
    assert (read.deriver, read.sigs, read.ca) == (info.deriver, info.sigs, info.ca)
    assert not read.ultimate and not read.registrationTime and not rest


@given(strategies.pathInfos())
def test_addToStoreNarRoundTrip(info):
    """Every info comes back whole."""
    data = serve.writeRequest(AddToStoreNar(info), 0x207)
    assert parse(readerOf(REQUESTS[0]), [data]) == (AddToStoreNar(info), b"")


@given(strategies.derivations(), st.sampled_from(MINORS))
def test_buildDerivationRoundTrip(drv, minor):
    """Every derivation comes back, whatever bytes its texts hold."""
    basic = type(DERIVATION)(drv.name, drv.outputs, drv.inputSrcs, drv.platform, drv.builder, drv.args, drv.env)
    drvPath = path(drv.name + ".drv")
    data = serve.writeRequest(BuildDerivation(drvPath, basic), 0x200 | minor)
    row = REQUESTS[0]._replace(minor=minor)
    assert parse(readerOf(row), [data]) == (BuildDerivation(drvPath, basic), b"")


def test_hashesAreSentAsNixSendsThem():
    """Bare hex in AddToStoreNar, nix32 with the algorithm in replies."""
    info = ValidPathInfo(path=ZEROS, narHash=Hash("sha256", bytes(32)), narSize=8)
    assert wire("0" * 64) in serve.writeRequest(AddToStoreNar(info), 0x207)
    assert wire("sha256:" + "0" * 52) in serve.writeReply(Command.QUERY_PATH_INFOS, {ZEROS: info}, 0x207)


def test_manyPaths():
    """70,000 paths are read at once, whole or in pieces of 32 KiB."""
    paths = [ZEROS[:11] + f"{n:032d}-p" for n in range(70_000)]
    data = wire(7, 0, paths)
    for pieces in ([data], [data[i : i + 32768] for i in range(0, len(data), 32768)]):
        request, rest = parse(readerOf(REQUESTS[0]), pieces)
        assert rest == b"" and request == QueryClosure(frozenset(request.paths)) and len(request.paths) == 70_000


def test_readersAreNotConfusedByTargets():
    """Targets of BuildPaths are texts: what they mean is decided by whoever builds."""
    for target in (f"{ONES_DRV}!*", "nonsense", str(ZEROS)):
        request, _ = parse(readerOf(REQUESTS[0]._replace(minor=0)), [wire(6, [target], 0, 0)])
        assert request == BuildPaths((target,))


def test_dumpStorePathIsNormalised():
    """A path is read as Nix reads it."""
    request, _ = parse(readerOf(REQUESTS[0]), [wire(3, f"/nix//store/./{ZEROS.baseName}/")])
    assert request == DumpStorePath(ZEROS)


# --- in pieces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, serve.AT_ONCE, 3 * serve.AT_ONCE + 1])
def test_setsInPieces(count):
    """A set is written in pieces of bounded size, sorted over all of them."""
    paths = [StoreDir().parse(f"/nix/store/{n * 7919 % 10007:032}-x") for n in range(count)]
    pieces = list(serve.replyPieces(Command.QUERY_CLOSURE, set(paths), 0x207))
    assert b"".join(pieces) == wire(sorted(paths))
    assert max(map(len, pieces)) <= 8 + serve.AT_ONCE * len(wire(LIB.path))
    # Repetition is no reason to write it twice.
    assert serve.writeReply(Command.QUERY_CLOSURE, paths * 2, 0x207) == wire(sorted(paths))


def test_pathInfosInPieces():
    """Path infos are taken as they are needed, and the pieces are those of the whole."""
    infos = {each.path: each for each in (replace(LIB, path=LIB.path[:-3] + f"x{n:05}") for n in range(2000))}
    taken = []
    pieces = serve.replyPieces(Command.QUERY_PATH_INFOS, (taken.append(each) or each for each in infos.values()), 0x207)
    first = next(pieces)
    assert len(taken) < 600
    assert first + b"".join(pieces) == serve.writeReply(Command.QUERY_PATH_INFOS, infos, 0x207)


def test_pathsAreParsedAsTheyCome():
    """The paths of a large set are parsed as they arrive, so that the last byte does not stop everybody for long."""
    reader, wrong = Reader(), "/nix/store/wrong"
    parse = serve.readPathSet(reader, StoreDir())
    next(parse)
    reader.feed(wire(1000) + wire(*[LIB.path] * 10) + wire(wrong))
    with pytest.raises(FormatError, match="wrong"):
        next(parse)

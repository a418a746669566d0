"""BuildResult: which numbers mean success, and the lengths and bytes of known examples."""

import pytest

from nixserve.codec.buildresult import UNKNOWN_DRV_HASH, BuildResult, BuildStatus, Realisation, exitStatus
from nixserve.codec.messages import BuildDerivation, Command
from nixserve.codec.serve import readReply, writeReply
from nixserve.codec.wire import Reader
from nixserve.errors import FormatError
from tests.vectors.serve.messages import DERIVATION, ONES_DRV, STORE_DIR, ZEROS, captured, path, wire

SUCCESS = BuildResult(BuildStatus.BUILT, "", 1, False, 100, 110, {"out": Realisation(ZEROS)})
ASKED = BuildDerivation(ONES_DRV, DERIVATION)
FAILURE = BuildResult(BuildStatus.PERMANENT_FAILURE, "boom", 1, False, 100, 110)


def read(data, minor):
    """What C{data} means."""
    reader = Reader()
    reader.feed(data)
    with pytest.raises(StopIteration) as stop:
        next(readReply(reader, ASKED, 0x200 | minor, STORE_DIR))
    assert reader.available == 0
    return stop.value.value


def write(result, minor):
    """The bytes."""
    return writeReply(Command.BUILD_DERIVATION, result, 0x200 | minor)


def test_names():
    """The numbers are those of Nix."""
    assert [status.value for status in BuildStatus] == list(range(15))
    assert BuildStatus(3) is BuildStatus.PERMANENT_FAILURE
    assert BuildStatus(14) is BuildStatus.NO_SUBSTITUTERS


def test_success():
    """Exactly Built, Substituted, AlreadyValid and ResolvesToAlreadyValid mean that the outputs are there."""
    assert [n for n in range(20) if BuildResult(n).success] == [0, 1, 2, 13]


@pytest.mark.parametrize("minor", [6, 7])
def test_json(minor):
    """Outputs as JSON: 328 bytes, of which one key of 75 and one text of 174."""
    data = write(SUCCESS, minor)
    assert len(data) == 328
    assert data[:48] == wire(0, "", 1, 0, 100, 110)
    key = f"{UNKNOWN_DRV_HASH}!out"
    assert data[48:56] == wire(1)
    assert data[56:144] == wire(key) and data[56] == 75
    assert data[144:] == wire(
        f'{{"dependentRealisations":{{}},"id":"{key}","outPath":"{ZEROS.baseName}","signatures":[]}}'
    )
    assert data[144] == 174
    assert read(data, minor) == SUCCESS


def test_binary():
    """Outputs in binary: 136 bytes, the full path."""
    data = write(SUCCESS, 8)
    assert len(data) == 136
    assert data == wire(0, "", 1, 0, 100, 110, [("out", ZEROS, [])])
    assert read(data, 8) == SUCCESS


@pytest.mark.parametrize("minor", [3, 4, 5])
def test_failure(minor):
    """A failure: 56 bytes with times."""
    data = write(FAILURE, minor)
    assert data == bytes.fromhex(
        "0300000000000000 0400000000000000 626f6f6d00000000 0100000000000000 0000000000000000 6400000000000000"
        "6e00000000000000"
    )
    assert read(data, minor) == FAILURE


def test_oldest():
    """Without times: the status and the text."""
    for minor in (1, 2):
        assert write(FAILURE, minor) == wire(3, "boom")
        assert read(wire(3, "boom"), minor) == BuildResult(3, "boom")


def test_onlyTheOutPathIsBelieved():
    """From JSON only the name in the key and C{outPath} are taken; servers from 2.35 on send no more than these."""
    text = f'{{"id":"anything","outPath":"{ZEROS.baseName}"}}'
    data = wire(0, "", 0, 0, 0, 0, [(f"{UNKNOWN_DRV_HASH}!a!b", text)])
    assert read(data, 7).builtOutputs == {"a!b": Realisation(ZEROS)}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("no mark", f'{{"outPath":"{ZEROS.baseName}"}}'),
        ("h!out", ""),
        ("h!out", "{"),
        ("h!out", "[]"),
        ("h!out", "1"),
        ("h!out", '"outPath"'),
        ("h!out", "{}"),
        ("h!out", '{"outPath":1}'),
        ("h!out", '{"outPath":null}'),
        ("h!out", '{"outPath":""}'),
        ("h!out", '{"outPath":"short"}'),
        ("h!out", '{"outPath":"\\ud800"}'),
        ("h!out", f'{{"outPath":"{ZEROS}"}}'),
        ("h!out", f'{{"outPath":"../{ZEROS.baseName}"}}'),
        ("h!out", "[" * 100_000),
        ("h!out", '{"outPath":' + "1" * 5000 + "}"),
        ("h!out", b"\xff"),
    ],
)
def test_badJson(key, text):
    """Whatever stands there instead of a realisation is an error of the format, of whatever kind."""
    with pytest.raises(FormatError):
        read(wire(0, "", 0, 0, 0, 0, [(key, text)]), 6)


def test_badPathInBinary():
    """An output outside the store is refused."""
    for bad in ("", "/etc/passwd", ZEROS.baseName):
        with pytest.raises(FormatError):
            read(wire(0, "", 0, 0, 0, 0, [("out", bad, [])]), 8)


@pytest.mark.parametrize("minor", [6, 7])
def test_realServerHasOutputsAlready(minor):
    """What Nix 2.8 says of a build whose output is valid: status 2, with the real hash of the derivation."""
    reply = captured(f"alreadyValid-2.{minor}")[1][24:]
    result = read(reply, minor)
    realisation = result.builtOutputs["out"]
    assert result.status is BuildStatus.ALREADY_VALID
    assert realisation.outPath == path("lib")
    assert realisation.drvHash.startswith("sha256:") and realisation.drvHash != UNKNOWN_DRV_HASH
    assert write(result, minor) == reply


@pytest.mark.parametrize("minor", [6, 7])
def test_realServerMissesAnInput(minor):
    """What Nix 2.8 says of a build whose input is missing: status 9 and a text with colours."""
    reply = captured(f"missingInput-2.{minor}")[1][16:]
    result = read(reply, minor)
    assert result.status is BuildStatus.MISC_FAILURE
    assert str(path("missing")) in result.errorMsg and "\x1b[" in result.errorMsg
    assert write(result, minor) == reply


# --- what a command ends with -------------------------------------------------------------------------------


MISMATCH = "hash mismatch in fixed-output derivation 'x'"


@pytest.mark.parametrize(
    ("number", "text", "expected"),
    [
        (BuildStatus.OUTPUT_REJECTED, f"{MISMATCH}:\n  specified: sha256-a\n     got:    sha256-b", True),
        (BuildStatus.OUTPUT_REJECTED, f"\x1b[31;1merror:\x1b[0m {MISMATCH}", True),
        (
            BuildStatus.OUTPUT_REJECTED,
            "hash \x1b[1mmismatch\x1b[0m in fixed-output derivation '\x1b[35;1mx\x1b[0m'",
            True,
        ),
        (BuildStatus.OUTPUT_REJECTED, "output is not allowed to refer to", False),
        (BuildStatus.OUTPUT_REJECTED, "", False),
        (BuildStatus.PERMANENT_FAILURE, MISMATCH, False),
        (77, MISMATCH, False),
    ],
)
def test_hashMismatch(number, text, expected):
    """Of a peer's results those which say so are about a wrong hash, and on the way to another peer they still are."""
    result = read(wire(number, text), 2)
    assert result.hashMismatch is expected
    for minor in (2, 6, 8):
        assert read(write(result, minor), minor) == result


def test_exitStatusOfHashMismatch():
    """Of our own results the fact counts, whatever the message is."""
    assert exitStatus([BuildResult(BuildStatus.OUTPUT_REJECTED, "", hashMismatch=True)]) == 102
    assert exitStatus([BuildResult(BuildStatus.OUTPUT_REJECTED, MISMATCH)]) == 1


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([], 0),
        ([(BuildStatus.BUILT, "")], 0),
        ([(BuildStatus.PERMANENT_FAILURE, "")], 100),
        ([(BuildStatus.TIMED_OUT, "")], 101),
        ([(BuildStatus.OUTPUT_REJECTED, MISMATCH)], 102),
        ([(BuildStatus.OUTPUT_REJECTED, f"\x1b[31;1m{MISMATCH}")], 102),
        ([(BuildStatus.OUTPUT_REJECTED, "output is not allowed to refer to")], 1),
        ([(BuildStatus.NOT_DETERMINISTIC, "")], 104),
        ([(BuildStatus.MISC_FAILURE, "")], 1),
        ([(BuildStatus.TRANSIENT_FAILURE, "")], 1),
        ([(77, "")], 1),
        ([(BuildStatus.DEPENDENCY_FAILED, "failed with exit code 3")], 100),
        ([(BuildStatus.BUILT, ""), (BuildStatus.MISC_FAILURE, "")], 1),
        ([(BuildStatus.PERMANENT_FAILURE, ""), (BuildStatus.OUTPUT_REJECTED, MISMATCH)], 102),
        ([(BuildStatus.TIMED_OUT, ""), (BuildStatus.OUTPUT_REJECTED, MISMATCH)], 103),
        ([(BuildStatus.PERMANENT_FAILURE, ""), (BuildStatus.NOT_DETERMINISTIC, "")], 108),
    ],
)
def test_exitStatus(results, status):
    """As C{nix-store -r} has it, of what peers say; several failures together too."""
    assert exitStatus([read(wire(number, text), 2) for number, text in results]) == status

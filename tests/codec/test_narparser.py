"""NARs: what is read, and everything that is refused, however the bytes are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.nar import MAX_NESTING, BadArchive, Contents, Directory, EndDirectory, Regular, Symlink
from nixserve.codec.narparser import NarParser
from nixserve.codec.narwriter import encodeNar
from nixserve.errors import FormatError
from tests.vectors.nar.trees import TREES, File, Link, events, joined, nar


def string(data):
    """A padded string."""
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def strings(*items):
    """Padded strings, C{str} for keywords."""
    return b"".join(string(item.encode() if isinstance(item, str) else item) for item in items)


MAGIC = strings("nix-archive-1")
FILE = strings("(", "type", "regular", "contents", b"data", ")")
EMPTY_DIRECTORY = strings("(", "type", "directory", ")")


def entry(name, node=FILE):
    """An entry of a directory."""
    return strings("entry", "(", "name", name, "node") + node + strings(")")


def directory(*entries):
    """The NAR of a directory."""
    return MAGIC + strings("(", "type", "directory") + b"".join(entries) + strings(")")


def parse(*pieces, maxSize=None):
    """All events of a complete NAR."""
    parser = NarParser(maxSize)
    result = [event for piece in pieces for event in parser.feed(piece)]
    parser.close()
    return joined(result)


def bytewise(data):
    """The same, cut after each byte."""
    return [data[i : i + 1] for i in range(len(data))]


def encode(tree):
    """The NAR of a tree."""
    return b"".join(encodeNar(events(tree)))


def refused(data, maxSize=None):
    """The error that C{data} gives, which must be the same whole, bytewise, and with much behind it."""
    texts = set()
    for pieces in ([data], bytewise(data), [data + bytes(2000)]):
        with pytest.raises(BadArchive) as caught:
            parse(*pieces, maxSize=maxSize)
        texts.add(str(caught.value))
    assert len(texts) == 1, texts
    return texts.pop()


@pytest.mark.parametrize("name", TREES)
def test_readsWhatNixWrote(name):
    """Whole, byte by byte, and in any two pieces."""
    data, expected = nar(name), list(events(TREES[name]))
    assert parse(data) == expected
    assert parse(*bytewise(data)) == expected
    for cut in range(0, len(data), 7):
        assert parse(data[:cut], data[cut:]) == expected


@given(st.data())
def test_cutsDoNotMatter(data):
    """Any cuts give the same events."""
    name = data.draw(st.sampled_from(sorted(TREES)))
    archive = nar(name)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(archive)), max_size=8)))
    pieces = [archive[a:b] for a, b in zip([0, *cuts], [*cuts, len(archive)], strict=True)]
    assert parse(*pieces) == list(events(TREES[name]))


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("pieces", [lambda data: [data], bytewise])
def test_surplus(name, pieces):
    """What follows the NAR is kept and not looked at."""
    parser = NarParser()
    for piece in pieces(nar(name) + b"(what follows"):
        parser.feed(piece)
    assert parser.finished
    assert parser.surplus == b"(what follows"
    parser.close()


def test_contentsArePassedOn():
    """Contents are reported as they come; a piece that is nothing else is passed on as it is."""
    archive = encode(File(bytes(100_000)))
    parser = NarParser()
    start, chunk = archive[:150], archive[150:50_000]
    assert parser.feed(start) == [Regular(b"", False, 100_000), Contents(bytes(54))]
    (event,) = parser.feed(chunk)
    assert event.data is chunk
    (view,) = parser.feed(archive[50_000:])
    assert view.data == bytes(100_096 - 50_000)
    assert isinstance(view.data, memoryview)
    assert view.data.readonly
    assert parser.finished


@pytest.mark.parametrize("name", TREES)
def test_truncated(name):
    """Every beginning of a NAR is fine so far and no NAR."""
    data = nar(name)
    for size in range(len(data)) if len(data) < 2000 else range(0, len(data), 13):
        parser = NarParser()
        parser.feed(data[:size])
        assert not parser.finished
        with pytest.raises(BadArchive, match=rf"^bad archive: unexpected end at offset {size}$"):
            parser.close()


@pytest.mark.parametrize(
    "name", [b"..x", b"...", b"a\nb", b"a\\b", b"\xff\x80", b" ", b"x" * 255, b"a~nix~case~hack~1"]
)
def test_acceptsOddNames(name):
    """Names that real Nix accepts."""
    assert parse(directory(entry(name)))[1].name == name


def test_acceptsNamesThatDifferInCase():
    """C{A} and C{a} are two names."""
    assert [event.name for event in parse(directory(entry(b"A"), entry(b"a"))) if isinstance(event, Regular)] == [
        b"A",
        b"a",
    ]


def test_acceptsLongestTarget():
    """4095 bytes."""
    assert parse(encode(Link(b"t" * 4095))) == [Symlink(b"", b"t" * 4095)]


def link(target):
    """The node of a symbolic link."""
    return strings("(", "type", "symlink", "target", target, ")")


HEAD = strings("(", "type", "regular")
REFUSED = {
    "bad magic": (strings("nix-archive-2") + FILE, "expected 'nix-archive-1', found 'nix-archive-2' at offset 0"),
    "long magic": (strings(b"x" * 33), "keyword too long: expected at most 32 bytes, found 33 at offset 0"),
    "no bracket": (MAGIC + strings("type"), "expected '(', found 'type' at offset 24"),
    "no type": (MAGIC + strings("(", "regular"), "expected 'type', found 'regular' at offset 40"),
    "unknown type": (
        MAGIC + strings("(", "type", "fifo"),
        "expected 'regular' or 'directory' or 'symlink', found 'fifo'",
    ),
    "second type": (MAGIC + HEAD + strings("type"), "expected 'executable' or 'contents', found 'type'"),
    "unknown tag in file": (MAGIC + HEAD + strings("owner"), "found 'owner'"),
    "unknown tag in directory": (directory(strings("size")), "expected 'entry' or ')', found 'size' at offset 80"),
    "unknown tag in link": (MAGIC + strings("(", "type", "symlink", "to"), "expected 'target', found 'to'"),
    "unknown tag in entry": (directory(strings("entry", "(", "title")), "expected 'name', found 'title'"),
    "executable with value": (MAGIC + HEAD + strings("executable", "1"), "executable marker has a value"),
    "executable last": (MAGIC + HEAD + strings("contents", "x", "executable", ""), "expected ')', found 'executable'"),
    "executable twice": (MAGIC + HEAD + strings("executable", "", "executable"), "expected 'contents'"),
    "no contents": (MAGIC + HEAD + strings(")"), "expected 'executable' or 'contents', found ')'"),
    "contents twice": (MAGIC + HEAD + strings("contents", "x", "contents"), "expected ')', found 'contents'"),
    "target empty": (MAGIC + link(b""), "empty target of a symbolic link"),
    "target with NUL": (MAGIC + link(b"a\0b"), "NUL in the target of a symbolic link"),
    "target too long": (MAGIC + link(b"t" * 4096), "too long: expected at most 4095 bytes, found 4096"),
    "target empty, nested": (directory(entry(b"a", link(b""))), "empty target of a symbolic link"),
    "target with NUL, nested": (directory(entry(b"a", link(b"\0"))), "NUL in the target of a symbolic link"),
    "target too long, nested": (directory(entry(b"a", link(b"t" * 4096))), "expected at most 4095 bytes"),
    "name empty": (directory(entry(b"")), "empty name of an entry at offset 128"),
    "name .": (directory(entry(b".")), "invalid name of an entry: found b'.'"),
    "name ..": (directory(entry(b"..")), "invalid name of an entry: found b'..' at offset 128"),
    "name with slash": (directory(entry(b"a/b")), "invalid name of an entry: found b'a/b'"),
    "name absolute": (directory(entry(b"/etc")), "invalid name of an entry"),
    "name with NUL": (directory(entry(b"a\0")), "invalid name of an entry"),
    "name too long": (directory(entry(b"x" * 256)), "name too long: expected at most 255 bytes, found 256"),
    "unsorted": (directory(entry(b"b"), entry(b"a")), "not in order: expected one after b'b', found b'a'"),
    "duplicate file": (directory(entry(b"a"), entry(b"a")), "not in order"),
    "duplicate directory": (directory(entry(b"a", EMPTY_DIRECTORY), entry(b"a", EMPTY_DIRECTORY)), "not in order"),
    "link, then directory": (
        directory(entry(b"a", link(b"/etc")), entry(b"a", strings("(", "type", "directory") + entry(b"passwd"))),
        "not in order",
    ),
    "entry without node": (directory(strings("entry", "(", "name", "a", ")")), "expected 'node', found ')'"),
    "empty entry": (directory(strings("entry", "(", ")")), "expected 'name', found ')'"),
    "two nodes": (
        directory(strings("entry", "(", "name", "a", "node") + FILE + strings("name", "b", "node") + FILE),
        "expected ')', found 'name'",
    ),
    "node before name": (directory(strings("entry", "(", "node")), "expected 'name', found 'node'"),
    "length of keyword": (MAGIC + (1 << 63).to_bytes(8, "little"), "keyword too long"),
    "length of name": (directory(strings("entry", "(", "name") + b"\xff" * 8), "name too long"),
    "length of target": (MAGIC + strings("(", "type", "symlink", "target") + b"\xff" * 8, "too long"),
    "length of contents": (MAGIC + HEAD + strings("contents") + (1 << 63).to_bytes(8, "little"), "file too large"),
    "length of contents, nested": (
        directory(strings("entry", "(", "name", "a", "node") + HEAD + strings("contents") + b"\xff" * 8),
        "file too large",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    """What real Nix refuses, with a text that says what and where, the same however it is cut."""
    data, text = REFUSED[name]
    error = refused(data)
    assert error.startswith("bad archive: ")
    assert text in error


def test_refusesAnyPaddingThatIsNotZero():
    """Each padding byte of a NAR, set, makes it bad, in front of and behind other entries."""
    tree = {b"abc": File(b"12345"), b"abd": File(b"1", True), b"abe": Link(b"x"), b"abf": {b"g": {}}, b"abg": File()}
    data = encode(tree)
    position = places = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 8], "little")
        start = position + 8 + size
        position = start + -size % 8
        for place in range(start, position):
            places += 1
            bad = data[:place] + b"\1" + data[place + 1 :]
            for pieces in ([bad], bytewise(bad), [bad + bytes(1000)]):
                with pytest.raises(BadArchive, match=rf"padding is not zero: found [01]+ at offset {start}$"):
                    parse(*pieces)
    assert places > 200


def nested(levels):
    """The NAR of that many directories, each in the one before."""
    start = strings("entry", "(", "name", "d", "node", "(", "type", "directory")
    end = strings(")", ")")
    return MAGIC + strings("(", "type", "directory") + start * (levels - 1) + end * (levels - 1) + strings(")")


def test_nestingLimit():
    """As many directories as allowed are fine, one more is refused, and both without recursion."""
    assert parse(nested(MAX_NESTING)).count(EndDirectory()) == MAX_NESTING
    for pieces in ([nested(MAX_NESTING + 1)], bytewise(nested(MAX_NESTING + 1))):
        with pytest.raises(BadArchive, match="nested too deeply: expected at most 4096 directories"):
            parse(*pieces)


@pytest.mark.parametrize("name", TREES)
def test_maxSize(name):
    """A NAR may be as large as it was said to be, and not a byte larger."""
    data = nar(name)
    assert parse(data, maxSize=len(data)) == list(events(TREES[name]))
    assert parse(*bytewise(data), maxSize=len(data)) == list(events(TREES[name]))
    for pieces in ([data], bytewise(data)):
        with pytest.raises(BadArchive, match=r"larger than it was said to be|file too large"):
            parse(*pieces, maxSize=len(data) - 1)


def test_maxSizeRefusesBeforeContents():
    """A file that cannot fit is refused when its size is known."""
    parser = NarParser(1000)
    with pytest.raises(BadArchive, match="file too large: expected at most 904 bytes, found 1001 at offset 88"):
        parser.feed(MAGIC + HEAD + strings("contents") + (1001).to_bytes(8, "little"))


def test_staysDead():
    """After an error there is only that error, whatever is fed."""
    parser = NarParser()
    parser.feed(MAGIC)
    with pytest.raises(FormatError) as first:
        parser.feed(strings("type"))
    for call in (lambda: parser.feed(FILE), parser.close):
        with pytest.raises(FormatError) as again:
            call()
        assert str(again.value) == str(first.value)
    assert not parser.finished


def test_deadAfterEarlyClose():
    """Nothing can be fed after the end was declared."""
    parser = NarParser()
    with pytest.raises(BadArchive, match="unexpected end at offset 0"):
        parser.close()
    with pytest.raises(BadArchive):
        parser.feed(MAGIC)


def test_reportsDirectories():
    """Directories are bracketed; the root has no name."""
    assert parse(directory(entry(b"a", EMPTY_DIRECTORY), entry(b"b"))) == [
        Directory(b""),
        Directory(b"a"),
        EndDirectory(),
        Regular(b"b", False, 4),
        Contents(b"data"),
        EndDirectory(),
    ]

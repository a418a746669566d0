"""The primitives of the wire: what is written and read, in any cut, and everything that is refused."""

import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.text import decodeText, encodeText
from nixserve.codec.wire import (
    MAX_SET_SIZE,
    MAX_STRING_SIZE,
    Reader,
    Writer,
    encodeString,
    encodeU64,
)
from nixserve.errors import FormatError
from tests.vectors.serve.messages import wire


def drive(parse, reader, pieces):
    """
    Run a parse over C{pieces}.

    @return: the value, and how many pieces were left over; the value is C{None} if it needs more than all.
    """
    left = list(pieces)
    while True:
        try:
            next(parse)
        except StopIteration as stop:
            return stop.value, len(left)
        if not left:
            return None, 0
        reader.feed(left.pop(0))


def bytewise(data):
    """C{data} cut after each byte."""
    return [data[i : i + 1] for i in range(len(data))]


def parse(method, *pieces, limit=None):
    """What C{method} of a new reader makes of C{pieces}, and what it leaves."""
    reader = Reader()
    reader.limit(limit)
    value, left = drive(method(reader), reader, pieces)
    return value, reader.take(1 << 30) + b"".join(pieces[len(pieces) - left :])


CASES = [
    ("zero", 0, Reader.u64, "0000000000000000"),
    ("little endian", 0x390C9DEB, Reader.u64, "eb9d0c3900000000"),
    ("largest", 2**64 - 1, Reader.u64, "ffffffffffffffff"),
    ("largest of 32 bits", 2**32 - 1, Reader.u32, "ffffffff00000000"),
    ("true", True, Reader.boolean, "0100000000000000"),
    ("two is true", True, Reader.boolean, "0200000000000000"),
    ("false", False, Reader.boolean, "0000000000000000"),
    ("most elements", MAX_SET_SIZE, Reader.count, "40420f0000000000"),
    ("empty", b"", Reader.string, "0000000000000000"),
    ("padded", b"a", Reader.string, "0100000000000000 6100000000000000"),
    ("padded by one", b"1234567", Reader.string, "0700000000000000 3132333435363700"),
    ("not padded", b"12345678", Reader.string, "0800000000000000 3132333435363738"),
    ("text", "é\udcff", Reader.text, "0300000000000000 c3a9ff0000000000"),
    ("no strings", [], Reader.strings, "0000000000000000"),
    (
        "strings in order, with repetition",
        ["b", "a", "", "b"],
        Reader.strings,
        "0400000000000000 0100000000000000 6200000000000000 0100000000000000 6100000000000000"
        "0000000000000000 0100000000000000 6200000000000000",
    ),
    (
        "pairs",
        {"k": 7, "": 1},
        lambda reader: reader.pairs(reader.text, reader.u64),
        "0200000000000000 0100000000000000 6b00000000000000 0700000000000000 0000000000000000 0100000000000000",
    ),
]


@pytest.mark.parametrize(("value", "method", "data"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_readsInAnyCut(value, method, data):
    """A value is the same whole, a byte at a time, in two pieces of any sizes, and with bytes behind it."""
    data = bytes.fromhex(data)
    assert parse(method, data) == (value, b"")
    assert parse(method, *bytewise(data)) == (value, b"")
    assert parse(method, data + b"behind it") == (value, b"behind it")
    for cut in range(1, len(data)):
        assert parse(method, data[:cut], data[cut:] + b"behind") == (value, b"behind")


@pytest.mark.parametrize(("method", "data"), [case[2:] for case in CASES], ids=[case[0] for case in CASES])
def test_needsAllBytes(method, data):
    """As long as a byte is missing there is no value."""
    data = bytes.fromhex(data)
    for end in range(len(data)):
        reader = Reader()
        assert drive(method(reader), reader, [data[:end]] if end else []) == (None, 0)


def test_writes():
    """What is written is what is read, and chains."""
    writer = Writer().u64(1).u64(True).string(b"a").text("é\udcff").strings(["b", "a", "b"])
    assert bytes(writer) == wire(1, 1, b"a", b"\xc3\xa9\xff", ["b", "a", "b"])
    assert encodeU64(0x5452EECB) == bytes.fromhex("cbee525400000000")
    assert encodeString(b"12345678") == bytes.fromhex("0800000000000000 3132333435363738")


def test_writesSets():
    """A set is written once each in the order of the bytes, which is not that of Python's strings."""
    late, early = "\udc80", "\U0001f600"
    assert sorted([late, early]) == [late, early]
    assert bytes(Writer().textSet([early, "b", late, "a", "b"])) == wire(["a", "b", b"\x80", early.encode()])


def test_writesNoForeignIntegers():
    """An integer that has no encoding is an error and not a wrong one."""
    for value in (-1, 2**64):
        with pytest.raises(struct.error):
            Writer().u64(value)


@given(st.lists(st.binary(max_size=30)), st.data())
def test_roundTrip(strings, data):
    """Any strings come back, whatever the cut."""
    encoded = bytes(Writer().strings(map(decodeText, strings)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(encoded)), max_size=5)))
    pieces = [encoded[a:b] for a, b in zip([0, *cuts], [*cuts, len(encoded)], strict=True)]
    value, rest = parse(Reader.strings, *pieces)
    assert [encodeText(text) for text in value] == strings
    assert rest == b""


PADDED = [wire(b"x" * size) for size in range(1, 8)]


@pytest.mark.parametrize("data", PADDED)
def test_nonZeroPadding(data):
    """Each byte of padding must be zero, in single strings and in lists, whole or in pieces."""
    size = data[0]
    for position in range(8 + size, 16):
        bad = data[:position] + b"\x01" + data[position + 1 :]
        for method, text in ((Reader.string, bad), (Reader.strings, wire(2, "fine") + bad)):
            for pieces in ([text], bytewise(text), [text + bytes(64)]):
                with pytest.raises(FormatError, match="non-zero padding"):
                    parse(method, *pieces)


@pytest.mark.parametrize("value", [2**32, 2**64 - 1])
@pytest.mark.parametrize("method", [Reader.u32, Reader.boolean])
def test_tooLargeFor32Bits(method, value):
    """What Nix reads into 32 bits must fit there."""
    with pytest.raises(FormatError, match=f"serialised integer {value} is too large at offset 0"):
        parse(method, wire(value))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Reader.u32, r"serialised integer \d+ is too large \(the bytes are the text 'Welcome '\)"),
        (Reader.string, r"a string of \d+ bytes \(the bytes are the text 'Welcome '\) is refused"),
        (Reader.count, r"a set of \d+ elements \(the bytes are the text 'Welcome '\) is refused"),
    ],
)
def test_textInPlaceOfNumber(method, message):
    """Where a number should be and text is, the error shows the text."""
    with pytest.raises(FormatError, match=message):
        parse(method, b"Welcome to this machine\n")


def test_textInPlaceOfNumberMustBePrintable():
    """A number that is no text is shown as a number only."""
    with pytest.raises(FormatError) as caught:
        parse(Reader.u32, b"Welcom\xe9 ")
    assert "text" not in str(caught.value)


def test_limits():
    """The limits themselves are allowed, one more is not; for strings each reader may have its own."""
    assert parse(Reader.string, wire(MAX_STRING_SIZE)) == (None, b"")
    for size in (MAX_STRING_SIZE + 1, 2**63, 2**64 - 1):
        with pytest.raises(FormatError, match=f"a string of {size} bytes is refused, the limit is {MAX_STRING_SIZE}"):
            parse(Reader.string, wire(size))
    with pytest.raises(FormatError, match=f"a set of {MAX_SET_SIZE + 1} elements is refused"):
        parse(Reader.strings, wire(MAX_SET_SIZE + 1))
    with pytest.raises(FormatError, match=f"a set of {2**64 - 1} elements is refused"):
        parse(lambda reader: reader.pairs(reader.text, reader.text), wire(2**64 - 1))
    assert parse(lambda reader: reader.string(4), wire("1234")) == (b"1234", b"")
    with pytest.raises(FormatError, match="the limit is 4"):
        parse(lambda reader: reader.string(4), wire("12345"))
    with pytest.raises(FormatError, match="the limit is 4"):
        parse(lambda reader: reader.strings(4), wire(["1234", "12345"]))


def test_limitOfRequest():
    """All parsers together may take no more than the limit; a string is refused by its length, before it comes."""
    for method in (Reader.string, Reader.strings):
        strings = wire(["x"] * 4) if method is Reader.strings else wire("x" * 40)
        assert parse(method, strings, limit=len(strings))[0] is not None
        for pieces in ([strings], bytewise(strings)):
            with pytest.raises(FormatError, match=f"a request of more than {len(strings) - 1} bytes is refused"):
                parse(method, *pieces, limit=len(strings) - 1)
    with pytest.raises(FormatError, match="a request of more than"):
        parse(Reader.string, wire(1000), limit=1000)


def test_takenBytesAreNotLimited():
    """Bytes of a NAR, which are taken and not parsed, do not count."""
    reader = Reader()
    reader.limit(16)
    reader.feed(wire(1) + bytes(100) + wire(2))
    assert drive(reader.u64(), reader, []) == (1, 0)
    assert reader.take(60) + reader.take(1000)[:40] == bytes(100)
    reader.putBack(8)
    assert drive(reader.u64(), reader, []) == (2, 0)
    assert reader.offset == 116


def test_offsetsOfErrors():
    """An error says how many bytes into the stream the trouble is, whatever came before."""
    for pieces in ([wire("abc", 2**32)], bytewise(wire("abc", 2**32))):
        reader = Reader()
        drive(reader.string(), reader, pieces[: len(pieces) // 3 * 2] or pieces)
        with pytest.raises(FormatError) as caught:
            drive(reader.u32(), reader, pieces[len(pieces) // 3 * 2 :] if len(pieces) > 1 else [])
        assert caught.value.offset == 16


def test_putBack():
    """What was taken too much is there again, for whoever reads next, and can be added to."""
    reader = Reader()
    reader.feed(b"abcdef")
    assert reader.take(4) == b"abcd"
    reader.putBack(3)
    assert (reader.available, reader.offset) == (5, 1)
    reader.feed(b"gh")
    assert reader.take(100) == b"bcdefgh"


def test_nothingIsAllocatedForClaims():
    """A length or count within the limits costs no memory before the bytes arrive."""
    tracemalloc.start()
    try:
        for data, method in (
            (wire(MAX_STRING_SIZE), Reader.string),
            (wire(MAX_SET_SIZE), Reader.strings),
            (wire(MAX_SET_SIZE), lambda reader: reader.pairs(reader.text, reader.text)),
            (wire(1, MAX_STRING_SIZE), Reader.strings),
        ):
            reader = Reader()
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            running = method(reader)
            reader.feed(data)
            next(running)
            assert tracemalloc.get_traced_memory()[1] - before < 10_000
    finally:
        tracemalloc.stop()


def test_claimsOverTheLimitAreRefusedCheaply():
    """A refusal costs no memory either."""
    tracemalloc.start()
    try:
        for method in (Reader.string, Reader.strings, Reader.count):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(FormatError):
                parse(method, wire(2**40))
            assert tracemalloc.get_traced_memory()[1] - before < 10_000
    finally:
        tracemalloc.stop()


def test_largeStringInPieces():
    """A large string in many pieces is put together once, not at every piece."""
    data = bytes(range(256)) * 4096 * 16
    encoded = wire(data)
    pieces = [encoded[i : i + 4096] for i in range(0, len(encoded), 4096)]
    tracemalloc.start()
    try:
        value, _ = parse(Reader.string, *pieces)
        # The pieces themselves are there before; the parts and their joining are twice the string.
        assert tracemalloc.get_traced_memory()[1] < 2.5 * len(data)
    finally:
        tracemalloc.stop()
    assert value == data


def test_tightLoopAgreesWithCarefulWay():
    """Strings that are here whole take another way than those that are not: both give the same."""
    strings = ["", "a" * 100, "\udcff", "x" * 8, "é"] * 3
    encoded = wire([text.encode("utf-8", "surrogateescape") for text in strings])
    for size in range(1, len(encoded) + 1):
        assert parse(Reader.strings, *[encoded[i : i + size] for i in range(0, len(encoded), size)]) == (strings, b"")


def test_spent():
    """How much has been read since a limit was set is known, whatever the limit; what is announced counts already."""
    for limit in (1 << 20, None):
        reader = Reader()
        reader.limit(limit)
        reader.feed(wire(1, 2))
        drive(reader.u64(), reader, [])
        assert reader.spent == 8
        reader.limit(limit)
        assert reader.spent == 0
        reader.feed(wire(1 << 10))
        drive(reader.u64(), reader, [])
        parse = reader.string()
        next(parse)
        assert reader.spent == 8 + 8 + 1024

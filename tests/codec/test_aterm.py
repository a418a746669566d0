"""The ATerm subset of .drv files."""

import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.aterm import MAX_STRINGS, ATermReader, BadATerm, quote, quoteRaw, writeList
from nixserve.codec.text import decodeText, encodeText
from nixserve.errors import FormatError
from tests import strategies

STRINGS = [
    ("", b'""'),
    ("a", b'"a"'),
    ('"', rb'"\""'),
    ("\\", rb'"\\"'),
    ('\\"', rb'"\\\""'),
    ('"\\', rb'"\"\\"'),
    ("\\\\\\", rb'"\\\\\\"'),
    ("\\n", rb'"\\n"'),
    ("\n\r\t", rb'"\n\r\t"'),
    ("\0\x0b\x7f$", b'"\0\x0b\x7f$"'),
    ("é\U0001f600", '"é\U0001f600"'.encode()),
    ("\udcff\udc80", b'"\xff\x80"'),
    (decodeText(b"\xed\xa0\x80\xed\xa0\x81"), b'"\xed\xa0\x80\xed\xa0\x81"'),
]


@pytest.mark.parametrize(("text", "data"), STRINGS)
def test_strings(text, data):
    """Each string, both ways."""
    assert quote(text) == data
    reader = ATermReader(data)
    assert reader.string() == text
    reader.finish()


@given(st.lists(strategies.derivationTexts()))
def test_roundTrip(texts):
    """Any strings, one after the other, read back as they are."""
    reader = ATermReader(writeList(map(quote, texts)))
    assert reader.items(reader.string) == texts
    reader.finish()


@given(st.text('"\\n[],\n', max_size=12))
def test_readsOnlyWhatIsWritten(body):
    """What is read as a list of strings is what the writer makes of these strings."""
    data = encodeText(f'["{body}"]')
    reader = ATermReader(data)
    try:
        texts = reader.items(reader.string)
        reader.finish()
    except BadATerm:
        return
    assert writeList(map(quote, texts)) == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected string '\"': found the end at offset 0"),
        (b"x", "expected string '\"': found 'x' at offset 0"),
        (b'"abc', "unterminated string in derivation: found 'abc' at offset 1"),
        (rb'"abc\"', r"unterminated string in derivation: found 'abc\\\\\"' at offset 1"),
        (rb'\"a"', "expected string '\"'"),
        (rb'\\"a"', "expected string '\"'"),
        (rb'"\x"', "an escape that Nix does not write"),
        (rb'"\\\a"', "an escape that Nix does not write"),
        (rb'"\0"', "an escape that Nix does not write"),
        (b'"\\\n"', "that is not escaped"),
        (b'"a\nb"', "that is not escaped"),
        (b'"\r"', "that is not escaped"),
        (b'"\t"', "that is not escaped"),
    ],
)
def test_badStrings(data, message):
    """What Nix would not write is refused, with a reason."""
    with pytest.raises(BadATerm, match=message):
        ATermReader(data).string()


def test_rawStrings():
    """A raw string can hold anything but quotes and backslashes, both ways."""
    for text in ("", "x86_64-linux", "a\nb", "é", "\udcff"):
        assert quoteRaw(text) == encodeText(f'"{text}"')
        assert ATermReader(encodeText(f'"{text}"')).rawString() == text
    for text in ('"', "\\", 'a\\"b', "\\\\"):
        with pytest.raises(FormatError, match="no quotes and backslashes"):
            quoteRaw(text)
    for data in (rb'"\n"', rb'"\""', rb'"\\"'):
        with pytest.raises(BadATerm, match="an escape where none can be"):
            ATermReader(data).rawString()


@pytest.mark.parametrize("data", [b"[]", b'["a"]', b'["a","b"]'])
def test_lists(data):
    """Lists of any length read back."""
    reader = ATermReader(data)
    texts = reader.items(reader.string)
    reader.finish()
    assert writeList(map(quote, texts)) == data


@pytest.mark.parametrize(
    "data",
    [b"", b"[", b'["a"', b'["a",', b'["a",]', b'[,"a"]', b"[,]", b'["a""b"]', b'[ "a"]', b'["a" ]', b'["a"),', b"[[]]"],
)
def test_badLists(data):
    """Lists have neither leading nor trailing commas nor spaces."""
    reader = ATermReader(data)
    with pytest.raises(BadATerm):
        reader.items(reader.string)


def test_expectAndFinish():
    """Tokens come in order and nothing comes behind."""
    reader = ATermReader(b"Derive(x")
    assert not reader.accept(b"(")
    assert reader.accept(b"Derive")
    reader.expect(b"(")
    with pytest.raises(BadATerm, match="expected the end: found 'x' at offset 7"):
        reader.finish()
    reader.expect(b"x")
    reader.finish()


def test_offsetsAreBytes():
    """An error's offset counts the bytes of the input, escapes and characters that take several included."""
    data = '"é\U0001f600\\\\\\"\\n"'.encode() + b"\xff"
    reader = ATermReader(data)
    reader.string()
    error = reader.error("x")
    assert error.offset == len(data) - 1
    assert error.found == r"'\udcff'"


@pytest.mark.parametrize("unit", [b"a", rb"\"", rb"\\", rb"\n", b"\xff", b"[", b"("])
def test_longStrings(unit):
    """A string of 16 MiB takes a small part of a second whatever it holds, so the work is not quadratic."""
    count = 2**24 // len(unit)
    data = b'"' + unit * count + b'"'
    start = time.process_time()
    text = ATermReader(data).string()
    assert len(quote(text)) == len(data)
    assert time.process_time() - start < 5


def test_longGarbage():
    """A long text that nobody wrote is refused as quickly, however it nests."""
    start = time.process_time()
    for data in (b"[" * 2**22, b"\\" * 2**22, b'"' + b"\\" * (2**22 + 1), b'["",' * 2**20):
        reader = ATermReader(data)
        with pytest.raises(BadATerm):
            reader.items(reader.string)
    assert time.process_time() - start < 10


def test_manyStrings():
    """What is made of a text is not many times as large as the text: it has so many strings and no more."""
    for item in (b'""', b'"a"', rb'"\n"'):
        reader = ATermReader(b"[" + b",".join([item] * MAX_STRINGS) + b"]")
        assert len(reader.items(reader.string)) == MAX_STRINGS
        reader = ATermReader(b"[" + b",".join([item] * (MAX_STRINGS + 1)) + b"]")
        with pytest.raises(BadATerm, match=f"more than {MAX_STRINGS} strings in a derivation are refused"):
            reader.items(reader.rawString if item != rb'"\n"' else reader.string)


@pytest.mark.parametrize("unit", [rb"\"", rb"\nx", rb"\\", b"x"])
def test_memory(unit):
    """Reading and writing take a few times the memory of the text, also if a character in it makes all of them wide."""
    data = '"\U0001f600'.encode() + unit * (2**22 // len(unit)) + b'"'
    tracemalloc.start()
    try:
        assert quote(ATermReader(data).string()) == data
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data)
    finally:
        tracemalloc.stop()

"""Finding and replacing hash parts in streams."""

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.base32 import ALPHABET
from nixserve.codec.references import HashRewriter, ReferenceScanner

A = "fcx9xzs072fd3nqwzb44vb5dl80vwhx1"
B = "qczjas54a9hqfzzngs1ggix0sl4klq0c"
C = "im1dsfa74w0ng9vprb17n00xzi39cin7"

# Few digits, so that words are shared, repeat, and almost match.
hashParts = st.text(alphabet="0a", min_size=32, max_size=32)


def cut(data, positions):
    """C{data} in pieces."""
    ends = [0, *sorted(position % (len(data) + 1) for position in positions), len(data)]
    return [data[start:end] for start, end in pairwise(ends)]


def scan(pieces, asked):
    """The hash parts found in a stream."""
    scanner = ReferenceScanner(asked)
    for piece in pieces:
        scanner.feed(piece)
    return scanner.found


@given(
    st.lists(hashParts, max_size=4, unique=True),
    st.lists(st.one_of(st.integers(0, 5), st.binary(max_size=40), hashParts), max_size=12),
    st.lists(st.integers(0, 500), max_size=6),
)
def test_findsExactlyWhatIsThere(asked, parts, cuts):
    """Found is what a plain search finds in the whole stream, wherever it is cut."""
    texts = [hashPart.encode() for hashPart in asked]
    data = b"".join(
        part
        if isinstance(part, bytes)
        else part.encode()
        if isinstance(part, str)
        else (texts or [b""])[part % max(1, len(texts))]
        for part in parts
    )
    assert scan(cut(data, cuts), asked) == {hashPart for hashPart in asked if hashPart.encode() in data}


@pytest.mark.parametrize("before", range(70))
def test_anyOffset(before):
    """A hash part is found at any distance from the beginning, cut at any of its digits or not at all."""
    data = bytes(before) + A.encode() + bytes(3)
    assert scan([data], [A, B]) == {A}
    for position in range(before, before + 33):
        assert scan([data[:position], data[position:]], [A, B]) == {A}


def test_byteByByte():
    """Pieces may be of one byte, or none."""
    data = b"xx" + A.encode() + B.encode() + b"yy"
    pieces = [piece for byte in data for piece in (bytes([byte]), b"")]
    assert scan(pieces, [A, B, C]) == {A, B}


def test_ends():
    """At the very beginning, at the very end, and next to each other."""
    assert scan([A.encode()], [A]) == {A}
    assert scan([(A + B + C).encode()], [A, B, C]) == {A, B, C}
    assert scan([bytes(5) + A.encode()], [A]) == {A}


def test_nearMisses():
    """31 of the 32 digits are not enough, whichever is wrong."""
    for position in range(32):
        wrong = A[:position] + ("0" if A[position] != "0" else "1") + A[position + 1 :]
        assert scan([wrong.encode()], [A]) == frozenset()
    assert scan([A[:31].encode(), b"\n", A[31:].encode()], [A]) == frozenset()


def test_sharedWords():
    """Hash parts that have words in common are told apart, also after one of them was found."""
    other = A[:16] + C[16:]
    third = B[:16] + A[16:]
    assert scan([A.encode(), other.encode()], [A, other, third]) == {A, other}
    assert scan([A.encode(), bytes(100), third.encode()], [A, other, third]) == {A, third}


def test_overlapping():
    """Occurrences that overlap are all found."""
    shifted = A[1:] + "0"
    assert scan([(A + "0").encode()], [A, shifted]) == {A, shifted}


def test_nothingAsked():
    """Looking for nothing finds nothing."""
    assert scan([A.encode()], []) == frozenset()


def test_manyInOneStream():
    """A thousand hash parts in random bytes, in pieces of odd sizes."""
    source = random.Random(1)
    asked = ["".join(source.choices(ALPHABET, k=32)) for _ in range(1000)]
    there = asked[::2]
    data = b"".join(source.randbytes(source.randrange(100)) + hashPart.encode() for hashPart in there)
    pieces = [data[start : start + 4099] for start in range(0, len(data), 4099)]
    assert scan(pieces, asked) == set(there)


@pytest.mark.parametrize("text", ["", A[:-1], A + "0"])
def test_badHashPart(text):
    """What is asked for must be a hash part."""
    with pytest.raises(ValueError, match="a hash part has 32 digits"):
        ReferenceScanner([text])
    with pytest.raises(ValueError, match="a hash part has 32 digits"):
        HashRewriter({text: A})
    with pytest.raises(ValueError, match="a hash part has 32 digits"):
        HashRewriter({A: text})


def rewrite(pieces, mapping):
    """The rewritten stream, and where."""
    rewriter = HashRewriter(mapping)
    data = b"".join([rewriter.feed(piece) for piece in pieces] + [rewriter.finish()])
    return data, list(rewriter.positions)


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([A.encode(), B.encode(), C.encode()])), max_size=8),
    st.lists(st.integers(0, 300), max_size=6),
)
def test_rewritesEverywhere(parts, cuts):
    """Each occurrence is replaced, and its offset kept, wherever the stream is cut; all else stays."""
    data = b"".join(parts)
    rewritten, positions = rewrite(cut(data, cuts), {A: B, B: A})
    assert len(rewritten) == len(data)
    assert rewritten == b"".join({A.encode(): B.encode(), B.encode(): A.encode()}.get(part, part) for part in parts)
    assert positions == [start for start in range(len(data)) if data[start : start + 32].decode("latin-1") in (A, B)]


def test_rewriteByteByByte():
    """Pieces of one byte."""
    data = b"x" + A.encode() + b"y" + A.encode()
    assert rewrite([bytes([byte]) for byte in data], {A: B}) == (b"x" + B.encode() + b"y" + B.encode(), [1, 34])


def test_whatIsPutInStays():
    """What was put in is not replaced in turn, not even with bytes that come later."""
    mapping = {A: 31 * "0" + "a", "a" + 31 * "0": B}
    data = A.encode() + 31 * b"0"
    for position in range(len(data)):
        rewritten, positions = rewrite([data[:position], data[position:]], mapping)
        assert rewritten == 31 * b"0" + b"a" + 31 * b"0"
        assert positions == [0]


def test_firstOfOverlappingWins():
    """Of two occurrences that overlap the first is replaced, however the stream is cut."""
    shifted = A[1:] + "0"
    data = (A + "0").encode()
    for position in range(len(data)):
        assert rewrite([data[:position], data[position:]], {shifted: C, A: B}) == (B.encode() + b"0", [0])


def test_zeroes():
    """Putting in NUL bytes is what hashing modulo an object's own path needs."""
    assert rewrite([A.encode()], {A: 32 * "\0"}) == (bytes(32), [0])


def test_rewritesNothing():
    """Without anything to replace nothing is held back."""
    rewriter = HashRewriter({})
    assert rewriter.feed(A.encode()) == A.encode()
    assert rewriter.finish() == b""


def seconds(data, asked):
    """Processor time to scan, of the best of some tries."""
    best = float("inf")
    for _ in range(5):
        scanner, begin = ReferenceScanner(asked), time.process_time()
        scanner.feed(data)
        best = min(best, time.process_time() - begin)
    return best


def test_nearMissesCostLittle():
    """Bytes that nearly are hash parts, all of them but for a digit, take a few times as long as any others."""
    asked = [A, B, C]
    near = b"".join(hashPart[:31].encode() + b"~" for hashPart in asked) * 10_000
    assert seconds(near, asked) < 15 * seconds(random.Random(1).randbytes(len(near)), asked)
    assert scan([near], asked) == set()


def test_digitsSharedAnywhere():
    """Hash parts that share digits, at the same place or at others, are all found, also when one has been found."""
    asked = [A, A[:16] + B[16:], "0" * 32, A[4:] + "0000", "0" * 31 + "1"]
    for first in asked:
        for second in asked:
            assert scan([f"-{first}-".encode(), f"~~{second}".encode()], asked) == {first, second}


def test_rewritesWhatOverlapsItself():
    """A hash part that repeats itself over and over is replaced once in every 32 digits, in time."""
    data, zeros = b"0" * (1 << 20), "0" * 32
    begin = time.process_time()
    assert rewrite([data], {zeros: A}) == (A.encode() * (1 << 15), list(range(0, 1 << 20, 32)))
    assert time.process_time() - begin < 5

"""Nix's base-32, against vectors made by real Nix and by its definition."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec import base32
from nixserve.errors import FormatError

VECTORS = [
    (b"", ""),
    (b"a", "31"),
    (bytes(20), "0" * 32),
    (bytes(range(20)), "2c91240g1q6hq2qa1440f1h50h1h4080"),
    (bytes(range(32)), "07qy3lf1n6hr30bic58l2c91240g1q6hq2qa1440f1h50h1h4080"),
    (b"\xff" * 16, "7zzzzzzzzzzzzzzzzzzzzzzzzz"),
    (hashlib.sha256(b"").digest(), "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"),
    (hashlib.sha256(b"abc").digest(), "1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s"),
    (hashlib.sha1(b"").digest(), "143xibwh31h9bvxzalr0sjvbbvpa6ffs"),
    (hashlib.md5(b"").digest(), "3y8bwfr609h3lh9ch0izcqq7fl"),
    (
        hashlib.sha512(b"abc").digest(),
        "2gs8k559z4rlahfx0y688s49m2vvszylcikrfinm30ly9rak69236nkam5ydvly1ai7xac99vxfc4ii84hawjbk876blyk1jfhkbbyx",
    ),
]


@pytest.mark.parametrize(("data", "text"), VECTORS)
def test_vectors(data, text):
    """Both directions agree with what Nix prints."""
    assert base32.encode(data) == text
    assert base32.decode(text) == data
    assert base32.encodedLength(len(data)) == len(text)


@given(st.binary(max_size=100))
def test_definition(data):
    """Digit k from the right is bits 5k to 5k+4 of the little-endian number."""
    value = int.from_bytes(data, "little")
    length = -(-8 * len(data) // 5)
    digits = [base32.ALPHABET[(value >> 5 * (length - 1 - k)) & 31] for k in range(length)]
    assert base32.encode(data) == "".join(digits)
    assert base32.decode("".join(digits)) == data


@pytest.mark.parametrize(
    "text",
    [
        "1",  # no number of bytes takes one digit
        "111",
        "zz",  # ten bits of ones do not fit one byte
        "80",
        "3e",  # e, o, t and u are no digits
        "3o",
        "3t",
        "3u",
        "3A",
        "3 ",
        " 3",
        "_3",
        "+3",
        "3\n",
        "3é",
        "\N{ARABIC-INDIC DIGIT THREE}1",
    ],
)
def test_rejects(text):
    """What is no base-32 raises FormatError, whatever Python's int() would make of it."""
    with pytest.raises(FormatError):
        base32.decode(text)


@given(st.text(st.sampled_from(base32.ALPHABET + "eotuA_ \n"), max_size=60))
def test_decodeIsInjective(text):
    """Whatever decodes is exactly what its bytes encode to."""
    try:
        data = base32.decode(text)
    except FormatError:
        return
    assert base32.encode(data) == text

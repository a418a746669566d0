"""Content addresses and their text."""

import pytest
from hypothesis import given

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.hashes import Hash, hashBytes
from nixserve.errors import FormatError
from tests import strategies

SHA256 = hashBytes("sha256", b"abc")
SHA1 = hashBytes("sha1", b"abc")
NIX32 = "1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s"

CASES = [
    (f"text:sha256:{NIX32}", ContentAddress(ContentAddressMethod.TEXT, SHA256)),
    (f"fixed:sha256:{NIX32}", ContentAddress(ContentAddressMethod.FLAT, SHA256)),
    (f"fixed:r:sha256:{NIX32}", ContentAddress(ContentAddressMethod.NAR, SHA256)),
    (f"fixed:git:sha1:{SHA1.nix32}", ContentAddress(ContentAddressMethod.GIT, SHA1)),
]


@pytest.mark.parametrize(("text", "ca"), CASES)
def test_forms(text, ca):
    """Each form, both ways."""
    assert ContentAddress.parse(text) == ca
    assert str(ca) == text


@pytest.mark.parametrize("digest", [SHA256.hex, SHA256.base64])
def test_otherBases(digest):
    """Read: base-16 and base-64 as well. Written: nix32."""
    assert str(ContentAddress.parse(f"fixed:r:sha256:{digest}")) == f"fixed:r:sha256:{NIX32}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "malformed"),
        ("text", "malformed"),
        ("fixed", "malformed"),
        ("fixed:", "malformed"),
        ("fixed:r:", "malformed"),
        ("fixed:sha256", "malformed"),
        (f"sha256:{NIX32}", "malformed"),
        (f"Fixed:sha256:{NIX32}", "malformed"),
        (f"nar:sha256:{NIX32}", "malformed"),
        (f"fixed:text:sha256:{NIX32}", "malformed"),
        (f"fixed:R:sha256:{NIX32}", "unknown hash algorithm 'R'"),
        (f"text:r:sha256:{NIX32}", "should use sha256"),
        (f"text:sha1:{SHA1.nix32}", "should use sha256"),
        (f"fixed:r:sha256:sha256:{NIX32}", "wrong length"),
        (f"fixed:r:{SHA256.sri}", "malformed"),
        (f"fixed:r:sha256:{NIX32} ", "wrong length"),
    ],
)
def test_rejects(text, message):
    """Everything else raises FormatError."""
    with pytest.raises(FormatError, match=message):
        ContentAddress.parse(text)


@given(strategies.contentAddresses())
def test_roundTrip(ca):
    """The text reads back as the value."""
    assert ContentAddress.parse(str(ca)) == ca


@pytest.mark.parametrize(
    ("text", "method", "rest"),
    [
        ("sha256", ContentAddressMethod.FLAT, "sha256"),
        ("r:sha256", ContentAddressMethod.NAR, "sha256"),
        ("text:sha256", ContentAddressMethod.TEXT, "sha256"),
        ("git:sha1", ContentAddressMethod.GIT, "sha1"),
        ("r:r:md5", ContentAddressMethod.NAR, "r:md5"),
        ("", ContentAddressMethod.FLAT, ""),
    ],
)
def test_methodPrefix(text, method, rest):
    """The prefix of a derivation's hashAlgo is cut off once."""
    assert ContentAddressMethod.split(text) == (method, rest)
    assert method.value + rest == text


def test_hashable():
    """Content addresses can be members of sets."""
    assert len({ContentAddress(ContentAddressMethod.FLAT, Hash("md5", bytes(16))) for _ in range(2)}) == 1

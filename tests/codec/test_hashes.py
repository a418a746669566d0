"""Hashes: every textual form, and what is none."""

import base64
import hashlib

import pytest
from hypothesis import given

from nixserve.codec import base32
from nixserve.codec.hashes import DIGEST_SIZES, Hash, compressHash, hashBytes
from nixserve.errors import FormatError
from tests import strategies

HEX = "1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13"
NIX32 = "04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw"
BASE64 = "HDfQGvQL4ugGkd48w99EN3ppmvuxfGjwgJZLL9Bx/BM="
HASH = Hash("sha256", bytes.fromhex(HEX))


def test_writes():
    """Each form is as Nix prints it."""
    assert HASH.hex == HEX
    assert HASH.nix32 == NIX32
    assert HASH.base64 == BASE64
    assert HASH.sri == f"sha256-{BASE64}"
    assert HASH.hexText == f"sha256:{HEX}"
    assert str(HASH) == f"sha256:{NIX32}"


@pytest.mark.parametrize("form", [HEX, HEX.upper(), NIX32, BASE64])
def test_parsesByLength(form):
    """After the colon, or bare with a known algorithm, the length tells the form."""
    assert Hash.parse(f"sha256:{form}") == HASH
    assert Hash.parse(f"sha256:{form}", "sha256") == HASH
    assert Hash.parse(form, "sha256") == HASH
    assert Hash.parseBare(form, "sha256") == HASH


@pytest.mark.parametrize("form", [f"sha256-{BASE64}", f"sha256-{BASE64}".rstrip("=")])
def test_parsesSRI(form):
    """After the dash there is base-64, whose padding may be missing."""
    assert Hash.parse(form) == HASH
    assert Hash.parse(form, "sha256") == HASH


@pytest.mark.parametrize(
    ("text", "algo", "message"),
    [
        (HEX, None, "does not include a type"),
        ("", None, "does not include a type"),
        (f"sha1:{HEX}", None, "has wrong length for hash type 'sha1'"),
        (f"sha256:{HEX}0", None, "has wrong length for hash type 'sha256'"),
        ("sha256:", None, "has wrong length"),
        (f"sha256:{BASE64[:-1]}", None, "has wrong length"),
        (f"SHA256:{HEX}", None, "unknown hash algorithm 'SHA256'"),
        (f":{HEX}", None, "unknown hash algorithm ''"),
        (f"crc:{HEX}", None, "unknown hash algorithm 'crc'"),
        (HEX, "crc", "unknown hash algorithm 'crc'"),
        (f"sha256:{HEX}", "sha1", "should have type 'sha1'"),
        (f"sha256-{BASE64}", "sha512", "should have type 'sha512'"),
        (f"sha256-{HEX}", None, "wrong size"),
        (f"sha256-{NIX32}", None, "wrong size"),
        ("sha256-", None, "wrong size"),
        (f"sha256-{BASE64[:-2]}*=", None, "invalid base-64"),
        (f"sha256:{BASE64[:-2]}é=", None, "invalid base-64"),
        (f"sha256:{'g' * 64}", None, "invalid base-16"),
        (f"sha256:{HEX[:-1]} ", None, "invalid base-16"),
        (f"sha256:{'é' * 64}", None, "invalid base-16"),
        (f"sha256:{'z' * 52}", None, "too large"),
        (f"sha256:{NIX32.upper()}", None, "invalid character"),
    ],
)
def test_rejects(text, algo, message):
    """Everything else raises FormatError and says why."""
    with pytest.raises(FormatError, match=message):
        Hash.parse(text, algo)


@pytest.mark.parametrize("text", [f"sha256:{HEX}", f"sha256-{BASE64}"])
def test_bareHasNoPrefix(text):
    """Where Nix wants a bare digest a prefix is an error."""
    with pytest.raises(FormatError, match="has wrong length for hash type 'sha256'"):
        Hash.parseBare(text, "sha256")


def test_digestSizeIsChecked():
    """No Hash with a digest of the wrong size can exist."""
    with pytest.raises(FormatError, match="expected 20 bytes, found 32 bytes"):
        Hash("sha1", bytes(32))


@given(strategies.hashes())
def test_roundTrip(hash):
    """Each form reads back as the hash."""
    for form in (str(hash), hash.hexText, hash.sri, f"{hash.algo}:{hash.base64}"):
        assert Hash.parse(form) == hash


@pytest.mark.parametrize("algo", DIGEST_SIZES)
def test_hashBytes(algo):
    """hashBytes is hashlib's."""
    assert hashBytes(algo, b"abc") == Hash(algo, hashlib.new(algo, b"abc").digest())


def test_hashBytesUnknown():
    """An algorithm that hashlib has and Nix has not is refused."""
    with pytest.raises(FormatError, match="unknown hash algorithm"):
        hashBytes("sha3_256", b"")


def test_compressHash():
    """The vector, from a fingerprint of real Nix."""
    digest = bytes.fromhex("fe50c26088fb1e2ba70dc3de7815d4b7fe5c6f8a83fb6464fb3da70023809016")
    assert compressHash(digest).hex() == "7daba60473c6b92b848d53c87815d4b7fe5c6f8a"
    assert base32.encode(compressHash(digest)) == "i9pmrzmpshapij2kin22pff6fc2adavx"


@given(strategies.hashes())
def test_compressHashDefinition(hash):
    """Byte i goes to slot i mod size."""
    for size in (1, 7, 20, 64):
        slots = bytearray(size)
        for i, byte in enumerate(hash.digest):
            slots[i % size] ^= byte
        assert compressHash(hash.digest, size) == slots


def test_base64OfNix():
    """The base-64 of a digest is RFC 4648's."""
    assert Hash("md5", bytes(16)).base64 == base64.b64encode(bytes(16)).decode()

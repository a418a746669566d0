"""
L{nixserve.store.contents}: what must be true of an object. Most of it is tested by the contract of the store.
"""

import hashlib

import pytest

from nixserve.codec.contentaddress import ContentAddress
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.codec.wire import MAX_STRING_SIZE
from nixserve.errors import StoreError
from nixserve.store import contents
from nixserve.store.contents import (
    MAX_DERIVATION_SIZE,
    HashModulo,
    checkContentAddress,
    readDerivation,
)
from nixserve.testing import makeInfo, makeNar

HASH_PART = "c0s0sinnjqcd858h2lnk879jcixgh3h0"
OUT = StorePath(f"/nix/store/{HASH_PART}-x")


def modulo(data, cut, algo="sha256"):
    """The hash of C{data} fed in pieces of C{cut} bytes."""
    hashing = HashModulo(algo, HASH_PART)
    for start in range(0, len(data), cut):
        hashing.feed(data[start : start + cut])
    return hashing.finish()


@pytest.mark.parametrize("cut", [1, 5, 31, 32, 33, 100, 10_000])
def test_hashModulo(cut):
    """Each occurrence counts as zeros and is named at the end, wherever the stream is cut."""
    needle = HASH_PART.encode()
    data = needle + b"a" + needle + needle[:20] + needle + b"end" + needle[:31]
    zeros = bytes(32)
    masked = zeros + b"a" + zeros + needle[:20] + zeros + b"end" + needle[:31] + b"|0|33|85"
    assert modulo(data, cut).digest == hashlib.sha256(masked).digest()
    assert modulo(data, cut, "sha1").digest == hashlib.sha1(masked).digest()


@pytest.mark.parametrize("data", [b"", b"x", bytes(100), HASH_PART.encode()[:31] * 5])
def test_hashModuloOfOthers(data):
    """Without an occurrence it is the plain hash."""
    assert modulo(data, 7).digest == hashlib.sha256(data).digest()


def test_hashModuloOverlapping():
    """Occurrences that overlap count once, the first."""
    hashing = HashModulo("sha256", "0" * 32)
    hashing.feed(b"0" * 40)
    assert hashing.finish().digest == hashlib.sha256(bytes(32) + b"0" * 8 + b"|0").digest()


def test_hashModuloOfMany(monkeypatch):
    """Occurrences may be many, and yet have a limit: each is kept until the end."""
    count = 25_000
    monkeypatch.setattr(contents, "MAX_SELF_REFERENCES", count)
    data = HASH_PART.encode() * count
    offsets = b"".join(b"|%d" % (32 * number) for number in range(count))
    assert modulo(data, 100_000).digest == hashlib.sha256(bytes(len(data)) + offsets).digest()
    with pytest.raises(StoreError, match="contains its own hash part more than 25000 times"):
        modulo(data + HASH_PART.encode(), 100_000)


def test_hashModuloVector():
    """The self-referring object that Nix 2.8 made."""
    nar = makeNar(f"me /nix/store/{HASH_PART}-self\n".encode())
    assert modulo(nar, 50).hex == "668b33344838bfcd0e9fbd6a9c16a59faffe102527543e929756b5ee30b4427b"


def test_git():
    """What cannot be verified is not believed."""
    info = makeInfo("x", makeNar(b""), ca=ContentAddress.parse("fixed:git:sha1:143xibwh31h9bvxzalr0sjvbbvpa6ffs"))
    with pytest.raises(StoreError, match="git is not supported"):
        checkContentAddress(info, list)


def test_largeDerivation(monkeypatch):
    """A derivation is read into memory only up to a size."""
    monkeypatch.setattr(contents, "MAX_DERIVATION_SIZE", 100)
    with pytest.raises(StoreError, match="is larger than 100 bytes"):
        readDerivation(StorePath(f"/nix/store/{HASH_PART}-x.drv"), [makeNar(bytes(101))], StoreDir())


def test_largestDerivation():
    """That is as much as a string of the protocol has; one larger is refused before it is together."""
    path, pieces = StorePath(f"/nix/store/{HASH_PART}-x.drv"), []
    assert MAX_DERIVATION_SIZE == MAX_STRING_SIZE

    def dump():
        nar = makeNar(bytes(4 * MAX_DERIVATION_SIZE))
        for start in range(0, len(nar), 1 << 20):
            pieces.append(start)
            yield nar[start : start + (1 << 20)]

    with pytest.raises(StoreError, match=f"is larger than {MAX_DERIVATION_SIZE} bytes"):
        readDerivation(path, dump(), StoreDir())
    assert len(pieces) == 17

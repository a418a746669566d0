"""
Hashes and their textual forms.

==========  =======================  =====================================
form        looks                    used by Nix for
==========  =======================  =====================================
base-16     C{sha256:<hex>}          ValidPaths.hash, fingerprints of paths
nix32       C{sha256:<nix32>}        content addresses, signatures
base-64     C{sha256:<base64>}       only read
SRI         C{sha256-<base64>}       messages, Nix expressions
==========  =======================  =====================================

Which of the first three a text is in follows from its length alone. Source: Nix 2.8, src/libutil/hash.cc.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from nixserve.codec import base32
from nixserve.errors import FormatError

__all__ = ["DIGEST_SIZES", "Hash", "compressHash", "hashBytes"]

#: The algorithms that Nix knows without experimental features, with the size of their digests in bytes.
DIGEST_SIZES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}


@dataclass(frozen=True, slots=True)
class Hash:
    """
    A digest and the algorithm that made it.

    @ivar algo: a key of L{DIGEST_SIZES}.
    @ivar digest: the bytes, as many as the algorithm gives.
    """

    algo: str
    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != digestSize(self.algo):
            raise FormatError(
                f"digest has the wrong size for hash algorithm '{self.algo}'",
                expected=f"{DIGEST_SIZES[self.algo]} bytes",
                found=f"{len(self.digest)} bytes",
            )

    @classmethod
    def parse(cls, text: str, algo: str | None = None) -> Hash:
        """
        Read any of the forms.

        @param text: C{algo:digest}, C{algo-base64}, or the bare digest if C{algo} is given.
        @param algo: the algorithm that must have made it.
        @raise FormatError: malformed, an unknown algorithm, or not the one expected.
        """
        prefix, colon, rest = text.partition(":")
        if colon:
            _requireAlgo(text, prefix, algo)
            return cls.parseBare(rest, prefix)
        prefix, dash, rest = text.partition("-")
        if dash:
            _requireAlgo(text, prefix, algo)
            return cls(prefix, _decodeBase64(text, rest))
        if algo is None:
            raise FormatError(
                f"hash '{text:.200}' does not include a type, nor is the type otherwise known from context"
            )
        return cls.parseBare(text, algo)

    @classmethod
    def parseBare(cls, text: str, algo: str) -> Hash:
        """
        Read a digest without prefix, told by its length to be base-16 (either case), nix32 or base-64.

        @raise FormatError: malformed, or an unknown algorithm.
        """
        size = digestSize(algo)
        if len(text) == size * 2:
            return cls(algo, _decodeHex(text))
        if len(text) == base32.encodedLength(size):
            return cls(algo, base32.decode(text))
        if len(text) == (size + 2) // 3 * 4:
            return cls(algo, _decodeBase64(text, text))
        raise FormatError(f"hash '{text:.200}' has wrong length for hash type '{algo}'")

    @property
    def hex(self) -> str:
        """The digest in base-16, lower case, without prefix."""
        return self.digest.hex()

    @property
    def nix32(self) -> str:
        """The digest in Nix's base-32, without prefix."""
        return base32.encode(self.digest)

    @property
    def base64(self) -> str:
        """The digest in base-64 with padding, without prefix."""
        return binascii.b2a_base64(self.digest, newline=False).decode("ascii")

    @property
    def sri(self) -> str:
        """C{sha256-<base64>}, as in Subresource Integrity."""
        return f"{self.algo}-{self.base64}"

    @property
    def hexText(self) -> str:
        """C{sha256:<hex>}."""
        return f"{self.algo}:{self.digest.hex()}"

    def __str__(self) -> str:
        """C{sha256:<nix32>}."""
        return f"{self.algo}:{self.nix32}"


def hashBytes(algo: str, data: bytes) -> Hash:
    """
    @return: the hash of C{data}.
    @raise FormatError: C{algo} is unknown.
    """
    digestSize(algo)
    return Hash(algo, hashlib.new(algo, data, usedforsecurity=False).digest())


def compressHash(digest: bytes, size: int = 20) -> bytes:
    """
    Fold a digest to C{size} bytes: byte i is xored into byte C{i mod size}, as store paths do with SHA-256.
    """
    folded = 0
    for start in range(0, len(digest), size):
        folded ^= int.from_bytes(digest[start : start + size], "little")
    return folded.to_bytes(size, "little")


def digestSize(algo: str) -> int:
    """
    @return: the size in bytes of the digests of C{algo}.
    @raise FormatError: C{algo} is unknown.
    """
    try:
        return DIGEST_SIZES[algo]
    except KeyError:
        raise FormatError(f"unknown hash algorithm '{algo:.200}'", expected=", ".join(DIGEST_SIZES)) from None


def _requireAlgo(text: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise FormatError(f"hash '{text:.200}' should have type '{expected}'")
    digestSize(found)


def _decodeHex(text: str) -> bytes:
    try:
        # Unlike bytes.fromhex, unhexlify does not skip white space.
        return binascii.unhexlify(text)
    except ValueError:
        raise FormatError(f"invalid base-16 hash '{text:.200}'") from None


def _decodeBase64(whole: str, text: str) -> bytes:
    """Decode with or without the padding at the end, as Nix does."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise FormatError(f"invalid base-64 hash '{whole:.200}'") from None

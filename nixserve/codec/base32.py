"""
Nix's base-32: the digits of store paths and of most hashes that Nix prints.

The bytes are one little-endian number, written in base 32 with the most significant digit first, zeros included, so
that n bytes always take C{ceil(8n / 5)} digits. The alphabet leaves out C{e}, C{o}, C{t} and C{u}. Source: Nix 2.8,
src/libutil/hash.cc.
"""

from __future__ import annotations

import base64
import re

from nixserve.errors import FormatError

__all__ = ["ALPHABET", "decode", "encode", "encodedLength"]

#: The digits, by value.
ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"

_FROM_RFC4648 = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", ALPHABET.encode("ascii"))
_TO_PYTHON = str.maketrans(ALPHABET, "0123456789abcdefghijklmnopqrstuv")
_FOREIGN = re.compile(f"[^{ALPHABET}]")


def encodedLength(size: int) -> int:
    """
    @param size: a number of bytes.
    @return: how many digits they take.
    """
    return (size * 8 + 4) // 5


def encode(data: bytes) -> str:
    """
    @return: the digits of C{data}, L{encodedLength} of them.
    """
    # RFC 4648 groups bits from the first byte down; of the reversed bytes, filled up in front to whole groups of five,
    # these groups are our digits. It is the fastest way that the standard library has.
    padded = bytes(-len(data) % 5) + data[::-1]
    digits = base64.b32encode(padded).translate(_FROM_RFC4648).decode("ascii")
    return digits[len(digits) - encodedLength(len(data)) :]


def decode(text: str) -> bytes:
    """
    The inverse of L{encode}; lower case only.

    @raise FormatError: a character outside the alphabet, a number of digits that no number of bytes takes, or a first
        digit that does not fit.
    """
    foreign = _FOREIGN.search(text)
    if foreign is not None:
        raise FormatError(
            f"invalid character in base-32 text '{text:.200}'", found=repr(foreign[0]), offset=foreign.start()
        )
    size = len(text) * 5 // 8
    if encodedLength(size) != len(text):
        raise FormatError(f"base-32 text '{text:.200}' has a length that no bytes give", found=f"{len(text)} digits")
    # int() takes time in proportion to the length, since 32 is a power of two.
    value = int(text.translate(_TO_PYTHON), 32) if text else 0
    try:
        return value.to_bytes(size, "little")
    except OverflowError:
        raise FormatError(f"base-32 text '{text:.200}' is too large a number for {size} bytes") from None

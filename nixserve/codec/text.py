"""
Text that may hold any bytes, and the bytes.

The rule and its reasons stand in L{nixserve.codec}: UTF-8, with bytes that are no UTF-8 kept as lone surrogates
(PEP 383).
"""

from __future__ import annotations

__all__ = ["decodeText", "encodeText"]


def decodeText(data: bytes) -> str:
    """
    @return: the text of C{data}. Never fails; L{encodeText} gives C{data} back.
    """
    return data.decode("utf-8", "surrogateescape")


def encodeText(text: str) -> bytes:
    """
    The bytes of C{text}. Also the sort key for everything that Nix keeps in bytewise order: the order of C{str} differs
    from that of the bytes where a lone surrogate meets a character above U+DFFF.

    @raise UnicodeEncodeError: C{text} holds a surrogate that stands for no byte, so it did not come from L{decodeText}.
    """
    return text.encode("utf-8", "surrogateescape")

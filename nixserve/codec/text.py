"""
Text that may hold any bytes, and the bytes; and how such text is shown.

The rule and its reasons stand in L{nixserve.codec}: UTF-8, with bytes that are no UTF-8 kept as lone surrogates
(PEP 383).
"""

from __future__ import annotations

__all__ = ["MAX_SHOWN", "decodeText", "encodeText", "shownText"]

# What is quoted of a peer's words: a store path is at most 255 characters, and a line of a log is to stay readable.
MAX_SHOWN = 300


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


def shownText(text: str | bytes, most: int = MAX_SHOWN) -> str:
    """
    Somebody else's words as they may stand in a log or in a message: on one line, without a character that a terminal
    or an editor would obey, and cut. Control and format characters (reversed writing is among them), line ends,
    surrogates and what is not assigned become C{\\x..}, C{\\u....}. Twice does the same as once.

    @param most: of characters, those of escapes included.
    """
    if isinstance(text, bytes):
        text = decodeText(text[: 4 * most + 4])
    if len(text) > most:
        text = text[: most + 1]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"

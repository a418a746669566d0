"""
The part of the ATerm format that .drv files use: strings, tuples and lists, without any white space.

Within quotes C{"}, C{\\}, line feed, carriage return and tab are escaped with a backslash, and nothing else is. Some
strings are written raw, since what they hold needs no escape: names of outputs, store paths, hashes, platforms.
Source: Nix 2.8, src/libstore/derivations.cc (C{printString}, C{printUnquotedString}, C{parseString}).

Nix reads more than it writes: any escaped byte, a comma after the opening bracket. Since derivations are identified
by the hash of their text, only what Nix writes is read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from nixserve.codec.text import decodeText, encodeText
from nixserve.errors import FormatError

__all__ = ["MAX_STRINGS", "ATermReader", "BadATerm", "quote", "quoteRaw", "writeList"]

T = TypeVar("T")

MAX_STRINGS: Final = 250_000
"""Strings in one text, so that what is made of it is not many times as large. Derivations of NixOS systems have some
thousands; one that used 100,000 others would fit."""

# Possessive repetitions: nothing is remembered for each of millions of escapes.
_matchString = re.compile(rb'"([^"\\\n\r\t]*+(?:\\[nrt"\\][^"\\\n\r\t]*+)*+)"').match
_matchRaw = re.compile(rb'"([^"\\]*+)"').match
_matchAny = re.compile(rb'"((?:[^"\\]++|\\.)*+)"', re.DOTALL).match
_searchControl = re.compile(rb"[\n\r\t]").search

# How much of the text an error shows.
_EXCERPT_LENGTH = 20


class BadATerm(FormatError):
    """A text is not what Nix writes; the offset says where."""


class ATermReader:
    """
    Reads one text from its beginning, in time and memory proportional to its length however long its strings are.

    Each method consumes what it names or raises L{BadATerm}.
    """

    __slots__ = ("_data", "_position", "_strings")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._strings = 0

    def expect(self, token: bytes) -> None:
        """Consume exactly C{token}."""
        if not self.accept(token):
            raise self.error(f"expected string '{decodeText(token)}'")

    def accept(self, token: bytes) -> bool:
        """Consume C{token} if it comes next, and say whether it did."""
        if not self._data.startswith(token, self._position):
            return False
        self._position += len(token)
        return True

    def string(self) -> str:
        """Consume a quoted string and undo its escapes."""
        match = _matchString(self._data, self._position)
        if match is None:
            if _searchControl(self._untilQuote()):
                what = "a line feed, carriage return or tab that is not escaped"
                raise self.error(f"string with {what}, right before this")
            raise self.error("string with an escape that Nix does not write, right before this")
        body = self._consume(match)
        if b"\\" in body:
            # Python knows each of these five escapes as the same, and leaves all other bytes as they are.
            body = body.decode("unicode_escape").encode("latin-1")
        return decodeText(body)

    def rawString(self) -> str:
        """Consume a quoted string of the sort that is written raw."""
        match = _matchRaw(self._data, self._position)
        if match is None:
            self._untilQuote()
            raise self.error("string with an escape where none can be, right before this")
        return decodeText(self._consume(match))

    def items(self, readItem: Callable[[], T]) -> list[T]:
        """
        Consume a list.

        @param readItem: consumes one element.
        """
        self.expect(b"[")
        if self.accept(b"]"):
            return []
        items = [readItem()]
        while self.accept(b","):
            items.append(readItem())
        self.expect(b"]")
        return items

    def finish(self) -> None:
        """Make sure that nothing follows."""
        if self._position < len(self._data):
            raise self.error("expected the end")

    def error(self, message: str) -> BadATerm:
        """
        @return: an error that tells where the reader stands.
        """
        # No character has more than four bytes.
        rest = decodeText(self._data[self._position : self._position + 4 * _EXCERPT_LENGTH])[:_EXCERPT_LENGTH]
        return BadATerm(message, found=ascii(rest) if rest else "the end", offset=self._position)

    def _consume(self, match: re.Match[bytes]) -> bytes:
        self._strings += 1
        if self._strings > MAX_STRINGS:
            raise self.error(f"more than {MAX_STRINGS} strings in a derivation are refused")
        self._position = match.end()
        return match[1]

    def _untilQuote(self) -> bytes:
        """Consume a string of which it is known that something is wrong, up to its end."""
        match = _matchAny(self._data, self._position)
        if match is None:
            self.expect(b'"')
            raise self.error("unterminated string in derivation")
        return self._consume(match)


def quote(text: str) -> bytes:
    """
    @return: C{text} with its escapes, in quotes.
    """
    data = encodeText(text)
    if b'"' in data or b"\\" in data:
        data = data.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    if _searchControl(data):
        data = data.replace(b"\n", b"\\n").replace(b"\r", b"\\r").replace(b"\t", b"\\t")
    return b'"' + data + b'"'


def quoteRaw(text: str) -> bytes:
    """
    @return: C{text} in quotes as it is.
    @raise FormatError: it needs escapes. Nix would write a text that means another derivation.
    """
    if '"' in text or "\\" in text:
        raise FormatError("this string of a derivation can have no quotes and backslashes", found=ascii(text[:100]))
    return b'"' + encodeText(text) + b'"'


def writeList(items: Iterable[bytes]) -> bytes:
    """
    @param items: the elements, written already.
    """
    return b"[" + b",".join(items) + b"]"

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
from typing import TypeVar

from nixserve.codec.text import decodeText, encodeText
from nixserve.errors import FormatError

__all__ = ["ATermReader", "BadATerm", "quote", "quoteRaw", "writeList"]

T = TypeVar("T")

# Stand for an escaped backslash and an escaped quote while reading. Decoded text has no surrogates in this range.
_BACKSLASH = "\ud800"
_QUOTE = "\ud801"

_searchSpecial = re.compile(f"[\\\\\n\r\t{_BACKSLASH}{_QUOTE}]").search
_searchRawControl = re.compile("[\n\r\t]").search

# How much of the text an error shows.
_EXCERPT_LENGTH = 20


class BadATerm(FormatError):
    """A text is not what Nix writes; the offset says where."""


class ATermReader:
    """
    Reads one text from its beginning, in time proportional to its length however long its strings are.

    Each method consumes what it names or raises L{BadATerm}.
    """

    __slots__ = ("_position", "_text")

    def __init__(self, data: bytes) -> None:
        # Once both are out of the way, every quote left delimits a string. Pairs of backslashes first: a run of
        # backslashes within a string begins with an escape, and outside of strings none can be.
        self._text = decodeText(data).replace("\\\\", _BACKSLASH).replace('\\"', _QUOTE)
        self._position = 0

    def expect(self, token: str) -> None:
        """Consume exactly C{token}."""
        if not self.accept(token):
            raise self.error(f"expected string '{token}'")

    def accept(self, token: str) -> bool:
        """Consume C{token} if it comes next, and say whether it did."""
        if not self._text.startswith(token, self._position):
            return False
        self._position += len(token)
        return True

    def string(self) -> str:
        """Consume a quoted string and undo its escapes."""
        body = self._untilQuote()
        if not _searchSpecial(body):
            return body
        if _searchRawControl(body):
            raise self.error("string with a line feed, carriage return or tab that is not escaped, right before this")
        body = body.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
        if "\\" in body:
            raise self.error("string with an escape that Nix does not write, right before this")
        return body.replace(_QUOTE, '"').replace(_BACKSLASH, "\\")

    def rawString(self) -> str:
        """Consume a quoted string of the sort that is written raw."""
        body = self._untilQuote()
        if "\\" in body or _BACKSLASH in body or _QUOTE in body:
            raise self.error("string with an escape where none can be, right before this")
        return body

    def items(self, readItem: Callable[[], T]) -> list[T]:
        """
        Consume a list.

        @param readItem: consumes one element.
        """
        self.expect("[")
        if self.accept("]"):
            return []
        items = [readItem()]
        while self.accept(","):
            items.append(readItem())
        self.expect("]")
        return items

    def finish(self) -> None:
        """Make sure that nothing follows."""
        if self._position < len(self._text):
            raise self.error("expected the end")

    def error(self, message: str) -> BadATerm:
        """
        @return: an error that tells where the reader stands.
        """
        rest = _withEscapes(self._text[self._position : self._position + _EXCERPT_LENGTH])
        offset = len(encodeText(_withEscapes(self._text[: self._position])))
        return BadATerm(message, found=ascii(rest) if rest else "the end", offset=offset)

    def _untilQuote(self) -> str:
        self.expect('"')
        end = self._text.find('"', self._position)
        if end < 0:
            raise self.error("unterminated string in derivation")
        body = self._text[self._position : end]
        self._position = end + 1
        return body


def quote(text: str) -> str:
    """
    @return: C{text} with its escapes, in quotes.
    """
    if '"' in text or "\\" in text:
        text = text.replace("\\", "\\\\").replace('"', '\\"')
    if _searchRawControl(text):
        text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f'"{text}"'


def quoteRaw(text: str) -> str:
    """
    @return: C{text} in quotes as it is.
    @raise FormatError: it needs escapes. Nix would write a text that means another derivation.
    """
    if '"' in text or "\\" in text:
        raise FormatError("this string of a derivation can have no quotes and backslashes", found=ascii(text[:100]))
    return f'"{text}"'


def writeList(items: Iterable[str]) -> str:
    """
    @param items: the elements, written already.
    """
    return f"[{','.join(items)}]"


def _withEscapes(text: str) -> str:
    return text.replace(_BACKSLASH, "\\\\").replace(_QUOTE, '\\"')

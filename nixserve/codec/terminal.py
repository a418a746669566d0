"""
Text of others on its way to a terminal, which obeys what it is sent: moves its cursor, changes its title and modes,
answers in the place of whoever types, and puts text that runs from right to left before what stands to the left of it.

Nothing of that passes. What does, if it is wanted, are plain colours, as compilers use them: C{ESC [ … m} with digits,
semicolons and colons only. With a C{<}, C{=}, C{>} or C{?}, or with a character between parameters and C{m}, the same
letter means something else (xterm: modifyOtherKeys, queries; ECMA-48, 5.4 leaves them to whoever makes the terminal).
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["MAX_LINE", "onOneLine", "printable", "printableLines"]

MAX_LINE: Final = 64 * 1024
"""Bytes of a line, after which its end is not waited for: more than anybody reads, and no more memory than that for a
gigabyte without LF."""

# ESC [ … letter; ESC ] … BEL or ESC \\; other short ones (ECMA-48, 5.3 and 5.4; ECMA-35, 13; xterm's OSC); any ESC.
_ESCAPES: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-Z\\^-~]|\x1b")

# Sixteen numbers; those of compilers have up to five.
_isColour: Final = re.compile(r"\x1b\[[0-9:;]{0,64}m").fullmatch

_NORMAL: Final = "\x1b[0m"
_NORMALS: Final = ("", "\x1b[m", _NORMAL)


def printable(text: str, colours: bool = False) -> str:
    """
    One line without anything that a terminal would obey. Control characters, those of one byte too (U+009B), and all
    that order text or are not seen (Unicode's categories C and Z but for the blank, bidirectional ones among them) are
    left out; tabs stay.

    @param colours: leave those, and return to normal at the end of the line.
    """
    kept: list[str] = []
    position, last = 0, ""
    for match in _ESCAPES.finditer(text):
        kept.append(_plain(text[position : match.start()]))
        position = match.end()
        if colours and _isColour(match[0]):
            last = match[0]
            kept.append(last)
    kept.append(_plain(text[position:]))
    if last not in _NORMALS:
        kept.append(_NORMAL)
    return "".join(kept)


def printableLines(text: str, colours: bool = False) -> str:
    """The same for several lines, which stay lines."""
    return "\n".join(printable(line, colours) for line in text.splitlines())


def onOneLine(text: str) -> str:
    """Several lines as one, without anything that a terminal would obey."""
    return " ".join(filter(None, (printable(line).strip() for line in text.splitlines())))


def _plain(text: str) -> str:
    return text if text.isprintable() else "".join(c for c in text if c.isprintable() or c == "\t")

"""
Text of other programs on its way to a person: what may reach a terminal, and sizes in words.
"""

from __future__ import annotations

import re

__all__ = ["formatBytes", "onOneLine", "printable"]

# What a terminal obeys: ESC [ … letter; ESC ] … BEL; ESC and one more (ECMA-48, 5.3 and 5.4; xterm's OSC).
_ESCAPES = re.compile(r"\x1b\[([0-?]*[ -/]*)([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[^\[\]]?")
_COLOUR = "m"


def printable(text: str, colours: bool = False) -> str:
    """
    One line without anything that a terminal would obey.

    @param colours: leave those, as compilers use them.
    """

    def replace(match: re.Match[str]) -> str:
        return match[0] if colours and match[2] == _COLOUR else ""

    kept = _ESCAPES.sub(replace, text)
    return "".join(c for c in kept if c.isprintable() or c == "\t" or (colours and c == "\x1b"))


def onOneLine(text: str) -> str:
    """Several lines as one, without anything that a terminal would obey."""
    return " ".join(filter(None, (printable(line).strip() for line in text.splitlines())))


def formatBytes(size: int) -> str:
    """A size as people say it: C{12.3 MB}."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"

"""
Structured attributes: a derivation whose environment has an entry C{__json} hands its attributes to the builder as a
JSON file and as a script for bash, instead of as environment variables.

Both files are byte for byte what Nix 2.8 writes (src/libstore/parsed-derivations.cc), since they can end up in outputs.
Nix uses the JSON library of Niels Lohmann, whose sorting and forms of numbers are repeated here.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring
from typing import Final, NoReturn

from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.text import encodeText
from nixserve.errors import BuildError

__all__ = ["JSON", "MAX_DEPTH", "MAX_VALUES", "STRUCTURED_ATTRS", "parseStructuredAttrs", "writeJSON", "writeShell"]

#: Any JSON value.
JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]

#: The environment variable that holds the attributes.
STRUCTURED_ATTRS = "__json"

#: Lists and objects within each other. Writing them takes Python's stack; real ones have a handful.
MAX_DEPTH: Final = 100

#: Values: parsing is one call, in which no other thread of this process runs, and each value takes 30 times the bytes
#: that it is written in. As many as a derivation may have strings.
MAX_VALUES: Final = 250_000

_isShellName = re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch


def parseStructuredAttrs(text: str) -> dict[str, JSON]:
    """
    Read what C{__json} holds.

    @raise BuildError: this is no JSON object, or one deeper than L{MAX_DEPTH}, or with more than L{MAX_VALUES} values.
        Commas and brackets in strings count as values of their own.
    """
    if sum(map(text.count, ",[{")) > MAX_VALUES:
        raise BuildError(
            BuildStatus.MISC_FAILURE, f"cannot process __json attribute: it has more than {MAX_VALUES} values"
        )
    try:
        # Text that came with bytes that are no UTF-8 fails here, as it does in Nix.
        text.encode("utf-8")
        value = json.loads(text, parse_int=_parseInt, parse_float=_parseFloat, parse_constant=_refuseConstant)
        # An escape such as \ud800 gives half a character. Nothing can be written then.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BuildError(BuildStatus.MISC_FAILURE, f"cannot process __json attribute: {error}") from error
    if not isinstance(value, dict):
        raise BuildError(BuildStatus.MISC_FAILURE, "cannot process __json attribute: it is not an object")
    _checkDepth(value)
    return value


def _checkDepth(attrs: dict[str, JSON]) -> None:
    level: list[list[JSON] | dict[str, JSON]] = [attrs]
    for _ in range(MAX_DEPTH):
        items = (item for outer in level for item in (outer if isinstance(outer, list) else outer.values()))
        level = [item for item in items if isinstance(item, list | dict)]
        if not level:
            return
    raise BuildError(
        BuildStatus.MISC_FAILURE, f"cannot process __json attribute: it is more than {MAX_DEPTH} levels deep"
    )


def _parseInt(digits: str) -> int | float:
    """Whole numbers have 64 bits, with or without sign; larger ones are taken as fractions."""
    number = int(digits) if len(digits) <= len("-9223372036854775808") else None
    if number is not None and -(2**63) <= number < 2**64:
        return number
    return _parseFloat(digits)


def _parseFloat(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"number overflow parsing '{digits:.100}'")
    return number


def _refuseConstant(name: str) -> NoReturn:
    raise ValueError(f"'{name}' is not JSON")


def writeJSON(value: JSON) -> str:
    """
    The contents of C{.attrs.json}: compact, keys in the order of their bytes, no newline at the end.
    """
    if isinstance(value, dict):
        return "{" + ",".join(f"{encode_basestring(key)}:{writeJSON(item)}" for key, item in _sortedItems(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(writeJSON, value)) + "]"
    if isinstance(value, float):
        return _writeFloat(value)
    return json.dumps(value, ensure_ascii=False)


def _sortedItems(value: Mapping[str, JSON]) -> list[tuple[str, JSON]]:
    return sorted(value.items(), key=lambda item: encodeText(item[0]))


def _writeFloat(number: float) -> str:
    text = repr(number)
    # Here alone the two differ: Python writes 1e15 up to 1e16 without an exponent.
    if 1e15 <= abs(number) < 1e16:
        digits = text.removeprefix("-").removesuffix(".0").replace(".", "").rstrip("0")
        fraction = f".{digits[1:]}" if len(digits) > 1 else ""
        return f"{'-' if number < 0 else ''}{digits[0]}{fraction}e+15"
    return text


def writeShell(attrs: Mapping[str, JSON]) -> str:
    """
    The contents of C{.attrs.sh}: a C{declare} for each attribute that bash can hold.
    """
    return "".join(_declaration(name, value) for name, value in _sortedItems(attrs) if _isShellName(name))


def _declaration(name: str, value: JSON) -> str:
    if isinstance(value, list):
        words = _words((None, item) for item in value)
        return "" if words is None else f"declare -a {name}=({words})\n"
    if isinstance(value, dict):
        words = _words(_sortedItems(value))
        return "" if words is None else f"declare -A {name}=({words})\n"
    word = _word(value)
    return "" if word is None else f"declare {name}={word}\n"


def _words(items: Iterable[tuple[str | None, JSON]]) -> str | None:
    """What stands in the brackets; C{None} if one of the items cannot."""
    words = ""
    for key, item in items:
        word = _word(item)
        if word is None:
            return None
        words += f"{word} " if key is None else f"[{_quoted(key)}]={word} "
    return words


def _word(value: JSON) -> str | None:
    match value:
        case None:
            return "''"
        case bool():
            return "1" if value else ""
        case str():
            return _quoted(value)
        case int() | float() if _isWhole(value):
            return str(_toInt32(value))
        case _:
            return None


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _isWhole(number: int | float) -> bool:
    """Nix looks at the number in single precision, in which it may lose its fraction or become infinite."""
    single: float = struct.unpack("f", struct.pack("f", number))[0]
    return math.isinf(single) or single.is_integer()


def _toInt32(number: int | float) -> int:
    """What C++ makes of it as an C{int}: the lower half of a whole number, for fractions what x86 gives."""
    if isinstance(number, int):
        return (number + 2**31) % 2**32 - 2**31
    whole = math.trunc(number)
    return whole if -(2**31) <= whole < 2**31 else -(2**31)

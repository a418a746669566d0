"""
The primitives of the serve protocol: integers, padded strings, lists; a L{Writer}, and a L{Reader} that can say
"need more".

Theory of operation. Bytes arrive in any cut. A reading method of L{Reader} is a generator: it yields C{None}
whenever it needs bytes that have not arrived, and returns its value at last. Whoever drives it feeds the reader
and resumes it (C{yield from} composes them). So a value is parsed once however many pieces it comes in, nothing
blocks, and nothing is parsed twice: 70,000 paths take 0.05 s whole or in 32 KiB pieces.

Every length that a peer states meets a limit before anything is allocated or waited for. Sources for the
encodings: Nix 2.8 to 2.36, src/libutil/serialise.cc, by experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from struct import Struct
from typing import Self, TypeVar

from nixserve.codec.text import decodeText, encodeText
from nixserve.errors import FormatError

__all__ = [
    "MAX_REPLY_SIZE",
    "MAX_REQUEST_SIZE",
    "MAX_SET_SIZE",
    "MAX_STRING_SIZE",
    "Parse",
    "Reader",
    "Writer",
    "asText",
    "encodeString",
    "encodeU64",
]

T = TypeVar("T")

Parse = Generator[None, None, T]
"""A parse under way: yields to ask for more bytes, returns its value."""

MAX_STRING_SIZE = 16 * 1024 * 1024
"""No string of the protocol is larger in practice: the largest are structured attributes in an environment,
some MiB in the worst of Nixpkgs."""

MAX_REQUEST_SIZE = 128 * 1024 * 1024
"""One request without its NAR: a million paths of average length fit."""

MAX_REPLY_SIZE = 32 * 1024 * 1024
"""One reply without its NARs: a closure of 400,000 paths of average length fits, four times the largest known."""

MAX_SET_SIZE = 1_000_000
"""Elements of one set or list: some ten times the largest closures known."""

NO_LIMIT = 1 << 63
"""More bytes than ever arrive."""

_U64 = Struct("<Q")
_ZEROS = tuple(bytes(n) for n in range(8))


def encodeU64(value: int) -> bytes:
    """An integer, enum or boolean: eight bytes, little endian."""
    return _U64.pack(value)


def encodeString(value: bytes) -> bytes:
    """Length, bytes, zeros up to a multiple of eight."""
    return _U64.pack(len(value)) + value + _ZEROS[-len(value) & 7]


class Writer:
    """Collects encoded values; C{bytes(writer)} is all of them. Methods return the writer, for chains."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def u64(self, value: int) -> Self:
        """An integer or boolean."""
        self._parts.append(_U64.pack(value))
        return self

    def string(self, value: bytes) -> Self:
        """A string of bytes."""
        self._parts.append(encodeString(value))
        return self

    def text(self, value: str) -> Self:
        """A string of text."""
        return self.string(encodeText(value))

    def strings(self, values: Iterable[str]) -> Self:
        """A count and that many strings, in the given order."""
        encoded = [encodeText(value) for value in values]
        self._parts.append(_U64.pack(len(encoded)))
        return self._each(encoded)

    def texts(self, values: Iterable[str]) -> Self:
        """Strings, one behind the other."""
        return self._each([encodeText(value) for value in values])

    def _each(self, encoded: list[bytes]) -> Self:
        pack = _U64.pack
        self._parts.extend([pack(len(value)) + value + _ZEROS[-len(value) & 7] for value in encoded])
        return self

    def textSet(self, values: Iterable[str]) -> Self:
        """A count and that many strings, each once, in bytewise order, as Nix writes sets."""
        return self.strings(sorted(set(values), key=encodeText))

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)


class Reader:
    """
    Bytes that have arrived and not been consumed, and the parsers that consume them.

    @ivar offset: how many bytes have been consumed since the beginning of the stream.
    """

    __slots__ = ("_allowance", "_allowed", "_buffer", "_limit", "_position", "offset")

    def __init__(self) -> None:
        # Immutable pieces, so that a large piece of a NAR can pass through without being copied.
        self._buffer = b""
        self._position = 0
        self._limit = self._allowance = NO_LIMIT
        self._allowed = ""
        self.offset = 0

    def feed(self, data: bytes) -> None:
        """Take bytes that have arrived, cut anywhere."""
        if self._position == len(self._buffer):
            self._buffer = data
        else:
            # What is left is less than one short string: every parser takes what it can before it yields.
            self._buffer = self._buffer[self._position :] + data
        self._position = 0

    @property
    def available(self) -> int:
        """How many bytes have arrived and not been consumed."""
        return len(self._buffer) - self._position

    @property
    def spent(self) -> int:
        """How many bytes parsers have consumed, or will before they return, since the last L{limit}."""
        return self._limit - self._allowance

    def limit(self, size: int | None, what: str = "a request") -> None:
        """
        From here on at most C{size} bytes may be consumed by parsers; C{None} lifts the limit.

        @param what: they belong to, for the error.
        """
        self._limit = self._allowance = NO_LIMIT if size is None else size
        self._allowed = f"{what} of more than {size} bytes"

    def take(self, atMost: int) -> bytes:
        """Consume up to C{atMost} bytes that are here already. They do not count against the L{limit}."""
        start = self._position
        stop = min(len(self._buffer), start + atMost)
        self._position = stop
        self.offset += stop - start
        return self._buffer[start:stop]

    def putBack(self, size: int) -> None:
        """
        Undo the end of a L{take}: the last C{size} bytes were found to be somebody else's. Nothing may have been
        taken or fed since.
        """
        self.offset -= size
        self._position -= size

    def _spend(self, size: int) -> None:
        if size > self._allowance:
            raise FormatError(f"{self._allowed} is refused", offset=self.offset)
        self._allowance -= size

    def u64(self) -> Parse[int]:
        """An unsigned integer of 64 bits."""
        while self.available < 8:
            yield
        self._spend(8)
        (value,) = _U64.unpack_from(self._buffer, self._position)
        self._position += 8
        self.offset += 8
        return int(value)

    def u32(self) -> Parse[int]:
        """An integer that Nix reads into 32 bits: more is an error."""
        value = yield from self.u64()
        if value >> 32:
            raise FormatError(f"serialised integer {value} is too large{asText(value)}", offset=self.offset - 8)
        return value

    def boolean(self) -> Parse[bool]:
        """An integer of which anything but zero is true, as Nix reads booleans."""
        return bool((yield from self.u32()))

    def count(self, most: int = MAX_SET_SIZE) -> Parse[int]:
        """How many elements follow, at most C{most}."""
        value = yield from self.u64()
        if value > most:
            raise FormatError(
                f"a set of {value} elements{asText(value)} is refused, the limit is {most}",
                offset=self.offset - 8,
            )
        return value

    def string(self, limit: int = MAX_STRING_SIZE) -> Parse[bytes]:
        """One string of at most C{limit} bytes."""
        size = yield from self.u64()
        if size > limit:
            raise FormatError(
                f"a string of {size} bytes{asText(size)} is refused, the limit is {limit}", offset=self.offset - 8
            )
        self._spend(size + (-size & 7))
        parts = [self.take(size)]
        missing = size - len(parts[0])
        while missing:
            yield
            parts.append(self.take(missing))
            missing -= len(parts[-1])
        padding = -size & 7
        while self.available < padding:
            yield
        if self.take(padding) != _ZEROS[padding]:
            raise FormatError("non-zero padding", offset=self.offset - padding)
        return b"".join(parts)

    def text(self, limit: int = MAX_STRING_SIZE) -> Parse[str]:
        """One string, as text."""
        return decodeText((yield from self.string(limit)))

    def strings(self, limit: int = MAX_STRING_SIZE, most: int = MAX_SET_SIZE) -> Parse[list[str]]:
        """A count of at most C{most} and that many strings of at most C{limit} bytes each, in the order of the wire."""
        return (yield from self.converted(lambda texts: texts, limit, most))

    def converted(
        self, convert: Callable[[list[str]], list[T]], limit: int = MAX_STRING_SIZE, most: int = MAX_SET_SIZE
    ) -> Parse[list[T]]:
        """
        As L{strings}, of values that are texts on the wire.

        @param convert: gives the values of some texts, in order. It is called as they come, with those that are here.
        """
        count = yield from self.count(most)
        result: list[T] = []
        while len(result) < count:
            here: list[str] = []
            self._shortStrings(here, count - len(result), limit)
            result += convert(here)
            if len(result) < count:
                # Not whole here yet, or in some way wrong: the careful way for this one.
                result += convert([(yield from self.text(limit))])
        return result

    def _shortStrings(self, result: list[str], count: int, limit: int) -> None:
        """
        Append up to C{count} strings that lie whole and well-formed in the buffer. One tight loop: this is where the
        time of a request with many paths goes.
        """
        buffer, position, end = self._buffer, self._position, len(self._buffer)
        unpack, zeros = _U64.unpack_from, _ZEROS
        missing = count
        while missing and end - position >= 8:
            (size,) = unpack(buffer, position)
            stop = position + 8 + size
            following = stop + (-size & 7)
            if size > limit or following > end or buffer[stop:following] != zeros[-size & 7]:
                break
            result.append(str(buffer[position + 8 : stop], "utf-8", "surrogateescape"))
            position = following
            missing -= 1
        self._spend(position - self._position)
        self.offset += position - self._position
        self._position = position

    def pairs(
        self, key: Callable[[], Parse[str]], value: Callable[[], Parse[T]], most: int = MAX_SET_SIZE
    ) -> Parse[dict[str, T]]:
        """A count, of at most C{most}, and that many keys with their values."""
        count = yield from self.count(most)
        result: dict[str, T] = {}
        for _ in range(count):
            name = yield from key()
            result[name] = yield from value()
        return result


def asText(value: int) -> str:
    """
    Where a number should be, peers that fail send text: a message of the day, a rejection by a shell. Eight
    printable bytes are shown as what they are.

    @return: what to put behind the number in an error; usually nothing.
    """
    raw = _U64.pack(value)
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in raw):
        return f" (the bytes are the text {raw.decode('ascii')!r})"
    return ""

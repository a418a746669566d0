"""
NAR, Nix's archive format: its grammar, what can be in an archive, and the sequences of bytes that have only one form.

L{nixserve.codec.narparser} makes events of bytes, L{nixserve.codec.narwriter} bytes of events.

The grammar, with C{str(x)} for a 64-bit little-endian length, the bytes, and zeros up to a multiple of eight::

    nar   = str("nix-archive-1") node
    node  = str("(") str("type") body str(")")
    body  = str("regular") [ str("executable") str("") ] str("contents") str(bytes)
          | str("symlink") str("target") str(bytes)
          | str("directory") entry*
    entry = str("entry") str("(") str("name") str(bytes) str("node") node str(")")

The parser accepts what Nix 2.34 accepts (src/libutil/archive.cc:parse). Nix 2.8 is laxer: entries in any order,
C{executable} after C{contents}, files without contents, entries without a node. No version of Nix ever wrote such
an archive.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from nixserve.errors import FormatError

__all__ = [
    "CLOSE",
    "CLOSE_ENTRY",
    "DIRECTORY",
    "ENTRY",
    "EXECUTABLE",
    "MAGIC",
    "MAX_CHUNK",
    "MAX_ENTRY_HEADER",
    "MAX_NAME",
    "MAX_NESTING",
    "MAX_TAG",
    "MAX_TARGET",
    "NODE",
    "PADDED_CLOSE",
    "PADDED_CLOSE_ENTRY",
    "PADDED_DIRECTORY",
    "PADDED_EXECUTABLE",
    "PADDED_REGULAR",
    "PADDED_SYMLINK",
    "REGULAR",
    "SYMLINK",
    "BadArchive",
    "Contents",
    "Directory",
    "EndDirectory",
    "Event",
    "Regular",
    "Symlink",
    "string",
]

# Nix's limit on keywords; the longest one has 13 bytes.
MAX_TAG = 32
# NAME_MAX of every file system that Linux has; Nix refuses longer names by format.
MAX_NAME = 255
# PATH_MAX without its NUL: the longest target that symlink(2) takes.
MAX_TARGET = 4095
# Directories open at once. Nix 2.34.7 and later refuse anything 64 levels or deeper below the root, both reading and
# dumping, to save their call stack; older ones have no limit, and deeper objects lie in stores that they filled.
# Nothing here recurses: a level costs us one name, so this limit only bounds the memory (1 MiB) that a peer may take.
# It is the reader's choice to be this generous: what is deeper than 64 cannot be passed on to a newer Nix.
MAX_NESTING = 4096
# Bytes of a NAR that move at once, wherever that is: large enough that what a chunk costs by itself does not count,
# small enough for hundreds in flight.
MAX_CHUNK = 256 * 1024

_U64 = Struct("<Q")
_ZEROS = bytes(8)


class BadArchive(FormatError):
    """
    Bytes that are not a NAR.

    The text begins with C{bad archive: }, as Nix's own does (src/libutil/archive.cc:badArchive).
    """

    def __init__(self, message: str, *, expected: str = "", found: str = "", offset: int | None = None) -> None:
        super().__init__(f"bad archive: {message}", expected=expected, found=found, offset=offset)


@dataclass(frozen=True, slots=True)
class Directory:
    """
    A directory begins. Its entries follow, in strictly ascending order of their names, then its L{EndDirectory}.

    @ivar name: its name in the directory that contains it; empty for the root of the archive.
    """

    name: bytes


@dataclass(frozen=True, slots=True)
class EndDirectory:
    """The innermost directory that is open is complete."""


@dataclass(frozen=True, slots=True)
class Regular:
    """
    A regular file begins. As many bytes as it has follow as L{Contents}, none for an empty file; nothing marks its
    end.

    @ivar name: as L{Directory.name}.
    @ivar executable: whether its owner may execute it.
    @ivar size: how many bytes of contents it has. Claimed by the archive: allocate nothing by it.
    """

    name: bytes
    executable: bool
    size: int


@dataclass(frozen=True, slots=True)
class Contents:
    """
    The next bytes of the file begun last, cut anywhere.

    @ivar data: at least one byte. A large piece is a read-only view of the bytes that were fed; it stays valid as
        long as it is held, and keeps all of them in memory as long.
    """

    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Symlink:
    """
    A symbolic link.

    @ivar name: as L{Directory.name}.
    @ivar target: where it points: 1 to 4095 bytes without NUL, otherwise unchecked.
    """

    name: bytes
    target: bytes


Event = Directory | EndDirectory | Regular | Contents | Symlink


def string(data: bytes) -> bytes:
    """C{str(data)} of the grammar."""
    return _U64.pack(len(data)) + data + _ZEROS[: -len(data) & 7]


def _strings(*items: bytes) -> bytes:
    """C{str()} of each of C{items}, one after another."""
    return b"".join(map(string, items))


def _padded(text: bytes) -> tuple[bytes, ...]:
    """C{text} behind 0 to 7 zeros: what follows a string that needs that many bytes of padding."""
    return tuple(_ZEROS[:count] + text for count in range(8))


# Whole sequences of the grammar that allow no variation, so that one comparison reads one. The index of a table is
# the number of zeros in front, the padding of the string before.
MAGIC = string(b"nix-archive-1")
ENTRY = _strings(b"entry", b"(", b"name")
NODE = string(b"node")
REGULAR = _strings(b"(", b"type", b"regular", b"contents")
EXECUTABLE = _strings(b"(", b"type", b"regular", b"executable", b"", b"contents")
SYMLINK = _strings(b"(", b"type", b"symlink", b"target")
DIRECTORY = _strings(b"(", b"type", b"directory")
CLOSE = string(b")")
CLOSE_ENTRY = CLOSE + CLOSE

PADDED_REGULAR = _padded(NODE + REGULAR)
PADDED_EXECUTABLE = _padded(NODE + EXECUTABLE)
PADDED_SYMLINK = _padded(NODE + SYMLINK)
PADDED_DIRECTORY = _padded(NODE + DIRECTORY)
PADDED_CLOSE = _padded(CLOSE)
PADDED_CLOSE_ENTRY = _padded(CLOSE_ENTRY)

# The longest head of an entry: with the longest name, up to and with the size of an executable file.
MAX_ENTRY_HEADER = len(ENTRY) + 8 + MAX_NAME + len(PADDED_EXECUTABLE[7]) + 8

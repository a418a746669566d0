"""
Reads NARs: a push parser, which takes the bytes however they are cut, hands back what they say, and holds no more of
them than one directory entry.
"""

from __future__ import annotations

from struct import Struct
from typing import NoReturn

from nixserve.codec.nar import (
    CLOSE_ENTRY,
    DIRECTORY,
    ENTRY,
    EXECUTABLE,
    MAX_ENTRY_HEADER,
    MAX_NAME,
    MAX_NESTING,
    MAX_TAG,
    MAX_TARGET,
    NODE,
    PADDED_CLOSE_ENTRY,
    PADDED_DIRECTORY,
    PADDED_EXECUTABLE,
    PADDED_REGULAR,
    PADDED_SYMLINK,
    REGULAR,
    SYMLINK,
    BadArchive,
    Contents,
    Directory,
    EndDirectory,
    Event,
    Regular,
    Symlink,
)

__all__ = ["NarParser"]

# No file and no file offset is larger on Linux (off_t), so no NAR can be either.
_UNLIMITED = (1 << 63) - 1
_U64 = Struct("<Q")
_ENTRY_SIZE = len(ENTRY)
_REGULAR_SIZE = len(NODE + REGULAR)
_EXECUTABLE_SIZE = len(NODE + EXECUTABLE)
_SYMLINK_SIZE = len(NODE + SYMLINK)
_DIRECTORY_SIZE = len(NODE + DIRECTORY)
_CLOSE_ENTRY_SIZE = len(CLOSE_ENTRY)

# A piece of contents of at least this many bytes is passed on as a view, a smaller one as a copy. A view costs about
# as much as copying this many bytes, and a copy of a small piece does not keep the whole chunk in memory.
_VIEW_SIZE = 4096
_DOTS = frozenset((b".", b".."))
_END_DIRECTORY = EndDirectory()


class _Incomplete(Exception):
    """The bytes at hand end within the item being read. Never leaves L{NarParser}."""


class NarParser:
    """
    Reads one NAR, fed in pieces.

    The bytes are taken item by item: the magic and the head of the root; the head of an entry, or the end of a
    directory; the end of a file. An item (at most 5 KiB) that is not complete is kept and read again from its start
    when more bytes arrive, so that what is reported never depends on how the bytes were cut. Contents of files are
    passed on as they come.

    There are two readers of items. The exact one goes string by string and knows what to say of each mistake. The fast
    one reads runs of whole entries, and leaves whatever it does not recognise to the exact one.

    After an error every further call raises that error.

    @ivar finished: whether the archive is complete.
    @ivar surplus: what was fed after the end of the archive. Stop feeding when C{finished} is set, or it grows.
    """

    def __init__(self, maxSize: int | None = None) -> None:
        """
        @param maxSize: how many bytes the archive may have, where that is known. A file that claims more than is
            left is refused before its contents are read.
        """
        self.finished = False
        self.surplus = b""
        self._maxSize = _UNLIMITED if maxSize is None else maxSize
        self._error: BadArchive | None = None
        # The bytes at hand, where in them the next item starts, and where in the archive they start.
        self._buffer = b""
        self._position = 0
        self._base = 0
        # What comes next: contents if any are left, else the end of a file if one is open (it starts with that many
        # zeros), else an entry of the innermost directory, or the root if none is open.
        self._contentsLeft = 0
        self._filePadding: int | None = None
        # For each directory that is open the name of the entry read last, which the next one must exceed.
        self._lastNames: list[bytes] = []

    def feed(self, data: bytes) -> list[Event]:
        """
        Take the next bytes, cut anywhere.

        @return: what they say, in the order of the archive.
        @raise BadArchive: they cannot belong to a NAR. Events in front of the mistake that were not returned yet are
            lost.
        """
        if self._error is not None:
            raise self._error
        if self.finished:
            self.surplus += data
            return []
        if self._contentsLeft >= len(data) > 0:
            # Contents only, as nearly always within a large file: nothing to look at, nothing to copy.
            self._contentsLeft -= len(data)
            self._base += len(data)
            return [Contents(data)]
        self._buffer = self._buffer + data if self._buffer else data
        events: list[Event] = []
        try:
            self._readItems(events)
        except _Incomplete:
            pass
        except BadArchive as error:
            self._error = error
            self._buffer = b""
            raise
        self._dropRead()
        return events

    def close(self) -> None:
        """
        There are no more bytes.

        @raise BadArchive: the archive is not complete, or has been found bad before.
        """
        if self._error is None and not self.finished:
            self._error = BadArchive("unexpected end", offset=self._base + len(self._buffer))
        if self._error is not None:
            raise self._error

    def _readItems(self, events: list[Event]) -> None:
        """
        Read whatever is complete in the buffer.

        @raise _Incomplete: there was something behind it; C{_position} is where that starts.
        """
        while not self.finished:
            if self._contentsLeft:
                self._readContents(events)
                continue
            if self._lastNames and self._filePadding is None:
                self._readEntriesFast(events)
            start = self._position
            try:
                event = self._readItem()
            except _Incomplete:
                self._position = start
                raise
            if self._base + self._position > self._maxSize:
                self._fail("larger than it was said to be", start, expected=f"{self._maxSize} bytes in all")
            if event is not None:
                events.append(event)

    def _dropRead(self) -> None:
        """Keep of the buffer only what has not been read."""
        rest = self._buffer[self._position :]
        self._base += self._position
        self._position = 0
        if self.finished:
            self._buffer, self.surplus = b"", rest
        else:
            self._buffer = rest

    def _readContents(self, events: list[Event]) -> None:
        """Pass on what there is of the contents of the open file."""
        start = self._position
        size = min(self._contentsLeft, len(self._buffer) - start)
        if not size:
            raise _Incomplete
        if size < _VIEW_SIZE:
            events.append(Contents(self._buffer[start : start + size]))
        else:
            events.append(Contents(memoryview(self._buffer)[start : start + size]))
        self._contentsLeft -= size
        self._position = start + size

    def _readEntriesFast(self, events: list[Event]) -> None:
        """
        Read entries and ends of directories as long as they are well-formed and lie wholly in the buffer, except for
        what ends the root. Stops in front of anything else.
        """
        buffer = self._buffer
        position = self._position
        names = self._lastNames
        last = names[-1]
        append = events.append
        startsWith = buffer.startswith
        number = _U64.unpack_from
        end = min(len(buffer), self._maxSize - self._base)
        lastStart = end - MAX_ENTRY_HEADER  # up to here the head of an entry lies wholly in the buffer
        while position <= lastStart:
            if not startsWith(ENTRY, position):
                if len(names) == 1 or not startsWith(CLOSE_ENTRY, position):
                    break
                names.pop()
                last = names[-1]
                append(_END_DIRECTORY)
                position += _CLOSE_ENTRY_SIZE
                continue
            here = position + _ENTRY_SIZE
            (size,) = number(buffer, here)
            if size > MAX_NAME:
                break
            here += 8 + size
            name = buffer[here - size : here]
            if name <= last or b"/" in name or b"\0" in name or name in _DOTS:
                break
            padding = -size & 7
            regular = executable = False
            if startsWith(PADDED_REGULAR[padding], here):
                regular = True
                here += padding + _REGULAR_SIZE
            elif startsWith(PADDED_DIRECTORY[padding], here):
                if len(names) == MAX_NESTING:
                    break
                append(Directory(name))
                names[-1] = name
                last = b""
                names.append(last)
                position = here + padding + _DIRECTORY_SIZE
                continue
            elif startsWith(PADDED_EXECUTABLE[padding], here):
                regular = executable = True
                here += padding + _EXECUTABLE_SIZE
            elif startsWith(PADDED_SYMLINK[padding], here):
                here += padding + _SYMLINK_SIZE
            else:
                break
            (size,) = number(buffer, here)
            here += 8
            close = PADDED_CLOSE_ENTRY[-size & 7]
            after = here + size + len(close)
            if after > end or not startsWith(close, here + size):
                break
            data = buffer[here : here + size]
            if regular:
                append(Regular(name, executable, size))
                if size:
                    append(Contents(data))
            elif 0 < size <= MAX_TARGET and b"\0" not in data:
                append(Symlink(name, data))
            else:
                break
            names[-1] = last = name
            position = after
        self._position = position

    def _readItem(self) -> Event | None:
        """
        Read one item string by string.

        @return: what it says; C{None} for the end of a file.
        @raise _Incomplete: the buffer ends within it; nothing has changed but C{_position}.
        """
        if self._filePadding is not None:
            self._readFileEnd(self._filePadding)
            return None
        names = self._lastNames
        if not names:
            self._expect(b"nix-archive-1")
            return self._readNode(b"")
        level = len(names) - 1
        if self._expect(b"entry", b")") == b")":
            if level:
                self._expect(b")")
            names.pop()
            self.finished = not level
            return _END_DIRECTORY
        self._expect(b"(")
        self._expect(b"name")
        start = self._position
        name = self._readString("name", MAX_NAME)
        self._checkName(name, start)
        self._expect(b"node")
        event = self._readNode(name)
        names[level] = name
        return event

    def _readNode(self, name: bytes) -> Event:
        """Read a node: a symbolic link whole, a file up to its contents, a directory up to its entries."""
        self._expect(b"(")
        self._expect(b"type")
        start = self._position
        match self._expect(b"regular", b"directory", b"symlink"):
            case b"regular":
                return self._readRegular(name)
            case b"symlink":
                return self._readSymlink(name)
        if len(self._lastNames) == MAX_NESTING:
            self._fail("nested too deeply", start, expected=f"at most {MAX_NESTING} directories")
        self._lastNames.append(b"")
        return Directory(name)

    def _readRegular(self, name: bytes) -> Regular:
        """Read what follows C{regular}, up to the contents."""
        executable = self._expect(b"executable", b"contents") == b"executable"
        if executable:
            start = self._position
            if self._readString("marker of an executable", MAX_TAG):
                self._fail("executable marker has a value", start)
            self._expect(b"contents")
        start = self._position
        size = self._readNumber()
        left = self._maxSize - self._base - self._position
        if size > left:
            self._fail("file too large", start, expected=f"at most {max(left, 0)} bytes", found=str(size))
        self._contentsLeft = size
        self._filePadding = -size & 7
        return Regular(name, executable, size)

    def _readSymlink(self, name: bytes) -> Symlink:
        """Read what follows C{symlink}."""
        self._expect(b"target")
        start = self._position
        target = self._readString("target of a symbolic link", MAX_TARGET)
        if not target:
            self._fail("empty target of a symbolic link", start)
        if b"\0" in target:
            self._fail("NUL in the target of a symbolic link", start)
        self._expect(b")")
        if name:
            self._expect(b")")
        else:
            self.finished = True
        return Symlink(name, target)

    def _readFileEnd(self, padding: int) -> None:
        """Read what follows the contents of a file: its padding and one or two brackets."""
        nested = bool(self._lastNames)
        self._readPadding(padding)
        self._expect(b")")
        if nested:
            self._expect(b")")
        self._filePadding = None
        self.finished = not nested

    def _checkName(self, name: bytes, start: int) -> None:
        """Refuse a name that no directory entry can have, or that does not come after the one before."""
        if not name:
            self._fail("empty name of an entry", start)
        if name in _DOTS or b"/" in name or b"\0" in name:
            self._fail("invalid name of an entry", start, found=repr(name))
        last = self._lastNames[-1]
        if name <= last:
            self._fail("names of entries not in order", start, expected=f"one after {last!r}", found=repr(name))

    def _expect(self, *tags: bytes) -> bytes:
        """Read one of the keywords C{tags}."""
        start = self._position
        found = self._readString("keyword", MAX_TAG)
        if found not in tags:
            expected = " or ".join(repr(tag.decode()) for tag in tags)
            self._fail("unexpected keyword", start, expected=expected, found=repr(found)[1:])
        return found

    def _readString(self, what: str, limit: int) -> bytes:
        """Read a padded string; its length is judged before any of it is looked at."""
        start = self._position
        size = self._readNumber()
        if size > limit:
            self._fail(f"{what} too long", start, expected=f"at most {limit} bytes", found=str(size))
        data = self._take(size)
        self._readPadding(-size & 7)
        return data

    def _readNumber(self) -> int:
        """Read a 64-bit number."""
        (value,) = _U64.unpack(self._take(8))
        return int(value)

    def _readPadding(self, count: int) -> None:
        """Read C{count} zeros."""
        start = self._position
        found = self._take(count)
        if found.strip(b"\0"):
            self._fail("padding is not zero", start, found=found.hex())

    def _take(self, size: int) -> bytes:
        """Read C{size} bytes."""
        start = self._position
        data = self._buffer[start : start + size]
        if len(data) < size:
            raise _Incomplete
        self._position = start + size
        return data

    def _fail(self, message: str, position: int, *, expected: str = "", found: str = "") -> NoReturn:
        """The archive is bad at C{position} of the buffer."""
        raise BadArchive(message, expected=expected, found=found, offset=self._base + position)

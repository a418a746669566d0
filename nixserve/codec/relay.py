"""
What C{nixserve-store --connect} and the service say to each other over a unix socket.

The relay sends one header line, then the bytes of its standard input as they are; its end of input is a
half-close. The service sends frames: a byte that says what it is, a length of four bytes, and the bytes. So one
socket carries both output streams and the exit status.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from nixserve.errors import FormatError

__all__ = ["MAX_FRAME", "MAX_HEADER", "Frame", "FrameReader", "RelayHeader", "encodeFrame"]

_HEAD = Struct(">BI")

MAX_FRAME = 256 * 1024
"""Bytes in one frame: what moves through a relay at once."""

MAX_HEADER = 16 * 1024
"""Bytes in the header line: a store URI of any use is much shorter."""


class Frame(enum.IntEnum):
    """The kinds of frames, by what is in them."""

    OUTPUT = 1
    ERROR = 2
    EXIT = 3


@dataclass(frozen=True, slots=True)
class RelayHeader:
    """
    What the relay was asked for.

    @ivar rights: as C{--rights} takes them.
    @ivar store: a store URI, or empty for whatever is served.
    """

    rights: str
    store: str = ""

    def encode(self) -> bytes:
        """The line, with its end."""
        return json.dumps({"nixserve-relay": 1, "rights": self.rights, "store": self.store}).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> RelayHeader:
        """
        Read the line.

        @raise FormatError: it is something else.
        """
        try:
            fields = json.loads(line)
            version, rights, store = fields["nixserve-relay"], fields["rights"], fields["store"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FormatError("this socket is for 'nixserve-store --connect'", found=repr(line[:80])) from None
        if version != 1 or not isinstance(rights, str) or not isinstance(store, str):
            raise FormatError("the relay speaks another version: use the nixserve-store of this nixserve")
        return cls(rights, store)


def encodeFrame(kind: Frame, data: bytes) -> bytes:
    """The bytes of one frame."""
    return _HEAD.pack(kind, len(data)) + data


class FrameReader:
    """Frames from bytes in any cut."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Frame, bytes]]:
        """
        The frames that are complete now.

        @raise FormatError: something else than frames.
        """
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            kind, size = _HEAD.unpack_from(self._buffer)
            if kind not in Frame._value2member_map_ or size > MAX_FRAME:
                raise FormatError("the service sent something else than frames", found=repr(bytes(self._buffer[:40])))
            end = _HEAD.size + size
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEAD.size : end])
            del self._buffer[:end]
            yield Frame(kind), payload

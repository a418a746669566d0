"""
What a connection object (L{nixserve.codec.connection}) reports.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final

from nixserve.codec.messages import Command, ImportItem, Request

__all__ = [
    "NEED_DATA",
    "PAUSED",
    "ClientEvent",
    "EndOfExport",
    "EndOfImport",
    "EndOfInput",
    "EndOfNar",
    "Hello",
    "ImportedItem",
    "NarData",
    "Pause",
    "Reply",
    "RequestStarted",
    "ServerEvent",
    "VersionAgreed",
]


class Pause(enum.Enum):
    """Why there is no event."""

    NEED_DATA = "need data"
    PAUSED = "paused"


NEED_DATA: Final = Pause.NEED_DATA
"""Nothing more to say until more bytes arrive."""

PAUSED: Final = Pause.PAUSED
"""The owner has to finish a reply first."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The client's magic is here: the server answers with C{sendHello} without waiting for more, as Nix does."""


@dataclass(frozen=True, slots=True)
class VersionAgreed:
    """
    Both sides have said their version.

    @ivar version: the lower one.
    """

    version: int


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """
    The number of a command has been read, its body not: the moment to refuse it unread.
    """

    command: Command


@dataclass(frozen=True, slots=True)
class NarData:
    """Some bytes of the NAR that is on its way."""

    data: bytes


@dataclass(frozen=True, slots=True)
class EndOfNar:
    """The NAR is complete, as far as its length or shape can tell."""


@dataclass(frozen=True, slots=True)
class ImportedItem:
    """What the NAR before this was; both in ImportPaths (server) and ExportPaths (client)."""

    item: ImportItem


@dataclass(frozen=True, slots=True)
class EndOfImport:
    """The export stream of the client is complete."""


@dataclass(frozen=True, slots=True)
class EndOfExport:
    """The export stream of the server is complete."""

    request: Request


@dataclass(frozen=True, slots=True)
class EndOfInput:
    """The peer has ended the conversation where it may."""


@dataclass(frozen=True, slots=True)
class Reply:
    """
    The reply to the oldest unanswered request.

    @ivar value: see L{nixserve.codec.serve.readReply}.
    """

    request: Request
    value: Any


ServerEvent = (
    Hello | VersionAgreed | RequestStarted | Request | NarData | EndOfNar | ImportedItem | EndOfImport | EndOfInput
)
ClientEvent = VersionAgreed | Reply | NarData | EndOfNar | ImportedItem | EndOfExport | EndOfInput

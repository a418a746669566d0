"""
The root and the families of the errors that nixserve raises.

Leaves stand beside the code that raises them; each belongs to one of the families here, and all of them to
L{NixServeError}, so C{except NixServeError} catches anything of ours and nothing else. An error carries its
facts as attributes; its text is one line that names the rule, the path and what would help.
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "FormatError",
    "LocalProtocolError",
    "NixServeError",
    "PolicyError",
    "ProtocolError",
    "RemoteError",
    "RemoteProtocolError",
    "StoreError",
    "UsageError",
]


class NixServeError(Exception):
    """
    Anything that nixserve reports. C{str()} of it is the line for a person.

    @cvar exitStatus: what a command that ends with this error exits with.
    """

    exitStatus = 1


class UsageError(NixServeError):
    """The command line, a configuration file or the environment asks for something impossible."""

    exitStatus = 2


class FormatError(NixServeError):
    """
    Malformed input: bytes or text that are not what their format says.

    @ivar message: what is wrong.
    @ivar expected: what should have been there, or empty.
    @ivar found: what was there, printable, or empty.
    @ivar offset: how many bytes into the input, or C{None} if that means nothing here.
    """

    def __init__(self, message: str, *, expected: str = "", found: str = "", offset: int | None = None) -> None:
        self.message = message
        self.expected = expected
        self.found = found
        self.offset = offset
        super().__init__(message, expected, found, offset)

    def __str__(self) -> str:
        text = self.message
        if self.expected:
            text += f": expected {self.expected}"
        if self.found:
            text += f"{',' if self.expected else ':'} found {self.found}"
        if self.offset is not None:
            text += f" at offset {self.offset}"
        return text


class ProtocolError(NixServeError):
    """The rules of the serve protocol were broken, by either side."""


class LocalProtocolError(ProtocolError):
    """We called a connection object in a state that does not allow it: a bug on our side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol does not allow."""


class StoreError(NixServeError):
    """The store cannot do what was asked."""


class BuildError(NixServeError):
    """
    A build failed.

    @ivar status: Nix's number for how, see L{nixserve.codec.buildresult.BuildStatus}.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class PolicyError(NixServeError):
    """The peer may not do this. The text names the rule and what would help, nothing of what the peer may not see."""


class RemoteError(NixServeError):
    """What the other end reported."""

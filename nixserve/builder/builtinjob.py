"""
What a builtin builder is given to do, and how it talks to whoever watches the build.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from nixserve.errors import NixServeError

__all__ = ["BuiltinFailed", "BuiltinJob", "logRecord", "warn"]

# Nix's numbers (2.8, src/libutil/logging.hh and error.hh).
_LEVEL_WARN = 1


class BuiltinFailed(NixServeError):
    """A builtin builder cannot do what it was asked; the text goes to the log of the build."""


@dataclass(frozen=True, slots=True)
class BuiltinJob:
    """
    One run of a builtin builder.

    @ivar builder: what the derivation calls it: C{builtin:fetchurl}.
    @ivar env: the variables of the derivation, with paths of outputs already replaced; not those of a process.
    @ivar out: where to put the only output, as seen from the process in which this runs.
    @ivar network: the derivation is of a kind that may use the network: its output is fixed, or impure.
    @ivar caCertificates: whom to trust, as PEM text; empty for the system's own certificates. They must be read before
        a sandbox is entered, in which there are none.
    @ivar attempts: how often to try a download.
    """

    builder: str
    env: Mapping[str, str]
    out: str
    network: bool = False
    caCertificates: str = ""
    attempts: int = 5

    def attribute(self, name: str) -> str:
        """
        @return: the variable called C{name}.
        @raise BuiltinFailed: the derivation has none.
        """
        try:
            return self.env[name]
        except KeyError:
            raise BuiltinFailed(f"attribute '{name}' missing") from None

    def encode(self) -> bytes:
        """As L{decode} reads it. Plain ASCII."""
        return json.dumps(asdict(self)).encode("ascii")

    @classmethod
    def decode(cls, data: bytes | str) -> BuiltinJob:
        """What L{encode} wrote, in the process in which the builder runs."""
        return cls(**json.loads(data))


def warn(text: str) -> None:
    """Put a warning into the log of the build."""
    logRecord(action="msg", level=_LEVEL_WARN, msg=f"warning: {text}")


def logRecord(**record: object) -> None:
    """Put a record that Nix's own log readers understand into the log of the build."""
    print(f"@nix {json.dumps(record, sort_keys=True, separators=(',', ':'))}", file=sys.stderr, flush=True)

"""
What came of a build: BuildResult, its status numbers, and the realised outputs.

Numbers and names are those of Nix 2.8, src/libstore/build-result.hh.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from nixserve.codec.storepath import StorePath

__all__ = ["UNKNOWN_DRV_HASH", "BuildResult", "BuildStatus", "Realisation"]


class BuildStatus(enum.IntEnum):
    """How a build ended. The numbers travel."""

    BUILT = 0
    SUBSTITUTED = 1
    ALREADY_VALID = 2
    PERMANENT_FAILURE = 3
    INPUT_REJECTED = 4
    OUTPUT_REJECTED = 5
    TRANSIENT_FAILURE = 6
    CACHED_FAILURE = 7
    TIMED_OUT = 8
    MISC_FAILURE = 9
    DEPENDENCY_FAILED = 10
    LOG_LIMIT_EXCEEDED = 11
    NOT_DETERMINISTIC = 12
    RESOLVES_TO_ALREADY_VALID = 13
    NO_SUBSTITUTERS = 14


_SUCCESSES = frozenset(
    {
        BuildStatus.BUILT,
        BuildStatus.SUBSTITUTED,
        BuildStatus.ALREADY_VALID,
        BuildStatus.RESOLVES_TO_ALREADY_VALID,
    }
)

UNKNOWN_DRV_HASH = "sha256:" + 64 * "0"
"""What servers from Nix 2.35 on put where older peers expect the hash of the derivation."""


@dataclass(frozen=True, slots=True)
class Realisation:
    """
    One output that exists.

    @ivar outPath: its store path.
    @ivar drvHash: C{sha256:} and the hex of the derivation's hash modulo; only peers up to Nix 2.15 look at it.
    @ivar signatures: over the realisation.
    """

    outPath: StorePath
    drvHash: str = UNKNOWN_DRV_HASH
    signatures: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class BuildResult:
    """
    What came of a build.

    @ivar status: usually a L{BuildStatus}; a number that we do not know is kept as it came.
    @ivar errorMsg: empty on success. May contain ANSI escapes.
    @ivar startTime: Unix seconds, 0 if unknown; C{stopTime} likewise.
    @ivar builtOutputs: by output name; empty on failure.
    """

    status: int
    errorMsg: str = ""
    timesBuilt: int = 0
    isNonDeterministic: bool = False
    startTime: int = 0
    stopTime: int = 0
    builtOutputs: Mapping[str, Realisation] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        """Are the outputs there?"""
        return self.status in _SUCCESSES

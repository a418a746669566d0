"""
What came of a build: BuildResult, its status numbers, and the realised outputs; and what a command that builds ends
with.

Numbers and names are those of Nix 2.8, src/libstore/build-result.hh.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from nixserve.codec.storepath import StorePath
from nixserve.codec.terminal import printable

__all__ = [
    "HASH_MISMATCH",
    "UNKNOWN_DRV_HASH",
    "BuildResult",
    "BuildStatus",
    "Realisation",
    "exitStatus",
    "saysHashMismatch",
]


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

HASH_MISMATCH: Final = "hash mismatch in fixed-output derivation "
"""What the message begins with that the contents of a fixed output are others than its derivation states."""

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
    @ivar hashMismatch: of a L{BuildStatus.OUTPUT_REJECTED}, whether for the contents of a fixed output, which are
        others than its derivation states. Does not travel but in C{errorMsg}: see L{saysHashMismatch}.
    """

    status: int
    errorMsg: str = ""
    timesBuilt: int = 0
    isNonDeterministic: bool = False
    startTime: int = 0
    stopTime: int = 0
    builtOutputs: Mapping[str, Realisation] = field(default_factory=dict)
    hashMismatch: bool = False

    @property
    def success(self) -> bool:
        """Whether the outputs are valid, built now or before."""
        return self.status in _SUCCESSES


def saysHashMismatch(status: int, errorMsg: str) -> bool:
    """
    What a peer's result does not say otherwise. The protocol has one number for all that is wrong with outputs; later
    versions of Nix have another one for this among themselves, but send the old one.

    @param errorMsg: perhaps coloured.
    """
    return status == BuildStatus.OUTPUT_REJECTED and HASH_MISMATCH in printable(errorMsg)


def exitStatus(results: Iterable[BuildResult]) -> int:
    """
    What C{nix-store -r} exits with (Nix 2.8, src/libstore/build/worker.cc, C{Worker::exitStatus}): bits for permanent
    failures, timeouts, wrong hashes and differing outputs, 1 if there are only others, 0 if there are no failures.
    """
    bits, failed = 0, False
    for result in results:
        failed |= not result.success
        if result.status == BuildStatus.TIMED_OUT:
            bits |= 0b101
        elif result.hashMismatch:
            bits |= 0b110
        elif result.status in (BuildStatus.PERMANENT_FAILURE, BuildStatus.DEPENDENCY_FAILED):
            bits |= 0b100
        elif result.status == BuildStatus.NOT_DETERMINISTIC:
            bits |= 0b1000
    return 0b1100000 | bits if bits else int(failed)

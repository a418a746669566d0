"""
What one peer may do: a frozen value that permits nothing unless told.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Self

from nixserve.errors import PolicyError, UsageError
from nixserve.protocol.logbudget import LogBudget

__all__ = ["EVERYTHING", "NOTHING", "READ_ONLY", "Peer", "Policy", "Right"]


class Right(enum.Enum):
    """
    One right. L{TRUST} means: without signature or verification, what real C{nix-store --serve --write} gives
    to everybody.
    """

    READ = "read"
    WRITE = "write"
    BUILD = "build"
    TRUST = "trust"


@dataclass(frozen=True, slots=True)
class Policy:
    """
    The rights of one peer.

    @ivar rights: those it has; none by default.
    """

    rights: frozenset[Right] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Read a comma-separated list of rights, C{"read"} or C{"read,write,build,trust"}.

        Rights in between need every path and derivation verified. As long as that is not built, giving them
        would either promise a check that does not happen or refuse everything, so they are refused here.

        @raise UsageError: an unknown word, or a combination that is not supported.
        """
        words = {word.strip() for word in text.split(",") if word.strip()}
        known = {right.value: right for right in Right}
        unknown = sorted(words - known.keys())
        if unknown:
            raise UsageError(f"unknown right '{unknown[0]}'; the rights are {', '.join(known)}")
        policy = cls(frozenset(known[word] for word in words))
        if policy not in (READ_ONLY, EVERYTHING):
            raise UsageError(
                f"the rights '{text}' cannot be given apart from each other yet: "
                "use 'read', or 'read,write,build,trust' (the same as --write)"
            )
        return policy

    def cutDownTo(self, other: Policy) -> Policy:
        """A policy with the rights that both have."""
        return Policy(self.rights & other.rights)

    def demand(self, right: Right, refusal: str) -> None:
        """
        Check that the peer has C{right}.

        @param refusal: the line for the peer if not; where real Nix has a text for this case, that text.
        @raise PolicyError: it has not.
        """
        if right not in self.rights:
            raise PolicyError(refusal)

    def __str__(self) -> str:
        return ",".join(right.value for right in Right if right in self.rights) or "none"


NOTHING = Policy()
READ_ONLY = Policy(frozenset({Right.READ}))
EVERYTHING = Policy(frozenset(Right))


@dataclass(frozen=True, slots=True)
class Peer:
    """
    Who is at the other end, for logs.

    @ivar address: where from, printable.
    @ivar key: fingerprint and comment of the key that logged in, printable, or empty.
    @ivar session: a number that tells the sessions of this process apart.
    @ivar budget: how much may be logged about it; C{None} if that is nobody's concern.
    """

    address: str
    key: str = ""
    session: int = 0
    budget: LogBudget | None = field(default=None, compare=False, repr=False)

    @property
    def client(self) -> str:
        """Who shares its limits and turns: the sessions of one key, or of one user where there is none."""
        return self.key or self.address

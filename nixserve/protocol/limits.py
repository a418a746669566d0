"""
How much of a server the sessions of one key may use, so that something is left for everybody else; and what the two
ends of a session agree on.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT_LIMITS", "FULL_WINDOW", "MAX_SMALL_NAR", "Limits"]

MIB = 1024 * 1024

MAX_SMALL_NAR = 64 * 1024
"""Bytes of a NAR that is kept until it is complete, and added together with its neighbours."""

FULL_WINDOW = 2 * MIB
"""Bytes that a peer may send while its session is paused, where each has its own window. Conch's 128 KiB halve the
speed on loopback and allow 1.8 MB/s over a link of 70 ms. 2 MiB is OpenSSH's own."""


@dataclass(frozen=True, slots=True)
class Limits:
    """
    What the sessions of one key may use together. Sessions that came in without a key count by their user.

    @ivar keyMemory: bytes that they may make this process hold: requests under way, and replies that nobody reads.
        The default is enough for requests about a million paths.
    @ivar untrustedMemory: the same for all keys without the right C{trust} together. One of them gets a quarter of it,
        which L{nixserve.protocol.memory} may double for one request. The default is enough for requests about 200,000
        paths.
    @ivar keyRequests: in how many worker threads they may be at work at once; a key without the right C{trust} in half
        as many. Few, for threads of Python stand in each other's way, and in that of everybody's packets.
    """

    keyMemory: int = 256 * MIB
    untrustedMemory: int = 192 * MIB
    keyRequests: int = 4

    def requestsOf(self, trusted: bool) -> int:
        """In how many worker threads the sessions of one key may be at once."""
        return self.keyRequests if trusted else max(1, self.keyRequests // 2)

    def memoryOf(self, trusted: bool) -> tuple[int, str]:
        """
        @return: bytes for one key, and the setting that says so.
        """
        if trusted or self.keyMemory <= self.untrustedMemory // 4:
            return self.keyMemory, "max-key-memory"
        return self.untrustedMemory // 4, "max-untrusted-memory"


DEFAULT_LIMITS = Limits()

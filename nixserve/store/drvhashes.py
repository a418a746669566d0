"""
Hashes of derivations that were found before: Nix's C{drvHashes} (Nix 2.8, src/libstore/derivations.cc), which keeps
them as long as the process.

To check what one .drv says of its outputs takes the hashes of all that it is built with, thousands of files. Whoever
sends one such file after the other, each in a session of its own, is not to make us read the thousands each time: so
all sessions of a store share what they find. What they share must be true for ever, whatever comes to lie under a path
once a collector has been there: only hashes of derivations whose paths follow from their texts, with inputs of which
the same is true.
"""

from __future__ import annotations

from typing import Final

from nixserve.codec.derivation import Derivation, Lookup, drvPathOf
from nixserve.codec.hashes import Hash
from nixserve.codec.storepath import StoreDir, StorePath

__all__ = ["MAX_REMEMBERED", "DerivationMemo", "DrvHashes", "FindingHashes"]

MAX_REMEMBERED: Final = 200_000
"""Hashes of derivations that are remembered: more than all of Nixpkgs has."""

_Hashes = dict[StorePath, Hash | None]


class DrvHashes:
    """
    What all sessions of a store share. Safe from any thread.

    @ivar hashes: only ever added to. Whoever uses it may go on with one that is another's no more.
    """

    def __init__(self) -> None:
        self.hashes: _Hashes = {}

    def add(self, hashes: _Hashes) -> None:
        """Share these from now on; all others are forgotten if there are too many."""
        if len(self.hashes) + len(hashes) > MAX_REMEMBERED:
            self.hashes = {}
        self.hashes.update(hashes)


class DerivationMemo:
    """
    What one session uses and finds.

    @ivar shared: what it shares with others.
    @ivar own: what is not certain enough for that.
    """

    def __init__(self, shared: DrvHashes | None = None) -> None:
        self.shared = shared or DrvHashes()
        self.own: _Hashes = {}

    def keep(self, hashes: _Hashes, proven: bool) -> None:
        """
        Have the memo of the store keep the hashes that were found.

        @param proven: for ever, and for all.
        """
        if proven:
            self.shared.add(hashes)
            return
        if len(self.own) + len(hashes) > MAX_REMEMBERED:
            self.own.clear()
        self.own.update(hashes)


class FindingHashes:
    """
    The hashes that one derivation needs, as a L{nixserve.codec.derivation.Memo}: those that are known, and those that
    are being found. To be ended with L{keep}, whatever came of it: what was found is true.
    """

    def __init__(self, memo: DerivationMemo, lookup: Lookup, storeDir: StoreDir) -> None:
        self._memo = memo
        self._lookup = lookup
        self._storeDir = storeDir
        self._shared = memo.shared.hashes
        self._found: _Hashes = {}
        self._proven = True

    def lookup(self, path: StorePath) -> Derivation:
        """Find an input, and see whether its path follows from its text."""
        drv = self._lookup(path)
        if self._proven and drvPathOf(drv, self._storeDir) != path:
            self._proven = False
        return drv

    def keep(self) -> None:
        """Have the memo of the store keep the hashes that were found."""
        if self._found:
            self._memo.keep(self._found, self._proven)

    def __getitem__(self, path: StorePath) -> Hash | None:
        for hashes in (self._found, self._shared):
            if path in hashes:
                return hashes[path]
        found = self._memo.own[path]
        # What comes of it is not certain either.
        self._proven = False
        return found

    def __contains__(self, path: object) -> bool:
        return path in self._found or path in self._shared or path in self._memo.own

    def __setitem__(self, path: StorePath, found: Hash | None) -> None:
        self._found[path] = found

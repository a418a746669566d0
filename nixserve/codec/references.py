"""
Finding the hash parts of store paths in a stream of bytes, and replacing them.

An object refers to another if the 32 digits of the other's hash part occur anywhere in its NAR: in contents, in targets
of symbolic links, in names. Only hash parts that are asked for count. Source: Nix 2.8, src/libstore/references.cc.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Collection, Iterator, Mapping
from struct import Struct

from nixserve.codec.storepath import HASH_PART_LENGTH

__all__ = ["HashRewriter", "ReferenceScanner"]

_WORD = 8
# Every stretch of 32 bytes contains an aligned word that begins at a multiple of this, wherever the stretch begins.
_STRIDE = HASH_PART_LENGTH - _WORD
_unpackWord = Struct("=Q").unpack_from


class ReferenceScanner:
    """
    Looks for hash parts in a stream.

    One word of 8 bytes in every 24 is looked up among the words that occur in the hash parts, at each of the 24
    offsets at which it can lie. So the time does not depend on what the bytes are, nor much on how many hash parts are
    asked for, and the loops over the bytes are C.

    Where there is such a word, it is compared with the hash parts once for each offset at which it occurs in one:
    nearly always one, for to find two hashes that share 8 digits takes a million.
    """

    def __init__(self, hashParts: Collection[str]) -> None:
        """
        @param hashParts: 32 digits each.
        """
        self._found: set[str] = set()
        self._missing = {_digits(hashPart) for hashPart in hashParts}
        # The first offset at which each word occurs in one of those that are missing; and the others, of the few words
        # that occur more than once.
        self._offsets: dict[int, int] = {}
        self._further: dict[int, set[int]] = {}
        for digits in self._missing:
            for offset, word in enumerate(_wordsOf(digits)):
                if word in self._offsets:
                    self._further.setdefault(word, set()).add(offset)
                else:
                    self._offsets[word] = offset
        self._rest = b""

    @property
    def found(self) -> frozenset[str]:
        """The hash parts that occurred so far."""
        return frozenset(self._found)

    def feed(self, data: bytes) -> None:
        """Take the next bytes, cut anywhere. Cheapest in large pieces."""
        buffer = self._rest + data
        words = memoryview(buffer)[: len(buffer) - len(buffer) % _WORD].cast("Q")[:: _STRIDE // _WORD].tolist()
        if not self._offsets.keys().isdisjoint(words):
            self._lookAround(buffer, words)
        self._rest = buffer[-(HASH_PART_LENGTH - 1) :]

    def _lookAround(self, buffer: bytes, words: list[int]) -> None:
        """Are words within a missing hash part? This is what near misses cost."""
        places = range(0, len(words) * _STRIDE, _STRIDE)
        # One that would begin before the buffer was in the last one; such slices are too short.
        candidates = {
            buffer[(start := place - offset) : start + HASH_PART_LENGTH]
            for place, offset in zip(places, map(self._offsets.get, words), strict=True)
            if offset is not None
        }
        if not self._further.keys().isdisjoint(words):
            candidates |= {
                buffer[(start := place - offset) : start + HASH_PART_LENGTH]
                for place, word in zip(places, words, strict=True)
                for offset in self._further.get(word, ())
            }
        for digits in candidates & self._missing:
            self._found.add(digits.decode("ascii"))
            self._forget(digits)

    def _forget(self, digits: bytes) -> None:
        """Do not look for what is found: popular hash parts would cost time at each occurrence."""
        self._missing.remove(digits)
        for word in _wordsOf(digits):
            # Another one may have those that occur more than once.
            if word not in self._further:
                del self._offsets[word]


class HashRewriter:
    """
    Replaces hash parts in a stream by others. What is put in is not looked at again.

    @ivar positions: offsets in the stream at which something was replaced, ascending.
    """

    def __init__(self, mapping: Mapping[str, str]) -> None:
        """
        @param mapping: 32 characters of ASCII each. Where two keys overlap in the stream, the first wins.
        """
        self.positions = array("Q")
        self._mapping = {_digits(old): _digits(new) for old, new in mapping.items()}
        # Bytes that were given back, and those after them that may be the beginning of an occurrence.
        self._written = 0
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """
        Take the next bytes, cut anywhere.

        @return: the next bytes of the rewritten stream, up to 31 behind.
        """
        buffer = self._rest + data
        ready = max(0, len(buffer) - HASH_PART_LENGTH + 1) if self._mapping else len(buffer)
        rewritten: bytearray | None = None
        end = 0
        for position, old in self._occurrences(buffer):
            rewritten = bytearray(buffer) if rewritten is None else rewritten
            end = position + HASH_PART_LENGTH
            rewritten[position:end] = self._mapping[old]
            self.positions.append(self._written + position)
        return self._write(buffer if rewritten is None else bytes(rewritten), max(ready, end))

    def finish(self) -> bytes:
        """
        The stream is at its end.

        @return: the last bytes of the rewritten stream.
        """
        return self._write(self._rest, len(self._rest))

    def _occurrences(self, buffer: bytes) -> Iterator[tuple[int, bytes]]:
        """Those that do not overlap an earlier one, in order."""
        following = [(position, old) for old in self._mapping if (position := buffer.find(old)) >= 0]
        heapq.heapify(following)
        end = 0
        while following:
            position, old = heapq.heappop(following)
            if position >= end:
                yield position, old
                end = position + HASH_PART_LENGTH
            # One that overlaps itself, over and over, is found once.
            if (position := buffer.find(old, end)) >= 0:
                heapq.heappush(following, (position, old))

    def _write(self, buffer: bytes, size: int) -> bytes:
        self._written += size
        self._rest = buffer[size:]
        return buffer[:size]


def _digits(hashPart: str) -> bytes:
    digits = hashPart.encode("ascii")
    if len(digits) != HASH_PART_LENGTH:
        raise ValueError(f"a hash part has {HASH_PART_LENGTH} digits, not {len(digits)}")
    return digits


def _wordsOf(digits: bytes) -> list[int]:
    """The words of a hash part by their offset, as numbers in the machine's own order of bytes."""
    return [_unpackWord(digits, offset)[0] for offset in range(_STRIDE)]

"""
What is the same in the writers of every store (L{nixserve.store.api.PathWriter}, L{nixserve.store.api.ImportWriter}),
and one that any of them gives out.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.store.contents import checkMore, sizeMismatch

__all__ = ["DrainingWriter", "ObjectWriter"]


class ObjectWriter(ABC):
    """
    An object on its way. Whatever goes wrong ends it, but L{Busy}; what has ended takes nothing more.
    """

    def __init__(self, requireOpen: Callable[[], None] = lambda: None) -> None:
        """
        @param requireOpen: raises if the session is closed; for sessions that do not abort their writers then.
        """
        self._requireOpen = requireOpen
        self._ended = False

    def feed(self, data: bytes) -> None:
        """See L{nixserve.store.api.PathWriter.feed}."""
        with self._working():
            self._take(data)

    def abort(self) -> None:
        """See L{nixserve.store.api.PathWriter.abort}."""
        if not self._ended:
            self._ended = True
            self._free()

    @contextlib.contextmanager
    def _working(self, isLast: bool = False) -> Iterator[None]:
        """
        What is done to the object within the block.

        @param isLast: with that it has ended.
        @raise StoreError: it had ended before, or its session.
        """
        try:
            self._requireOpen()
            if self._ended:
                raise StoreError("adding this object to the store has ended already")
            yield
        except Busy:
            raise
        except BaseException:
            self.abort()
            raise
        if isLast:
            self.abort()

    @abstractmethod
    def _take(self, data: bytes) -> None:
        """The next bytes of the NAR have come."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of everything. Called once."""


class DrainingWriter:
    """
    A L{nixserve.store.api.PathWriter} for a path that is valid already: its NAR is counted and dropped.
    """

    alreadyValid = True

    def __init__(self, info: ValidPathInfo) -> None:
        self._info = info
        self._size = 0

    def feed(self, data: bytes) -> None:
        """
        @raise StoreError: more bytes than C{narSize}.
        """
        size, self._size = self._size, self._size + len(data)
        checkMore(self._info, size, False, data)

    def finish(self) -> None:
        """
        @raise StoreError: fewer bytes than C{narSize}.
        """
        if self._size != self._info.narSize:
            raise sizeMismatch(self._info, self._size)

    def abort(self) -> None:
        """See L{nixserve.store.api.PathWriter.abort}; nothing is held that could be given up."""

"""
The store here, as commands use it that copy to or from another one; and failures told so that it is clear which side
they are about.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import replace

from nixserve.app.storechoice import chooseStore
from nixserve.codec.storepath import StoreDir
from nixserve.codec.terminal import onOneLine
from nixserve.errors import NixServeError, RemoteError, StoreError, UsageError
from nixserve.store.api import InvalidPath, Store
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.store.memory import MemoryStore

__all__ = ["CommandFailed", "LocalSide", "checkStoreDirs"]


class CommandFailed(NixServeError):
    """
    A command cannot do what was asked.

    @ivar side: C{"here"} or C{"there"}, or empty if neither is to blame.
    @ivar hint: another line, which says what is left and what to do; or empty.
    """

    def __init__(self, text: str, exitStatus: int = 1, side: str = "", hint: str = "") -> None:
        self.exitStatus = exitStatus
        self.side = side
        self.hint = hint
        super().__init__(text)


class LocalSide:
    """
    The store here.

    @ivar layout: where it lies.
    @ivar store: it, open.
    @ivar writable: whether this user may change it; then it is opened for that.
    """

    def __init__(self, uri: str | None, environ: Mapping[str, str]) -> None:
        """
        @param uri: what C{--store} says.
        """
        self.layout = chooseStore(uri, environ)
        self.writable = _mayWrite(self.layout)
        self.store: Store

    def openForReading(self) -> LocalSide:
        """
        Open it, to change nothing but temporary roots, and not even these where this user may not: then nothing here
        is kept from a collector. Makes no store.

        @raise StoreError: it cannot be opened.
        """
        self.writable = self.writable and os.path.isdir(self.layout.dbDir)
        self.store = LocalStore(self.layout if self.writable else replace(self.layout, readOnly=True))
        return self

    def openForLooking(self) -> LocalSide:
        """
        Open it to see what is there. One that has not been made yet is empty.

        @raise StoreError: it cannot be opened.
        """
        self.writable = False
        if os.path.isdir(self.layout.dbDir):
            self.store = LocalStore(replace(self.layout, readOnly=True))
        else:
            self.store = MemoryStore(self.layout.storeDir)
        return self

    def openForWriting(self, instead: str) -> LocalSide:
        """
        Open it, or make it.

        @param instead: what would help if that is not allowed.
        @raise StoreError: it is not, or it cannot be opened.
        """
        if not self.writable:
            raise StoreError(f"this user may not write to it; {instead}")
        self.store = LocalStore(self.layout)
        return self

    def close(self) -> None:
        """Close the store, if it was opened."""
        if hasattr(self, "store"):
            self.store.close()

    def explain(self, error: Exception, source: bool, remote: str) -> CommandFailed:
        """
        The failure of a command, with the side that it happened on.

        @param source: it is from here that paths are copied.
        @param remote: what the other side is called.
        """
        text = onOneLine(str(error))
        if isinstance(error, UsageError):
            return CommandFailed(text, error.exitStatus)
        if isinstance(error, RemoteError):
            return CommandFailed(text, error.exitStatus, "there")
        if isinstance(error, InvalidPath) and not source:
            return CommandFailed(f"{remote}: {text} there", side="there")
        if isinstance(error, InvalidPath):
            text += "; build it or copy it here first, or name another store with --store"
        elif _isFull(error):
            text += "; make room there, as by collecting garbage"
        status = error.exitStatus if isinstance(error, NixServeError) else 1
        return CommandFailed(f"the store here ({self.layout.realStoreDir}): {text}", status, "here")


def checkStoreDirs(here: StoreDir, there: StoreDir, remote: str) -> None:
    """
    @raise UsageError: paths of the one store mean nothing in the other.
    """
    if here != there:
        raise UsageError(
            f"the paths of the store here begin with '{here.path}', those of {remote} with '{there.path}'; nothing can "
            f"be copied between them. If they are the same there, add ?store={here.path} to the URL"
        )


def _mayWrite(layout: StoreLayout) -> bool:
    """Is it this user who may change the store, or make it?"""
    if layout.readOnly:
        return False
    return all(os.access(path, os.W_OK) for path in (layout.dbDir, layout.realStoreDir) if os.path.exists(path))


def _isFull(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            return True
        error = error.__cause__
    return False

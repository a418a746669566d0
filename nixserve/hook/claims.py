"""
Claims on paths that are being sent to a machine, so that of several build hooks which send to it at once, each path
is sent by one.

The state directory has one empty file for each machine. Who sends a path holds a lock on one byte of that file, at
an offset that follows from the path's hash part. No traces are left, and the claims of a process end with it. They are
locks of I{open file descriptions} (fcntl(2), F_OFD_SETLK), which, unlike plain POSIX locks, exclude threads of one
process from each other too.

Nobody waits for ever for each other. A path may be claimed only when all that it refers to is there or claimed by the
same sender, so whoever holds a claim can go on without anybody; and who has to wait for a path of somebody else
has released all of his own before. The way of a sender::

    while missing := those that the machine does not have yet:
        claimed = claims.claim(missing)
        if not claimed: wait until claims.check(missing[0].path) is quiet
        else: ask the machine again about those claimed, for one may have come in the meantime; send; release each

Claims save work, they do not protect anything: two who send the same path do no harm. So a sender who waited too long
may go on without one.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from nixserve.codec.base32 import ALPHABET
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.hook.machines import Machine
from nixserve.store.api import Busy
from nixserve.store.fileerrors import fileSystemErrors, refused
from nixserve.store.ownpaths import makeOwnDirectory

__all__ = ["MAX_CLAIMED", "Claims"]

MAX_CLAIMED = 1000
"""
Paths that one sender has claimed at a time. The kernel searches a file's locks one by one: a thousand take 12 ms,
twenty thousand would take 6 s. And the less is claimed at once, the more is left for others to send meanwhile.
"""

_DIGITS = 12
"""Of the hash part that make the offset: 60 bits. Two paths with the same are taken for one, which does no harm."""

# struct flock, with the padding that C gives it on 64 bits.
_FLOCK = struct.Struct("@hhqqi0q")

_RETRY_SECONDS = 0.05
"""A small path has been sent by then."""


class Claims:
    """
    The claims of one sender on one machine, until L{close}. Never blocks for more than a system call; safe from any
    thread.
    """

    def __init__(self, directory: str, machine: Machine) -> None:
        """
        @param directory: for the files; made if it is missing.
        @raise StoreError: the file system refuses.
        """
        self._path = f"{directory}/{machine.fileName('.claims')}"
        self._mutex = threading.Lock()
        self._claimed: set[StorePath] = set()
        with fileSystemErrors(f"cannot open the lock file '{self._path}'"):
            makeOwnDirectory(directory)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def claim(self, missing: Sequence[ValidPathInfo]) -> list[ValidPathInfo]:
        """
        Claim of these paths all that nobody else sends, up to L{MAX_CLAIMED}, and that need none that somebody else
        does.

        @param missing: what is to be sent, references first. What they refer to beside each other is there already.
        @return: those claimed, in the same order; each to be released.
        @raise StoreError: the file system refuses.
        """
        absent = {info.path for info in missing}
        result = []
        with self._mutex:
            for info in missing:
                if len(self._claimed) >= MAX_CLAIMED:
                    break
                needed = absent & info.references - self._claimed - {info.path}
                if not needed and info.path not in self._claimed and self._lock(info.path):
                    self._claimed.add(info.path)
                    result.append(info)
        return result

    def release(self, path: StorePath) -> None:
        """The path has arrived, or will not be sent. What is not claimed stays so."""
        with self._mutex:
            if path not in self._claimed:
                return
            self._claimed.remove(path)
            self._control(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, path)

    def check(self, path: StorePath) -> None:
        """
        @raise Busy: somebody else is sending this path.
        @raise StoreError: the file system refuses.
        """
        kind = self._control(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, path)
        if kind != fcntl.F_UNLCK:
            raise Busy(f"another build hook to send '{path}'", _RETRY_SECONDS)

    def close(self) -> None:
        """All claims end. Safe to call twice."""
        with self._mutex:
            fd, self._fd = self._fd, -1
            self._claimed.clear()
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _lock(self, path: StorePath) -> bool:
        """
        @return: whether the lock is ours.
        """
        try:
            self._control(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, path)
        except BlockingIOError:
            return False
        return True

    def _control(self, operation: int, kind: int, path: StorePath) -> int:
        """
        One operation on the lock of a path.

        @return: the kind of lock that the kernel told.
        @raise BlockingIOError: somebody else has it.
        """
        request = _FLOCK.pack(kind, os.SEEK_SET, _offset(path), 1, 0)
        try:
            answer = fcntl.fcntl(self._fd, operation, request)
        except BlockingIOError:
            raise
        except OSError as error:
            raise refused(f"cannot lock '{self._path}'", error) from error
        return int(_FLOCK.unpack(answer)[0])


def _offset(path: StorePath) -> int:
    """Where the lock of a path is."""
    value = 0
    for digit in path.hashPart[:_DIGITS]:
        value = value * len(ALPHABET) + ALPHABET.index(digit)
    return value

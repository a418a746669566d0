"""
Temporary roots: what one session wants kept by any garbage collector, as long as the session lives.

This is shared ground (Nix 2.8, src/libstore/gc.cc: addTempRoot, findTempRoots, and the server in collectGarbage):

  - C{STATE/temproots/<pid>-<n>} holds the logical paths, each followed by NUL. It is locked with C{flock} for the
    life of the session; a collector takes an unlocked one for that of a dead process, removes it and writes a
    byte into it. Collectors up to Nix 2.34 insist on a name that begins with a number.
  - C{STATE/gc.lock} is locked exclusively by a collector at work. While it is not, a path is a root once it has been
    written to the file under a shared lock: the next collector reads the file.
  - A collector at work has read the files already. It must be told over C{STATE/gc-socket/socket}, a line for each
    path, and answers each with the byte C{1}.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import select
import socket
import time
from collections.abc import Callable, Collection
from typing import Final

from nixserve.codec.storepath import StorePath
from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.store.fileerrors import fileSystemErrors, refused
from nixserve.store.layout import StoreLayout

__all__ = ["TempRoots"]

#: How long one call waits for a collector's answers, in seconds: long enough for some ten thousand of them, short
#: enough for a worker thread.
_PATIENCE: Final = 0.02

#: When to look again for a collector that is only starting or just ending, in seconds, as Nix waits.
_COLLECTOR_COMING: Final = 0.1

#: Bytes that C{sun_path} holds, with the NUL.
_SUN_PATH_SIZE: Final = 108

#: A connection that a collector ended, or never took.
_LOST: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN})

_fileNumbers = itertools.count(1)


class TempRoots:
    """
    The temporary roots of one session. Blocking for at most 20 ms; calls must not overlap.

    What is guaranteed. When L{addTempRoots} returns, each path that is valid then, or becomes valid later, stays so
    until L{close}, whatever collector runs. For a collector that starts later this follows from the file. For
    one at work it needs two things beyond its answer:

      1. The paths are in the file before they are announced. Nix writes them after the answer; a collector that
         ends in between, and the next that reads the file before they are in, would both miss them.
      2. Up to Nix 2.34 the answer does not protect what already waits for deletion: the collector computed that
         this path and all that refers to it are dead, and deletes them without looking at its roots again. So if a
         path announced this way is valid, or anything lies in its place, the answer is not believed: the call
         stays L{Busy} until the collector has ended. Its outcome is then to be asked for anew. A path of which there
         is no trace waits for nothing: it can be in no such list.
    """

    def __init__(self, layout: StoreLayout, inDanger: Callable[[Collection[StorePath]], bool]) -> None:
        """
        Nothing is opened before the first path.

        @param inDanger: whether any of some paths is valid or exists in the file system.
        """
        self._layout = layout
        self._inDanger = inDanger
        self._file = -1
        self._fileName = ""
        self._gcLock = -1
        #: Certain to be kept.
        self._rooted: set[StorePath] = set()
        #: In the file.
        self._written: set[StorePath] = set()
        self._collector: _CollectorConnection | None = None

    def addTempRoots(self, paths: Collection[StorePath]) -> None:
        """
        Keep these paths, valid or not.

        @param paths: parsed ones only: collectors die of others.
        @raise Busy: a collector is at work, and not done with what it was told. Call again with the same paths.
        @raise StoreError: the file system refuses, or the collector's answer is none.
        """
        wanted = set(paths) - self._rooted
        if not wanted:
            return
        self._openFiles()
        if self._tryGCLock():
            try:
                self._write(wanted)
            finally:
                fcntl.flock(self._gcLock, fcntl.LOCK_UN)
            self._hangUp()
        else:
            self._write(wanted)
            self._announce(wanted)
        self._rooted |= wanted

    def close(self) -> None:
        """Give all of them up. Safe to call twice."""
        self._hangUp()
        if self._file >= 0:
            # The name goes while the lock is still held, or a collector could not tell it from a dead one's.
            with contextlib.suppress(OSError):
                os.unlink(self._fileName)
            os.close(self._file)
            self._file = -1
        if self._gcLock >= 0:
            os.close(self._gcLock)
            self._gcLock = -1
        self._rooted.clear()
        self._written.clear()

    def _openFiles(self) -> None:
        if self._gcLock < 0:
            with fileSystemErrors(f"cannot open '{self._layout.gcLockPath}'"):
                self._gcLock = os.open(self._layout.gcLockPath, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while self._file < 0:
            self._fileName = f"{self._layout.tempRootsDir}/{os.getpid()}-{next(_fileNumbers)}"
            with fileSystemErrors(f"cannot create temporary roots file '{self._fileName}'"):
                self._file = _createLocked(self._fileName)

    def _tryGCLock(self) -> bool:
        """Lock C{gc.lock} shared, unless a collector is at work."""
        try:
            fcntl.flock(self._gcLock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise refused(f"cannot lock '{self._layout.gcLockPath}'", error) from error
        return True

    def _write(self, paths: set[StorePath]) -> None:
        """Append what is not in the file yet."""
        added = paths - self._written
        data = memoryview("".join([f"{path}\0" for path in added]).encode("ascii"))
        with fileSystemErrors(f"cannot write temporary roots file '{self._fileName}'"):
            before = os.fstat(self._file).st_size
            try:
                while data:
                    data = data[os.write(self._file, data) :]
            except OSError:
                # What is written next would become one word with half a path, and collectors die of that.
                os.ftruncate(self._file, before)
                raise
        self._written |= added

    def _announce(self, paths: set[StorePath]) -> None:
        """Tell the collector at work; return once that is enough."""
        try:
            if self._collector is None:
                self._collector = _CollectorConnection(self._layout.gcSocketPath)
            self._collector.tell(paths)
        except OSError as error:
            self._hangUp()
            if error.errno in _LOST:
                raise Busy("the garbage collector to begin or end", _COLLECTOR_COMING) from error
            raise refused("cannot talk to the garbage collector", error) from error
        except StoreError as error:
            if not isinstance(error, Busy):
                self._hangUp()
            raise
        if self._inDanger(paths):
            raise Busy("the garbage collector to end", _COLLECTOR_COMING)

    def _hangUp(self) -> None:
        if self._collector is not None:
            self._collector.close()
            self._collector = None


class _CollectorConnection:
    """
    A connection to a collector at work. It is one collector's: with its end the connection ends.
    """

    def __init__(self, socketPath: str) -> None:
        """
        @raise OSError: there is none listening.
        @raise Busy: too many are talking to it.
        """
        self._told: set[StorePath] = set()
        self._unsent = b""
        #: Answers still to come.
        self._owed = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            _connect(self._socket, socketPath)
        except BlockingIOError:
            self._socket.close()
            raise Busy("the garbage collector's attention") from None
        except BaseException:
            self._socket.close()
            raise

    def tell(self, paths: set[StorePath]) -> None:
        """
        Announce what has not been announced; return when everything ever announced has been answered.

        @raise Busy: not answered yet.
        @raise OSError: the collector has ended; C{ECONNRESET} if it did so in good order.
        """
        added = paths - self._told
        self._unsent += "".join([f"{path}\n" for path in added]).encode("ascii")
        self._owed += len(added)
        self._told |= added
        deadline = time.monotonic() + _PATIENCE
        while self._owed:
            if not self._wait(deadline):
                raise Busy("the garbage collector's answer")
            self._exchange()

    def close(self) -> None:
        """Close the connection to the collector."""
        self._socket.close()

    def _wait(self, deadline: float) -> bool:
        """Wait until something can be sent or received; false if the time is up."""
        poller = select.poll()  # unlike select, not limited to the first 1024 file descriptors
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def _exchange(self) -> None:
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        with contextlib.suppress(BlockingIOError):
            answers = self._socket.recv(65536)
            if not answers:
                raise ConnectionResetError(errno.ECONNRESET, "the garbage collector has ended")
            if answers.strip(b"1") or len(answers) > self._owed:
                raise StoreError(f"the garbage collector answered {answers[:20]!r} where '1' should be")
            self._owed -= len(answers)


def _createLocked(path: str) -> int:
    """
    Create and lock a file of temporary roots.

    The name is new in this process, but may exist: left by a dead process of the same number, or in use by a living
    one of another PID namespace. Neither is touched; collectors remove dead ones.

    @return: its file descriptor, or -1 if this name will not do.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return -1
    try:
        # A collector may have found the file before it was locked: then it holds the lock now, or has
        # removed the file and left its mark in it.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(fd)
        if found.st_size == 0 and found.st_nlink:
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return -1


def _connect(connection: socket.socket, path: str) -> None:
    """Connect to a socket in the file system whose path may be longer than the system allows."""
    if len(os.fsencode(path)) < _SUN_PATH_SIZE:
        connection.connect(path)
        return
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    finally:
        os.close(directory)

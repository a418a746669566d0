"""
A unix socket that one process at a time listens on, and what a dead one has left of it.

Who listens holds the C{flock(2)} of a file beside the socket, C{PATH.flock}, for as long as it does. The kernel lets go
of it however that process ends, and knows nothing of process numbers, which come again: after a reboot, and in a
container always. The file stays; what is in it is for people alone.

Versions up to 0.1 left a link C{PATH.lock} that names a process (L{twisted.python.lockfile}). It says nothing any more,
and goes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat

from nixserve.errors import UsageError
from nixserve.store.ownpaths import makeOwnDirectory, requireOwn

__all__ = ["OwnSocket"]

_CONNECT_SECONDS = 1.0
"""How long somebody else's socket may take to accept, or not."""

_MAX_TEXT = 200


class OwnSocket:
    """
    The right to listen on a path, from construction until L{release}.
    """

    def __init__(self, path: str) -> None:
        """
        Take it, and clear the place. Blocks for some system calls.

        @param path: of the socket. Its directory is made if it is missing.
        @raise UsageError: somebody listens there, or something else lies there.
        @raise nixserve.store.ownpaths.UnsafePath: others could put something there.
        @raise OSError: the file system refuses.
        """
        self._fd = -1
        makeOwnDirectory(os.path.dirname(path) or ".", shared=True)
        requireOwn(path)
        self._fd = os.open(f"{path}.flock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self._judge(f"{path}.flock")
            self._take(path)
            _clear(path)
            os.truncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()}\n".encode("ascii"), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go of it. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _judge(self, path: str) -> None:
        """
        Others may make files where sockets may lie, and links to files of ours: what we lock, empty and repeat from
        must be none of these.
        """
        status = os.fstat(self._fd)
        isOwn = status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022
        if not (isOwn and stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
            raise UsageError(f"'{path}' may be somebody else's: remove it, or name another path for the socket")

    def _take(self, path: str) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, _MAX_TEXT, 0).decode("ascii", "replace").strip() or "another process"
            raise UsageError(
                f"another nixserve, {holder}, listens on '{path}': stop it, or give this one a socket of its own"
            ) from None


def _clear(path: str) -> None:
    """Remove what a dead process has left."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(f"'{path}' is no socket: remove it, or name another path for the socket")
        if _isAlive(path):
            raise UsageError(f"another program listens on '{path}': stop it, or name another path for the socket")
        os.unlink(path)
    with contextlib.suppress(OSError):
        if os.path.islink(f"{path}.lock"):
            os.unlink(f"{path}.lock")


def _isAlive(path: str) -> bool:
    """Whether somebody listens on the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_SECONDS)
        try:
            probe.connect(path)
        except TimeoutError:
            return True
        except OSError as error:
            # EAGAIN: somebody does, but has no time.
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True

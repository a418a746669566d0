"""
Files of store objects made from NARs.

As in L{nixserve.store.files} everything here blocks, may be called from any thread, and resolves names one at a time;
trees may be deeper than the call stack and than the number of descriptors a process may have.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable

from nixserve.codec.hashes import Hash
from nixserve.codec.nar import BadArchive, Contents, Directory, Event, Regular, Symlink
from nixserve.codec.narparser import NarParser
from nixserve.codec.narwriter import regularEnd, regularStart
from nixserve.errors import NixServeError, StoreError
from nixserve.store.contents import MAX_PATH_SIZE, checkPathSize
from nixserve.store.fileerrors import fileSystemErrors, refused, shortened
from nixserve.store.files import MTIME_NS, canonicalisePathMetaData
from nixserve.store.walk import Walk, chmodNode

__all__ = ["PathRestorer", "handsDownAcl", "restoreNar", "restorePath"]

_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What a directory with this attribute hands down to all that is created in it.
_INHERITED_ACL = "system.posix_acl_default"


class PathRestorer:
    """
    Turns a NAR that is fed to it into files, and hashes it on the way.

    What is restored is in Nix's canonical form when it is finished (see L{canonicalisePathMetaData}): modes 0444,
    or 0555 for directories and executables, and one second after the epoch as time of modification. The process's
    umask has no say in it.

    Nothing is created outside of the target, whatever the NAR holds, and nothing that exists is opened or changed.
    After an error what has been created so far stays, for the caller to delete; nothing stays open.

    No C{fsync} anywhere: that comes when the object is complete, if at all (L{nixserve.store.durability}).

    @ivar narSize: how many bytes of the NAR were fed so far; after L{finish} its size.
    """

    def __init__(self, target: str, maxSize: int | None = None, realPath: str | None = None) -> None:
        """
        @param target: what the root of the NAR becomes. The directory for it must exist, it itself must not.
        @param maxSize: how many bytes the NAR may have, where that is known.
        @param realPath: where it will be in the end, if that is elsewhere: its paths must be possible there too, and
            errors name it.
        @raise StoreError: the directory that should contain C{target} cannot be opened.
        """
        self.narSize = 0
        self._target = target
        self._realPath = target if realPath is None else realPath
        # Nor must a path be too long where it is until then: Nix's collector looks at the paths of all open files, and
        # fails on one that the kernel cannot show.
        self._longer = max(0, len(os.fsencode(self._realPath)) - len(os.fsencode(target)))
        # Of the longest path in it, and that of the root where it will be.
        self._longest = self._rootSize = len(os.fsencode(target)) + self._longer
        self._parser = NarParser(maxSize)
        self._digest = hashlib.sha256()
        self._narHash: Hash | None = None
        # Of the regular file being written, if any.
        self._file = -1
        self._fileMode = 0
        self._fileLeft = 0
        # Access time is nobody's concern, but must be given with the other.
        self._times = (time.time_ns(), MTIME_NS)
        self._walk = Walk(target, "write")
        self._name = self._walk.base
        self._open = True

    @property
    def finished(self) -> bool:
        """Whether the NAR is complete. What is fed now is surplus."""
        return self._parser.finished

    @property
    def narHash(self) -> Hash:
        """The hash of the NAR; only after L{finish}."""
        assert self._narHash is not None, "the NAR is not finished"
        return self._narHash

    def feed(self, data: bytes) -> None:
        """
        Take the next bytes of the NAR, cut anywhere. What can be written is written before this returns.

        @raise nixserve.errors.FormatError: this is no NAR, or larger than it may be.
        @raise StoreError: the file system refuses, or this restorer has failed or was ended before.
        """
        if not self._open:
            raise StoreError(f"restoring '{self._target}' has ended already")
        if self._parser.finished:
            self._parser.feed(data)
            return
        try:
            events = self._parser.feed(data)
            self._apply(events)
        except OSError as error:
            self.abort()
            raise refused(f"cannot write '{shortened(self._path())}'", error) from error
        except NixServeError:
            self.abort()
            raise
        if self._parser.surplus:
            data = data[: -len(self._parser.surplus)]
        # The whole chunk at once: for more than 2 KiB hashlib lets other threads run.
        self._digest.update(data)
        self.narSize += len(data)

    def finish(self) -> None:
        """
        There is no more.

        @raise nixserve.errors.FormatError: the NAR is not complete, or something came after it.
        @raise StoreError: the file system refuses, or this restorer has failed or was ended before.
        """
        if not self._open:
            raise StoreError(f"restoring '{self._target}' has ended already")
        self.abort()
        self._parser.close()
        if self._parser.surplus:
            raise BadArchive("data after its end", offset=self.narSize)
        if handsDownAcl(self._target):
            canonicalisePathMetaData(self._target)
        self._narHash = Hash("sha256", self._digest.digest())

    def checkPaths(self, realPath: str) -> None:
        """
        What is complete gets another name than was thought.

        @raise nixserve.store.contents.PathTooLong: a path in it is not possible there.
        """
        checkPathSize(self._longest - self._rootSize + len(os.fsencode(realPath)), os.fsencode(realPath))

    def abort(self) -> None:
        """Give up. What has been created stays. Safe at any time, also twice and after L{finish}."""
        self._open = False
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)
        self._walk.close()

    def _apply(self, events: Iterable[Event]) -> None:
        """Do what the events say."""
        for event in events:
            if isinstance(event, Contents):
                self._write(event.data)
            elif isinstance(event, Regular):
                self._setName(event.name)
                self._startFile(event)
            elif isinstance(event, Directory):
                self._setName(event.name)
                self._startDirectory()
            elif isinstance(event, Symlink):
                self._setName(event.name)
                os.symlink(event.target, self._name, dir_fd=self._walk.fd)
                os.utime(self._name, ns=self._times, dir_fd=self._walk.fd, follow_symlinks=False)
            else:
                self._endDirectory()

    def _setName(self, name: bytes) -> None:
        """Note the name of what is created now."""
        self._name = name or self._walk.base
        size = self._walk.pathSize + 1 + len(self._name) + self._longer
        if size > self._longest:
            self._longest = size
            if size > MAX_PATH_SIZE:
                checkPathSize(size, os.fsencode(self._path()))

    def _path(self) -> str:
        """What is created now, by its final name."""
        return self._realPath + self._walk.path(self._name).removeprefix(self._target)

    def _startFile(self, event: Regular) -> None:
        """Create a file, whose contents may follow."""
        self._fileMode = 0o555 if event.executable else 0o444
        self._file = os.open(self._name, _CREATE_FLAGS, self._fileMode, dir_fd=self._walk.fd)
        self._fileLeft = event.size
        if not event.size:
            self._endFile()

    def _write(self, data: bytes | memoryview) -> None:
        """Write the next bytes of the file."""
        written = os.write(self._file, data)
        while written < len(data):
            written += os.write(self._file, memoryview(data)[written:])
        self._fileLeft -= written
        if not self._fileLeft:
            self._endFile()

    def _endFile(self) -> None:
        """Close the file, which is complete, with the metadata that it is to have."""
        file = self._file
        # Not left to the mode that it was created with: the umask took its share of that.
        os.fchmod(file, self._fileMode)
        os.utime(file, ns=self._times)
        self._file = -1
        os.close(file)

    def _startDirectory(self) -> None:
        """Create a directory, one that we can write to, and go there."""
        name = self._name
        os.mkdir(name, 0o755, dir_fd=self._walk.fd)
        try:
            self._walk.enter(name)
        except PermissionError:
            # An umask that denies the owner.
            chmodNode(name, self._walk.fd, 0o755)
            self._walk.enter(name)
        os.fchmod(self._walk.fd, 0o755)

    def _endDirectory(self) -> None:
        """The directory is complete: nothing will be created in it any more."""
        os.fchmod(self._walk.fd, 0o555)
        os.utime(self._walk.fd, ns=self._times)
        self._name = self._walk.leave()


def handsDownAcl(path: str) -> bool:
    """Whether what is created at C{path} gets an access control list from the directory there."""
    try:
        return _INHERITED_ACL in os.listxattr(os.path.dirname(path.rstrip("/")) or ".")
    except OSError:
        return False


def restorePath(target: str, chunks: Iterable[bytes]) -> tuple[Hash, int]:
    """
    Restore the NAR that C{chunks} yields.

    @return: hash and size, in bytes, of the NAR.
    @raise StoreError: as L{PathRestorer}.
    @raise nixserve.errors.FormatError: as L{PathRestorer}.
    """
    restorer = PathRestorer(target)
    try:
        for chunk in chunks:
            restorer.feed(chunk)
        restorer.finish()
    finally:
        restorer.abort()
    return restorer.narHash, restorer.narSize


def restoreNar(target: str, nar: bytes) -> None:
    """
    Restore a small NAR that is at hand whole, with the same result and the same care as L{PathRestorer}.

    @raise StoreError: as L{PathRestorer}.
    @raise nixserve.errors.FormatError: as L{PathRestorer}.
    """
    for executable in (False, True):
        contents = _contentsOf(nar, executable)
        if contents is not None:
            with fileSystemErrors(f"cannot write '{target}'"):
                _restoreFile(target, contents, 0o555 if executable else 0o444)
            if handsDownAcl(target):
                canonicalisePathMetaData(target)
            return
    restorePath(target, [nar])


def _contentsOf(nar: bytes, executable: bool) -> bytes | None:
    """
    @return: what is in the only file of a NAR; C{None} for anything else. Such a NAR has one form: what would be
        written for these contents.
    """
    prefix = len(regularStart(b"", executable, 0))
    size = int.from_bytes(nar[prefix - 8 : prefix], "little")
    contents = nar[prefix : prefix + size]
    if nar[:prefix] == regularStart(b"", executable, len(contents)) and nar[prefix + size :] == regularEnd(b"", size):
        return contents
    return None


def _restoreFile(target: str, contents: bytes, mode: int) -> None:
    """Create a file in canonical form, but for what it inherits."""
    file = os.open(target, _CREATE_FLAGS, mode)
    try:
        written = os.write(file, contents)
        while written < len(contents):
            written += os.write(file, memoryview(contents)[written:])
        os.fchmod(file, mode)
        os.utime(file, ns=(time.time_ns(), MTIME_NS))
    finally:
        os.close(file)

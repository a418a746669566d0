"""
Objects on their way to a remote store: what can be checked here is checked before the last byte leaves.

So an object that is not what it should be is refused with the same error as by a store on this machine, and the remote
has nothing of it but the beginning of a NAR, which it drops when the transfer is cut. All of this blocks, in threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final

from nixserve.codec.contentaddress import ContentAddressMethod
from nixserve.codec.derivation import Derivation
from nixserve.codec.nar import MAX_CHUNK
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.errors import NixServeError, StoreError
from nixserve.protocol.streams import READ_AHEAD
from nixserve.remote.clients import Upload
from nixserve.remote.link import Link
from nixserve.store.api import Busy
from nixserve.store.contents import (
    Intake,
    checkContentAddress,
    checkMore,
    checkNar,
    checkNewInfo,
    derivationOutputs,
    readDerivation,
)
from nixserve.store.writers import DrainingWriter, ObjectWriter

__all__ = ["RemoteImportWriter", "RemotePathWriter", "addSmallPaths"]

MAX_SPOOLED_IN_MEMORY: Final = 1024 * 1024
"""Bytes of a NAR that is kept until it is complete; larger ones lie in an unlinked file in C{TMPDIR}."""

_NONE: Final[Mapping[StorePath, bytes]] = {}


class Spool:
    """
    A NAR that is kept until it is complete: its path is not known before, or what is in it decides whether it is sent.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(MAX_SPOOLED_IN_MEMORY, prefix="nixserve-")  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """
        @raise StoreError: the file system refuses.
        """
        try:
            self._file.write(data)
        except OSError as e:
            raise StoreError(
                f"cannot keep a NAR in '{tempfile.gettempdir()}' until it is complete: {e.strerror}"
            ) from e

    def chunks(self) -> Iterator[bytes]:
        """All that was written, in chunks of at most L{MAX_CHUNK}."""
        self._file.seek(0)
        while chunk := self._file.read(MAX_CHUNK):
            yield chunk

    def close(self) -> None:
        """Remove the file. Safe to call twice."""
        self._file.close()


class Outgoing:
    """
    A NAR that is being sent. Nothing is before L{READ_AHEAD} bytes are together; the last bytes are not before
    L{finish}.
    """

    def __init__(self, link: Link, info: ValidPathInfo) -> None:
        self._link = link
        self._info = info
        self._pieces: list[bytes] = []
        self._size = 0
        self._upload: Upload | None = None

    def write(self, data: bytes, isLast: bool = False) -> None:
        """
        The next bytes. Waits until the remote takes them.

        @param isLast: nothing will follow: keep these until L{finish}.
        @raise nixserve.errors.RemoteError: the remote refuses, or is gone.
        """
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= READ_AHEAD and not isLast:
            upload, pieces = self._begun(), self._take()
            self._link.hop(upload.write, pieces)

    def finish(self) -> None:
        """
        Send the rest, and wait until the remote has acknowledged it.

        @raise nixserve.errors.RemoteError: the remote refuses, or is gone.
        """
        upload, pieces = self._begun(), self._take()
        self._link.hop(upload.end, pieces)
        self._upload = None
        self._link.release(upload.client, True)

    def abort(self) -> None:
        """Cut the transfer off. Safe at any time."""
        upload, self._upload = self._upload, None
        self._pieces.clear()
        if upload is not None:
            self._link.release(upload.client, False)

    def _begun(self) -> Upload:
        if self._upload is None:
            self._upload = self._link.upload(self._info)
        return self._upload

    def _take(self) -> list[bytes]:
        pieces, self._pieces, self._size = self._pieces, [], 0
        return pieces


def needsContents(info: ValidPathInfo) -> bool:
    """
    Must the contents be read again to know whether an object is what its info says? The hash of its NAR tells else.
    """
    if info.path.isDerivation:
        return True
    if info.ca is None:
        return False
    return info.ca.method is not ContentAddressMethod.NAR or info.ca.hash.algo != "sha256" or info.hasSelfReference


def checkContents(
    link: Link,
    info: ValidPathInfo,
    dump: Callable[[], Iterable[bytes]],
    earlier: Mapping[StorePath, bytes] = _NONE,
) -> None:
    """
    What a complete NAR must fulfil besides its hash.

    @param dump: gives it; called only if L{needsContents}.
    @param earlier: NARs of objects that will be valid before this one is.
    @raise nixserve.store.api.InvalidPath: a reference is not valid.
    @raise StoreError: its content address is another one.
    @raise FormatError: a derivation is malformed, or its outputs are not its own.
    """

    def lookup(path: StorePath) -> Derivation:
        if path == info.path:
            return readDerivation(path, dump(), link.storeDir)
        if path in earlier:
            return readDerivation(path, [earlier[path]], link.storeDir)
        return link.readDerivation(path)

    checkContentAddress(info, dump)
    link.require(info.references - {info.path} - earlier.keys())
    derivationOutputs(info.path, lookup, link.storeDir, link.memo)


class RemotePathWriter(ObjectWriter):
    """
    L{nixserve.store.api.PathWriter} of a path that is not valid yet. Holds its lock, which only sessions here heed.
    What it does waits for the remote, and fails with L{nixserve.errors.RemoteError} if that refuses or is gone.
    """

    alreadyValid = False

    def __init__(self, link: Link, info: ValidPathInfo) -> None:
        super().__init__(link.requireOpen)
        self._link = link
        self._info = info
        self._intake = Intake(info.narSize)
        self._outgoing = Outgoing(link, info)
        self._spool = Spool() if needsContents(info) else None
        link.uploads.begin(info.path, self)

    @property
    def received(self) -> int:
        """How many bytes of the object have come."""
        return self._intake.size

    def finish(self) -> None:
        """See L{nixserve.store.api.PathWriter.finish}. The remote may have to wait for a lock."""
        with self._working(isLast=True):
            narHash = self._intake.finish()
            checkNar(self._info, narHash, self._intake.size)
            checkContents(self._link, self._info, self._spool.chunks if self._spool is not None else tuple)
            _send(self._outgoing, self._spool)
            self._link.added([self._info.path])

    def _take(self, data: bytes) -> None:
        checkMore(self._info, self._intake.size, self._intake.finished, data)
        self._intake.feed(data)
        if self._spool is not None:
            self._spool.write(data)
        else:
            self._outgoing.write(data, self._intake.finished)

    def _free(self) -> None:
        """Cut the transfer, if one is under way, and unlock."""
        self._outgoing.abort()
        if self._spool is not None:
            self._spool.close()
        self._link.uploads.end(self._info.path, self)
        self._link.unlock([self._info.path])


class RemoteImportWriter(ObjectWriter):
    """
    L{nixserve.store.api.ImportWriter}: the NAR is kept here until its path is known.
    """

    def __init__(self, link: Link) -> None:
        super().__init__(link.requireOpen)
        self._link = link
        self._intake = Intake()
        self._spool = Spool()

    def finish(self, path: StorePath, references: Collection[StorePath], deriver: StorePath | None) -> None:
        """
        See L{nixserve.store.api.ImportWriter.finish}. Waits for the remote, which may have to wait for a lock.

        @raise nixserve.errors.RemoteError: the remote refuses, or is gone.
        """
        with self._working(isLast=True):
            info = ValidPathInfo(path, self._intake.finish(), self._intake.size, frozenset(references), deriver)
            checkNewInfo(info, self._link.storeDir)
            if self._link.lockInvalid(info):
                try:
                    self._send(info)
                finally:
                    self._link.unlock([path])

    def _take(self, data: bytes) -> None:
        self._intake.feed(data)
        self._spool.write(data)

    def _free(self) -> None:
        self._spool.close()

    def _send(self, info: ValidPathInfo) -> None:
        checkContents(self._link, info, self._spool.chunks)
        outgoing = Outgoing(self._link, info)
        try:
            _send(outgoing, self._spool)
        finally:
            outgoing.abort()
        self._link.added([info.path])


def _send(outgoing: Outgoing, spool: Spool | None) -> None:
    """Send what has been kept, and what has not been sent yet."""
    for chunk in spool.chunks() if spool is not None else ():
        outgoing.write(chunk)
    outgoing.finish()


# --- many small ones --------------------------------------------------------------------------------------

Objects = Sequence[tuple[ValidPathInfo, bytes]]


def addSmallPaths(link: Link, objects: Objects) -> int:
    """
    See L{nixserve.store.api.StoreSession.addSmallPaths}: all straight behind each other, in one round trip.
    """
    link.keep([path for info, _ in objects for path in (info.path, *info.references)])
    ready = _check(link, objects)
    # Once each, in order.
    missing = {info.path: (info, nar) for info, nar in ready if not link.kept([info.path])}
    locked: list[StorePath] = []
    try:
        for path in missing:
            link.lock(path)
            locked.append(path)
    except Busy:
        if not locked and ready[0][0].path in missing:
            raise
    try:
        if locked:
            link.send([missing[path] for path in locked])
    finally:
        link.unlock(locked)
    valid = link.kept([info.path for info, _ in ready])
    return next((number for number, (info, _) in enumerate(ready) if info.path not in valid), len(ready))


def _check(link: Link, objects: Objects) -> Objects:
    """
    @return: those from the first on that may be added.
    @raise NixServeError: what there is against the first.
    """
    earlier: dict[StorePath, bytes] = {}
    for number, (info, nar) in enumerate(objects):
        try:
            checkNewInfo(info, link.storeDir)
            if link.kept([info.path]) or info.path in earlier:
                _checkSize(info, nar)
            else:
                _checkWhole(link, info, nar, earlier)
                earlier[info.path] = nar
        except NixServeError:
            if not number:
                raise
            return objects[:number]
    return objects


def _checkSize(info: ValidPathInfo, nar: bytes) -> None:
    """What is valid already is not looked at, as everywhere."""
    writer = DrainingWriter(info)
    writer.feed(nar)
    writer.finish()


def _checkWhole(link: Link, info: ValidPathInfo, nar: bytes, earlier: Mapping[StorePath, bytes]) -> None:
    checkMore(info, 0, False, nar)
    intake = Intake(info.narSize)
    intake.feed(nar)
    checkNar(info, intake.finish(), intake.size)
    checkContents(link, info, lambda: [nar], earlier)

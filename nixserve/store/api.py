"""
The contract of a store, as the protocol layer uses it and as every implementation is tested against
(L{nixserve.testing}).

A L{Store} is opened once and gives out L{StoreSession}s. A session stands for one peer: it owns the temporary
GC roots, path locks and half-written objects of that peer, and closing it frees them whatever state they are in.

Nothing here waits for a lock that somebody else may hold for long. What would have to wait raises L{Busy}; the
caller comes back later with the same arguments, from wherever it can wait without holding a thread.

What is read comes in chunks of at most L{nixserve.codec.nar.MAX_CHUNK} bytes.

Threads: any method may be called from any thread; calls on one session (and what it gave out) must not overlap.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import BasicDerivation, Derivation, drvPathOf, unparse
from nixserve.codec.hashes import hashBytes
from nixserve.codec.narwriter import regularEnd, regularStart
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import StoreError
from nixserve.store.contents import readDerivation

__all__ = [
    "Busy",
    "Closable",
    "ImportWriter",
    "InvalidPath",
    "OpenSessions",
    "PathWriter",
    "Store",
    "StoreSession",
    "addWhole",
    "requireValid",
]

S = TypeVar("S")


class Busy(StoreError):
    """
    A lock is held by somebody else. Nothing is wrong: call again with the same arguments.

    @ivar what: what is being waited for, as the end of a sentence: C{"the lock on '/nix/store/…'"}.
    @ivar retryAfter: seconds after which another try makes sense.
    """

    def __init__(self, what: str, retryAfter: float = 0.02) -> None:
        self.what = what
        self.retryAfter = retryAfter
        super().__init__(f"waiting for {what}")


class InvalidPath(StoreError):
    """
    A path is not valid: the store has no object registered under it.

    @ivar path: the path.
    """

    def __init__(self, path: StorePath) -> None:
        self.path = path
        super().__init__(f"path '{path}' is not valid")


class PathWriter(Protocol):
    """
    One object on its way into the store: fed the bytes of its NAR, then finished or aborted, exactly once.

    @ivar alreadyValid: the path was valid already. The NAR must still be fed, since it is on the wire; it is
        counted and dropped without any other check, as real Nix does.
    """

    alreadyValid: bool

    def feed(self, data: bytes) -> None:
        """
        Take the next bytes of the NAR, cut anywhere. What can be written is written before this returns.

        @raise nixserve.errors.FormatError: this is no NAR.
        @raise StoreError: more bytes than C{narSize}, or the file system refuses.
        """

    def finish(self) -> None:
        """
        The NAR is complete: check size, hash and content address, register, unlock.

        @raise Busy: others are writing to the database; call again.
        @raise StoreError: something does not match, or a reference is not valid; nothing is registered.
        """

    def abort(self) -> None:
        """
        Give up. Safe at any time, also twice and after a failed C{feed} or C{finish}; leaves no more than a
        crash of real Nix would.
        """


class ImportWriter(Protocol):
    """
    One object of an export stream on its way in. Its path is known only after its NAR.
    """

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the NAR, as L{PathWriter.feed}."""

    def finish(self, path: StorePath, references: Collection[StorePath], deriver: StorePath | None) -> None:
        """
        The NAR is complete and this is what it is. An already valid path is dropped without comparing.

        @raise Busy: call again with the same arguments.
        @raise StoreError: a reference is not valid, or the NAR is incomplete; nothing is registered.
        """

    def abort(self) -> None:
        """Give up, as L{PathWriter.abort}."""


class StoreSession(Protocol):
    """
    One peer's use of a store. Whoever implements it inherits what is written here in terms of the rest.

    @ivar storeDir: the logical store directory.
    """

    @property
    def storeDir(self) -> StoreDir: ...

    def addTempRoots(self, paths: Collection[StorePath]) -> None:
        """
        Make each path, valid or not, a root of the garbage collector until this session closes. When this
        returns, a path that a later query finds valid stays valid, whatever collector runs.

        @raise Busy: a collector is at work; call again with the same paths.
        @raise StoreError: the store is opened read-only.
        """

    def queryValidPaths(self, paths: Collection[StorePath]) -> set[StorePath]:
        """The valid ones among C{paths}."""

    def queryPathInfos(self, paths: Collection[StorePath]) -> dict[StorePath, ValidPathInfo]:
        """What is registered about each of C{paths}; those that are not valid are left out."""

    def queryClosure(self, paths: Collection[StorePath], includeOutputs: bool = False) -> set[StorePath]:
        """
        The paths and everything they refer to; with C{includeOutputs}, for every derivation among them also
        its valid outputs and their closures.

        @raise InvalidPath: one of C{paths} is not valid.
        """

    def narFromPath(self, path: StorePath) -> Iterator[bytes]:
        """
        The NAR of a valid path in chunks. Nothing is checked against the recorded hash.

        @raise InvalidPath: at once, not when the first chunk is asked for.
        """

    def narsFromPaths(self, paths: Sequence[StorePath]) -> Iterator[bytes]:
        """
        The NARs of several valid paths, one behind the other, in chunks as L{narFromPath}.

        @raise InvalidPath: at once for the first path; for another one from the iterator, when it has come there.
        """

    def exportPaths(self, paths: Collection[StorePath]) -> Iterator[bytes]:
        """
        An export stream of exactly these paths, references first, byte for byte as C{nix-store --export}
        writes it, in chunks. Each NAR is checked against the recorded hash as it passes;
        the iterator raises L{StoreError} at its end if it differs.

        @raise InvalidPath: at once.
        """

    def addToStore(self, info: ValidPathInfo) -> PathWriter:
        """
        Begin to add an object, which becomes a temporary root.

        @raise Busy: a collector is at work, or somebody else is adding this path and it is worth waiting for that;
            call again.
        @raise StoreError: the path is of another store directory, its size is unknown, or the content address
            does not give it.
        @raise nixserve.errors.FormatError: a signature is malformed.
        """

    def addSmallPaths(self, objects: Sequence[tuple[ValidPathInfo, bytes]]) -> int:
        """
        Add several small objects at once, which is much faster than one after the other. Each is judged as by
        L{addToStore}, and may refer to what is valid, to itself, and to what stands before it.

        @param objects: what is said about each, and its whole NAR.
        @return: how many of them, from the first on, are valid now: at least one, if any were given. If it is
            fewer than all, call again with the rest; then what there is against the next one is raised, or it
            is added after all.
        @raise Busy: nothing was added; call again with the same objects. No lock is kept meanwhile.
        @raise StoreError: the first object is refused, as by L{addToStore} and its writer. Nothing was added.
        @raise nixserve.errors.FormatError: likewise.
        """

    def importPath(self) -> ImportWriter:
        """
        Begin to add the next object of an export stream.

        @raise Busy: a collector is at work; call again.
        """

    def readDerivation(self, path: StorePath) -> Derivation:
        """
        The derivation of a valid .drv.

        @raise InvalidPath: it is not valid.
        @raise StoreError: it cannot be read, is no file, or is too large.
        @raise nixserve.errors.FormatError: it is no derivation.
        """
        return readDerivation(path, self.narFromPath(path), self.storeDir)

    def addDerivation(self, drv: BasicDerivation) -> StorePath:
        """
        Write a derivation to the store, if it is not there. It becomes a temporary root.

        @return: the path of the .drv.
        @raise Busy: call again.
        @raise StoreError: an input is not valid.
        """
        text = unparse(drv)
        nar = regularStart(b"", False, len(text)) + text + regularEnd(b"", len(text))
        info = ValidPathInfo(
            path=drvPathOf(drv, self.storeDir),
            narHash=hashBytes("sha256", nar),
            narSize=len(nar),
            references=drv.inputSrcs.union(drv.inputDrvs if isinstance(drv, Derivation) else ()),
            ca=ContentAddress(ContentAddressMethod.TEXT, hashBytes("sha256", text)),
        )
        addWhole(self, info, nar)
        return info.path

    def close(self) -> None:
        """Free everything the session holds: aborts what is unfinished. Safe to call twice."""


class Store(Protocol):
    """
    A store.

    @ivar storeDir: the logical store directory.
    """

    @property
    def storeDir(self) -> StoreDir: ...

    def openSession(self) -> StoreSession:
        """A new session, with roots of its own."""

    def close(self) -> None:
        """Close every session and let go of the store. Safe to call twice."""


def addWhole(session: StoreSession, info: ValidPathInfo, nar: bytes) -> None:
    """
    Add one object whose NAR is at hand.

    @raise Busy: call again.
    @raise StoreError: as L{StoreSession.addToStore} and its writer.
    @raise nixserve.errors.FormatError: likewise.
    """
    writer = session.addToStore(info)
    try:
        writer.feed(nar)
        writer.finish()
    except BaseException:
        writer.abort()
        raise


# --- what is the same in every implementation -------------------------------------------------------------


def requireValid(paths: Collection[StorePath], valid: Collection[StorePath]) -> None:
    """
    @raise InvalidPath: one of C{paths} is not among those that are valid; the first of them in order.
    """
    if missing := set(paths).difference(valid):
        # Not by sorting: nothing else runs until a million of them are sorted.
        raise InvalidPath(min(missing))


class Closable(ABC):
    """
    A session, or what one stands on.
    """

    def __init__(self, onClose: Callable[[Any], None]) -> None:
        """
        @param onClose: called with this when it has freed everything, or could not.
        """
        self._onClose = onClose
        self._closed = False

    def requireOpen(self) -> None:
        """
        @raise StoreError: the session is closed.
        """
        if self._closed:
            raise StoreError("the session is closed")

    def close(self) -> None:
        """See L{StoreSession.close}."""
        if not self._closed:
            self._closed = True
            try:
                self._free()
            finally:
                self._onClose(self)

    @abstractmethod
    def _free(self) -> None:
        """Let go of everything. Called once."""


class OpenSessions(Generic[S]):
    """
    The open sessions of a store. From any thread.
    """

    def __init__(self, store: str = "the store") -> None:
        """
        @param store: what it is called when it is closed.
        """
        self._store = store
        self._closed = False
        self._sessions: set[S] = set()
        # Guards the two above; never held during I/O.
        self._mutex = threading.Lock()

    def open(self, session: Callable[[], S]) -> S:
        """
        @param session: makes the session.
        @raise StoreError: the store is closed.
        """
        with self._mutex:
            if self._closed:
                raise StoreError(f"{self._store} is closed")
            opened = session()
            self._sessions.add(opened)
        return opened

    def forget(self, session: S) -> None:
        """Count a session no more: it is closed."""
        with self._mutex:
            self._sessions.discard(session)

    def all(self) -> list[S]:
        """The sessions that are open."""
        with self._mutex:
            return list(self._sessions)

    def end(self) -> list[S]:
        """
        Open no more.

        @return: those to be closed.
        """
        with self._mutex:
            self._closed = True
            return list(self._sessions)

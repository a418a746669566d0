"""
What a session of L{nixserve.remote.store} stands on: the way from its threads to the reactor, where the remote sessions
live, and what it knows about their store.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable, Collection, Generator, Sequence
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.threads import blockingCallFromThread
from twisted.python.threadable import isInIOThread

from nixserve.codec.derivation import Derivation
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import LocalProtocolError, RemoteError
from nixserve.protocol.client import ServeClient
from nixserve.protocol.reactors import IThreadReactor
from nixserve.remote.clients import Download, RemoteClients, Upload
from nixserve.store.api import Busy, Closable, requireValid
from nixserve.store.contents import readDerivation
from nixserve.store.drvhashes import DerivationMemo
from nixserve.store.uploads import Uploads, UploadWait

__all__ = ["AddingLocks", "Link"]

P = ParamSpec("P")
T = TypeVar("T")


class AddingLocks:
    """
    Which paths the sessions of one store are adding. From any thread; nothing waits here.

    They exclude nothing that matters, since the remote has locks of its own, but save it what is sent twice. So whoever
    is sent next to nothing loses his to the next who asks (L{nixserve.store.uploads}).

    @ivar uploads: what sessions are being sent.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._holders: dict[StorePath, object] = {}
        self.uploads = Uploads()

    def lock(self, path: StorePath, holder: object) -> None:
        """
        Lock a path for adding it.

        @raise Busy: somebody else is adding it.
        """
        with self._mutex:
            if path in self._holders:
                raise Busy(f"the lock on '{path}'")
            self._holders[path] = holder

    def takeOver(self, path: StorePath, holder: object) -> None:
        """Have a lock, whoever has had it."""
        with self._mutex:
            self._holders[path] = holder

    def unlock(self, paths: Collection[StorePath], holder: object) -> None:
        """Unlock those that C{holder} holds."""
        with self._mutex:
            for path in paths:
                if self._holders.get(path) is holder:
                    del self._holders[path]

    def unlockAll(self, holder: object) -> None:
        """Unlock everything that C{holder} holds."""
        with self._mutex:
            for path in [path for path, other in self._holders.items() if other is holder]:
                del self._holders[path]


class Link(Closable):
    """
    One session's. Blocks, in any thread but the reactor's, unless it says otherwise.

    @ivar storeDir: the logical store directory.
    @ivar memo: hashes of derivations that passed by.
    @ivar clients: of the remote store; only for the reactor's thread.
    """

    def __init__(self, reactor: IThreadReactor, clients: RemoteClients, locks: AddingLocks, storeDir: StoreDir) -> None:
        super().__init__(locks.unlockAll)
        self.storeDir = storeDir
        self.memo = DerivationMemo()
        self.clients = clients
        self._reactor = reactor
        self._locks = locks
        self._courtesy = UploadWait(locks.uploads)
        # What has been found valid while it was a root. It will stay so.
        self._kept: set[StorePath] = set()

    # --- to the reactor and back --------------------------------------------------------------------------

    def hop(self, function: Callable[P, Deferred[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """
        Do something in the reactor's thread, and wait for it.

        @raise StoreError: the session is closed.
        @raise LocalProtocolError: this is the reactor's thread.
        """
        self.requireOpen()
        return self._hop(function, *args, **kwargs)

    def ask(self, question: Callable[[ServeClient], Awaitable[T]]) -> T:
        """
        Ask the session that holds the roots.

        @raise RemoteError: it has no answer, and is over.
        """

        async def ask() -> T:
            return await question(await self.clients.keeper())

        return self.hop(lambda: ensureDeferred(ask()))

    def interrupt(self) -> None:
        """Have whatever waits for the remote fail soon. From any thread; never waits."""
        self._later(self.clients.cut)

    def _free(self) -> None:
        """
        End the sessions there, and wait until the remote has freed what they held. In the reactor's thread they are
        cut, and not waited for.
        """
        if isInIOThread():
            self.clients.cut()
        else:
            self._hop(self.clients.close)

    def _hop(self, function: Callable[P, Deferred[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        if isInIOThread():
            raise LocalProtocolError("a remote store blocks: use it in a worker's thread, not in the reactor's")
        # Its type cannot say that a function which returns a Deferred gives what that fires with.
        call: Callable[..., T] = blockingCallFromThread
        return call(self._reactor, function, *args, **kwargs)

    def _later(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Do something in the reactor's thread, after what was asked for before. From any thread; never waits."""
        self._reactor.callFromThread(function, *args, **kwargs)

    # --- what is there, and stays -------------------------------------------------------------------------

    def keep(self, paths: Collection[StorePath]) -> None:
        """Make paths roots, and find out which of them are valid. Those of another store directory never are."""
        self.requireOpen()
        unknown = {path for path in paths if path.storeDir == self.storeDir.path} - self._kept
        if unknown:
            self._kept |= self.ask(lambda keeper: keeper.queryValidPaths(unknown, lock=True))

    def kept(self, paths: Collection[StorePath]) -> set[StorePath]:
        """Those of C{paths} that are known to be valid for as long as this session is open. Does not ask."""
        return self._kept.intersection(paths)

    def require(self, paths: Collection[StorePath]) -> None:
        """
        Make C{paths} roots.

        @raise InvalidPath: one is not valid.
        """
        self.keep(paths)
        requireValid(paths, self._kept)

    def lockInvalid(self, info: ValidPathInfo) -> bool:
        """
        Make an object and its references roots, and lock it.

        @return: whether it is not valid; only then it is locked.
        @raise Busy: another session is adding it, and it is worth waiting for that.
        """
        try:
            self.lock(info.path)
        except Busy:
            if self._locks.uploads.of(info.path) is None:
                raise
            self._courtesy.wait(info.path)
            self._locks.takeOver(info.path, self)
        try:
            self.keep([info.path, *info.references])
            valid = info.path in self._kept
        except BaseException:
            valid = True
            raise
        finally:
            if valid:
                self.unlock([info.path])
        return not valid

    def lock(self, path: StorePath) -> None:
        """
        Lock a path against the other sessions of this store. Never waits.

        @raise Busy: one of them is adding it.
        """
        self._locks.lock(path, self)

    @property
    def uploads(self) -> Uploads:
        """What all sessions of the store are being sent."""
        return self._locks.uploads

    def unlock(self, paths: Collection[StorePath]) -> None:
        """Unlock what is locked of C{paths}. Never waits."""
        self._locks.unlock(paths, self)

    def readDerivation(self, path: StorePath) -> Derivation:
        """
        @raise StoreError: it is not valid, or is no file.
        @raise nixserve.errors.FormatError: it is no derivation.
        """
        self.require([path])
        return readDerivation(path, self.nars([path]), self.storeDir)

    # --- transfers ----------------------------------------------------------------------------------------

    def dump(self, paths: Sequence[StorePath]) -> Generator[bytes | None, None, None]:
        """
        NARs, one straight behind the other. Closing the generator before its end cuts this transfer off.

        @return: chunks, and C{None} after each NAR.
        @raise RemoteError: one is missing, or not complete.
        """
        if not paths:
            return
        download: Download = self.hop(lambda: ensureDeferred(self.clients.download(paths)))
        complete = False
        try:
            while pieces := self.hop(download.read):
                yield from pieces
            complete = True
        finally:
            self.release(download.client, complete)

    def nars(self, paths: Sequence[StorePath]) -> Generator[bytes, None, None]:
        """The NARs, one behind the other, and nothing between them."""
        with contextlib.closing(self.dump(paths)) as stream:
            for piece in stream:
                if piece is not None:
                    yield piece

    def upload(self, info: ValidPathInfo) -> Upload:
        """Begin to send an object. Its client is to be released."""
        return self.hop(lambda: ensureDeferred(self.clients.upload(info)))

    def send(self, objects: Sequence[tuple[ValidPathInfo, bytes]]) -> None:
        """
        Send small objects, none of which is valid.

        @raise RemoteError: the first is refused. If a later one is, those before it have been added.
        """
        acknowledged: list[StorePath] = []
        try:
            self.hop(lambda: ensureDeferred(self.clients.send(objects, acknowledged)))
        except RemoteError:
            if not acknowledged:
                raise
        finally:
            self.added(acknowledged)

    def added(self, paths: Collection[StorePath]) -> None:
        """These roots are valid now."""
        self._kept.update(paths)

    def release(self, client: ServeClient, complete: bool) -> None:
        """A transfer is complete, or over before that: then it is cut off. From any thread; never waits."""
        self._later(self.clients.giveBack if complete else self.clients.discard, client)

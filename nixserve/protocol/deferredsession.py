"""
A session of a blocking store for the reactor's side: what L{nixserve.store.api.StoreSession} has, as Deferreds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.protocol.interfaces import IWorkers
from nixserve.protocol.reactors import IClientReactor
from nixserve.protocol.workers import Door, Workers
from nixserve.store.api import Store, StoreSession

__all__ = ["DeferredSession", "openSession"]

P = ParamSpec("P")
T = TypeVar("T")


class DeferredSession:
    """
    A session of a store on this side, used one call after the other. Closing it frees its roots, locks and
    half-written objects; C{async with} does that at the end of the block.

    @ivar door: the way to C{session}. Whoever else uses the session goes through it too.
    @ivar session: the session itself, which blocks.
    """

    def __init__(self, door: Door, session: StoreSession, onClose: Callable[[], None] = lambda: None) -> None:
        """
        @param onClose: called when the session has been closed.
        """
        self.door = door
        self.session = session
        self._onClose = onClose

    @classmethod
    def open(
        cls, store: Store, workers: IWorkers, onWait: Callable[[str], None] = lambda what: None
    ) -> Deferred[DeferredSession]:
        """
        Open a session.

        @param workers: where it blocks.
        @param onWait: called with what a call waits for if that takes long: somebody else's lock.
        """
        door = Door(workers, onWait)
        return door.call(store.openSession).addCallback(lambda session: cls(door, session))

    @property
    def storeDir(self) -> StoreDir:
        """The logical store directory."""
        return self.session.storeDir

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Call something that blocks, usually a method of C{session}: see L{Door.call}."""
        return self.door.call(function, *args, **kwargs)

    def addTempRoots(self, paths: Collection[StorePath]) -> Deferred[None]:
        """See L{nixserve.store.api.StoreSession.addTempRoots}."""
        return self.call(self.session.addTempRoots, paths)

    def queryValidPaths(self, paths: Collection[StorePath]) -> Deferred[set[StorePath]]:
        """See L{nixserve.store.api.StoreSession.queryValidPaths}."""
        return self.call(self.session.queryValidPaths, paths)

    def queryPathInfos(self, paths: Collection[StorePath]) -> Deferred[dict[StorePath, ValidPathInfo]]:
        """See L{nixserve.store.api.StoreSession.queryPathInfos}."""
        return self.call(self.session.queryPathInfos, paths)

    def queryClosure(self, paths: Collection[StorePath], includeOutputs: bool = False) -> Deferred[set[StorePath]]:
        """See L{nixserve.store.api.StoreSession.queryClosure}."""
        return self.call(self.session.queryClosure, paths, includeOutputs)

    def close(self) -> Deferred[None]:
        """
        Give up what is under way and free everything.

        @return: fires when that is done.
        """
        self.door.abandon()
        closing = self.call(self.session.close)
        closing.addBoth(self._closed)
        return closing

    def _closed(self, result: T) -> T:
        onClose, self._onClose = self._onClose, lambda: None
        onClose()
        return result

    async def __aenter__(self) -> DeferredSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def openSession(reactor: IClientReactor, store: Store) -> Deferred[DeferredSession]:
    """
    Open a session with worker threads of its own, for who has none to share. They end with it.

    @param reactor: as L{Workers} needs it.
    """
    workers = Workers(reactor)
    workers.start()

    def opened(session: DeferredSession) -> DeferredSession:
        # When it has closed, no thread has anything to do, so this does not block.
        session._onClose = workers.stop
        return session

    def failed(failure: Failure) -> Failure:
        workers.stop()
        return failure

    return DeferredSession.open(store, workers).addCallbacks(opened, failed)

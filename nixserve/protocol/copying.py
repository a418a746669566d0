"""
Closures from one store to another over a L{ServeClient}, without a round trip for each path.

Upload: one locked query for the whole closure, then every missing path straight behind the one before it;
acknowledgements are counted as they come. Download: closure and infos, then NARs requested some way ahead of the one
that is being stored. Either way paths go in dependency order, so whatever ends a copy half way leaves the receiving
store with whole closures only.

Who may add what is not decided here: signatures are passed on unjudged. Hashes are checked by the store that receives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any, Final, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from nixserve.codec.pathinfo import ValidPathInfo, topoSort
from nixserve.codec.storepath import StorePath
from nixserve.protocol.client import ServeClient
from nixserve.protocol.streams import MAX_QUEUED, NarInflow, Throttle
from nixserve.protocol.workers import Door
from nixserve.store.api import InvalidPath, PathWriter, StoreSession
from nixserve.store.contents import sizeMismatch

__all__ = ["Copied", "CopyProgress", "downloadClosure", "uploadClosure"]

T = TypeVar("T")

MAX_UNDER_WAY: Final = 512
"""Requests without an answer. At 50 ms a round trip these are 10,000 small paths a second: more than a store takes."""

MAX_BYTES_AHEAD: Final = 16 * 1024 * 1024
"""Sizes of the NARs requested and not yet stored: what a link of 1 Gbit/s and 130 ms holds."""


class CopyProgress:
    """
    Hears how a copy is getting on. This one ignores it; a subclass shows it.
    """

    def planned(self, infos: Sequence[ValidPathInfo], present: int) -> None:
        """
        It is known what is to be done.

        @param infos: what will be copied, in this order.
        @param present: how many paths of the closure are there already.
        """

    def moved(self, size: int) -> None:
        """C{size} more bytes of NARs are on their way or have come. Called in any thread."""

    def copied(self, info: ValidPathInfo) -> None:
        """The receiving store has this path."""


@dataclass(frozen=True, slots=True)
class Copied:
    """
    What came of a copy.

    @ivar infos: what was copied, in this order.
    @ivar present: how many paths of the closure were there before.
    """

    infos: tuple[ValidPathInfo, ...]
    present: int

    @property
    def narBytes(self) -> int:
        """The bytes of the NARs that were copied."""
        return sum(info.narSize for info in self.infos)


_SILENT: Final = CopyProgress()


def uploadClosure(
    client: ServeClient,
    door: Door,
    session: StoreSession,
    paths: Collection[StorePath],
    progress: CopyProgress = _SILENT,
) -> Deferred[Copied]:
    """
    Copy C{paths} and all that they refer to from a local store to the remote one. What the remote has stays there until
    the client's session ends.

    @param door: the way to C{session}, which nobody else uses meanwhile.
    @param session: of the local store. Whoever wants the paths kept there meanwhile makes them roots of it.
    @return: fires when the remote has acknowledged everything. Fails with L{InvalidPath} if the local store lacks one
        of C{paths}, or with what the client's session fails with. Failing or cancelled it cuts the connection: what
        has been sent cannot be taken back.
    """
    return Deferred.fromCoroutine(_orCut(client, _upload(client, door, session, paths, progress)))


def downloadClosure(
    client: ServeClient,
    door: Door,
    session: StoreSession,
    paths: Collection[StorePath],
    progress: CopyProgress = _SILENT,
) -> Deferred[Copied]:
    """
    Copy C{paths} and all that they refer to from the remote store to a local one. What is or comes there stays there
    until C{session} closes.

    @param door: the way to C{session}, which nobody else uses meanwhile.
    @param session: of the local store; it holds what is half-written when this fails, until it is closed.
    @return: fires when everything is registered. Fails as L{uploadClosure}, or with
        L{nixserve.errors.StoreError} if something that came is not what its info says.
    """
    return Deferred.fromCoroutine(_orCut(client, _download(client, door, session, paths, progress)))


async def _orCut(client: ServeClient, copying: Coroutine[Any, Any, T]) -> T:
    """Answers to what is under way have nobody to take them if a copy ends early."""
    try:
        return await copying
    except BaseException:
        client.transport.abortConnection()
        raise


def _inOrder(wanted: Iterable[StorePath], infos: Mapping[StorePath, ValidPathInfo]) -> list[ValidPathInfo]:
    """
    @param infos: those of C{wanted}, and maybe more.
    @return: those of C{wanted}, references first.
    @raise InvalidPath: one has vanished since it was found in the closure.
    """
    references: dict[StorePath, frozenset[StorePath]] = {}
    for path in wanted:
        if path not in infos:
            raise InvalidPath(path)
        references[path] = infos[path].references
    return [infos[path] for path in topoSort(references)]


# --- up ---------------------------------------------------------------------------------------------------


async def _upload(
    client: ServeClient, door: Door, session: StoreSession, paths: Collection[StorePath], progress: CopyProgress
) -> Copied:
    closure = await door.call(session.queryClosure, paths)
    infos = await door.call(session.queryPathInfos, closure)
    present = await client.queryValidPaths(closure, lock=True)
    missing = _inOrder(closure - present, infos)
    progress.planned(missing, len(closure) - len(missing))
    unacknowledged: deque[Deferred[None]] = deque()
    try:
        for info in missing:
            if len(unacknowledged) == MAX_UNDER_WAY:
                await unacknowledged.popleft()
            sent = client.addToStoreNar(info, door, partial(_dump, session, info.path, progress.moved))
            sent.addCallback(partial(_acknowledged, progress, info))
            unacknowledged.append(sent)
        while unacknowledged:
            await unacknowledged.popleft()
    finally:
        for sent in unacknowledged:
            # They fail for the reason that is on its way up.
            sent.addErrback(lambda _: None)
    return Copied(tuple(missing), len(closure) - len(missing))


def _acknowledged(progress: CopyProgress, info: ValidPathInfo, _: None) -> None:
    progress.copied(info)


def _dump(session: StoreSession, path: StorePath, moved: Callable[[int], None]) -> Iterator[bytes]:
    for chunk in session.narFromPath(path):
        moved(len(chunk))
        yield chunk


# --- down -------------------------------------------------------------------------------------------------


async def _download(
    client: ServeClient, door: Door, session: StoreSession, paths: Collection[StorePath], progress: CopyProgress
) -> Copied:
    closure = await client.queryClosure(paths)
    infos = await client.queryPathInfos(closure)
    # Roots first: what is valid after that stays so.
    await door.call(session.addTempRoots, closure)
    present = await door.call(session.queryValidPaths, closure)
    missing = _inOrder(closure - present, infos)
    progress.planned(missing, len(present))
    throttle = Throttle(client.transport)
    waiting = deque(missing)
    requested: deque[_Arrival] = deque()
    bytesAhead = 0
    try:
        while waiting or requested:
            # One more than the one that is being stored, however large; then as far as the limits go.
            while waiting and (len(requested) < 2 or (bytesAhead < MAX_BYTES_AHEAD and len(requested) < MAX_UNDER_WAY)):
                arrival = _Arrival(waiting.popleft(), throttle, progress.moved)
                arrival.request(client)
                requested.append(arrival)
                bytesAhead += arrival.info.narSize
            # One at a time: whoever held the locks of several could wait for somebody who waits for him.
            arrival = requested[0]
            await arrival.store(door, session)
            requested.popleft()
            bytesAhead -= arrival.info.narSize
            progress.copied(arrival.info)
    finally:
        for arrival in requested:
            arrival.complete.addErrback(lambda _: None)
    return Copied(tuple(missing), len(present))


class _Arrival:
    """
    One NAR that has been requested. It may come before its turn to be stored: then up to L{MAX_QUEUED} bytes wait here,
    and the remote after them.

    @ivar complete: fires when all of it has come, or with why it will not.
    """

    def __init__(self, info: ValidPathInfo, throttle: Throttle, moved: Callable[[int], None]) -> None:
        self.info = info
        self.complete: Deferred[None] = Deferred()
        self._throttle = throttle
        self._moved = moved
        self._early: list[bytes] = []
        self._size = 0
        self._inflow: NarInflow[PathWriter] | None = None

    def request(self, client: ServeClient) -> None:
        """Ask for it."""
        client.dumpStorePath(self.info.path, self._received).addCallbacks(self.complete.callback, self._failed)

    async def store(self, door: Door, session: StoreSession) -> None:
        """
        It is its turn.

        @raise nixserve.errors.StoreError: it is not what its info says.
        """
        inflow = NarInflow[PathWriter](door, self._throttle, partial(session.addToStore, self.info), self._failed)
        self._inflow = inflow
        early, self._early = self._early, []
        for data in early:
            inflow.write(data)
        self._throttle.resume(self)
        await self.complete
        await inflow.end(methodcaller("finish"))

    def _received(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self.info.narSize:
            raise sizeMismatch(self.info, self._size)
        self._moved(len(data))
        if self._inflow is not None:
            self._inflow.write(data)
            return
        self._early.append(data)
        if self._size >= MAX_QUEUED:
            self._throttle.pause(self)

    def _failed(self, failure: Failure) -> None:
        """The remote, or storing what has come so far."""
        if not self.complete.called:
            self.complete.errback(failure)

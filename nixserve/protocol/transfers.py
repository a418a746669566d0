"""
The two directions of a copy: each moves the paths that a L{Schedule} gives it over one L{ServeClient}, without a round
trip for each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import methodcaller
from typing import Final

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.errors import StoreError
from nixserve.protocol.client import ServeClient
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.limits import MAX_SMALL_NAR
from nixserve.protocol.schedule import Schedule
from nixserve.protocol.streams import MAX_QUEUED, NarInflow, Throttle
from nixserve.store.api import PathWriter, StoreSession
from nixserve.store.contents import sizeMismatch

__all__ = ["Arrived", "Moved", "download", "upload", "uploadStream"]

Moved = Callable[[int], None]
"""Hears how many more bytes have been sent or have come. Called in any thread."""

Arrived = Callable[[ValidPathInfo], None]
"""Hears of each path that the receiving store has."""

MAX_BATCH_PATHS: Final = 512
"""Paths sent without a look at what the others do."""

MAX_BATCHES: Final = 3
"""Batches without an answer. At 50 ms a round trip these are 30,000 small paths a second: more than a store takes."""

SHARED_BATCH_BYTES: Final = 8 * 1024 * 1024
"""The same in bytes when there are other sessions, which could take what would wait behind it."""

MAX_REQUESTED: Final = 512
"""NARs requested and not yet stored."""

MAX_BYTES_AHEAD: Final = 16 * 1024 * 1024
"""The same in bytes: what a link of 1 Gbit/s and 130 ms holds."""

MAX_SMALL_BATCH: Final = 256
"""How many small NARs are registered in one turn of a worker."""


# --- up ---------------------------------------------------------------------------------------------------


async def upload(
    here: DeferredSession, client: ServeClient, schedule: Schedule, lane: int, moved: Moved, arrived: Arrived
) -> None:
    """
    Send paths straight behind each other; acknowledgements are counted as they come.

    @param lane: our number in C{schedule}.
    @raise nixserve.protocol.client.RemoteFailure: the remote refused one, or is gone.
    @raise StoreError: one cannot be read.
    """
    maxBytes = SHARED_BATCH_BYTES if schedule.lanes > 1 else 1 << 62
    unacknowledged: deque[Deferred[None]] = deque()
    try:
        while not schedule.exhausted or unacknowledged:
            batch = schedule.take(lane, MAX_BATCH_PATHS, maxBytes) if len(unacknowledged) < MAX_BATCHES else []
            if batch:
                begin = partial(_dump, here.session, batch, moved)
                unacknowledged.append(client.addToStoreNars(batch, here.door, begin, arrived))
            elif unacknowledged:
                await unacknowledged.popleft()
            else:
                await schedule.changed()
    finally:
        for sent in unacknowledged:
            # They fail for the reason that is on its way up.
            sent.addErrback(lambda _: None)


def _dump(session: StoreSession, infos: Sequence[ValidPathInfo], moved: Moved) -> Iterator[bytes]:
    """
    @return: the NARs of all paths, one behind the other.
    @raise StoreError: one has not the size that is registered, so nothing behind it could be understood.
    """
    for info in infos:
        size = 0
        for chunk in session.narFromPath(info.path):
            size += len(chunk)
            if size > info.narSize:
                break
            yield chunk
            moved(len(chunk))
        if size != info.narSize:
            raise StoreError(
                f"'{info.path}' has changed since it was registered with {info.narSize} bytes of NAR; "
                "'nix-store --verify --check-contents' tells what else has"
            )


async def uploadStream(
    here: DeferredSession, client: ServeClient, infos: Sequence[ValidPathInfo], moved: Moved, arrived: Arrived
) -> None:
    """
    The same for servers that do not know AddToStoreNar (below 2.5): everything in one ImportPaths, with one
    acknowledgement at its end.

    @raise nixserve.protocol.client.RemoteFailure: as L{upload}.
    """

    def begin() -> Iterator[bytes]:
        for chunk in here.session.exportPaths([info.path for info in infos]):
            yield chunk
            moved(len(chunk))

    await client.importPaths(here.door, begin)
    for info in infos:
        arrived(info)


# --- down -------------------------------------------------------------------------------------------------


async def download(
    client: ServeClient, here: DeferredSession, schedule: Schedule, lane: int, moved: Moved, arrived: Arrived
) -> None:
    """
    Request NARs some way ahead of the one that is being stored. Small ones are registered several at once.

    One path is begun only when the one before is complete: whoever held the locks of several could wait for somebody
    who waits for him.

    @param lane: our number in C{schedule}.
    @raise nixserve.protocol.client.RemoteFailure: the remote does not give one, or is gone.
    @raise StoreError: one is not what its info says, or cannot be stored.
    """
    throttle = Throttle(client.transport)
    requested: deque[_Arrival] = deque()
    bytesAhead = 0
    try:
        while not schedule.exhausted or requested:
            # One more than the one that is being stored, however large; then as far as the limits go.
            while len(requested) < 2 or (bytesAhead < MAX_BYTES_AHEAD and len(requested) < MAX_REQUESTED):
                taken = schedule.take(lane, 1, 1)
                if not taken:
                    break
                arrival = _Arrival(taken[0], throttle, moved)
                arrival.request(client)
                requested.append(arrival)
                bytesAhead += arrival.info.narSize
            if not requested:
                await schedule.changed()
                continue
            stored = [requested[0]]
            if stored[0].small:
                await stored[0].complete
                stored = _completeSmall(requested)
                await _storeSmall(here, stored)
            else:
                await stored[0].store(here)
            for arrival in stored:
                requested.popleft()
                bytesAhead -= arrival.info.narSize
                arrived(arrival.info)
    finally:
        for arrival in requested:
            arrival.complete.addErrback(lambda _: None)


def _completeSmall(requested: deque[_Arrival]) -> list[_Arrival]:
    """Small NARs that are here, from the left."""
    stored: list[_Arrival] = []
    for arrival in requested:
        if not (arrival.small and arrival.isComplete) or len(stored) == MAX_SMALL_BATCH:
            break
        stored.append(arrival)
    return stored


async def _storeSmall(here: DeferredSession, arrivals: Sequence[_Arrival]) -> None:
    objects = [(arrival.info, arrival.nar) for arrival in arrivals]
    while objects:
        added = await here.call(here.session.addSmallPaths, objects)
        del objects[:added]


class _Arrival:
    """
    One NAR that has been requested. It may come before its turn to be stored: then it waits here, if it is large only
    its first L{MAX_QUEUED} bytes, and the remote with the rest.

    @ivar small: it is kept until it is complete.
    @ivar complete: fires when all of it has come, or with why it will not.
    """

    def __init__(self, info: ValidPathInfo, throttle: Throttle, moved: Moved) -> None:
        self.info = info
        self.small = info.narSize <= MAX_SMALL_NAR
        self.isComplete = False
        self.complete: Deferred[None] = Deferred()
        self._throttle = throttle
        self._moved = moved
        # One piece: a remote may send it byte by byte.
        self._early = bytearray()
        self._size = 0
        self._inflow: NarInflow[PathWriter] | None = None

    @property
    def nar(self) -> bytes:
        """What has come of it, as long as it is kept in memory."""
        return bytes(self._early)

    def request(self, client: ServeClient) -> None:
        """Ask the remote for the NAR."""
        client.dumpStorePath(self.info.path, self._received).addCallbacks(self._completed, self._failed)

    async def store(self, here: DeferredSession) -> None:
        """
        Store it, what has come as well as what will come.

        @raise StoreError: it is not what its info says.
        """
        begin = partial(here.session.addToStore, self.info)
        inflow = self._inflow = NarInflow[PathWriter](here.door, self._throttle, begin, self._failed)
        early, self._early = bytes(self._early), bytearray()
        if early:
            inflow.write(early)
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
        self._early += data
        if self._size >= MAX_QUEUED:
            self._throttle.pause(self)

    def _completed(self, _: None) -> None:
        self.isComplete = True
        self.complete.callback(None)

    def _failed(self, failure: Failure) -> None:
        """The remote, or storing what has come so far."""
        if not self.complete.called:
            self.complete.errback(failure)

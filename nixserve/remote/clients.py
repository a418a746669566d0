"""
The reactor's side of L{nixserve.remote.store}: the clients behind one session of a store, and the NARs that a thread
sends and receives over them, piece by piece.

Everything here is called in the reactor's thread and blocks nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred, fail, gatherResults, maybeDeferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.errors import RemoteError
from nixserve.protocol.client import ServeClient
from nixserve.protocol.interfaces import IWorkers
from nixserve.protocol.streams import MAX_QUEUED, READ_AHEAD
from nixserve.protocol.workers import Door, whenFired

__all__ = ["Download", "Open", "RemoteClients", "Upload"]

Open = Callable[[Callable[[bytes], None]], Deferred[ServeClient]]
"""Opens a session on the remote store: called with what takes the remote's standard error, gives a client that is
ready. Cancelling it gives up."""

CLOSE_SECONDS = 5.0
"""How long they may take to end by themselves."""

MAX_ASKED = 128
"""How many NARs are requested before the first one has come: none has to wait for the way there and back."""


def _ignore(data: bytes) -> None:
    """What a transfer says on standard error stands in its error, if it fails."""


class RemoteClients:
    """
    The clients of one session on a remote store: the I{keeper}, which holds the roots, answers queries and builds; and
    one for transfers, which may fail or be cut half way without losing any root. Each is opened when it is needed
    first; one for transfers that is still busy is joined by another.

    @ivar listener: takes the keeper's standard error, cut anywhere.
    """

    def __init__(self, reactor: IReactorTime, open: Open) -> None:
        self.listener: Callable[[bytes], None] = _ignore
        self._reactor = reactor
        self._open = open
        self._keeper: ServeClient | None = None
        self._idle: ServeClient | None = None
        self._clients: set[ServeClient] = set()
        self._opening: set[Deferred[ServeClient]] = set()
        self._over = False

    async def keeper(self) -> ServeClient:
        """
        The session that holds the roots. It is never replaced: what it held would be gone.

        @raise RemoteError: it is gone.
        """
        if self._keeper is None:
            self._keeper = await self._connect(lambda data: self.listener(data))
        elif self._keeper.ended.called:
            raise RemoteError(f"the connection to {self._keeper.name or 'the remote store'} is lost")
        return self._keeper

    async def upload(self, info: ValidPathInfo) -> Upload:
        """Begin to send one object, over a session that is borrowed."""
        return Upload(self._reactor, await self.borrow(), info)

    async def download(self, paths: Sequence[StorePath]) -> Download:
        """Begin to fetch NARs, over a session that is borrowed."""
        return Download(await self.borrow(), paths)

    async def send(self, objects: Sequence[tuple[ValidPathInfo, bytes]], acknowledged: list[StorePath]) -> None:
        """
        Send small objects.

        @param acknowledged: their paths are added to it as the remote acknowledges them.
        @raise RemoteError: one is refused.
        """
        client = await self.borrow()
        infos = [info for info, _ in objects]
        try:
            await client.addToStoreNars(
                infos,
                Door(_AtOnce(self._reactor)),
                lambda: (nar for _, nar in objects),
                lambda info: acknowledged.append(info.path),
            )
        except BaseException:
            self.discard(client)
            raise
        self.giveBack(client)

    async def borrow(self) -> ServeClient:
        """A session for a transfer. It is to be given back, or discarded."""
        idle, self._idle = self._idle, None
        if idle is not None and not idle.ended.called:
            return idle
        return await self._connect(_ignore)

    def giveBack(self, client: ServeClient) -> None:
        """Take a borrowed session back: its transfer is complete."""
        if self._idle is None and not self._over:
            self._idle = client
        else:
            client.close()

    def discard(self, client: ServeClient) -> None:
        """End a borrowed session whose transfer failed or was given up half way."""
        client.cut()

    def cut(self) -> None:
        """End everything at once: whoever waits for something gets a L{RemoteError}."""
        self._over = True
        for opening in list(self._opening):
            opening.cancel()
        for client in list(self._clients):
            client.cut()

    def close(self) -> Deferred[None]:
        """
        End everything, so that the remote frees what it held.

        @return: fires when the connections are gone.
        """
        self._over = True
        for opening in list(self._opening):
            opening.cancel()
        ended = gatherResults([whenFired(client.ended) for client in self._clients])
        for client in list(self._clients):
            if client in (self._keeper, self._idle):
                client.close()
            else:
                client.cut()
        if ended.called:
            return succeed(None)
        patience = self._reactor.callLater(CLOSE_SECONDS, self.cut)
        return ended.addCallback(lambda _: patience.cancel() if patience.active() else None)

    async def _connect(self, onError: Callable[[bytes], None]) -> ServeClient:
        if self._over:
            raise RemoteError("the session on the remote store has ended")
        opening = self._open(onError)
        self._opening.add(opening)
        try:
            client = await opening
        finally:
            self._opening.discard(opening)
        self._clients.add(client)
        client.ended.addCallback(lambda _: self._clients.discard(client))
        return client


@implementer(IWorkers)
class _AtOnce:
    """Workers for what does not block: it only reads what is in memory."""

    def __init__(self, reactor: IReactorTime) -> None:
        self.reactor = reactor

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        """See L{IWorkers}."""
        return maybeDeferred(function, *args, **kwargs)


@implementer(IWorkers)
class Upload:
    """
    One object on its way to the remote, whose NAR is pushed by a thread. The client pulls, through a door; behind that
    door is this: a call happens as soon as there is something to read, and so never blocks.

    @ivar client: over which it goes.
    """

    def __init__(self, reactor: IReactorTime, client: ServeClient, info: ValidPathInfo) -> None:
        self.reactor = reactor
        self.client = client
        self._pieces: deque[bytes] = deque()
        self._queued = 0
        self._ended = False
        self._reading: tuple[Callable[[], Any], Deferred[Any]] | None = None
        self._waiting: Deferred[None] | None = None
        self._failure: Failure | None = None
        client.addToStoreNar(info, Door(self), self._read).addCallbacks(self._settle, self._failed)

    def write(self, pieces: list[bytes]) -> Deferred[None]:
        """
        The next bytes of the NAR.

        @return: fires when more may follow, or with why none need to.
        """
        return self._push(pieces)

    def end(self, pieces: list[bytes]) -> Deferred[None]:
        """
        The last bytes of the NAR.

        @return: fires when the remote has acknowledged it, or with why it will not.
        """
        self._ended = True
        return self._push(pieces)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        """See L{IWorkers}; for the client."""
        result: Deferred[Any] = Deferred()
        self._reading = partial(function, *args, **kwargs), result
        self._advance()
        return result

    def _push(self, pieces: list[bytes]) -> Deferred[None]:
        if self._failure is not None:
            return fail(self._failure)
        self._pieces += pieces
        self._queued += sum(map(len, pieces))
        waiting: Deferred[None] = Deferred()
        self._waiting = waiting
        self._advance()
        return waiting

    def _read(self) -> Iterator[bytes]:
        while self._pieces:
            piece = self._pieces.popleft()
            self._queued -= len(piece)
            yield piece

    def _advance(self) -> None:
        # A reader that found less would take it for the end.
        if self._reading is not None and (self._ended or self._queued >= READ_AHEAD):
            (function, result), self._reading = self._reading, None
            result.callback(function())
        if self._queued < READ_AHEAD and not self._ended:
            self._settle()

    def _settle(self, _: None = None) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.callback(None)

    def _failed(self, failure: Failure) -> None:
        self._failure = failure
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.errback(failure)


class Download:
    """
    NARs on their way from the remote, taken by a thread. What it has not taken waits here, up to L{MAX_QUEUED} bytes,
    and the remote after them.

    @ivar client: over which they come.
    """

    def __init__(self, client: ServeClient, paths: Sequence[StorePath]) -> None:
        """
        @param paths: at least one.
        """
        self.client = client
        self._unasked = deque(paths)
        self._outstanding = len(paths)
        self._pieces: list[bytes | None] = []
        self._queued = 0
        self._paused = False
        self._failure: Failure | None = None
        self._waiting: Deferred[list[bytes | None]] | None = None
        for _ in range(min(MAX_ASKED, len(paths))):
            self._ask()

    def read(self) -> Deferred[list[bytes | None]]:
        """
        What has come.

        @return: chunks, and C{None} after the last one of each NAR. Nothing after the last NAR.
        """
        waiting: Deferred[list[bytes | None]] = Deferred()
        self._waiting = waiting
        self._deliver()
        return waiting

    def _ask(self) -> None:
        path = self._unasked.popleft()
        self.client.dumpStorePath(path, self._received).addCallbacks(self._complete, self._failed)

    def _received(self, data: bytes) -> None:
        self._pieces.append(data)
        self._queued += len(data)
        self._deliver()
        if self._queued >= MAX_QUEUED and not self._paused:
            self._paused = True
            self.client.transport.pauseProducing()

    def _complete(self, _: None) -> None:
        self._pieces.append(None)
        self._outstanding -= 1
        if self._unasked:
            self._ask()
        self._deliver()

    def _failed(self, failure: Failure) -> None:
        self._failure = failure
        self._deliver()

    def _deliver(self) -> None:
        if self._waiting is None or (self._outstanding and not self._pieces and self._failure is None):
            return
        waiting, self._waiting = self._waiting, None
        pieces, self._pieces, self._queued = self._pieces, [], 0
        if self._paused:
            self._paused = False
            self.client.transport.resumeProducing()
        # What came before a failure is complete in itself, and taken first.
        if self._failure is not None and not pieces:
            waiting.errback(self._failure)
        else:
            waiting.callback(pieces)

"""
A client and a server joined in memory: the whole conversation, without sockets, threads or a reactor.

Whoever uses a L{ServeClient} can be tested against a real server on a store in memory, with what usually goes wrong::

    joined = Joined(store)
    valid = joined.client.queryValidPaths(paths)
    joined.flush()
    assert joined.result(valid) == ...
    joined.cut()

Nothing moves unless L{Joined.flush}, L{Joined.turn} or L{Joined.result} says so. With C{reactor=} everything moves by
itself, in that reactor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost, ProcessTerminated
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from nixserve.protocol.building import IBuilds
from nixserve.protocol.client import ServeClient
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.interfaces import IWorkers
from nixserve.protocol.policy import EVERYTHING, Peer, Policy
from nixserve.protocol.server import ServeServer
from nixserve.protocol.workers import Door
from nixserve.store.api import Store
from nixserve.store.memory import MemoryStore
from nixserve.testing.building import Script, ScriptedBuilds
from nixserve.testing.deferreds import result
from nixserve.testing.transports import MemoryTransport
from nixserve.testing.workers import ImmediateWorkers

__all__ = ["Joined", "Pair"]

T = TypeVar("T")


class Pair:
    """
    The connection between a client's and a server's protocol.

    @ivar piece: the most bytes that are delivered at once: what depends on how bytes are cut shows with small ones.
    @ivar clientSide: the client's transport.
    @ivar serverSide: the server's.
    @ivar over: the connection is gone.
    """

    def __init__(self, client: Any, server: Any, piece: int = 1 << 20, wake: Callable[[], None] = lambda: None) -> None:
        """
        @param client: provides L{nixserve.protocol.interfaces.IErrorReceiver} as well.
        @param server: provides L{twisted.internet.interfaces.IHalfCloseableProtocol} as well.
        @param wake: called when something may move.
        """
        self.piece = piece
        self.client, self.server = client, server
        self.clientSide, self.serverSide = MemoryTransport(wake), MemoryTransport(wake)
        self.over = False
        self._eofSent = False
        server.makeConnection(self.serverSide)
        client.makeConnection(self.clientSide)

    def turn(self) -> bool:
        """
        Deliver one piece in each direction.

        @return: whether anything moved.
        """
        moved = self._move(self.clientSide, self.serverSide, self.server.dataReceived)
        # What a server says about a reply comes before it.
        if self.serverSide.errors and not self.over:
            data, self.serverSide.errors = bytes(self.serverSide.errors), bytearray()
            self.client.errorReceived(data)
            moved = True
        moved |= self._move(self.serverSide, self.clientSide, self.client.dataReceived)
        return moved | self._end()

    def flush(self, work: Callable[[], Any] = lambda: None) -> None:
        """
        Deliver until nothing moves.

        @param work: called in between, for workers that wait to be told.
        """
        work()
        while self.turn():
            work()

    def lose(self, reason: BaseException | None = None) -> None:
        """
        The connection breaks: neither end gets another byte.

        @param reason: what both ends hear.
        """
        if not self.over:
            self.over = True
            failure = Failure(reason or ConnectionLost())
            self.server.connectionLost(failure)
            self.client.connectionLost(failure)

    def _move(self, source: MemoryTransport, target: MemoryTransport, deliver: Callable[[bytes], None]) -> bool:
        if target.paused or not source.written or self.over:
            return False
        data = source.take(self.piece)
        if target.status is None:
            deliver(data)
        source.taken()
        return True

    def _end(self) -> bool:
        if self.over:
            return False
        if self.clientSide.aborted or self.serverSide.aborted:
            self.lose()
            return True
        if self.serverSide.status is not None and not self.serverSide.written:
            self.lose(ProcessTerminated(self.serverSide.status) if self.serverSide.status else ConnectionDone())
            return True
        if self.clientSide.closing and not self.clientSide.written and not self._eofSent:
            self._eofSent = True
            self.server.readConnectionLost()
            return True
        return False


class Joined:
    """
    A client's session on a server of ours.

    @ivar store: what is served.
    @ivar client: whose methods are to be called.
    @ivar server: the other end.
    @ivar clock: by which both ends count time: that of the workers, a L{Clock} unless there is a reactor.
    @ivar workers: where the server blocks.
    @ivar said: what the server wrote on its standard error.
    @ivar pair: the connection.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        policy: Policy = EVERYTHING,
        build: Script | None = None,
        builds: IBuilds | None = None,
        piece: int = 1 << 20,
        workers: IWorkers | None = None,
        reactor: IReactorTime | None = None,
        onError: Callable[[bytes], None] = lambda data: None,
        name: str = "memory",
    ) -> None:
        """
        @param store: an empty L{MemoryStore} if not given.
        @param policy: what the client may do.
        @param build: answers builds, see L{ScriptedBuilds}; without it and C{builds} they are refused.
        @param builds: who builds instead.
        @param piece: the most bytes that are delivered at once.
        @param workers: where the server blocks; at once, if not given. If they have a method C{drain}, it is called
            whenever something may move.
        @param reactor: have everything move by itself, in this reactor.
        @param onError: called with the server's standard error, too.
        @param name: of the remote, in the client's errors.
        """
        self.store: Store = MemoryStore() if store is None else store
        if workers is None:
            workers = ImmediateWorkers(Clock() if reactor is None else reactor)
        self.clock: Any = workers.reactor
        self.said = bytearray()
        self._onError = onError
        self._reactor = reactor
        self._scheduled = False
        self.workers = workers
        self.client = ServeClient(self.store.storeDir, self._errorReceived, name, self.clock)
        if build is not None:
            builds = ScriptedBuilds(build)
        self.server = ServeServer(self.store, self.workers, policy, Peer("memory"), self.clock, builds=builds)
        self.pair = Pair(self.client, self.server, piece, self._wake)

    def turn(self) -> bool:
        """
        One piece moves in each direction.

        @return: whether anything did.
        """
        return self.pair.turn()

    def flush(self) -> Joined:
        """Everything moves until nothing does; what waits for time goes on waiting."""
        self.pair.flush(self.work)
        return self

    def advance(self, seconds: float) -> Joined:
        """
        Time passes, then everything moves. Somebody who waits for a lock tries again.
        """
        self.flush()
        self.clock.advance(seconds)
        return self.flush()

    def result(self, deferred: Deferred[T]) -> T:
        """
        Everything moves.

        @return: what C{deferred} has fired with.
        @raise AssertionError: it has not.
        """
        self.flush()
        return result(deferred)

    def cut(self) -> None:
        """The connection breaks, whatever was on its way. What each end can do to it, C{client.cut()} does."""
        self.pair.lose()

    def session(self, store: Store) -> DeferredSession:
        """A session of a store on the client's side, for copying from or to."""
        return DeferredSession(Door(ImmediateWorkers(self.clock)), store.openSession())

    def work(self) -> None:
        """Workers that wait to be told do what there is to do."""
        getattr(self.workers, "drain", lambda: None)()

    def _errorReceived(self, data: bytes) -> None:
        self.said += data
        self._onError(data)

    def _wake(self) -> None:
        if self._reactor is not None and not self._scheduled:
            self._scheduled = True
            self._reactor.callLater(0, self._move)

    def _move(self) -> None:
        self._scheduled = False
        if self.turn():
            self._wake()

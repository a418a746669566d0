"""
What a session waits for, and what may end it meanwhile.

Whoever answers a peer asks here for what it does next, and has everything that takes time waited for here: the store,
the peer's reading, memory that others hold. All of that ends at once, with the cause, when something else ends the
conversation: the connection is lost, the peer stands still, the server stops.

The peer is given up when it moves nothing for too long; not while it is we who are busy. What its requests and our
replies make this process hold is counted (L{nixserve.protocol.memory}), and waits where there is no room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from nixserve.codec.connection import ServerConnection
from nixserve.errors import PolicyError, RemoteProtocolError
from nixserve.protocol.interfaces import IServeTransport
from nixserve.protocol.limits import FULL_WINDOW
from nixserve.protocol.memory import Account
from nixserve.protocol.stalltimer import StallTimer
from nixserve.protocol.streams import MAX_QUEUED, NarOutflow, Throttle, drained
from nixserve.protocol.workers import Door

__all__ = ["ANSWER_MEMORY", "STALL_SECONDS", "WORK_MEMORY", "Conversation"]

P = ParamSpec("P")
T = TypeVar("T")

MAX_UNSENT = 64 * 1024
"""Bytes of replies that wait for the peer, above which the transport is asked whether it has enough. If so, the next
request is not performed before the peer has read."""

MAX_UNREAD = 256 * 1024
"""Bytes of later requests that are kept while one is being answered; then the peer is paused."""

SMALL_REPLY = 4 * 1024
"""Bytes of replies that may wait for the peer without being counted at once."""

FIRST_WINDOW = 128 * 1024
"""Bytes that a peer may send while its session is paused, at first: held by us, times the number of sessions. For a
session that has something to send it becomes L{FULL_WINDOW}, if there is room."""

SESSION_MEMORY = 64 * 1024
"""What a session costs that does nothing."""

WORK_MEMORY = MAX_QUEUED
"""What a request costs while it is worked off: the queue of a stream, or results on their way."""

ANSWER_MEMORY = 16 * 1024 * 1024
"""What a closure may become that nobody has asked the store about yet, for a question of a hundred bytes: 200,000 paths
are so large. Of a key with less memory a third of that."""

REQUEST_MEMORY = 3
"""Bytes of memory for each byte of a request: a million paths of 60 characters become objects of 180 MB."""

MAX_SMALL_REQUEST = 64 * 1024
"""Bytes of a request that arrive without a look at the memory that its key uses."""

_INTERRUPTED = "interrupted by the user"
"""What real Nix says when the client is gone in the middle of a build."""

STALL_SECONDS = 600.0
"""A session in the middle of a request that moves no byte for so long ends."""

HALF_CLOSED_SECONDS = 2.0
"""The same for a session whose peer has sent EOF and only has to go on reading, of whom we hear nothing when it dies: a
reader on the slowest of links takes some bytes in that time. What holds on to things for so long that others notice is
promised to be gone within 5 seconds, on a busy machine too."""


class Conversation:
    """
    One session's, from its first byte to its exit status. One coroutine at a time waits for something.

    @ivar connection: the rules of the protocol.
    @ivar transport: where replies go.
    @ivar throttle: pauses what the peer sends.
    @ivar door: the way to the store.
    @ivar gathered: bytes of requests that are kept, besides the one that is being read.
    @ivar cause: why it has to end, if something outside it says so.
    """

    def __init__(
        self,
        connection: ServerConnection,
        transport: IServeTransport,
        door: Door,
        openAccount: Callable[[Callable[[], int]], Account],
        clock: IReactorTime,
        stallSeconds: float,
    ) -> None:
        """
        @param openAccount: given how many bytes this holds, counts them.
        @param stallSeconds: see L{STALL_SECONDS}.
        """
        self.connection = connection
        self.transport = transport
        self.throttle = Throttle(transport)
        self.door = door
        self.gathered = 0
        self.cause: Failure | None = None
        self._window = transport.allowUnread(FIRST_WINDOW)
        self._received = self._working = 0
        # Does the request that is worked off, or its reply, take memory that others may wait for?
        self._large = False
        # A reply that is complete and not sent.
        self._pieces: deque[bytes] = deque()
        self._account = openAccount(self._held)
        self._stall = StallTimer(clock, stallSeconds, self._stalled, lambda: transport.sent)
        # What is waited for: bytes from the peer, or something of ours.
        self._wakeUp: Deferred[None] | None = None
        self._pending: Deferred[Any] | None = None
        self._eof = False
        self._building = False
        self._over = False

    # --- the peer -----------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer, and wake who waits for them."""
        if self._over:
            return
        self._stall.touch()
        self.connection.receiveData(data)
        self._wake()
        if self._wakeUp is None and self.connection.buffered > MAX_UNREAD:
            self.throttle.pause(self)
        self._received += len(data)
        if self._received > self._window and self._window < FULL_WINDOW:
            self._enlargeWindow()

    def _enlargeWindow(self) -> None:
        """The peer has a lot to send: let it send more at once, if there is room. Asked once for each window."""
        self._received = 0
        if self._account.mayGrow(FULL_WINDOW):
            self._window = self.transport.allowUnread(FULL_WINDOW)

    def receiveEOF(self) -> None:
        """
        The peer will send nothing more. It may still read; but if it stops that too, it is most likely dead: not every
        ssh whose reader is gone says more than EOF.
        """
        self._stall.shorten(HALF_CLOSED_SECONDS)
        self.connection.receiveEOF()
        self._eof = True
        if self._building:
            self.end(Failure(PolicyError(_INTERRUPTED)))
        self._wake()

    async def more(self) -> None:
        """Wait until the peer has sent more, or will not."""
        if self.cause is not None:
            self.cause.raiseException()
        if self.connection.requestSize > MAX_SMALL_REQUEST and await self._room(0):
            # The peer may have ended meanwhile.
            return
        self.throttle.resume(self)
        self._wakeUp = Deferred()
        await self._wakeUp

    def _wake(self) -> None:
        if self._wakeUp is not None:
            wakeUp, self._wakeUp = self._wakeUp, None
            wakeUp.callback(None)

    def reply(self, value: Any) -> None:
        """Send the whole reply to one request."""
        self.transport.write(self.connection.sendReply(value))

    async def send(self, pieces: deque[bytes]) -> None:
        """
        Send a reply as the peer reads it.

        @param pieces: all of it; they are held here.
        """
        self._pieces = pieces
        many = len(pieces) > 2
        if many or self._working > WORK_MEMORY:
            # Now it is known how much that is: what was set aside for more is free, even if nobody reads this.
            self._working = WORK_MEMORY
            self._large = self._large or many
            self._account.shrank()
        while pieces:
            self.transport.write(pieces.popleft())
            if self.transport.unsent > MAX_UNSENT:
                self._stall.touch()
                await self.wait(drained(self.transport))

    async def stream(self, begin: Callable[[], Iterator[bytes]]) -> None:
        """
        Send what comes from the store as the peer reads it.

        @param begin: gives it; called in a worker.
        """
        await self.wait(NarOutflow(self.door, self.transport, begin, self._stall.touch).start())

    # --- waiting ------------------------------------------------------------------------------------------

    async def wait(self, pending: Deferred[T]) -> T:
        """
        Wait for something that the peer has a part in, until the conversation has to end.
        """
        if self.cause is not None:
            pending.addErrback(lambda _: None)
            pending.cancel()
            self.cause.raiseException()
        self._pending = pending
        try:
            return await pending
        finally:
            self._pending = None

    async def ours(self, pending: Deferred[T]) -> T:
        """The same for what the peer has no part in: it need not act meanwhile, however long it takes."""
        with self._stall.stopped:
            return await self.wait(pending)

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something on the store in a worker, and wait for its result. The peer need not act meanwhile."""
        with self._stall.stopped:
            return await self.wait(self.door.call(function, *args, **kwargs))

    async def interruptible(self, building: Deferred[T]) -> T:
        """
        Wait for a build, which ends with the client's end of input: real clients send it only when they are gone.
        """
        self._building = True
        if self._eof:
            self.end(Failure(PolicyError(_INTERRUPTED)))
        try:
            return await self.ours(building)
        finally:
            self._building = False

    def requestBegins(self) -> None:
        """The peer has to act from now on."""
        self._stall.start()

    def requestEnds(self) -> None:
        """The request is answered, and the peer need not act any more."""
        self._stall.stop()

    # --- memory -------------------------------------------------------------------------------------------

    def _held(self) -> int:
        """Bytes of memory that this session uses."""
        request = REQUEST_MEMORY * (self.connection.requestSize + self.gathered) + self.connection.buffered
        reply = sum(map(len, self._pieces)) if self._pieces else 0
        unsent = self.transport.unsent if not self._over else 0
        return SESSION_MEMORY + self._window + request + self._working + reply + unsent

    def requireRoom(self) -> None:
        """
        @raise PolicyError: the sessions of this key hold too much for one more.
        """
        if not self._account.hasRoom(0):
            raise PolicyError("too much is under way for this key here, or its replies are not read: try again later")

    @property
    def answerMemory(self) -> int:
        """Bytes that there must be for an answer of unknown size."""
        return max(WORK_MEMORY, min(ANSWER_MEMORY, self._account.share // 3))

    async def _room(self, more: int) -> bool:
        """
        Wait until there is memory for C{more} bytes. The peer cannot act meanwhile: it is paused.

        @return: whether that took any time.
        """
        waiting = self._account.wait(more)
        if waiting is None:
            return False
        self.throttle.pause(self._account)
        await self.ours(waiting)
        self.throttle.resume(self._account)
        return True

    def workBeginsAtOnce(self, size: int) -> bool:
        """
        Small requests, of which there may be thousands a second, need no look at what everybody holds.

        @param size: bytes of memory that there must be for what a request needs.
        @return: whether this is one; else L{workBegins}.
        """
        self._large = self.connection.requestSize > MAX_SMALL_REQUEST
        if self._large or not self._account.takes(size):
            return False
        self._working = size
        return True

    async def workBegins(self, size: int) -> None:
        """Wait until there is memory for what a request needs."""
        await self._room(size)
        self._working = size
        self._account.grew(size)

    async def workEnds(self) -> None:
        """It is replied to. The next one comes when the peer has read enough of that."""
        unsent = self.transport.unsent
        if unsent > MAX_UNSENT:
            await self.wait(drained(self.transport))
        working, self._working = self._working, 0
        if self._large or unsent > SMALL_REPLY or not self._account.gives(working):
            self._account.requestEnds()

    # --- the end ------------------------------------------------------------------------------------------

    def end(self, cause: Failure) -> None:
        """End it because of something outside it; the first cause counts."""
        if self.cause is None and not self._over:
            self.cause = cause
            if self._wakeUp is not None:
                self._wake()
            elif self._pending is not None:
                self._pending.cancel()

    def _stalled(self) -> None:
        # It is we who wait, for a lock or a disk.
        if self.door.working:
            self._stall.start()
            return
        self.end(Failure(RemoteProtocolError("nothing has moved for too long in the middle of a request; giving up")))

    def tell(self, line: str) -> None:
        """One line on the peer's standard error."""
        self.transport.writeError(line.replace("\n", " ").encode("utf-8", "replace") + b"\n")

    def exit(self, status: int) -> None:
        """Tell the peer that it is over. The first status counts."""
        if not self._over:
            self._over = True
            self.transport.exit(status)

    def close(self) -> None:
        """Let go of everything: the session has ended."""
        self._over = True
        self._stall.close()
        self._pieces.clear()
        self._account.close()

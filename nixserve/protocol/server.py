"""
L{ServeServer}: one session of C{nix-store --serve}. It feeds a L{ServerConnection} and has one C{cmd_} method for
each command; it holds no rule of the protocol itself.

A session ends in one of these ways, each of which frees its temporary roots, path locks and half-written objects:

  - the client's EOF between requests: exit status 0;
  - anything wrong, ours or the client's: one line C{error: …} on standard error, exit status 1. Real Nix does the
    same, since the protocol has no way to report an error;
  - the connection is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from operator import methodcaller
from typing import Any, ClassVar, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.codec.connection import ServerConnection
from nixserve.codec.derivation import drvPathOf, verifyBasicDerivation
from nixserve.codec.events import (
    EndOfImport,
    EndOfInput,
    EndOfNar,
    Hello,
    ImportedItem,
    NarData,
    Pause,
    RequestStarted,
    ServerEvent,
    VersionAgreed,
)
from nixserve.codec.messages import (
    AddToStoreNar,
    BuildDerivation,
    BuildOptions,
    BuildPaths,
    Command,
    DumpStorePath,
    ExportPaths,
    ImportPaths,
    QueryClosure,
    QueryPathInfos,
    QueryValidPaths,
    Request,
)
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.peertext import hidePaths, peerText
from nixserve.codec.serve import batches, inOrder
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import FormatError, NixServeError, PolicyError, RemoteProtocolError
from nixserve.protocol.building import BuildClient, IBuilds
from nixserve.protocol.interfaces import Interruptible, IServeTransport, IWorkers
from nixserve.protocol.limits import FULL_WINDOW, MAX_SMALL_NAR
from nixserve.protocol.memory import Memory
from nixserve.protocol.peerlog import PeerLog
from nixserve.protocol.policy import Peer, Policy, Right
from nixserve.protocol.stalltimer import StallTimer
from nixserve.protocol.streams import MAX_QUEUED, NarInflow, NarOutflow, Throttle, drained
from nixserve.protocol.workers import Door
from nixserve.store.api import Store, StoreSession

__all__ = ["ServeServer"]

P = ParamSpec("P")
T = TypeVar("T")

MAX_POSTPONED = 256
"""Requests that are worked off together at most, so that the first one's reply does not wait for long. Of NARs they
have at most L{MAX_QUEUED} bytes."""

MAX_UNSENT = 64 * 1024
"""Bytes of replies that wait for the peer, above which the transport is asked whether it has enough. If so, the next
request is not performed before the peer has read."""

INFOS_AT_ONCE = 256
"""Paths about which the store is asked at once: some milliseconds for a worker."""

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

_log = Logger()


@implementer(IHalfCloseableProtocol)
class ServeServer(Protocol):
    """
    One session.

    @ivar transport: an L{IServeTransport}.
    @ivar ended: fires with C{None} when the session has freed everything.
    """

    transport: IServeTransport

    REQUIRED: ClassVar[dict[Command, tuple[Right, str]]] = {
        Command.QUERY_VALID_PATHS: (Right.READ, "querying paths is not allowed"),
        Command.QUERY_PATH_INFOS: (Right.READ, "querying paths is not allowed"),
        Command.QUERY_CLOSURE: (Right.READ, "querying paths is not allowed"),
        Command.DUMP_STORE_PATH: (Right.READ, "reading paths is not allowed"),
        Command.EXPORT_PATHS: (Right.READ, "reading paths is not allowed"),
        Command.IMPORT_PATHS: (Right.WRITE, "importing paths is not allowed"),
        Command.ADD_TO_STORE_NAR: (Right.WRITE, "importing paths is not allowed"),
        Command.BUILD_PATHS: (Right.BUILD, "building paths is not allowed"),
        Command.BUILD_DERIVATION: (Right.BUILD, "building paths is not allowed"),
    }
    """What each command needs; what is not here needs L{Right.TRUST}."""

    def __init__(
        self,
        store: Store,
        workers: IWorkers,
        policy: Policy,
        peer: Peer,
        clock: IReactorTime,
        stallSeconds: float = STALL_SECONDS,
        builds: IBuilds | None = None,
        memory: Memory | None = None,
    ) -> None:
        """
        @param memory: where the memory is counted that the peers of this process use; this one has its own if not
            given.
        """
        self._store = store
        self._builds = builds
        self._session: StoreSession | None = None
        self._policy = policy
        self._peer = peer
        self.log = PeerLog(_log, peer.budget)
        self._door = Door(workers, self._tellWait)
        self._memory = memory or Memory(clock)
        self._window = self._received = self._working = 0
        # Does the request that is worked off, or its reply, take memory that others may wait for?
        self._large = False
        # A reply that is complete and not sent.
        self._pieces: deque[bytes] = deque()
        self._stall = StallTimer(clock, stallSeconds, self._stalled, lambda: self.transport.sent)
        self._connection = ServerConnection(store.storeDir)
        self._inflow: NarInflow[Any] | None = None
        self._command: Command | None = None
        # Requests of a client that does not wait for replies: read first, then worked off together. Of one kind.
        self._small: list[tuple[ValidPathInfo, bytes]] = []
        self._smallSize = 0
        self._dumps: list[StorePath] = []
        # What the conversation waits for: bytes from the peer, or something of ours.
        self._wakeUp: Deferred[None] | None = None
        self._pending: Deferred[Any] | None = None
        # Why the conversation has to end, if something outside it says so.
        self._cause: Failure | None = None
        self._eof = False
        self._building = False
        self._exiting = False
        self.ended: Deferred[None] = Deferred()

    # --- the transport ------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Begin the conversation."""
        self._throttle = Throttle(self.transport)
        self._window = self.transport.allowUnread(FIRST_WINDOW)
        trusted = Right.TRUST in self._policy.rights
        self._account = self._memory.open(self._peer.client, trusted, self._held)
        self.log.info(
            "session {peer.session} of {peer.address} begins: {policy}", **self._facts(), policy=str(self._policy)
        )
        conversation = Deferred.fromCoroutine(self._converse())
        conversation.addErrback(self._conversationFailed)
        conversation.addBoth(lambda _: self._free())

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the peer, and go on with the conversation if it waits for them."""
        if self._exiting:
            return
        self._stall.touch()
        self._connection.receiveData(data)
        self._wake()
        if self._wakeUp is None and self._connection.buffered > MAX_UNREAD:
            self._throttle.pause(self)
        self._received += len(data)
        if self._received > self._window and self._window < FULL_WINDOW:
            self._enlargeWindow()

    def _enlargeWindow(self) -> None:
        """The peer has a lot to send: let it send more at once, if there is room. Asked once for each window."""
        self._received = 0
        if self._account.mayGrow(FULL_WINDOW):
            self._window = self.transport.allowUnread(FULL_WINDOW)

    def readConnectionLost(self) -> None:
        """
        The peer will send nothing more. It may still read; but if it stops that too, it is most likely dead: not every
        ssh whose reader is gone says more than EOF.
        """
        self._stall.shorten(HALF_CLOSED_SECONDS)
        self._connection.receiveEOF()
        self._eof = True
        if self._building:
            self._end(Failure(PolicyError(_INTERRUPTED)))
        self._wake()

    def writeConnectionLost(self) -> None:
        """The peer reads nothing more: every reply from here on would be lost."""
        self._end(Failure(ConnectionLost()))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The peer is gone."""
        self._end(Failure(ConnectionLost(reason.getErrorMessage())))

    # --- the conversation ---------------------------------------------------------------------------------

    async def _event(self) -> ServerEvent:
        """The next thing that the peer does."""
        while True:
            event = self._connection.nextEvent()
            if not isinstance(event, Pause):
                return event
            if self._connection.postponed:
                await self._settle()
                continue
            if self._inflow is not None:
                self._inflow.push()
            if self._cause is not None:
                self._cause.raiseException()
            if self._connection.requestSize > MAX_SMALL_REQUEST and await self._room(0):
                # The peer may have ended meanwhile.
                continue
            self._throttle.resume(self)
            self._wakeUp = Deferred()
            await self._wakeUp

    async def _room(self, more: int) -> bool:
        """
        Wait until there is memory for C{more} bytes. The peer cannot act meanwhile: it is paused.

        @return: whether that took any time.
        """
        waiting = self._account.wait(more)
        if waiting is None:
            return False
        self._throttle.pause(self._account)
        self._stall.stop()
        await self._wait(waiting)
        self._stall.start()
        self._throttle.resume(self._account)
        return True

    def _held(self) -> int:
        """Bytes of memory that this session uses."""
        request = REQUEST_MEMORY * (self._connection.requestSize + self._smallSize) + self._connection.buffered
        reply = sum(map(len, self._pieces)) if self._pieces else 0
        unsent = self.transport.unsent if not self._exiting else 0
        return SESSION_MEMORY + self._window + request + self._working + reply + unsent

    async def _wait(self, pending: Deferred[T]) -> T:
        """
        Wait for something of ours, until the conversation has to end.
        """
        if self._cause is not None:
            pending.addErrback(lambda _: None)
            pending.cancel()
            self._cause.raiseException()
        self._pending = pending
        try:
            return await pending
        finally:
            self._pending = None

    def _wake(self) -> None:
        if self._wakeUp is not None:
            wakeUp, self._wakeUp = self._wakeUp, None
            wakeUp.callback(None)

    async def _converse(self) -> None:
        if not self._account.hasRoom(0):
            raise PolicyError("too much is under way for this key here, or its replies are not read: try again later")
        await self._wait(self._door.call(self._openSession))
        try:
            while not isinstance(event := await self._event(), EndOfInput):
                match event:
                    case Hello():
                        self.transport.write(self._connection.sendHello())
                    case VersionAgreed():
                        pass
                    case RequestStarted(command):
                        self._command = command
                        self._stall.start()
                        right, refusal = self.REQUIRED.get(command, (Right.TRUST, f"{command.name} is not allowed"))
                        self._policy.demand(right, refusal)
                    case _:
                        await self._perform(event)
                        self._stall.stop()
                        self._command = None
        except NixServeError:
            # This is about the request read last: those before it come first.
            await self._settle()
            raise
        await self._settle()
        self._exit(0)

    async def _perform(self, request: Any) -> None:
        perform: Callable[[Request], Coroutine[Any, Any, None]] = getattr(self, f"cmd_{request.command.camelName}")
        if self._gathers(request):
            await perform(request)
            return
        if self._small or self._dumps:
            await self._settle()
        size = self._workMemory(request)
        if not self._beginsAtOnce(size):
            await self._beginWork(size)
        await perform(request)
        await self._endWork()

    def _workMemory(self, request: Request) -> int:
        """Bytes that there must be for working off a request."""
        if isinstance(request, BuildPaths | BuildDerivation):
            # It may wait for hours, and others for memory meanwhile.
            return 0
        if isinstance(request, QueryClosure):
            return max(WORK_MEMORY, min(ANSWER_MEMORY, self._account.share // 3))
        return WORK_MEMORY

    def _beginsAtOnce(self, size: int) -> bool:
        """Small requests, of which there may be thousands a second, need no look at what everybody holds."""
        self._large = self._connection.requestSize > MAX_SMALL_REQUEST
        if self._large or not self._account.takes(size):
            return False
        self._working = size
        return True

    async def _beginWork(self, size: int) -> None:
        """Wait until there is memory for what a request needs."""
        await self._room(size)
        self._working = size
        self._account.grew(size)

    async def _endWork(self) -> None:
        """It is replied to. The next one comes when the peer has read enough of that."""
        unsent = self.transport.unsent
        if unsent > MAX_UNSENT:
            await self._wait(drained(self.transport))
        working, self._working = self._working, 0
        if self._large or unsent > SMALL_REPLY or not self._account.gives(working):
            self._account.requestEnds()

    def _gathers(self, request: Any) -> bool:
        """Is this request one more of those that are postponed?"""
        if isinstance(request, AddToStoreNar):
            return not self._dumps and request.info.narSize <= MAX_SMALL_NAR
        return isinstance(request, DumpStorePath) and not self._small

    async def _settle(self) -> None:
        """
        Work off what was postponed, and reply. What a request is refused for is raised after the replies to those
        before it, and the rest is dropped.
        """
        small, self._small, self._smallSize = self._small, [], 0
        dumps, self._dumps = self._dumps, []
        command = self._command
        if not small and not dumps:
            return
        await self._beginWork(WORK_MEMORY)
        if small:
            self._command = Command.ADD_TO_STORE_NAR
            await self._addSmall(small)
        if dumps:
            self._command = Command.DUMP_STORE_PATH
            self._stall.start()
            await self._stream(dumps, partial(self._open.narsFromPaths, dumps))
        await self._endWork()
        self._command = command
        if command is None:
            self._stall.stop()

    async def _addSmall(self, objects: list[tuple[ValidPathInfo, bytes]]) -> None:
        while objects:
            added = await self._call(self._open.addSmallPaths, objects)
            objects = objects[added:]
            self.transport.write(b"".join([self._connection.sendReply(None) for _ in range(added)]))

    def _openSession(self) -> None:
        """In a worker. The result is kept here, not returned: L{_free} must find it whatever happened since."""
        self._session = self._store.openSession()

    @property
    def _open(self) -> StoreSession:
        assert self._session is not None, "the conversation begins with opening it"
        return self._session

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """
        Do something on the store. The peer need not act meanwhile, however long it takes.
        """
        self._stall.stop()
        try:
            return await self._wait(self._door.call(function, *args, **kwargs))
        finally:
            self._stall.start()

    def _rooted(self, paths: Collection[StorePath], function: Callable[[], T]) -> T:
        """
        In a worker: do something with paths that the peer asks about, which become roots first if it may write. No
        client of Nix 2.x sets the C{lock} flag, so a path that it was told to be there could vanish before it is
        used: the flag is taken as set.
        """
        if Right.WRITE in self._policy.rights:
            self._open.addTempRoots(paths)
        return function()

    # --- commands -----------------------------------------------------------------------------------------

    async def cmd_queryValidPaths(self, request: QueryValidPaths) -> None:
        """
        Which are valid. C{substitute} finds nothing: this store has no substituters.
        """
        await self._answer(request.paths, partial(self._open.queryValidPaths, request.paths))

    async def cmd_queryPathInfos(self, request: QueryPathInfos) -> None:
        """
        What is registered; what is not valid is left out. Of many paths it is asked, encoded and sent in parts: no
        worker and no memory is kept by who is slow to read it.
        """
        if len(request.paths) <= INFOS_AT_ONCE:
            # One part: a stream of it would cost as much as the answer.
            await self._answer(request.paths, partial(self._pathInfos, request.paths))
            return
        encode = self._connection.startReply()
        outflow = self._outflow(request.paths, lambda: encode(self._pathInfos(request.paths)))
        await self._wait(outflow.start())
        self._connection.endStream()

    def _pathInfos(self, paths: Collection[StorePath]) -> Iterator[ValidPathInfo]:
        """The infos of the valid ones, asked for some hundred at a time. Blocks: for a worker."""
        for batch in batches(inOrder(paths), INFOS_AT_ONCE):
            infos = self._open.queryPathInfos(batch)
            yield from (infos[path] for path in batch if path in infos)

    async def cmd_queryClosure(self, request: QueryClosure) -> None:
        """The closure. Its elements are kept by the roots that the given paths become."""
        closure = partial(self._open.queryClosure, request.paths, request.includeOutputs)
        await self._answer(request.paths, closure)

    async def cmd_dumpStorePath(self, request: DumpStorePath) -> None:
        """A NAR. Those of several requests that are here already are one stream."""
        self._connection.postponeReply()
        self._dumps.append(request.path)
        if len(self._dumps) >= MAX_POSTPONED:
            await self._settle()

    async def cmd_exportPaths(self, request: ExportPaths) -> None:
        """Send the objects as an export stream."""
        await self._stream(request.paths, partial(self._open.exportPaths, request.paths))

    async def cmd_addToStoreNar(self, request: AddToStoreNar) -> None:
        """
        A NAR with all that is to be registered about it. Small ones that are here already are added together.
        """
        if request.info.narSize <= MAX_SMALL_NAR:
            await self._gatherSmall(request.info)
            return
        inflow = self._inflow = NarInflow(
            self._door, self._throttle, partial(self._open.addToStore, request.info), self._end
        )
        await self._receiveNar(inflow)
        await self._finishNar(inflow, methodcaller("finish"))
        self._reply(None)

    async def _gatherSmall(self, info: ValidPathInfo) -> None:
        pieces: list[bytes] = []
        while isinstance(event := await self._event(), NarData):
            pieces.append(event.data)
        self._smallSize += info.narSize + self._connection.requestSize
        self._connection.postponeReply()
        self._small.append((info, b"".join(pieces)))
        if len(self._small) >= MAX_POSTPONED or self._smallSize >= MAX_QUEUED:
            await self._settle()

    async def cmd_importPaths(self, request: ImportPaths) -> None:
        """An export stream from the peer; each object is registered as it comes."""
        event: ServerEvent | None = None
        while not isinstance(event, EndOfImport):
            inflow = self._inflow = NarInflow(self._door, self._throttle, self._open.importPath, self._end)
            event = await self._receiveNar(inflow)
            if isinstance(event, EndOfNar):
                event = await self._event()
                assert isinstance(event, ImportedItem)
                item = event.item
                await self._finishNar(inflow, methodcaller("finish", item.path, item.references, item.deriver))
        self._reply(None)

    async def cmd_buildDerivation(self, request: BuildDerivation) -> None:
        """
        Build what comes with the request. Whoever is not trusted may build what can be verified: whose output paths
        follow from the derivation itself, or from what comes out.
        """
        builds = self._requireBuilds(request.options)
        if Right.TRUST not in self._policy.rights:
            try:
                request = await self._call(_verified, request, self._store.storeDir)
            except FormatError as e:
                raise PolicyError(f"{e}; building it needs the right 'trust', or its .drv in the store") from e
        await self._call(self._open.addTempRoots, request.mentioned)
        self._reply(await self._interruptible(builds.build(request, self._buildClient())))

    async def cmd_buildPaths(self, request: BuildPaths) -> None:
        """Build derivations that are in the store, and what they need."""
        builds = self._requireBuilds(request.options)
        self._reply(await self._interruptible(builds.buildPaths(request, self._buildClient())))

    def _requireBuilds(self, options: BuildOptions) -> IBuilds:
        """
        @raise PolicyError: there are no builds here, or not such.
        """
        if self._builds is None:
            raise PolicyError("this nixserve does not build: take it out of the builders, or use it for copying only")
        if options.refusal:
            raise PolicyError(options.refusal)
        return self._builds

    def _buildClient(self) -> BuildClient:
        return BuildClient(
            name=self._peer.key or self._peer.address,
            listener=self.transport.writeError,
            door=self._door,
            session=self._open,
            mustSandbox=Right.TRUST not in self._policy.rights,
        )

    async def _interruptible(self, building: Deferred[T]) -> T:
        """
        Wait for a build, which ends with the client's end of input: real clients send it only when they are gone. The
        client need not act meanwhile.
        """
        self._stall.stop()
        self._building = True
        if self._eof:
            self._end(Failure(PolicyError(_INTERRUPTED)))
        try:
            return await self._wait(building)
        finally:
            self._building = False
            self._stall.start()

    async def _receiveNar(self, inflow: NarInflow[Any]) -> ServerEvent:
        """
        Pass the NAR on.

        @return: the first event that is none of its bytes.
        """
        while isinstance(event := await self._event(), NarData):
            inflow.write(event.data)
        return event

    async def _finishNar(self, inflow: NarInflow[Any], finish: Callable[[Any], None]) -> None:
        self._inflow = None
        self._stall.stop()
        await self._wait(inflow.end(finish))
        self._stall.start()

    async def _answer(self, paths: Collection[StorePath], query: Callable[[], Any]) -> None:
        """Reply with what a query says about paths that become roots. It is encoded where it is made, in a worker."""
        encode = self._connection.startReply()
        self._pieces = await self._call(self._rooted, paths, lambda: deque(encode(query())))
        many = len(self._pieces) > 2
        if many or self._working > WORK_MEMORY:
            # Now it is known how much that is: what was set aside for more is free, even if nobody reads this.
            self._working = WORK_MEMORY
            self._large = self._large or many
            self._account.shrank()
        while self._pieces:
            self.transport.write(self._pieces.popleft())
            if self.transport.unsent > MAX_UNSENT:
                self._stall.touch()
                await self._wait(drained(self.transport))
        self._connection.endStream()

    async def _stream(self, paths: Collection[StorePath], begin: Callable[[], Iterator[bytes]]) -> None:
        """Reply with a stream of paths that become roots: the replies to all that was postponed, or to one request."""
        self._connection.startStream(self._connection.postponed or 1)
        await self._wait(self._outflow(paths, begin).start())
        self._connection.endStream()

    def _outflow(self, paths: Collection[StorePath], begin: Callable[[], Iterator[bytes]]) -> NarOutflow:
        return NarOutflow(self._door, self.transport, partial(self._rooted, paths, begin), self._stall.touch)

    def _reply(self, value: Any) -> None:
        self.transport.write(self._connection.sendReply(value))

    # --- the end ------------------------------------------------------------------------------------------

    def _end(self, cause: Failure) -> None:
        """End the conversation because of something outside it; the first cause counts."""
        if self._cause is None and not self._exiting:
            self._cause = cause
            if self._wakeUp is not None:
                self._wake()
            elif self._pending is not None:
                self._pending.cancel()

    def _conversationFailed(self, failure: Failure) -> None:
        """
        Say why, to the peer and in the log. Whatever is no error of ours is a bug, of which the peer need not
        know the details.
        """
        cause = self._cause or failure
        error = cause.value
        if isinstance(error, NixServeError):
            event = "session {peer.session} of {peer.address} failed: {error}"
            if cause.check(PolicyError, RemoteProtocolError):
                event = "session {peer.session} of {peer.address} refused: {error}"
            self.log.warn(event, **self._facts(), error=error, path=getattr(error, "path", None))
            self._tell(f"error: {peerText(error, self._store.storeDir.path)}")
        elif isinstance(error, ConnectionLost):
            self.log.info("session {peer.session} of {peer.address} lost its connection", **self._facts())
        elif isinstance(error, OSError):
            self.log.failure("session {peer.session} of {peer.address} failed", cause, **self._facts())
            self._tell(f"error: {peerText(error, self._store.storeDir.path)}")
        else:
            self.log.failure("a bug in session {peer.session} of {peer.address}", cause, **self._facts())
            self._tell(f"error: internal error; the log of the server has more about session {self._peer.session}")
        self._exit(1)

    def _exit(self, status: int) -> None:
        if not self._exiting:
            self._exiting = True
            self.transport.exit(status)

    def _free(self) -> None:
        """The conversation is over: let go of everything, after what still runs in a thread."""
        self._exiting = True
        self._stall.close()
        self._pieces.clear()
        self._account.close()
        self._door.abandon()
        session: object = self._session
        if self._door.working and isinstance(session, Interruptible):
            session.interrupt()
        closing = self._door.call(self._closeSession)
        closing.addErrback(lambda failure: self.log.failure("closing session {peer.session}", failure, **self._facts()))
        closing.addCallback(lambda _: self.log.info("session {peer.session} of {peer.address} ends", **self._facts()))
        closing.addCallback(self.ended.callback)

    def _closeSession(self) -> None:
        """Close the store's session. Blocks: for a worker."""
        if self._session is not None:
            self._session.close()

    def stop(self) -> None:
        """The server is going down."""
        if not self.connected:
            # It never began and holds nothing.
            self.ended.callback(None)
            return
        self._end(Failure(PolicyError("the server is being stopped; try again later")))

    def _stalled(self) -> None:
        # It is we who wait, for a lock or a disk.
        if self._door.working:
            self._stall.start()
            return
        self._end(Failure(RemoteProtocolError("nothing has moved for too long in the middle of a request; giving up")))

    def _tell(self, line: str) -> None:
        """One line on the peer's standard error."""
        self.transport.writeError(line.replace("\n", " ").encode("utf-8", "replace") + b"\n")

    def _tellWait(self, what: str) -> None:
        self._tell(f"waiting for {hidePaths(what, self._store.storeDir.path)}...")

    def _facts(self) -> dict[str, Any]:
        """The fields of every event."""
        return {"peer": self._peer, "key": self._peer.key, "command": self._command and self._command.name}


def _verified(request: BuildDerivation, storeDir: StoreDir) -> BuildDerivation:
    """
    Check a derivation that comes from somebody who is not trusted.

    @return: it, by what it is called in truth: the name that came with it would be recorded as the deriver of its
        outputs.
    @raise FormatError: it cannot be verified.
    """
    verifyBasicDerivation(request.drvPath, request.drv, storeDir)
    return replace(request, drvPath=drvPathOf(request.drv, storeDir))

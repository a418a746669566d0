"""
What a session does for its peer: L{Commands} has one C{cmd_} method for each command.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from operator import methodcaller
from typing import Any, ClassVar, TypeVar

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
from nixserve.codec.serve import batches, inOrder
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import FormatError, NixServeError, PolicyError
from nixserve.protocol.building import BuildClient, IBuilds
from nixserve.protocol.conversation import WORK_MEMORY, Conversation
from nixserve.protocol.interfaces import Interruptible
from nixserve.protocol.limits import MAX_SMALL_NAR
from nixserve.protocol.policy import Peer, Policy, Right
from nixserve.protocol.streams import MAX_QUEUED, NarInflow
from nixserve.store.api import Store, StoreSession

__all__ = ["Commands"]

T = TypeVar("T")

MAX_POSTPONED = 256
"""Requests that are worked off together at most, so that the first one's reply does not wait for long. Of NARs they
have at most L{MAX_QUEUED} bytes."""

INFOS_AT_ONCE = 256
"""Paths about which the store is asked at once: some milliseconds for a worker."""


class Commands:
    """
    Does what one peer asks for, on a session of the store that is its own.

    Small requests of one kind that are here already are read first, and then worked off together. Nobody notices:
    nothing is gathered when nothing more is there.

    @ivar command: which is performed, if any.
    """

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
        self, conversation: Conversation, store: Store, policy: Policy, peer: Peer, builds: IBuilds | None
    ) -> None:
        """
        @param builds: who builds on C{store}; without, requests to build are refused.
        """
        self.command: Command | None = None
        self._conversation = conversation
        self._connection = conversation.connection
        self._store = store
        self._session: StoreSession | None = None
        self._policy = policy
        self._peer = peer
        self._builds = builds
        self._inflow: NarInflow[Any] | None = None
        # What was gathered, of one kind.
        self._small: list[tuple[ValidPathInfo, bytes]] = []
        self._dumps: list[StorePath] = []

    # --- the session of the store -------------------------------------------------------------------------

    def _openSession(self) -> None:
        """For a worker. The result is kept here, not returned: L{close} must find it whatever has happened since."""
        self._session = self._store.openSession()

    @property
    def _open(self) -> StoreSession:
        assert self._session is not None, "it is opened first"
        return self._session

    def interrupt(self) -> None:
        """Have what waits for somebody far away fail soon."""
        session: object = self._session
        if isinstance(session, Interruptible):
            session.interrupt()

    def close(self) -> None:
        """Close the store's session, which frees everything. Blocks: for a worker."""
        if self._session is not None:
            self._session.close()

    def _rooted(self, paths: Collection[StorePath], function: Callable[[], T]) -> T:
        """
        In a worker: do something with paths that the peer asks about, which become roots first if it may write. No
        client of Nix 2.x sets the C{lock} flag, so a path that it was told to be there could vanish before it is
        used: the flag is taken as set.
        """
        if Right.WRITE in self._policy.rights:
            self._open.addTempRoots(paths)
        return function()

    # --- one request after the other ----------------------------------------------------------------------

    async def perform(self) -> None:
        """
        Do what the peer asks for, until its end of input.

        @raise NixServeError: a request is refused, breaks the rules, or fails. Those before it have been replied to.
        """
        await self._conversation.wait(self._conversation.door.call(self._openSession))
        try:
            while not isinstance(event := await self._event(), EndOfInput):
                match event:
                    case Hello():
                        self._conversation.transport.write(self._connection.sendHello())
                    case VersionAgreed():
                        pass
                    case RequestStarted(command):
                        self.command = command
                        self._conversation.requestBegins()
                        right, refusal = self.REQUIRED.get(command, (Right.TRUST, f"{command.name} is not allowed"))
                        self._policy.demand(right, refusal)
                    case _:
                        await self._perform(event)
                        self._conversation.requestEnds()
                        self.command = None
        except NixServeError:
            # This is about the request read last: those before it come first.
            await self._settle()
            raise
        await self._settle()

    async def _event(self) -> ServerEvent:
        """The next thing that the peer does. Where nothing more is here, what was gathered is worked off first."""
        while isinstance(event := self._connection.nextEvent(), Pause):
            if self._connection.postponed:
                await self._settle()
                continue
            if self._inflow is not None:
                self._inflow.push()
            await self._conversation.more()
        return event

    async def _perform(self, request: Any) -> None:
        perform: Callable[[Request], Coroutine[Any, Any, None]] = getattr(self, f"cmd_{request.command.camelName}")
        if self._gathers(request):
            await perform(request)
            return
        if self._small or self._dumps:
            await self._settle()
        size = self._workMemory(request)
        if not self._conversation.workBeginsAtOnce(size):
            await self._conversation.workBegins(size)
        await perform(request)
        await self._conversation.workEnds()

    def _workMemory(self, request: Request) -> int:
        """Bytes that there must be for working off a request."""
        if isinstance(request, BuildPaths | BuildDerivation):
            # It may wait for hours, and others for memory meanwhile.
            return 0
        return self._conversation.answerMemory if isinstance(request, QueryClosure) else WORK_MEMORY

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
        small, self._small, self._conversation.gathered = self._small, [], 0
        dumps, self._dumps = self._dumps, []
        command = self.command
        if not small and not dumps:
            return
        await self._conversation.workBegins(WORK_MEMORY)
        if small:
            self.command = Command.ADD_TO_STORE_NAR
            await self._addSmall(small)
        if dumps:
            self.command = Command.DUMP_STORE_PATH
            self._conversation.requestBegins()
            await self._stream(dumps, partial(self._open.narsFromPaths, dumps))
        await self._conversation.workEnds()
        self.command = command
        if command is None:
            self._conversation.requestEnds()

    async def _addSmall(self, objects: list[tuple[ValidPathInfo, bytes]]) -> None:
        while objects:
            added = await self._conversation.call(self._open.addSmallPaths, objects)
            objects = objects[added:]
            replies = [self._connection.sendReply(None) for _ in range(added)]
            self._conversation.transport.write(b"".join(replies))

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
        infos = partial(self._rooted, request.paths, lambda: encode(self._pathInfos(request.paths)))
        await self._conversation.stream(infos)
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
        inflow = self._beginNar(partial(self._open.addToStore, request.info))
        await self._receiveNar(inflow)
        await self._finishNar(inflow, methodcaller("finish"))
        self._conversation.reply(None)

    async def _gatherSmall(self, info: ValidPathInfo) -> None:
        pieces: list[bytes] = []
        while isinstance(event := await self._event(), NarData):
            pieces.append(event.data)
        self._conversation.gathered += info.narSize + self._connection.requestSize
        self._connection.postponeReply()
        self._small.append((info, b"".join(pieces)))
        if len(self._small) >= MAX_POSTPONED or self._conversation.gathered >= MAX_QUEUED:
            await self._settle()

    async def cmd_importPaths(self, request: ImportPaths) -> None:
        """An export stream from the peer; each object is registered as it comes."""
        event: ServerEvent | None = None
        while not isinstance(event, EndOfImport):
            inflow = self._beginNar(self._open.importPath)
            event = await self._receiveNar(inflow)
            if isinstance(event, EndOfNar):
                event = await self._event()
                assert isinstance(event, ImportedItem)
                item = event.item
                await self._finishNar(inflow, methodcaller("finish", item.path, item.references, item.deriver))
        self._conversation.reply(None)

    async def cmd_buildDerivation(self, request: BuildDerivation) -> None:
        """
        Build what comes with the request. Whoever is not trusted may build what can be verified: whose output paths
        follow from the derivation itself, or from what comes out.
        """
        builds = self._requireBuilds(request.options)
        if Right.TRUST not in self._policy.rights:
            try:
                request = await self._conversation.call(_verified, request, self._store.storeDir)
            except FormatError as e:
                raise PolicyError(f"{e}; building it needs the right 'trust', or its .drv in the store") from e
        await self._conversation.call(self._open.addTempRoots, request.mentioned)
        building = builds.build(request, self._buildClient())
        self._conversation.reply(await self._conversation.interruptible(building))

    async def cmd_buildPaths(self, request: BuildPaths) -> None:
        """Build derivations that are in the store, and what they need."""
        builds = self._requireBuilds(request.options)
        building = builds.buildPaths(request, self._buildClient())
        self._conversation.reply(await self._conversation.interruptible(building))

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
            listener=self._conversation.transport.writeError,
            door=self._conversation.door,
            session=self._open,
            mustSandbox=Right.TRUST not in self._policy.rights,
        )

    def _beginNar(self, begin: Callable[[], Any]) -> NarInflow[Any]:
        """
        @param begin: gives the writer; called in a worker.
        """
        conversation = self._conversation
        self._inflow = NarInflow(conversation.door, conversation.throttle, begin, conversation.end)
        return self._inflow

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
        await self._conversation.ours(inflow.end(finish))

    async def _answer(self, paths: Collection[StorePath], query: Callable[[], Any]) -> None:
        """Reply with what a query says about paths that become roots. It is encoded where it is made, in a worker."""
        encode = self._connection.startReply()
        pieces = await self._conversation.call(self._rooted, paths, lambda: deque(encode(query())))
        await self._conversation.send(pieces)
        self._connection.endStream()

    async def _stream(self, paths: Collection[StorePath], begin: Callable[[], Iterator[bytes]]) -> None:
        """Reply with a stream of paths that become roots: the replies to all that was postponed, or to one request."""
        self._connection.startStream(self._connection.postponed or 1)
        await self._conversation.stream(partial(self._rooted, paths, begin))
        self._connection.endStream()


def _verified(request: BuildDerivation, storeDir: StoreDir) -> BuildDerivation:
    """
    Check a derivation that comes from somebody who is not trusted.

    @return: it, by what it is called in truth: the name that came with it would be recorded as the deriver of its
        outputs.
    @raise FormatError: it cannot be verified.
    """
    verifyBasicDerivation(request.drvPath, request.drv, storeDir)
    return replace(request, drvPath=drvPathOf(request.drv, storeDir))

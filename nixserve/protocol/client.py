"""
L{ServeClient}: the other end of C{nix-store --serve}. It feeds a L{ClientConnection} and has one
Deferred-returning method for each command.

Any number of requests may be under way: each is sent behind the one before it without waiting for replies, which
come in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredLock
from twisted.internet.error import ConnectionDone, ProcessDone, ProcessTerminated
from twisted.internet.interfaces import IHalfCloseableProtocol, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.codec.buildresult import BuildResult
from nixserve.codec.connection import ClientConnection
from nixserve.codec.derivation import BasicDerivation
from nixserve.codec.events import EndOfExport, EndOfInput, EndOfNar, ImportedItem, NarData, Pause, Reply, VersionAgreed
from nixserve.codec.messages import (
    AddToStoreNar,
    BuildDerivation,
    BuildOptions,
    BuildPaths,
    BuildPathsResult,
    Command,
    DumpStorePath,
    ExportPaths,
    ImportItem,
    ImportPaths,
    QueryClosure,
    QueryPathInfos,
    QueryValidPaths,
    Request,
)
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.serve import MAX_INFOS_ASKED, batches, dependsOnVersion, hasCommand, hasHashes
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import LocalProtocolError, NixServeError, RemoteError
from nixserve.protocol.interfaces import IErrorReceiver, IServeTransport
from nixserve.protocol.streams import NarOutflow
from nixserve.protocol.workers import Door, whenFired

__all__ = ["ServeClient"]

MAX_REMOTE_ERROR = 16 * 1024
"""How much of the remote's standard error is kept for error messages: its end, where the reason stands."""

MAX_SAID_LINES = 5
"""How many lines of it an error shows. After a build it may be a long log."""

MAX_BATCHES_ASKED = 8
"""Requests for path infos without an answer. At 100 ms for the way there and back these are 80,000 infos a second."""

MAX_INFOS_SPACE = 384 * 1024 * 1024
"""
What the references and signatures of all path infos of one question may take up here. Those of a hundred thousand
paths, the largest closures known, take up less than half of that.
"""

_ELEMENT_SPACE = 64
"""What each of them takes up beside its characters: a text of Python, and its place in a set."""

CLOSE_SECONDS = 3.0
"""How long a remote may take to end by itself when it is told that nothing more will come."""

_DEFAULT_OPTIONS = BuildOptions()


class _Awaited:
    """
    A request whose reply is still to come.

    @ivar about: what it does, as the beginning of an error; or empty.
    @ivar path: what it is about, if that is one path.
    @ivar sink: takes the bytes of a reply that is a stream.
    @ivar onItem: takes what follows each NAR in an export stream.
    """

    __slots__ = ("about", "onItem", "path", "reply", "sink")

    def __init__(
        self,
        reply: Deferred[Any],
        about: str = "",
        path: StorePath | None = None,
        sink: Callable[[bytes], None] | None = None,
        onItem: Callable[[ImportItem], None] | None = None,
    ) -> None:
        self.reply = reply
        self.about = about
        self.path = path
        self.sink = sink
        self.onItem = onItem


@implementer(IHalfCloseableProtocol, IErrorReceiver)
class ServeClient(Protocol):
    """
    A client's session. C{async with} closes it at the end of the block, or cuts it if an exception leaves the block.

    A session in which anything failed is dead: every request under way and every later one fails with the same
    L{RemoteError}, which names the remote and what it wrote on its standard error.

    Cancelling a request that has not been sent takes it back. Cancelling a query that has been gives up its answer;
    the session goes on. A transfer or a build that has begun can only be stopped by cutting the connection, so that is
    what cancelling it does; the remote then kills the build.

    @ivar ready: fires with the version spoken, or with why there is none.
    @ivar ended: fires when the connection is gone.
    @ivar name: what the remote is called in errors, or empty.
    """

    transport: IServeTransport

    def __init__(
        self,
        storeDir: StoreDir,
        onError: Callable[[bytes], None] = lambda data: None,
        name: str = "",
        clock: IReactorTime | None = None,
    ) -> None:
        """
        @param onError: called with the remote's standard error as it comes, cut anywhere.
        @param clock: by which L{close} loses patience; without one it never does.
        """
        self.ready: Deferred[int] = Deferred()
        self.ended: Deferred[None] = Deferred()
        self.name = name
        self.storeDir = storeDir
        self._connection = ClientConnection(storeDir)
        self._onError = onError
        self._clock = clock
        # One request after the other is written; those that have not been yet, and those without a reply.
        self._sending = DeferredLock()
        self._unsent: set[_Awaited] = set()
        self._awaited: deque[_Awaited] = deque()
        self._outflow: Deferred[None] | None = None
        self._errorText = b""
        self._failure: NixServeError | None = None
        self._closing = False
        # Fires when the version is known, or never will be.
        self._decided: Deferred[None] = Deferred()

    @property
    def version(self) -> int | None:
        """The version spoken, as C{major << 8 | minor}; C{None} until L{ready} has fired."""
        return self._connection.version

    def knows(self, command: Command) -> bool:
        """Has the version spoken this command? To be asked when L{ready} has fired."""
        return hasCommand(self._agreed, command)

    def tellsHashes(self) -> bool:
        """Does the remote say what is in its paths? Likewise."""
        return hasHashes(self._agreed)

    @property
    def _agreed(self) -> int:
        assert self.version is not None, "it has answered"
        return self.version

    # --- commands -----------------------------------------------------------------------------------------

    def queryValidPaths(
        self, paths: Collection[StorePath], lock: bool = False, substitute: bool = False
    ) -> Deferred[frozenset[StorePath]]:
        """
        Which of C{paths} are valid there.

        @param lock: all of them, valid or not, become roots there until this session ends.
        @param substitute: the remote shall try to fetch the missing ones from its own substituters first.
        """
        return self._ask(QueryValidPaths(frozenset(paths), lock, substitute))

    def queryPathInfos(self, paths: Collection[StorePath]) -> Deferred[dict[StorePath, ValidPathInfo]]:
        """
        What is registered about those of C{paths} that are valid there. Many are asked about in several requests, so
        that no reply is large.
        """
        return Deferred.fromCoroutine(self._queryPathInfos(frozenset(paths)))

    def queryClosure(
        self, paths: Collection[StorePath], includeOutputs: bool = False
    ) -> Deferred[frozenset[StorePath]]:
        """C{paths} and everything they refer to; with C{includeOutputs} also what derivations have built."""
        return self._ask(QueryClosure(frozenset(paths), includeOutputs))

    def dumpStorePath(self, path: StorePath, sink: Callable[[bytes], None]) -> Deferred[None]:
        """
        Fetch a NAR.

        @param sink: called with its bytes as they come. To slow down the remote, pause the transport.
        @return: fires after the last byte. Nothing has been checked but the shape.
        """
        awaited = _Awaited(Deferred(self._cancelled), f"fetching '{path}'", path, sink)
        return self._ask(DumpStorePath(path), awaited)

    def exportPaths(
        self, paths: Sequence[StorePath], sink: Callable[[bytes], None], onItem: Callable[[ImportItem], None]
    ) -> Deferred[None]:
        """
        Fetch an export stream of exactly these paths, references first. Servers from Nix 2.32 on know it no more.

        @param sink: called with the bytes of each NAR as they come.
        @param onItem: called after each NAR with what it was.
        @return: fires after the last one. Nothing has been checked but the shape.
        """
        awaited = _Awaited(Deferred(self._cancelled), "exporting paths", None, sink, onItem)
        return self._ask(ExportPaths(tuple(paths)), awaited)

    def addToStoreNar(self, info: ValidPathInfo, door: Door, begin: Callable[[], Iterator[bytes]]) -> Deferred[None]:
        """
        Send a path, of which the remote must have the references by then.

        @param door: what C{begin} is called through.
        @param begin: gives the NAR in chunks.
        @return: fires when the remote has acknowledged it.
        """
        return self.addToStoreNars([info], door, begin)

    def addToStoreNars(
        self,
        infos: Iterable[ValidPathInfo],
        door: Door,
        begin: Callable[[], Iterator[bytes]],
        acknowledged: Callable[[ValidPathInfo], None] = lambda info: None,
    ) -> Deferred[None]:
        """
        Send paths, one straight behind the other, each after its references. Small ones cost neither side a turn of
        its own.

        @param infos: in this order.
        @param begin: gives all NARs in the same order, each of exactly C{narSize} bytes, in chunks cut anywhere.
        @param acknowledged: called for each path when the remote has it.
        @return: fires when the remote has acknowledged all of them.
        """
        upload = _Upload(self, infos, acknowledged, Deferred(self._cancelled))

        async def send() -> None:
            await self._stream(door, upload, begin)
            upload.end()

        return self._perform(_Awaited(upload.complete), send, answered=False)

    def importPaths(self, door: Door, begin: Callable[[], Iterator[bytes]]) -> Deferred[None]:
        """
        Send an export stream: what servers below 2.5 take instead of L{addToStoreNar}.

        @param begin: gives the stream in chunks, as L{nixserve.store.api.StoreSession.exportPaths} does.
        @return: fires when the remote has acknowledged all of it.
        """
        awaited = _Awaited(Deferred(self._cancelled), "importing paths")

        async def send() -> None:
            self.transport.write(self._connection.sendRequest(ImportPaths()))
            await self._stream(door, self.transport, begin)
            self._connection.endImport()

        return self._perform(awaited, send)

    def buildDerivation(
        self, drvPath: StorePath, drv: BasicDerivation, options: BuildOptions = _DEFAULT_OPTIONS
    ) -> Deferred[BuildResult]:
        """
        Build a derivation that need not be there, from inputs that must be. Its log comes as standard error.

        @param drvPath: what it is called.
        @param drv: its C{inputSrcs} are all that it may use.
        @return: what came of it; a build that fails is a result as well.
        """
        awaited = _Awaited(Deferred(self._cancelled), f"building '{drvPath}'", drvPath)
        return self._ask(BuildDerivation(drvPath, drv, options), awaited)

    def buildPaths(
        self, targets: Sequence[str], options: BuildOptions = _DEFAULT_OPTIONS
    ) -> Deferred[BuildPathsResult]:
        """
        Build derivations that are there, and what they need. Their logs come as standard error.

        @param targets: as L{BuildPaths} has them.
        @return: what came of it; a build that fails is a result as well.
        """
        awaited = _Awaited(Deferred(self._cancelled), "building")
        return self._ask(BuildPaths(tuple(targets), options), awaited)

    # --- the end ------------------------------------------------------------------------------------------

    def close(self) -> Deferred[None]:
        """
        End the session, in which no request may be under way: the remote frees what it kept for it. One that does not
        end by itself is cut off.

        @return: fires when the connection is gone.
        """
        if self._failure is None and not self._closing:
            self._connection.sendEOF()
            if self._clock is not None:
                patience = self._clock.callLater(CLOSE_SECONDS, self.cut)
                self.ended.addCallback(lambda _: patience.cancel() if patience.active() else None)
        self._closing = True
        self.transport.loseConnection()
        return whenFired(self.ended)

    def cut(self) -> None:
        """End the session at once, whatever is under way: the remote gives up what it was doing for it."""
        self._cut("the session was cut")

    async def __aenter__(self) -> ServeClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.cut()
        await self.close()

    # --- sending ------------------------------------------------------------------------------------------

    def _ask(self, request: Request, awaited: _Awaited | None = None) -> Deferred[Any]:
        """Send what is a request and nothing more."""

        async def send() -> None:
            self.transport.write(self._connection.sendRequest(request))

        awaited = awaited or _Awaited(Deferred(), "asking about paths")
        return self._perform(awaited, send, versioned=dependsOnVersion(request))

    async def _queryPathInfos(self, paths: frozenset[StorePath]) -> dict[StorePath, ValidPathInfo]:
        unasked = deque(batches(sorted(paths), MAX_INFOS_ASKED)) or deque([[]])
        infos: dict[StorePath, ValidPathInfo] = {}
        asked: deque[Deferred[dict[StorePath, ValidPathInfo]]] = deque()
        space = 0
        try:
            while unasked or asked:
                if unasked and len(asked) <= MAX_BATCHES_ASKED:
                    asked.append(self._ask(QueryPathInfos(frozenset(unasked.popleft()))))
                    continue
                found = await asked.popleft()
                infos |= found
                space += sum(map(_spaceOf, found.values()))
                if space > MAX_INFOS_SPACE:
                    self._cut(f"what it says of {len(paths)} paths takes up more than {MAX_INFOS_SPACE} bytes")
                    assert self._failure is not None, "it was cut"
                    raise self._failure
        finally:
            for answer in asked:
                # It fails for the reason that is on its way up, or nobody wants it any more.
                answer.addErrback(lambda _: None)
        return infos

    def _perform(
        self,
        awaited: _Awaited,
        send: Callable[[], Awaitable[None]],
        *,
        versioned: bool = False,
        answered: bool = True,
    ) -> Deferred[Any]:
        """
        Send something when it is its turn.

        @param versioned: it is written otherwise in other versions: it, and whatever is asked after it, waits for the
            server's hello.
        @param answered: C{awaited} is for the next reply; otherwise C{send} says what is awaited.
        """
        if self._failure is not None:
            awaited.reply.errback(self._failure)
            return awaited.reply
        self._unsent.add(awaited)

        async def turn() -> None:
            if versioned:
                await self._decided
            self._unsent.discard(awaited)
            if awaited.reply.called:
                # Cancelled while it waited, or failed with all the others.
                return
            if answered:
                self._awaited.append(awaited)
            await send()

        self._sending.run(lambda: Deferred.fromCoroutine(turn()).addErrback(self._sendingFailed, awaited))
        return awaited.reply

    async def _stream(self, door: Door, consumer: Any, begin: Callable[[], Iterator[bytes]]) -> None:
        self._outflow = NarOutflow(door, consumer, begin).start()
        try:
            await self._outflow
        finally:
            self._outflow = None

    def _sendingFailed(self, failure: Failure, awaited: _Awaited) -> None:
        """
        Sending went wrong half way: nothing can follow. Whoever wanted it sent hears why; the others, that the session
        is over. Called before the next request gets its turn.
        """
        if not awaited.reply.called:
            awaited.reply.errback(self._failure or failure)
        if self._failure is None:
            self._cut(failure.getErrorMessage())

    def _cancelled(self, reply: Deferred[Any]) -> None:
        """A transfer or build is given up. One that has not been sent will not be; otherwise nothing else stops it."""
        if all(awaited.reply is not reply for awaited in self._unsent):
            reply.errback(CancelledError())
            self._cut("a request that was under way has been cancelled")

    def _cut(self, why: str) -> None:
        self._fail(why, decidedHere=True)
        self.transport.abortConnection()

    # --- the transport ------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Say hello."""
        self.transport.write(self._connection.sendHello())

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the remote, and do what their events say."""
        if self._failure is None:
            self._connection.receiveData(data)
            self._advance()

    def errorReceived(self, data: bytes) -> None:
        """Standard error of the remote."""
        self._errorText = (self._errorText + data)[-MAX_REMOTE_ERROR:]
        self._onError(data)

    def readConnectionLost(self) -> None:
        """The remote sends nothing more; what it says on standard error may still come."""

    def writeConnectionLost(self) -> None:
        """The remote takes nothing more; why, it says on standard error or in its reply."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The remote is gone."""
        self._connection.receiveEOF()
        if self._failure is None:
            self._advance(_goneBecause(reason))
        if self._failure is None and (self._awaited or self._unsent or not self.ready.called):
            self._fail(_goneBecause(reason))
        self.ended.callback(None)

    def _advance(self, gone: str = "") -> None:
        """
        Deal with what has come.

        @param gone: why nothing more will.
        """
        try:
            # Whoever hears of an event may cut the connection.
            while self._failure is None and not isinstance(event := self._connection.nextEvent(), Pause | EndOfInput):
                match event:
                    case VersionAgreed(version):
                        self.ready.callback(version)
                        self._decided.callback(None)
                    case NarData(data):
                        sink = self._awaited[0].sink
                        assert sink is not None, "only streams are answered with NARs"
                        sink(data)
                    case ImportedItem(item):
                        onItem = self._awaited[0].onItem
                        assert onItem is not None, "only ExportPaths is answered with items"
                        onItem(item)
                    case EndOfNar():
                        if self._awaited[0].onItem is None:
                            self._awaited.popleft().reply.callback(None)
                    case EndOfExport():
                        self._awaited.popleft().reply.callback(None)
                    case Reply(_, value):
                        self._awaited.popleft().reply.callback(value)
        except NixServeError as e:
            self._fail(f"{e}: {gone}" if gone else str(e), decidedHere=not gone)
            self.transport.abortConnection()

    def _fail(self, why: str, decidedHere: bool = False) -> None:
        if self._failure is None:
            first = self._awaited[0] if self._awaited else None
            about, path = (first.about, first.path) if first else ("", None)
            self._failure = RemoteFailure(self.name, about, why, _lastLines(self._errorText), path, decidedHere)
        failure = self._failure
        awaited, self._awaited = [*self._awaited, *self._unsent], deque()
        self._unsent.clear()
        for one in awaited:
            if not one.reply.called:
                one.reply.errback(failure)
        if not self.ready.called:
            self.ready.errback(failure)
            self._decided.callback(None)
        if self._outflow is not None:
            # What is being sent will never arrive: let go of the store it comes from.
            self._outflow.cancel()


class RemoteFailure(RemoteError):
    """
    The remote refused, failed, or is gone.

    @ivar name: what the remote is called.
    @ivar about: what was being done, or empty.
    @ivar why: how that was noticed here.
    @ivar said: the last lines of its standard error, or empty.
    @ivar path: what was being transferred or built, if it is known.
    @ivar decidedHere: this side has ended the session, because of what came: whatever the remote has said, the reason
        is C{why}.
    """

    def __init__(
        self, name: str, about: str, why: str, said: str, path: StorePath | None, decidedHere: bool = False
    ) -> None:
        self.name = name
        self.about = about
        self.why = why
        self.said = said
        self.path = path
        self.decidedHere = decidedHere
        super().__init__(name, about, why, said, path, decidedHere)

    def __str__(self) -> str:
        reason = f"the remote said: {self.said}" if self.said else self.why
        isLog = self.about.startswith("building") and "error:" not in self.said
        if self.said and (self.decidedHere or isLog):
            # It may be anything, such as the log of the build: no reason.
            reason = f"{self.why}; {reason}"
        return ": ".join(filter(None, (self.name, self.about, reason)))


def _spaceOf(info: ValidPathInfo) -> int:
    """What a remote can make large of a path info, in bytes of memory."""
    texts = [*info.references, *info.sigs]
    return sum(map(len, texts)) + _ELEMENT_SPACE * len(texts)


def _lastLines(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return "\n".join(lines[-MAX_SAID_LINES:])


def _goneBecause(reason: Failure) -> str:
    """What a transport says of its end, for a person."""
    ended = reason.value
    if isinstance(ended, ProcessTerminated):
        return f"it was killed by signal {ended.signal}" if ended.signal else f"it exited with status {ended.exitCode}"
    if isinstance(ended, ConnectionDone | ProcessDone):
        return "it ended the session"
    return reason.getErrorMessage()


class _Upload:
    """
    Where the NARs of several paths go: cut where one ends and the next begins, with a request before each.
    """

    def __init__(
        self,
        client: ServeClient,
        infos: Iterable[ValidPathInfo],
        acknowledged: Callable[[ValidPathInfo], None],
        complete: Deferred[None],
    ) -> None:
        self._client = client
        self._infos = iter(infos)
        self._acknowledged = acknowledged
        self._left = 0
        self._unacknowledged = 1
        self.complete = complete
        self.registerProducer = client.transport.registerProducer
        self.unregisterProducer = client.transport.unregisterProducer

    def write(self, data: bytes) -> None:
        """
        Bytes of the NARs.

        @raise LocalProtocolError: there are more than all paths together have.
        """
        while data:
            if not self._left:
                self._begin()
            piece, data = data[: self._left], data[self._left :]
            self._left -= len(piece)
            self._client.transport.write(self._client._connection.sendNarData(piece))
            if not self._left:
                self._client._connection.endNar()

    def _begin(self) -> None:
        info = next(self._infos, None)
        if info is None:
            raise LocalProtocolError("more bytes of NARs than their sizes say")
        self._left = info.narSize
        self._unacknowledged += 1
        reply: Deferred[None] = Deferred()
        reply.addCallbacks(self._added, self._failed, (info,))
        self._client._awaited.append(_Awaited(reply, f"adding '{info.path}'", info.path))
        self._client.transport.write(self._client._connection.sendRequest(AddToStoreNar(info)))

    def end(self) -> None:
        """
        All NARs have been written.

        @raise LocalProtocolError: one is missing, or incomplete.
        """
        if self._left or next(self._infos, None) is not None:
            raise LocalProtocolError(f"the NARs end {self._left} bytes early, or before the last")
        self._oneLess()

    def _added(self, _: None, info: ValidPathInfo) -> None:
        self._acknowledged(info)
        self._oneLess()

    def _failed(self, failure: Failure) -> None:
        if not self.complete.called:
            self.complete.errback(failure)

    def _oneLess(self) -> None:
        self._unacknowledged -= 1
        if not self._unacknowledged and not self.complete.called:
            self.complete.callback(None)

"""
L{ServeClient}: the other end of C{nix-store --serve}. It feeds a L{ClientConnection} and has one
Deferred-returning method for each command.

Any number of requests may be under way: each is sent behind the one before it without waiting for replies, which
come in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock, maybeDeferred
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.codec.buildresult import BuildResult
from nixserve.codec.connection import (
    ClientConnection,
    EndOfInput,
    EndOfNar,
    NarData,
    Pause,
    Reply,
    VersionAgreed,
)
from nixserve.codec.derivation import BasicDerivation
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.serve import (
    AddToStoreNar,
    BuildDerivation,
    BuildOptions,
    BuildPaths,
    BuildPathsResult,
    DumpStorePath,
    QueryClosure,
    QueryPathInfos,
    QueryValidPaths,
    Request,
    dependsOnVersion,
)
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import NixServeError, RemoteError
from nixserve.protocol.interfaces import IErrorReceiver, IServeTransport
from nixserve.protocol.streams import NarOutflow
from nixserve.protocol.workers import Door

__all__ = ["ServeClient"]

MAX_REMOTE_ERROR = 16 * 1024
"""How much of the remote's standard error is kept for error messages: its end, where the reason stands."""

_DEFAULT_OPTIONS = BuildOptions()


class _Awaited:
    """A reply that is still to come."""

    __slots__ = ("reply", "sink")

    def __init__(self, sink: Callable[[bytes], None] | None = None) -> None:
        self.reply: Deferred[Any] = Deferred()
        self.sink = sink


@implementer(IHalfCloseableProtocol, IErrorReceiver)
class ServeClient(Protocol):
    """
    A client's session.

    A session in which anything failed is dead: every request under way and every later one fails with the same
    L{RemoteError}, whose text ends with what the remote wrote on its standard error.

    @ivar ready: fires with the version spoken, or with why there is none.
    @ivar ended: fires when the connection is gone.
    """

    transport: IServeTransport

    def __init__(self, storeDir: StoreDir, onError: Callable[[bytes], None] = lambda data: None) -> None:
        """
        @param onError: called with the remote's standard error as it comes, cut anywhere.
        """
        self.ready: Deferred[int] = Deferred()
        self.ended: Deferred[None] = Deferred()
        self._connection = ClientConnection(storeDir)
        self._onError = onError
        self._sending = DeferredLock()
        self._awaited: deque[_Awaited] = deque()
        self._outflow: Deferred[None] | None = None
        self._errorText = b""
        self._failure: NixServeError | None = None
        self._closing = False
        # Fires when the version is known, or never will be.
        self._decided: Deferred[None] = Deferred()

    # --- commands -----------------------------------------------------------------------------------------

    def queryValidPaths(
        self, paths: Collection[StorePath], lock: bool = False, substitute: bool = False
    ) -> Deferred[frozenset[StorePath]]:
        """Which of C{paths} are valid there; with C{lock} they stay so until this session ends."""
        return self._ask(QueryValidPaths(frozenset(paths), lock, substitute))

    def queryPathInfos(self, paths: Collection[StorePath]) -> Deferred[dict[StorePath, ValidPathInfo]]:
        """What is registered about those of C{paths} that are valid there."""
        return self._ask(QueryPathInfos(frozenset(paths)))

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
        return self._ask(DumpStorePath(path), sink)

    def addToStoreNar(self, info: ValidPathInfo, door: Door, begin: Callable[[], Iterator[bytes]]) -> Deferred[None]:
        """
        Send a path, of which the remote must have the references by then.

        @param door: what C{begin} is called through.
        @param begin: gives the NAR in chunks.
        @return: fires when the remote has acknowledged it.
        """
        awaited = self._await()

        async def send() -> None:
            self._send(AddToStoreNar(info))
            self._outflow = NarOutflow(door, _Counted(self.transport, self._connection), begin).start()
            await self._outflow
            self._connection.endNar()

        self._sending.run(lambda: Deferred.fromCoroutine(send()).addErrback(self._abort))
        return awaited.reply

    def buildDerivation(
        self, drvPath: StorePath, drv: BasicDerivation, options: BuildOptions = _DEFAULT_OPTIONS
    ) -> Deferred[BuildResult]:
        """
        Build a derivation that need not be there, from inputs that must be. Its log comes as standard error.

        @param drvPath: what it is called.
        @param drv: its C{inputSrcs} are all that it may use.
        @return: what came of it; a build that fails is a result as well.
        """
        return self._ask(BuildDerivation(drvPath, drv, options))

    def buildPaths(
        self, targets: Sequence[str], options: BuildOptions = _DEFAULT_OPTIONS
    ) -> Deferred[BuildPathsResult]:
        """
        Build derivations that are there, and what they need. Their logs come as standard error.

        @param targets: as L{BuildPaths} has them.
        @return: what came of it; a build that fails is a result as well.
        """
        return self._ask(BuildPaths(tuple(targets), options))

    def close(self) -> Deferred[None]:
        """
        End the session, in which no request may be under way: the remote frees what it kept for it.

        @return: fires when the connection is gone.
        """
        if self._failure is None and not self._closing:
            self._connection.sendEOF()
        self._closing = True
        self.transport.loseConnection()
        ended: Deferred[None] = Deferred()
        self.ended.addCallback(lambda _: ended.callback(None))
        return ended

    def _ask(self, request: Request, sink: Callable[[bytes], None] | None = None) -> Deferred[Any]:
        awaited = self._await(sink)
        send = self._sendInVersion if dependsOnVersion(request) else self._send
        self._sending.run(lambda: maybeDeferred(send, request).addErrback(self._abort))
        return awaited.reply

    def _await(self, sink: Callable[[bytes], None] | None = None) -> _Awaited:
        """
        Expect a reply. Requests are sent in the order in which they are made, so this is the order of replies
        too, and one whose turn to be sent never comes fails with the others.
        """
        awaited = _Awaited(sink)
        if self._failure is None:
            self._awaited.append(awaited)
        else:
            awaited.reply.errback(self._failure)
        return awaited

    async def _sendInVersion(self, request: Request) -> None:
        """What is written otherwise in other versions, and whatever is asked after it, waits for the server's hello."""
        await self._decided
        self._send(request)

    def _send(self, request: Request) -> None:
        if self._failure is not None:
            raise self._failure
        self.transport.write(self._connection.sendRequest(request))

    # --- the transport ------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Say hello."""
        self.transport.write(self._connection.sendHello())

    def dataReceived(self, data: bytes) -> None:
        """Bytes from the remote."""
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
            self._advance()
        if self._failure is None and (self._awaited or not self.ready.called):
            self._fail(reason.getErrorMessage())
        self.ended.callback(None)

    def _advance(self) -> None:
        try:
            while not isinstance(event := self._connection.nextEvent(), Pause | EndOfInput):
                match event:
                    case VersionAgreed(version):
                        self.ready.callback(version)
                        self._decided.callback(None)
                    case NarData(data):
                        sink = self._awaited[0].sink
                        assert sink is not None, "only DumpStorePath is answered with a NAR"
                        sink(data)
                    case EndOfNar():
                        self._awaited.popleft().reply.callback(None)
                    case Reply(_, value):
                        self._awaited.popleft().reply.callback(value)
        except NixServeError as e:
            self._fail(str(e))
            self.transport.abortConnection()

    def _abort(self, failure: Failure) -> None:
        """Sending went wrong half way: nothing can follow. Called before the next request gets its turn."""
        self._fail(failure.getErrorMessage())
        self.transport.abortConnection()

    def _fail(self, why: str) -> None:
        if self._failure is None:
            said = self._errorText.decode("utf-8", "replace").strip()
            self._failure = RemoteError(f"the remote said: {said}" if said else why)
        failure = self._failure
        awaited, self._awaited = self._awaited, deque()
        for one in awaited:
            one.reply.errback(failure)
        if not self.ready.called:
            self.ready.errback(failure)
            self._decided.callback(None)
        if self._outflow is not None:
            # What is being sent will never arrive: let go of the store it comes from.
            self._outflow.cancel()


class _Counted:
    """A transport as L{NarOutflow} needs it, that has the connection count the bytes of the NAR."""

    def __init__(self, transport: IServeTransport, connection: ClientConnection) -> None:
        self.registerProducer = transport.registerProducer
        self.unregisterProducer = transport.unregisterProducer
        self._transport = transport
        self._connection = connection

    def write(self, data: bytes) -> None:
        """Bytes of the NAR."""
        self._transport.write(self._connection.sendNarData(data))

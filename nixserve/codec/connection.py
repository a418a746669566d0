"""
A conversation in the serve protocol: L{ServerConnection} and L{ClientConnection}; bytes in, events out.

A connection object holds no socket and calls nobody. Its owner feeds it what arrives (C{receiveData}, C{receiveEOF}),
takes events out with C{nextEvent} until that answers C{NEED_DATA} or C{PAUSED} (L{nixserve.codec.events}), and sends
the bytes that the other methods return. Which steps are possible when, L{nixserve.codec.states} says, theory and
tables.

Whose fault something is, is decided here once: a L{FormatError} caused by bytes of the peer becomes a
L{RemoteProtocolError}.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, Final, Literal

from nixserve.codec import serve
from nixserve.codec.events import (
    NEED_DATA,
    PAUSED,
    ClientEvent,
    EndOfExport,
    EndOfImport,
    EndOfInput,
    EndOfNar,
    Hello,
    ImportedItem,
    NarData,
    Pause,
    Reply,
    RequestStarted,
    ServerEvent,
    VersionAgreed,
)
from nixserve.codec.messages import AddToStoreNar, Command, ExportPaths, Request
from nixserve.codec.nar import MAX_CHUNK
from nixserve.codec.narparser import NarParser
from nixserve.codec.serve import SERVE_VERSION, readCommand, readRequest, replyPieces, writeReply, writeRequest
from nixserve.codec.states import (
    CLIENT_RECEIVING,
    CLIENT_SENDING,
    SERVER_POSTPONED,
    SERVER_STEPS,
    State,
    StateMachine,
    Step,
)
from nixserve.codec.storepath import StoreDir
from nixserve.codec.wire import MAX_REPLY_SIZE, MAX_REQUEST_SIZE, Parse, Reader, encodeU64
from nixserve.errors import FormatError, LocalProtocolError, RemoteProtocolError

__all__ = ["ClientConnection", "ServerConnection"]


_STREAMED: Final = frozenset({Command.DUMP_STORE_PATH, Command.EXPORT_PATHS})
"""Commands whose reply is a stream."""


class _Receiver:
    """
    What both sides share: bytes, the parse under way, the end of input, and errors.

    A subclass gives C{_parse}, an endless generator that yields C{None} for "need more", L{PAUSED}, or an event.
    """

    def __init__(self, storeDir: StoreDir) -> None:
        self.storeDir = storeDir
        self._reader = Reader()
        self._eof = False
        self._error: RemoteProtocolError | None = None
        self._parsing: Generator[Any, None, None] = self._parse()

    def _parse(self) -> Generator[Any, None, None]:
        raise NotImplementedError

    def _mayEnd(self) -> bool:
        """Is this a place where the peer may end the conversation?"""
        raise NotImplementedError

    def _failed(self) -> None:
        """The peer broke the protocol."""
        raise NotImplementedError

    @property
    def buffered(self) -> int:
        """How many bytes have arrived and not become events."""
        return self._reader.available

    def receiveData(self, data: bytes) -> None:
        """Take bytes that have arrived, cut anywhere."""
        self._reader.feed(data)

    def receiveEOF(self) -> None:
        """No more bytes will arrive."""
        self._eof = True

    def _nextEvent(self) -> Any:
        if self._error is not None:
            raise self._error
        try:
            event = next(self._parsing)
            if event is None and self._eof:
                if not self._mayEnd():
                    raise FormatError("unexpected end-of-file")
                return EndOfInput()
        except FormatError as e:
            self._failed()
            self._error = RemoteProtocolError(str(e))
            raise self._error from e
        return NEED_DATA if event is None else event

    def _narOf(self, size: int) -> Generator[Any, None, None]:
        """The events of a NAR whose length is known."""
        while size:
            data = self._reader.take(min(size, MAX_CHUNK))
            size -= len(data)
            yield NarData(data) if data else None

    def _narByShape(self) -> Generator[Any, None, None]:
        """The events of a NAR that ends where its last parenthesis closes."""
        parser = NarParser()
        while not parser.finished:
            data = self._reader.take(MAX_CHUNK)
            if not data:
                yield None
                continue
            parser.feed(data)
            if parser.surplus:
                data = data[: -len(parser.surplus)]
                self._reader.putBack(len(parser.surplus))
            yield NarData(data)


class ServerConnection(_Receiver):
    """
    The server's end of a conversation.

    @ivar version: what is spoken, once L{VersionAgreed} has been seen.
    @ivar announced: what we say that we speak.
    """

    def __init__(self, storeDir: StoreDir, announced: int = SERVE_VERSION) -> None:
        super().__init__(storeDir)
        self.announced = announced
        self.version = announced
        self._machine = StateMachine(State.MAGIC, SERVER_STEPS)
        self._command = Command.QUERY_VALID_PATHS
        self._replying = StateMachine(State.IDLE, SERVER_POSTPONED)
        self._postponed: deque[Command] = deque()
        # Replies in the stream that is being sent.
        self._streams = 0

    @property
    def state(self) -> State:
        """The state of the conversation, of those in L{nixserve.codec.states}."""
        return self._machine.state

    def nextEvent(self) -> ServerEvent | Literal[Pause.NEED_DATA, Pause.PAUSED]:
        """
        What has happened next.

        @return: an event; L{NEED_DATA} if it takes more bytes, or the end of input, to tell; L{PAUSED} if a request is
            complete whose reply has been neither sent nor postponed.
        @raise RemoteProtocolError: the peer broke a rule; again on every further call.
        """
        event: ServerEvent | Literal[Pause.NEED_DATA, Pause.PAUSED] = self._nextEvent()
        if isinstance(event, EndOfInput) and self._machine.allows(Step.EOF):
            self._machine.go(Step.EOF)
        return event

    def sendHello(self) -> bytes:
        """The answer to L{Hello}."""
        self._machine.go(Step.HELLO)
        return encodeU64(serve.SERVER_MAGIC) + encodeU64(self.announced)

    @property
    def requestSize(self) -> int:
        """
        How many bytes of the request that has no reply have arrived, or are announced to be part of it. Those of NARs
        and of requests whose reply was postponed do not count.
        """
        return 0 if self.state is State.IDLE else self._reader.spent

    @property
    def postponed(self) -> int:
        """How many replies have been postponed and not been sent."""
        return len(self._postponed)

    def postponeReply(self) -> None:
        """
        Read on before the request that is complete now is answered. From here on what replies is for the oldest request
        without a reply, wherever the conversation stands.
        """
        self._machine.go(Step.POSTPONE)
        self._postponed.append(self._command)

    def sendReply(self, value: Any) -> bytes:
        """
        The reply to the oldest request that has none; L{nixserve.codec.serve.readReply} says what C{value} is.
        """
        command = self._postponed[0] if self._postponed else self._command
        if command in _STREAMED:
            raise LocalProtocolError(f"the reply to {command.name} is a stream")
        self._replyMachine.go(Step.REPLY)
        if self._postponed:
            self._postponed.popleft()
        return writeReply(command, value, self.version)

    def startStream(self, count: int = 1) -> None:
        """
        From here to L{endStream} the owner sends the bytes of a NAR or export stream.

        @param count: of how many, one behind the other: the replies to the oldest requests that have none. More
            than one must have been postponed.
        """
        commands = list(self._postponed)[:count] or [self._command]
        if len(commands) != count or not _STREAMED.issuperset(commands):
            raise LocalProtocolError(f"{count} streams are no reply to {', '.join(each.name for each in commands)}")
        self._replyMachine.go(Step.STREAM_START)
        self._streams = count

    def startReply(self) -> Callable[[Any], Iterator[bytes]]:
        """
        From here to L{endStream} the owner sends the reply to the oldest request that has none, in pieces.

        @return: makes the pieces from the value, as L{replyPieces}. It knows nothing of this object: any thread may
            call it.
        """
        command = self._postponed[0] if self._postponed else self._command
        if command in _STREAMED:
            raise LocalProtocolError(f"the reply to {command.name} is a stream")
        self._replyMachine.go(Step.STREAM_START)
        self._streams = 1
        return partial(replyPieces, command, version=self.version)

    def endStream(self) -> None:
        """What was started is complete."""
        self._replyMachine.go(Step.STREAM_END)
        if self._postponed:
            for _ in range(self._streams):
                self._postponed.popleft()

    @property
    def _replyMachine(self) -> StateMachine:
        """The one in which the next reply is a step."""
        return self._replying if self._postponed else self._machine

    def _mayEnd(self) -> bool:
        # Nix takes EOF inside the number of a command for EOF instead of it.
        return self.state in (State.IDLE, State.CLOSED)

    def _failed(self) -> None:
        self._machine.go(Step.ERROR)

    def _parse(self) -> Generator[Any, None, None]:
        reader, go = self._reader, self._machine.go
        if (yield from reader.u64()) != serve.CLIENT_MAGIC:
            raise FormatError("protocol mismatch")
        go(Step.MAGIC)
        yield Hello()
        yield from self._paused()
        version = yield from reader.u32()
        self.version = min(version, self.announced)
        go(Step.VERSION)
        yield VersionAgreed(self.version)
        while True:
            reader.limit(MAX_REQUEST_SIZE)
            self._command = yield from readCommand(reader)
            go(Step.COMMAND)
            yield RequestStarted(self._command)
            request = yield from readRequest(reader, self._command, self.version, self.storeDir)
            if isinstance(request, AddToStoreNar):
                go(Step.NAR_REQUEST)
                yield request
                yield from self._narOf(request.info.narSize)
                go(Step.NAR_END)
                yield EndOfNar()
            elif self._command is Command.IMPORT_PATHS:
                go(Step.IMPORT_REQUEST)
                yield request
                yield from self._import()
            else:
                go(Step.REQUEST)
                yield request
            yield from self._paused()

    def _import(self) -> Generator[Any, None, None]:
        reader, go = self._reader, self._machine.go
        while True:
            # Each object counts for itself: a stream may hold any number of them.
            reader.limit(MAX_REQUEST_SIZE)
            if not (yield from serve.readExportMarker(reader)):
                break
            go(Step.ITEM_START)
            yield from self._narByShape()
            go(Step.NAR_END)
            yield EndOfNar()
            item = yield from serve.readImportItem(reader, self.storeDir)
            go(Step.ITEM)
            yield ImportedItem(item)
        go(Step.IMPORT_END)
        yield EndOfImport()

    def _paused(self) -> Generator[Any, None, None]:
        while self.state in (State.HELLO, State.REPLY, State.STREAM):
            yield PAUSED


class ClientConnection(_Receiver):
    """
    The client's end of a conversation.

    @ivar version: what is spoken, once L{VersionAgreed} has been seen; before that C{None}.
    @ivar announced: what we say that we speak. Nix 2.4 to 2.8 send build outputs to every client, also to one
        that announced less than 2.6 and does not expect them.
    """

    def __init__(self, storeDir: StoreDir, announced: int = SERVE_VERSION) -> None:
        super().__init__(storeDir)
        self.announced = announced
        self.version: int | None = None
        self._sending = StateMachine(State.HELLO, CLIENT_SENDING)
        self._receiving = StateMachine(State.MAGIC, CLIENT_RECEIVING)
        self._unanswered: deque[Request] = deque()
        self._narLeft = 0

    def nextEvent(self) -> ClientEvent | Literal[Pause.NEED_DATA, Pause.PAUSED]:
        """
        What has happened next.

        @return: an event, among them L{EndOfInput} only where no reply is owed; L{NEED_DATA} if it takes more bytes, or
            the end of input, to tell.
        @raise RemoteProtocolError: the peer broke a rule; again on every further call.
        """
        event: ClientEvent | Literal[Pause.NEED_DATA, Pause.PAUSED] = self._nextEvent()
        return event

    def sendHello(self) -> bytes:
        """The first bytes."""
        self._sending.go(Step.HELLO)
        return encodeU64(serve.CLIENT_MAGIC) + encodeU64(self.announced)

    def sendRequest(self, request: Request) -> bytes:
        """
        A request. Those that do not depend on the version may be sent before it is known.

        @raise LocalProtocolError: the version must be known first, or a NAR is under way.
        """
        if self.version is None and serve.dependsOnVersion(request):
            raise LocalProtocolError(f"{request.command.name} cannot be sent before the version is known")
        if isinstance(request, AddToStoreNar):
            self._sending.go(Step.NAR_REQUEST)
            self._narLeft = request.info.narSize
        elif request.command is Command.IMPORT_PATHS:
            self._sending.go(Step.IMPORT_REQUEST)
        else:
            self._sending.go(Step.REQUEST)
        self._unanswered.append(request)
        return writeRequest(request, self.version or self.announced)

    def sendNarData(self, data: bytes) -> bytes:
        """
        The next bytes of the NAR of AddToStoreNar.

        @raise LocalProtocolError: more than C{narSize}.
        """
        if len(data) > self._narLeft or self._sending.state is not State.NAR:
            raise LocalProtocolError(f"{len(data)} bytes of NAR where {self._narLeft} are left to send")
        self._narLeft -= len(data)
        return data

    def endNar(self) -> None:
        """Go on behind the NAR, of which exactly C{narSize} bytes were sent."""
        if self._narLeft:
            raise LocalProtocolError(f"the NAR ends {self._narLeft} bytes early")
        self._sending.go(Step.NAR_END)

    def endImport(self) -> None:
        """The export stream, which is sent as it is and brings its own end, is complete."""
        self._sending.go(Step.IMPORT_END)

    def sendEOF(self) -> None:
        """We end the conversation: no request may follow. Replies still come."""
        self._sending.go(Step.EOF)

    def _mayEnd(self) -> bool:
        return self._receiving.state is State.IDLE and not self._unanswered and not self._reader.available

    def _failed(self) -> None:
        self._sending.go(Step.ERROR)
        self._receiving.go(Step.ERROR)

    def _parse(self) -> Generator[Any, None, None]:
        reader, go = self._reader, self._receiving.go
        yield from self._readMagic()
        go(Step.MAGIC)
        version = yield from reader.u32()
        if version >> 8 != SERVE_VERSION >> 8:
            raise FormatError(f"unsupported 'nix-store --serve' protocol version {serve.versionText(version)}")
        self.version = min(version, self.announced)
        go(Step.VERSION)
        yield VersionAgreed(self.version)
        while True:
            while not self._unanswered:
                if reader.available:
                    raise FormatError("the remote sent a reply that nobody asked for")
                yield None
            request = self._unanswered[0]
            if request.command is Command.DUMP_STORE_PATH:
                go(Step.STREAM_START)
                yield from self._narByShape()
                go(Step.STREAM_END)
                self._unanswered.popleft()
                yield EndOfNar()
            elif isinstance(request, ExportPaths):
                go(Step.IMPORT_REQUEST)
                yield from self._export(request)
                go(Step.STREAM_END)
                self._unanswered.popleft()
                yield EndOfExport(request)
            else:
                value = yield from serve.readReply(reader, request, self.version, self.storeDir)
                go(Step.REPLY)
                self._unanswered.popleft()
                yield Reply(request, value)

    def _readMagic(self) -> Parse[None]:
        """
        The server's magic. What is there instead is usually a line of text from a login shell, and worth
        showing.
        """
        reader = self._reader
        while reader.available < 8:
            if self._eof and reader.available:
                raise FormatError(f"protocol mismatch, got {reader.take(_SHOWN)!r}")
            yield
        start = reader.take(8)
        if start != encodeU64(serve.SERVER_MAGIC):
            raise FormatError(f"protocol mismatch, got {start + reader.take(_SHOWN)!r}")

    def _export(self, request: ExportPaths) -> Generator[Any, None, None]:
        reader, go = self._reader, self._receiving.go
        missing = set(request.paths)
        while True:
            reader.limit(MAX_REPLY_SIZE, "an object of an export stream")
            if not (yield from serve.readExportMarker(reader)):
                return
            go(Step.ITEM_START)
            yield from self._narByShape()
            go(Step.NAR_END)
            yield EndOfNar()
            item = yield from serve.readImportItem(reader, self.storeDir)
            if item.path not in missing:
                raise FormatError(f"the remote exports '{item.path}', which it was not asked for, or twice")
            missing.remove(item.path)
            go(Step.ITEM)
            yield ImportedItem(item)


_SHOWN = 1024
"""How much text in place of the protocol is shown."""

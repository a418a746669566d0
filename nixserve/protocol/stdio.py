"""
Standard streams as transports: sessions on this process's own.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from twisted.internet import abstract, fdesc, main
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IAddress, IDelayedCall, IHalfCloseableProtocol, IProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.protocol.interfaces import IServeTransport
from nixserve.protocol.reactors import IStreamReactor

__all__ = ["InputStream", "OutputStream", "StdioTransport", "StreamPair", "pendingOf", "registerProducer"]

READ_SIZE = 256 * 1024
"""Bytes read from a pipe at once; Twisted's own reader of pipes takes 8 KiB, which halves the rate of a NAR."""

PIPE_SIZE = 1024 * 1024
"""What pipes are enlarged to: the most that an unprivileged process may ask for by default."""

MAX_ERROR_BUFFER = 64 * 1024
"""Bytes for standard error that wait for a slow reader; more is dropped."""

LINGER_SECONDS = 30.0
"""How long a session that has ended waits for a reader that takes nothing of the rest. One that is only slow gets
all of it: the last reply may still lie here."""


@implementer(IAddress)
class StreamAddress:
    """Where standard streams lead: unknown."""

    def __repr__(self) -> str:
        return "standard streams"


class Stream(abstract.FileDescriptor):
    """
    One direction of a session, over a file descriptor that is a pipe, socket, terminal or file.
    """

    def __init__(self, reactor: IStreamReactor, fd: int, lost: Callable[[Failure], None]) -> None:
        super().__init__(reactor)
        self._fd = fd
        self._lost = lost
        self.connected = 1
        fdesc.setNonBlocking(fd)
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            _enlarge(fd)

    def fileno(self) -> int:
        """See C{IFileDescriptor}."""
        return -1 if self.disconnected else self._fd

    def connectionLost(self, reason: Failure) -> None:
        """The stream has ended, or we are done with it."""
        super().connectionLost(reason)
        self._lost(reason)


class InputStream(Stream):
    """
    Delivers what comes in, in pieces of up to L{READ_SIZE}.
    """

    def __init__(
        self, reactor: IStreamReactor, fd: int, received: Callable[[bytes], None], lost: Callable[[Failure], None]
    ) -> None:
        super().__init__(reactor, fd, lost)
        self._received = received

    def doRead(self) -> Exception | None:
        """Read some bytes and deliver them."""
        try:
            data = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return None
        except OSError as e:
            return ConnectionLost(str(e))
        if not data:
            return main.CONNECTION_DONE
        self._received(data)
        return None


class OutputStream(Stream):
    """
    Writes, and is a consumer for producers.

    @ivar sent: bytes written so far.
    """

    def __init__(self, reactor: IStreamReactor, fd: int, lost: Callable[[Failure], None]) -> None:
        super().__init__(reactor, fd, lost)
        self.sent = 0
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            # A pipe whose reader has gone becomes "readable": the only way to hear of it while nothing is written.
            self.startReading()

    def doRead(self) -> Exception | None:
        """For the reactor: the reader of the pipe has gone."""
        return main.CONNECTION_LOST

    def writeSomeData(self, data: bytes) -> int | Exception:
        """Write as much as the descriptor takes, as L{abstract.FileDescriptor} wants it."""
        written: int | Exception = fdesc.writeToFD(self._fd, data)
        if isinstance(written, int):
            self.sent += written
        return written


def pendingOf(descriptor: abstract.FileDescriptor) -> int:
    """Bytes that wait to be written. Twisted has no public name for this."""
    return len(descriptor.dataBuffer) - descriptor.offset + descriptor._tempDataLen


def registerProducer(descriptor: Any, producer: Any) -> None:
    """
    Register a push producer, and pause it if too much waits to be written already. Twisted would do so at the next
    write.
    """
    descriptor.registerProducer(producer, True)
    if descriptor.producer is producer and pendingOf(descriptor) > descriptor.bufferSize:
        descriptor.producerPaused = True
        producer.pauseProducing()


def _enlarge(fd: int) -> None:
    """Make a pipe larger, if the system lets us: fewer switches between the processes at its ends."""
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)


class StreamPair:
    """
    What the transports over two streams have in common: what goes out and what comes in.
    """

    _output: OutputStream | None = None
    _input: InputStream | None = None
    # Nothing is to be written or read any more.
    _exiting = False

    @property
    def sent(self) -> int:
        """See L{IServeTransport}."""
        return 0 if self._output is None else self._output.sent

    @property
    def unsent(self) -> int:
        """See L{IServeTransport}."""
        return 0 if self._output is None else pendingOf(self._output)

    def allowUnread(self, size: int) -> int:
        """See L{IServeTransport}. What is not read stays in the pipe."""
        return 0

    def write(self, data: bytes) -> None:
        """See L{IServeTransport}."""
        if self._output is not None and not self._exiting:
            self._output.write(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """See L{IServeTransport}."""
        for chunk in data:
            self.write(chunk)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """See L{IServeTransport}."""
        if self._output is None:
            producer.stopProducing()
        else:
            registerProducer(self._output, producer)

    def unregisterProducer(self) -> None:
        """See L{IServeTransport}."""
        if self._output is not None:
            self._output.unregisterProducer()

    def pauseProducing(self) -> None:
        """See L{IServeTransport}."""
        if self._input is not None:
            self._input.stopReading()

    def resumeProducing(self) -> None:
        """See L{IServeTransport}."""
        if self._input is not None and not self._exiting:
            self._input.startReading()

    def stopProducing(self) -> None:
        """See L{IServeTransport}."""
        self.abortConnection()

    def abortConnection(self) -> None:
        """See L{IServeTransport}."""
        raise NotImplementedError

    def getPeer(self) -> IAddress:
        """See L{IServeTransport}."""
        return StreamAddress()

    def getHost(self) -> IAddress:
        """See L{IServeTransport}."""
        return StreamAddress()


@implementer(IServeTransport)
class StdioTransport(StreamPair):
    """
    The standard streams of this process.

    @ivar exited: fires with the exit status when the session has ended and everything is written.
    """

    def __init__(
        self, protocol: IProtocol, reactor: IStreamReactor, stdin: int = 0, stdout: int = 1, stderr: int = 2
    ) -> None:
        self.exited: Deferred[int] = Deferred()
        self._protocol: IProtocol | None = protocol
        self._reactor = reactor
        self._status = 1
        self._fds = (stdin, stdout, stderr)
        self._linger: IDelayedCall | None = None
        self._output = OutputStream(reactor, stdout, self._outputLost)
        self._errors: OutputStream | None = OutputStream(reactor, stderr, self._errorsLost)
        self._input = InputStream(reactor, stdin, protocol.dataReceived, self._inputLost)
        self._input.startReading()
        protocol.makeConnection(self)

    def writeError(self, data: bytes) -> None:
        """See L{IServeTransport}."""
        if self._errors is not None and not self._exiting and pendingOf(self._errors) + len(data) <= MAX_ERROR_BUFFER:
            self._errors.write(data)

    def loseConnection(self) -> None:
        """See L{IServeTransport}."""
        self.exit(1)

    def exit(self, status: int) -> None:
        """See L{IServeTransport}."""
        if self._exiting:
            return
        self._exiting = True
        self._status = status
        self.pauseProducing()
        for stream in (self._output, self._errors):
            if stream is not None:
                stream.loseConnection()
        if self._output is None and self._errors is None:
            self._ended(Failure(ConnectionDone()))
        else:
            self._waitForReader(self._unread())

    def abortConnection(self) -> None:
        """See L{IServeTransport}."""
        self._exiting = True
        self._ended(Failure(ConnectionDone()))

    def _inputLost(self, reason: Failure) -> None:
        self._input = None
        if self._protocol is not None and not self._exiting:
            IHalfCloseableProtocol(self._protocol).readConnectionLost()

    def _outputLost(self, reason: Failure) -> None:
        self._output = None
        if not self._exiting or self._errors is None:
            self._ended(reason)

    def _errorsLost(self, reason: Failure) -> None:
        self._errors = None
        if self._exiting and self._output is None:
            self._ended(reason)

    def _unread(self) -> int:
        """How many bytes of both streams were written and have not left."""
        return sum(pendingOf(stream) for stream in (self._output, self._errors) if stream is not None)

    def _waitForReader(self, before: int) -> None:
        self._linger = self._reactor.callLater(LINGER_SECONDS, self._checkReader, before)

    def _checkReader(self, before: int) -> None:
        self._linger = None
        unread = self._unread()
        if unread < before:
            self._waitForReader(unread)
        else:
            self.abortConnection()

    def _ended(self, reason: Failure) -> None:
        protocol, self._protocol = self._protocol, None
        if protocol is None:
            return
        self._exiting = True
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        for stream in (self._input, self._output, self._errors):
            if stream is not None:
                stream.connectionLost(reason)
        for fd in self._fds:
            # Whoever gave us the descriptors may go on using them. Not before the end: they may all be one socket.
            fdesc.setBlocking(fd)
        protocol.connectionLost(reason)
        self.exited.callback(self._status)

"""
A client's transport to a running service, over its unix socket. L{nixserve.codec.relay} has the format.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from twisted.internet.error import ConnectionDone, ConnectionLost, ProcessTerminated
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.codec.relay import Frame, FrameReader, RelayHeader
from nixserve.errors import FormatError
from nixserve.protocol.interfaces import IErrorReceiver, IServeTransport
from nixserve.protocol.stdio import pendingOf, registerProducer

__all__ = ["RelayTransport"]


@implementer(IServeTransport)
class RelayTransport(Protocol):
    """
    The client's end of the socket: sends the header, then is the transport of a client's protocol, whose input it
    takes out of frames.

    The protocol hears of the end of the session in C{connectionLost}: with L{ConnectionDone} for the exit status 0,
    L{ProcessTerminated} for any other, L{ConnectionLost} if there was none.
    """

    def __init__(self, protocol: IProtocol, header: RelayHeader) -> None:
        """
        @param header: what to ask for.
        """
        self._protocol = protocol
        self._header = header
        self._reader = FrameReader()
        # What has come and not been delivered: the protocol wants nothing at the moment.
        self._frames: deque[tuple[Frame, bytes]] = deque()
        self._paused = False
        self._aborted = False
        self._delivering = False
        self._status: int | None = None
        self._broken: FormatError | None = None
        self._lost: Failure | None = None
        self._written = 0

    # --- the socket ---------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Ask for a session."""
        self._socket.write(self._header.encode())
        self._protocol.makeConnection(self)

    def dataReceived(self, data: bytes) -> None:
        """Frames of the service."""
        if self._broken is None and not self._aborted:
            try:
                self._frames.extend(self._reader.feed(data))
            except FormatError as e:
                self._broken = e
                self._socket.abortConnection()
            self._deliver()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The service is gone."""
        self._lost = reason
        self._deliver()

    def _deliver(self) -> None:
        """Give the protocol what it wants to have; the end after everything else."""
        if self._delivering:
            return
        self._delivering = True
        try:
            while self._frames and not self._paused and not self._aborted:
                self._deliverFrame(*self._frames.popleft())
        finally:
            self._delivering = False
        if self._lost is not None and (self._aborted or not self._frames):
            self._lost = None
            self._protocol.connectionLost(Failure(self._lossReason()))

    def _deliverFrame(self, kind: Frame, data: bytes) -> None:
        match kind:
            case Frame.OUTPUT:
                self._protocol.dataReceived(data)
            case Frame.ERROR:
                receiver = IErrorReceiver(self._protocol, None)
                if receiver is not None:
                    receiver.errorReceived(data)
            case Frame.EXIT:
                self._status = data[0] if data else None

    def _lossReason(self) -> Exception:
        if self._broken is not None:
            return ConnectionLost(str(self._broken))
        if self._status is None:
            return ConnectionLost("the service closed the socket without an exit status")
        return ConnectionDone() if self._status == 0 else ProcessTerminated(exitCode=self._status)

    # --- what the protocol uses ---------------------------------------------------------------------------

    @property
    def _socket(self) -> Any:
        return self.transport

    @property
    def sent(self) -> int:
        """See L{IServeTransport}."""
        return self._written - pendingOf(self._socket)

    @property
    def unsent(self) -> int:
        """See L{IServeTransport}."""
        return pendingOf(self._socket)

    def allowUnread(self, size: int) -> int:
        """See L{IServeTransport}. What is not read stays in the socket."""
        return 0

    def write(self, data: bytes) -> None:
        """See L{IServeTransport}."""
        self._written += len(data)
        self._socket.write(data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """See L{IServeTransport}."""
        for chunk in data:
            self.write(chunk)

    def writeError(self, data: bytes) -> None:
        """See L{IServeTransport}; a client has nobody to write errors to."""

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """See L{IServeTransport}."""
        registerProducer(self._socket, producer)

    def unregisterProducer(self) -> None:
        """See L{IServeTransport}."""
        self._socket.unregisterProducer()

    def pauseProducing(self) -> None:
        """See L{IServeTransport}."""
        self._paused = True
        self._socket.pauseProducing()

    def resumeProducing(self) -> None:
        """See L{IServeTransport}."""
        self._paused = False
        self._deliver()
        if not self._paused and self._socket.connected:
            self._socket.resumeProducing()

    def stopProducing(self) -> None:
        """See L{IServeTransport}."""
        self.abortConnection()

    def loseConnection(self) -> None:
        """End the input of the session; it is to end by itself then. A socket that is gone has none."""
        if self._socket.connected:
            self._socket.loseWriteConnection()

    def exit(self, status: int) -> None:
        """See L{IServeTransport}."""
        self.loseConnection()

    def abortConnection(self) -> None:
        """Close the socket; what is in it is not read any more."""
        self._aborted = True
        self._socket.abortConnection()
        self._deliver()

    def getPeer(self) -> Any:
        """See L{IServeTransport}."""
        return self._socket.getPeer()

    def getHost(self) -> Any:
        """See L{IServeTransport}."""
        return self._socket.getHost()

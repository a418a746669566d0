"""
Sessions from C{nixserve-store --connect}, over a unix socket. L{nixserve.codec.relay} has the format.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from twisted.internet.interfaces import IHalfCloseableProtocol, IProtocol
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.codec.relay import MAX_FRAME, MAX_HEADER, Frame, RelayHeader, encodeFrame
from nixserve.errors import NixServeError, PolicyError
from nixserve.protocol.interfaces import IServeSessions, IServeTransport
from nixserve.protocol.logbudget import LogBudget, LogBudgets
from nixserve.protocol.peerlog import PeerLog
from nixserve.protocol.policy import EVERYTHING, Peer, Policy
from nixserve.protocol.stdio import MAX_ERROR_BUFFER, pendingOf, registerProducer

__all__ = ["RelayFactory"]

_log = Logger()


@implementer(IHalfCloseableProtocol)
class RelayServer(Protocol):
    """
    The service's end of one relay's socket: reads the header, then is the L{IServeTransport} of a session, whose
    output it puts into frames.
    """

    def __init__(self, factory: RelayFactory) -> None:
        self._factory = factory
        self._head = b""
        self._session: IProtocol | None = None
        self._view: _FramedTransport | None = None

    def dataReceived(self, data: bytes) -> None:
        """Bytes from the relay: the header, then standard input."""
        if self._session is not None:
            self._session.dataReceived(data)
            return
        self._head += data
        line, end, rest = self._head.partition(b"\n")
        if not end and len(line) <= MAX_HEADER:
            return
        view = self._view = _FramedTransport(self.transport)
        try:
            session = self._factory.admit(line, self.transport)
        except NixServeError as e:
            uid = _userOf(self.transport)
            PeerLog(_log, self._factory.budgetOf(uid)).warn(
                "a relay of uid {uid} was refused: {error}", uid=uid, error=e
            )
            view.writeError(f"error: {e}\n".encode("utf-8", "replace"))
            view.exit(1)
            return
        self._session = session
        session.makeConnection(view)
        if rest:
            session.dataReceived(rest)

    def readConnectionLost(self) -> None:
        """The relay's standard input has ended."""
        if self._session is not None:
            IHalfCloseableProtocol(self._session).readConnectionLost()
        elif self.transport is not None:
            self.transport.loseConnection()

    def writeConnectionLost(self) -> None:
        """The relay takes nothing more."""
        if self._session is not None:
            IHalfCloseableProtocol(self._session).writeConnectionLost()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The relay is gone."""
        session, self._session = self._session, None
        if session is not None:
            session.connectionLost(reason)


@implementer(IServeTransport)
class _FramedTransport:
    """What a session behind a relay writes to."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._exiting = False
        self._written = 0
        # As IConsumer has it, these mean the socket as a whole.
        self.unregisterProducer = transport.unregisterProducer
        self.pauseProducing = transport.pauseProducing
        self.resumeProducing = transport.resumeProducing
        self.stopProducing = transport.stopProducing
        self.abortConnection = transport.abortConnection
        self.getPeer = transport.getPeer
        self.getHost = transport.getHost

    @property
    def sent(self) -> int:
        """See L{IServeTransport}."""
        return self._written - pendingOf(self._transport)

    @property
    def unsent(self) -> int:
        """See L{IServeTransport}."""
        return pendingOf(self._transport)

    def allowUnread(self, size: int) -> int:
        """See L{IServeTransport}. What is not read stays in the socket."""
        return 0

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """See L{IServeTransport}."""
        registerProducer(self._transport, producer)

    def write(self, data: bytes) -> None:
        """See L{IServeTransport}."""
        self._frames(Frame.OUTPUT, data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """See L{IServeTransport}."""
        for chunk in data:
            self.write(chunk)

    def writeError(self, data: bytes) -> None:
        """
        See L{IServeTransport}.

        A relay whose own output is stuck reads nothing: beyond some frames lines are dropped.
        """
        if pendingOf(self._transport) <= MAX_ERROR_BUFFER + MAX_FRAME:
            self._frames(Frame.ERROR, data)

    def loseConnection(self) -> None:
        """See L{IServeTransport}."""
        self.exit(1)

    def exit(self, status: int) -> None:
        """See L{IServeTransport}."""
        self._frames(Frame.EXIT, bytes([status]))
        self._exiting = True
        self._transport.loseConnection()

    def _frames(self, kind: Frame, data: bytes) -> None:
        if self._exiting:
            return
        for start in range(0, len(data), MAX_FRAME):
            frame = encodeFrame(kind, data[start : start + MAX_FRAME])
            self._written += len(frame)
            self._transport.write(frame)


class RelayFactory(Factory):
    """
    Lets in local users by the credentials of their socket: root and the user that this service runs as get what
    they ask for, others no more than C{defaultPolicy}. Who may connect at all is the mode of the socket.
    """

    noisy = False

    def __init__(
        self, sessions: IServeSessions, defaultPolicy: Policy, sessionNumbers: Iterator[int] | None = None
    ) -> None:
        """
        @param sessionNumbers: where the numbers of sessions come from, if other endpoints count with this one.
        """
        self._sessions = sessions
        self._defaultPolicy = defaultPolicy
        self._numbers = count(1) if sessionNumbers is None else sessionNumbers
        self._budgets = LogBudgets()

    def budgetOf(self, uid: int) -> LogBudget:
        """How much may be logged about a user."""
        return self._budgets.known(f"uid {uid}")

    def buildProtocol(self, addr: Any) -> Protocol:
        """See L{twisted.internet.interfaces.IProtocolFactory}."""
        return RelayServer(self)

    def admit(self, line: bytes, transport: Any) -> IProtocol:
        """
        A session for a relay.

        @param line: the header.
        @raise NixServeError: it is not let in.
        """
        header = RelayHeader.decode(line)
        uid = _userOf(transport)
        most = EVERYTHING if uid in (0, os.geteuid()) else self._defaultPolicy
        if header.store and not self._sessions.isServed(header.store):
            raise PolicyError(f"the store '{header.store}' is not served here: leave --store out")
        policy = Policy.parse(header.rights).cutDownTo(most)
        return self._sessions.buildSession(policy, Peer(f"uid {uid}", "", next(self._numbers), self.budgetOf(uid)))


def _userOf(transport: Any) -> int:
    """The user at the other end of a unix socket, by the kernel's word."""
    credentials = transport.getHandle().getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return int(uid)

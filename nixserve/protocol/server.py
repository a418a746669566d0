"""
L{ServeServer}: one session of C{nix-store --serve}. It hands what comes to a L{Conversation}, has L{Commands} perform
what is asked for, and frees everything in the end; it holds no rule of the protocol itself.

A session ends in one of these ways, each of which frees its temporary roots, path locks and half-written objects:

  - the client's EOF between requests: exit status 0;
  - anything wrong, ours or the client's: one line C{error: …} on standard error, exit status 1. Real Nix does the
    same, since the protocol has no way to report an error;
  - the connection is gone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.codec.connection import ServerConnection
from nixserve.codec.peertext import hidePaths, peerText
from nixserve.errors import NixServeError, PolicyError, RemoteProtocolError
from nixserve.protocol.building import IBuilds
from nixserve.protocol.commands import Commands
from nixserve.protocol.conversation import STALL_SECONDS, Conversation
from nixserve.protocol.interfaces import IServeTransport, IWorkers
from nixserve.protocol.memory import Memory
from nixserve.protocol.peerlog import PeerLog
from nixserve.protocol.policy import Peer, Policy, Right
from nixserve.protocol.workers import Door
from nixserve.store.api import Store

__all__ = ["ServeServer"]

_log = Logger()


@implementer(IHalfCloseableProtocol)
class ServeServer(Protocol):
    """
    One session.

    @ivar transport: an L{IServeTransport}.
    @ivar ended: fires with C{None} when the session has freed everything.
    """

    transport: IServeTransport

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
        @param stallSeconds: see L{STALL_SECONDS}.
        @param memory: where the memory is counted that the peers of this process use; this one has its own if not
            given.
        """
        self._store = store
        self._connection = ServerConnection(store.storeDir)
        self._door = Door(workers, self._tellWait)
        self._policy = policy
        self._peer = peer
        self._clock = clock
        self._stallSeconds = stallSeconds
        self._builds = builds
        self._memory = memory or Memory(clock)
        self.log = PeerLog(_log, peer.budget)
        self.ended: Deferred[None] = Deferred()

    # --- the transport ------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        """Begin the conversation."""
        trusted = Right.TRUST in self._policy.rights
        self._conversation = Conversation(
            self._connection,
            self.transport,
            self._door,
            partial(self._memory.open, self._peer.client, trusted),
            self._clock,
            self._stallSeconds,
        )
        self._commands = Commands(self._conversation, self._store, self._policy, self._peer, self._builds)
        self.log.info(
            "session {peer.session} of {peer.address} begins: {policy}", **self._facts(), policy=str(self._policy)
        )
        performing = Deferred.fromCoroutine(self._perform())
        performing.addErrback(self._failed)
        performing.addBoth(lambda _: self._free())

    def dataReceived(self, data: bytes) -> None:
        """Take bytes from the peer, and go on with the conversation if it waits for them."""
        self._conversation.receive(data)

    def readConnectionLost(self) -> None:
        """The peer will send nothing more. It may still read."""
        self._conversation.receiveEOF()

    def writeConnectionLost(self) -> None:
        """The peer reads nothing more: every reply from here on would be lost."""
        self._conversation.end(Failure(ConnectionLost()))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The peer is gone."""
        self._conversation.end(Failure(ConnectionLost(reason.getErrorMessage())))

    def stop(self) -> None:
        """The server is going down."""
        if not self.connected:
            # It never began and holds nothing.
            self.ended.callback(None)
            return
        self._conversation.end(Failure(PolicyError("the server is being stopped; try again later")))

    # --- its life -----------------------------------------------------------------------------------------

    async def _perform(self) -> None:
        self._conversation.requireRoom()
        await self._commands.perform()
        self._conversation.exit(0)

    def _failed(self, failure: Failure) -> None:
        """
        Say why, to the peer and in the log. Whatever is no error of ours is a bug, of which the peer need not
        know the details.
        """
        cause = self._conversation.cause or failure
        error = cause.value
        if isinstance(error, NixServeError):
            event = "session {peer.session} of {peer.address} failed: {error}"
            if cause.check(PolicyError, RemoteProtocolError):
                event = "session {peer.session} of {peer.address} refused: {error}"
            self.log.warn(event, **self._facts(), error=error, path=getattr(error, "path", None))
            self._conversation.tell(f"error: {peerText(error, self._store.storeDir.path)}")
        elif isinstance(error, ConnectionLost):
            self.log.info("session {peer.session} of {peer.address} lost its connection", **self._facts())
        elif isinstance(error, OSError):
            self.log.failure("session {peer.session} of {peer.address} failed", cause, **self._facts())
            self._conversation.tell(f"error: {peerText(error, self._store.storeDir.path)}")
        else:
            self.log.failure("a bug in session {peer.session} of {peer.address}", cause, **self._facts())
            self._conversation.tell(
                f"error: internal error; the log of the server has more about session {self._peer.session}"
            )
        self._conversation.exit(1)

    def _free(self) -> None:
        """The conversation is over: let go of everything, after what still runs in a thread."""
        self._conversation.close()
        self._door.abandon()
        if self._door.working:
            self._commands.interrupt()
        closing = self._door.call(self._commands.close)
        closing.addErrback(lambda failure: self.log.failure("closing session {peer.session}", failure, **self._facts()))
        closing.addCallback(lambda _: self.log.info("session {peer.session} of {peer.address} ends", **self._facts()))
        closing.addCallback(self.ended.callback)

    def _tellWait(self, what: str) -> None:
        self._conversation.tell(f"waiting for {hidePaths(what, self._store.storeDir.path)}...")

    def _facts(self) -> dict[str, Any]:
        """The fields of every event."""
        command = self._commands.command
        return {"peer": self._peer, "key": self._peer.key, "command": command and command.name}

"""
The sessions of one store, whatever endpoint they come in by.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.interfaces import IProtocol, IReactorTime
from zope.interface import implementer

from nixserve.protocol.building import IBuilds
from nixserve.protocol.conversation import STALL_SECONDS
from nixserve.protocol.descriptors import SESSION, Descriptors
from nixserve.protocol.interfaces import IServeSessions, ISharedWorkers
from nixserve.protocol.limits import DEFAULT_LIMITS, Limits
from nixserve.protocol.memory import Memory
from nixserve.protocol.policy import Peer, Policy, Right
from nixserve.protocol.server import ServeServer
from nixserve.protocol.workers import whenFired
from nixserve.store.api import Store

__all__ = ["ServeSessions"]


@implementer(IServeSessions)
class ServeSessions:
    """
    Sessions of one store, for any endpoint.
    """

    def __init__(
        self,
        store: Store,
        workers: ISharedWorkers,
        clock: IReactorTime,
        isServed: Callable[[str], bool] = lambda uri: False,
        stallSeconds: float = STALL_SECONDS,
        builds: IBuilds | None = None,
        descriptors: Descriptors | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """
        @param workers: the sessions of each key are one client of theirs.
        @param descriptors: those that each session is given.
        @param isServed: does this URI mean C{store}?
        @param builds: who builds on C{store}; without, requests to build are refused.
        @param limits: what the sessions of one key may use.
        """
        self._descriptors = descriptors or Descriptors()
        self._limits = limits
        self._memory = Memory(clock, limits)
        self._builds = builds
        self._store = store
        self._workers = workers
        self._clock = clock
        self._isServed = isServed
        self._stallSeconds = stallSeconds
        self._running: set[ServeServer] = set()

    def isServed(self, storeURI: str) -> bool:
        """See L{IServeSessions}."""
        return self._isServed(storeURI)

    def buildSession(self, policy: Policy, peer: Peer) -> IProtocol:
        """See L{IServeSessions}."""
        self._descriptors.take(peer.client, SESSION)
        workers = self._workers.of(peer.client, self._limits.requestsOf(Right.TRUST in policy.rights))
        server = ServeServer(
            *(self._store, workers, policy, peer, self._clock, self._stallSeconds, self._builds), memory=self._memory
        )
        self._running.add(server)
        server.ended.addCallback(lambda _: self._ended(server, peer.client))
        return server

    def _ended(self, server: ServeServer, name: str) -> None:
        self._running.discard(server)
        self._descriptors.giveBack(name, SESSION)

    def __len__(self) -> int:
        """How many sessions are running."""
        return len(self._running)

    def stop(self) -> Deferred[None]:
        """
        End every session.

        @return: fires when all have freed what they held.
        """
        ended = [whenFired(server.ended) for server in self._running]
        for server in list(self._running):
            server.stop()
        return gatherResults(ended).addCallback(lambda _: None)

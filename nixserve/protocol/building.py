"""
Between the sessions of a server and whoever builds for them: L{IBuilds}, and what it is told about a L{BuildClient}.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from twisted.internet.defer import Deferred
from zope.interface import Interface

from nixserve.codec.buildresult import BuildResult
from nixserve.codec.messages import BuildDerivation, BuildPaths, BuildPathsResult
from nixserve.codec.storepath import StorePath
from nixserve.protocol.buildlog import Listener
from nixserve.protocol.workers import Door
from nixserve.store.api import StoreSession

__all__ = ["BuildClient", "IBuilds"]


@dataclass(frozen=True, slots=True, eq=False)
class BuildClient:
    """
    Somebody who waits for builds.

    @ivar name: whose turns the builds use up: one name, one queue.
    @ivar listener: takes whole lines of logs.
    @ivar door: the way to C{session}.
    @ivar session: the client's own. What is built or found there for it stays there for as long as that is open.
    @ivar mustSandbox: rather fail than build outside the sandbox.
    """

    name: str
    listener: Listener
    door: Door
    session: StoreSession
    mustSandbox: bool = False

    def keep(self, paths: Collection[StorePath]) -> Deferred[None]:
        """Make paths roots of the client's own session."""
        return self.door.call(self.session.addTempRoots, paths)


class IBuilds(Interface):
    """
    Who builds on one store, for the sessions on it. A build that fails is a result as well.
    """

    def build(request: BuildDerivation, client: BuildClient) -> Deferred[BuildResult]:
        """
        Build one derivation from inputs that are there, and keep what comes of it for C{client}.

        @param request: what it names is kept for C{client} already.
        @return: what came of it, with L{BuildResult.hashMismatch} set where that is so, for exit statuses are not told
            from texts. Cancelling leaves: what nobody waits for any more is killed.
        """

    def buildPaths(request: BuildPaths, client: BuildClient) -> Deferred[BuildPathsResult]:
        """
        Build derivations that are in the store, and what they need.

        @return: what came of it. Cancelling leaves, as with L{build}.
        """

"""
Builds on a L{RemoteStore}: the remote builds, and says here what it says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from twisted.internet.defer import Deferred
from zope.interface import implementer

from nixserve.codec.buildresult import BuildResult
from nixserve.codec.messages import BuildDerivation, BuildPaths, BuildPathsResult
from nixserve.codec.terminal import MAX_LINE
from nixserve.errors import PolicyError
from nixserve.protocol.building import BuildClient, IBuilds
from nixserve.protocol.buildlog import Listener
from nixserve.protocol.buildoutputs import checkBuiltOutputs
from nixserve.protocol.client import ServeClient
from nixserve.remote.store import RemoteSession

__all__ = ["RemoteBuilds"]

T = TypeVar("T")


@implementer(IBuilds)
class RemoteBuilds:
    """
    All builds on one L{RemoteStore}. In the reactor's thread.

    Each happens in the remote session that holds the roots of the one who asked, so what it needs and makes stays
    there. Cancelling a build cuts that session, which is the only way to stop it. How many run at once, and in whose
    turn, is the remote's affair.
    """

    def build(self, request: BuildDerivation, client: BuildClient) -> Deferred[BuildResult]:
        """See L{IBuilds.build}."""

        async def build(keeper: ServeClient) -> BuildResult:
            result = await keeper.buildDerivation(request.drvPath, request.drv, request.options)
            checkBuiltOutputs(keeper.name, request.drvPath, request.drv, result, keeper.storeDir)
            if outputs := [realisation.outPath for realisation in result.builtOutputs.values()]:
                # Those whose paths were not known before are roots only now.
                await keeper.queryValidPaths(outputs, lock=True)
            return result

        return Deferred.fromCoroutine(self._forward(client, build))

    def buildPaths(self, request: BuildPaths, client: BuildClient) -> Deferred[BuildPathsResult]:
        """See L{IBuilds.buildPaths}."""

        def build(keeper: ServeClient) -> Deferred[BuildPathsResult]:
            return keeper.buildPaths(request.targets, request.options)

        return Deferred.fromCoroutine(self._forward(client, build))

    async def _forward(self, client: BuildClient, build: Callable[[ServeClient], Awaitable[T]]) -> T:
        """
        @raise PolicyError: the build must be confined.
        @raise nixserve.errors.RemoteError: the remote refuses, or is gone.
        """
        session = client.session
        assert isinstance(session, RemoteSession), "whoever builds here is a session of the remote store"
        keeper = await session.clients.keeper()
        if client.mustSandbox:
            raise PolicyError(
                f"whether {keeper.name or 'the remote store'} confines its builds is not known here, so a build needs "
                "the right 'trust'"
            )
        lines = _Lines(client.listener)
        # For good: some lines come after the result that they belong to.
        session.clients.listener = lines.feed
        try:
            return await build(keeper)
        finally:
            lines.flush()


class _Lines:
    """Makes whole lines of what comes cut anywhere."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Pass on the lines that the next bytes make whole."""
        whole, newline, rest = (self._rest + data).rpartition(b"\n")
        self._rest = rest
        if newline:
            self._listener(whole + newline)
        if len(rest) > MAX_LINE:
            self.flush()

    def flush(self) -> None:
        """Pass on what is there, as a line."""
        rest, self._rest = self._rest, b""
        if rest:
            self._listener(rest + b"\n")

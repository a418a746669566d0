"""
What a build needs, on its way to the machine: each path is sent by one of the build hooks that send there at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.hook.claims import Claims
from nixserve.protocol.client import ServeClient
from nixserve.protocol.copying import CopyProgress, queryMissing, sendPaths
from nixserve.protocol.deferredsession import DeferredSession

__all__ = ["PATIENCE_SECONDS", "sendInputs"]

PATIENCE_SECONDS: Final = 900.0
"""How long somebody else may take to send one path before it is sent once more: what the original waits for its upload
lock (Nix 2.8 to 2.36, src/build-remote/build-remote.cc)."""


async def sendInputs(
    reactor: IReactorTime,
    here: DeferredSession,
    client: ServeClient,
    inputs: Collection[StorePath],
    claims: Claims,
    *,
    substitute: bool,
    progress: CopyProgress,
    onWait: Callable[[StorePath], None] = lambda path: None,
) -> None:
    """
    Have all of C{inputs} on the machine, where they stay until the session ends.

    @param inputs: with all that they refer to, valid here.
    @param claims: which paths this hook process sends, and no other.
    @param substitute: the machine shall try to fetch them from its own substituters first.
    @param onWait: called with a path that somebody else sends.
    @raise InvalidPath: one of them is not valid here.
    @raise RemoteError: the machine does not take them.
    """

    def arrived(info: ValidPathInfo) -> None:
        claims.release(info.path)
        progress.copied(info)

    missing = await queryMissing(here, client, frozenset(inputs), lock=True, substitute=substitute)
    while missing:
        claimed = await here.call(claims.claim, missing)
        if not claimed:
            path = missing[0].path
            onWait(path)
            try:
                await here.call(claims.check, path).addTimeout(PATIENCE_SECONDS, reactor)
            except TimeoutError:
                claimed = missing[:1]
        # Between question and claim somebody else may have sent them, and roots are ours only for what was asked.
        asked = claimed or missing
        there = await client.queryValidPaths([info.path for info in asked], lock=True)
        for path in there:
            claims.release(path)
        if lacking := [info for info in claimed if info.path not in there]:
            progress.planned(lacking, 0)
            await sendPaths([here], [client], lacking, progress.moved, arrived)
        done = there.union(info.path for info in claimed)
        missing = [info for info in missing if info.path not in done]

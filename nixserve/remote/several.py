"""
L{connectSeveral}: sessions that share what is costly.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from twisted.internet.defer import DeferredList

from nixserve.protocol.client import ServeClient
from nixserve.protocol.reactors import IClientReactor
from nixserve.remote.address import RemoteAddress, Via
from nixserve.remote.connecting import connect
from nixserve.remote.master import SSHMaster

__all__ = ["connectSeveral"]


@asynccontextmanager
async def connectSeveral(
    reactor: IClientReactor, url: str | RemoteAddress, count: int, *, environ: Mapping[str, str], **options: Any
) -> AsyncIterator[list[ServeClient]]:
    """
    Several sessions on one store, for the length of an C{async with}. Those through the system's C{ssh} share one
    connection, which ends with them.

    @param count: how many sessions.
    @param options: as for L{connect}.
    """
    address = url if isinstance(url, RemoteAddress) else RemoteAddress.parse(url)
    async with AsyncExitStack() as stack:
        if count > 1 and address.via is Via.OPENSSH:
            options["master"] = await stack.enter_async_context(SSHMaster(reactor, address, environ))
        connecting = [connect(reactor, address, environ=environ, **options) for _ in range(count)]
        results: list[tuple[bool, Any]] = await DeferredList(connecting, consumeErrors=True)
        clients = [await stack.enter_async_context(client) for connected, client in results if connected]
        for connected, failure in results:
            if not connected:
                failure.raiseException()
        yield clients

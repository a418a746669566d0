"""
The old way to build elsewhere, with our client: the closure of the .drv and the inputs are copied, BuildPaths builds,
the outputs are copied back, all in one session.

    python -m tests.bench.oldway STORE URL DRV [INPUT…]
"""

from __future__ import annotations

import os
import sys
from typing import Any

from nixserve.app.react import runReactor
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.protocol.copying import copyClosure
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.workers import Workers
from nixserve.remote.connecting import connect
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore


async def build(reactor: Any, store: LocalStore, workers: Workers, url: str, paths: list[StorePath]) -> None:
    """
    @param paths: the .drv, then its inputs.
    """
    here = await DeferredSession.open(store, workers)
    client = await connect(reactor, url, environ=os.environ)
    async with here, client:
        await copyClosure(here, client, paths)
        result = await client.buildPaths([paths[0]])
        if result.status:
            raise RuntimeError(f"the build failed with status {result.status}: {result.errorMsg}")
        drv = await here.call(here.session.readDerivation, paths[0])
        await copyClosure(client, here, [output.path for output in drv.outputs.values() if output.path])


def main() -> None:
    """Build."""
    root, url, *names = sys.argv[1:]
    store = LocalStore(StoreLayout.underRoot(root))

    async def run(reactor: Any) -> None:
        workers = Workers(reactor)
        workers.start()
        try:
            await build(reactor, store, workers, url, [StoreDir().parse(name) for name in names])
        finally:
            workers.stop()

    try:
        runReactor(run)
    finally:
        store.close()


if __name__ == "__main__":
    main()

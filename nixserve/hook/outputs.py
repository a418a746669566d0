"""
What a build has made, on its way into the store here.
"""

from __future__ import annotations

from nixserve.codec.derivation import BasicDerivation
from nixserve.codec.pathinfo import topoSort
from nixserve.codec.storepath import StorePath
from nixserve.errors import RemoteError
from nixserve.protocol.buildoutputs import KnownOutputs, asPromised
from nixserve.protocol.client import ServeClient
from nixserve.protocol.copying import CopyProgress
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.schedule import Schedule
from nixserve.protocol.transfers import download

__all__ = ["fetchOutputs", "knownOutputs"]


def knownOutputs(drv: BasicDerivation) -> frozenset[StorePath]:
    """The outputs whose paths are known before they are built. The Nix that asks has locked them."""
    return frozenset(drv.knownOutputPaths.values())


async def fetchOutputs(
    here: DeferredSession, client: ServeClient, outputs: KnownOutputs, progress: CopyProgress
) -> None:
    """
    Have all of C{outputs} here, where they stay until the session here ends.

    Nothing else comes from the machine, as with the original. An output refers to what its builder could see, which is
    valid here, and to other outputs. A path that is not, a machine could have made up: whatever it gave for it would be
    valid here, unsigned, for whoever wants that path later.

    @param outputs: valid on the machine, and roots of the client's session; with what their derivation says of them.
    @raise RemoteError: the machine does not give them, or they cannot be what the derivation says.
    @raise StoreError: one cannot be stored.
    """
    await here.addTempRoots(frozenset(outputs))
    present = await here.queryValidPaths(frozenset(outputs))
    for info in (await here.queryPathInfos(present)).values():
        # The machine may have chosen it.
        asPromised(client.name, info, outputs)
    missing = frozenset(outputs) - present
    if not missing:
        return
    told = await client.queryPathInfos(missing)
    infos = {path: asPromised(client.name, info, outputs) for path, info in told.items()}
    for path in sorted(missing - infos.keys()):
        raise RemoteError(f"{client.name}: the output '{path}' is not there after the build")
    references = frozenset[StorePath]().union(*(info.references for info in infos.values())) - missing
    await here.addTempRoots(references)
    lacking = references - await here.queryValidPaths(references)
    for path in sorted(lacking):
        [user, *_] = sorted(info.path for info in infos.values() if path in info.references)
        raise RemoteError(
            f"{client.name} says that '{user}' refers to '{path}', which is neither an output of the build nor valid "
            "here, and so was no input either"
        )
    ordered = [infos[path] for path in topoSort({path: info.references for path, info in infos.items()})]
    progress.planned(ordered, len(outputs) - len(missing))
    await download(client, here, Schedule(ordered, 1), 0, progress.moved, progress.copied)

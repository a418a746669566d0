"""
What a build has made, on its way into the store here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nixserve.codec.buildresult import BuildResult
from nixserve.codec.derivation import BasicDerivation
from nixserve.codec.pathinfo import topoSort
from nixserve.codec.storepath import StorePath
from nixserve.errors import RemoteError
from nixserve.protocol.client import ServeClient
from nixserve.protocol.copying import CopyProgress, copyClosure
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.schedule import Schedule
from nixserve.protocol.transfers import download

__all__ = ["fetchOutputs", "knownOutputs", "madeOutputs"]


def knownOutputs(drv: BasicDerivation) -> frozenset[StorePath]:
    """The outputs whose paths are known before they are built. The Nix that asks has locked them."""
    return frozenset(output.path for output in drv.outputs.values() if output.path is not None)


def madeOutputs(
    name: str, drv: BasicDerivation, wanted: Collection[str], result: BuildResult
) -> Mapping[str, StorePath]:
    """
    What is to be fetched after a build that succeeded: all outputs; of those whose paths only the machine knows the
    ones that are wanted, as in the original.

    @param name: of the machine.
    @param wanted: names of outputs.
    @raise RemoteError: the machine does not say where one is.
    """
    outputs = {}
    for output, about in drv.outputs.items():
        if about.path is not None:
            outputs[output] = about.path
        elif output in result.builtOutputs:
            outputs[output] = result.builtOutputs[output].outPath
        elif output in wanted:
            raise RemoteError(f"{name} does not say where the output '{output}' is that it has built")
    return outputs


async def fetchOutputs(
    here: DeferredSession, client: ServeClient, outputs: Collection[StorePath], progress: CopyProgress
) -> None:
    """
    Have all of C{outputs} here, where they stay until the session here ends.

    @param outputs: valid on the machine, and roots of the client's session.
    @raise RemoteError: the machine does not give them.
    @raise StoreError: one cannot be stored.
    """
    await here.addTempRoots(outputs)
    missing = frozenset(outputs) - await here.queryValidPaths(outputs)
    if not missing:
        return
    infos = await client.queryPathInfos(missing)
    for path in sorted(missing - infos.keys()):
        raise RemoteError(f"{client.name}: the output '{path}' is not there after the build")
    references = frozenset[StorePath]().union(*(info.references for info in infos.values())) - missing
    await here.addTempRoots(references)
    lacking = references - await here.queryValidPaths(references)
    if lacking:
        # An output refers to what its builder could see, and all of that is valid here; but who knows what it reads.
        await copyClosure(client, here, lacking)
    ordered = [infos[path] for path in topoSort({path: info.references for path, info in infos.items()})]
    progress.planned(ordered, len(outputs) - len(missing))
    await download(client, here, Schedule(ordered, 1), 0, progress.moved, progress.copied)

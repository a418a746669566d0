"""
What a build has made, on its way into the store here.
"""

from __future__ import annotations

from collections.abc import Mapping

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.errors import RemoteError
from nixserve.protocol.buildoutputs import KnownOutputs
from nixserve.protocol.client import ServeClient
from nixserve.protocol.copying import CopyProgress, MissingReference, copyClosure
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.store.api import InvalidPath

__all__ = ["fetchOutputs"]


async def fetchOutputs(
    here: DeferredSession, client: ServeClient, outputs: KnownOutputs, progress: CopyProgress
) -> None:
    """
    Have all of C{outputs} here, where they stay until the session here ends, as they do on the machine until C{client}
    ends.

    Nothing else comes from the machine, as with the original. An output refers to what its builder could see, which is
    valid here, and to other outputs. A path that is not, a machine could have made up: whatever it gave for it would be
    valid here, unsigned, for whoever wants that path later.

    @param outputs: with what their derivation says of them.
    @raise RemoteError: the machine does not give them, or they cannot be what the derivation says.
    @raise StoreError: one cannot be stored.
    """

    async def explain(told: Mapping[StorePath, ValidPathInfo]) -> KnownOutputs:
        return outputs

    try:
        await copyClosure(client, here, outputs, closure=False, progress=progress, explain=explain)
    except InvalidPath as e:
        if e.path not in outputs:
            raise
        raise RemoteError(f"{client.name}: the output '{e.path}' is not there after the build") from e
    except MissingReference as e:
        raise RemoteError(
            f"{client.name} says that '{e.path}' refers to '{e.reference}', which is neither an output of the build "
            "nor valid here, and so was no input either"
        ) from e

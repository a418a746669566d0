"""
What identifies the outputs of a derivation to Nix: their realisations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nixserve.codec.buildresult import UNKNOWN_DRV_HASH, Realisation
from nixserve.codec.derivation import BasicDerivation, Derivation, OutputKind, hashDerivationModulo, unparse
from nixserve.codec.hashes import hashBytes
from nixserve.codec.storepath import StoreDir, StorePath

__all__ = ["realisations"]


def realisations(drv: BasicDerivation, outputs: Mapping[str, StorePath], storeDir: StoreDir) -> dict[str, Realisation]:
    """
    What the results of builds say about outputs that are there.

    @param outputs: where they are, by name.
    """
    drvHash = _drvHash(drv, storeDir)
    return {name: Realisation(outputs[name], drvHash) for name in sorted(outputs)}


def _drvHash(drv: BasicDerivation, storeDir: StoreDir) -> str:
    """
    The hash that Nix 2.4 to 2.34 identifies the outputs by: for a fixed output that which stands for it in other
    derivations, otherwise the masked one.

    That of a derivation which had input derivations cannot be known: then input-addressed outputs are elsewhere than
    the hash of what is left would have them.
    """
    if drv.kind() is OutputKind.FIXED:
        whole = Derivation(
            drv.name, drv.outputs, drv.inputSrcs, drv.platform, drv.builder, drv.args, drv.env, inputDrvs={}
        )
        modulo = hashDerivationModulo(whole, _noInputs, storeDir, {})
        return UNKNOWN_DRV_HASH if modulo is None else modulo.hexText
    if drv.kind() is OutputKind.FLOATING:
        # Of such outputs there is no path to be masked; what is left of them stays.
        env = {name: "" if name in drv.outputs else value for name, value in drv.env.items()}
        return hashBytes("sha256", unparse(replace(drv, env=env))).hexText
    masked = hashBytes("sha256", unparse(drv, maskOutputs=True))
    for name, path in drv.knownOutputPaths.items():
        if path != storeDir.makeOutputPath(name, masked, drv.name):
            return UNKNOWN_DRV_HASH
    return masked.hexText


def _noInputs(path: StorePath) -> Derivation:
    raise AssertionError(f"'{path}' is no input derivation")

"""
Derivations whose inputs were built, with the names of what came of these inputs written into them.

A derivation that uses a floating output names it by a I{placeholder}, since nobody knows its path before it is built.
To I{resolve} the derivation means to put the path where the placeholder stood and to list it among the sources;
nothing of the inputs' recipes is left. So inputs that turn out to be the same lead to the same resolved derivation,
however they were made. Source: Nix 2.8, src/libstore/derivations.cc (C{tryResolve}, C{rewriteDerivation}) and
downstream-placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from nixserve.codec.derivation import (
    BasicDerivation,
    Derivation,
    DerivationOutput,
    OutputKind,
    derivationName,
    unparse,
)
from nixserve.codec.hashes import hashBytes
from nixserve.codec.storepath import StoreDir, StorePath, outputPathName

__all__ = ["InputOutputs", "basicDerivation", "mustResolve", "outputPlaceholder", "resolve", "upstreamPlaceholder"]

InputOutputs = Mapping[StorePath, Mapping[str, StorePath]]
"""For each input derivation the paths of its outputs, by name."""


def outputPlaceholder(outputName: str) -> str:
    """
    What stands in a derivation for an output of its own whose path is not known.
    """
    return "/" + hashBytes("sha256", f"nix-output:{outputName}".encode("utf-8", "surrogateescape")).nix32


def upstreamPlaceholder(drvPath: StorePath, outputName: str) -> str:
    """
    What stands in a derivation for the output of an input derivation whose path is not known.

    @param drvPath: the input derivation.
    """
    name = outputPathName(derivationName(drvPath), outputName)
    return "/" + hashBytes("sha256", f"nix-upstream-output:{drvPath.hashPart}:{name}".encode("ascii")).nix32


def mustResolve(drv: Derivation, inputKinds: Mapping[StorePath, OutputKind]) -> bool:
    """
    Whether C{drv} can be built only after L{resolve}: it has placeholders of inputs, or its own paths depend on them.

    @param inputKinds: what kind the outputs of each input derivation are of.
    """
    known = (OutputKind.INPUT_ADDRESSED, OutputKind.FIXED)
    if not drv.inputDrvs:
        return False
    return drv.kind() in (OutputKind.DEFERRED, OutputKind.FLOATING) or any(
        inputKinds[path] not in known for path in drv.inputDrvs
    )


def basicDerivation(drv: Derivation, inputSrcs: frozenset[StorePath]) -> BasicDerivation:
    """
    @param inputSrcs: all that the build may use.
    @return: the derivation without its input derivations.
    """
    return BasicDerivation(drv.name, drv.outputs, inputSrcs, drv.platform, drv.builder, drv.args, drv.env)


def resolve(drv: Derivation, inputs: InputOutputs, storeDir: StoreDir) -> BasicDerivation:
    """
    Put the paths of the inputs' outputs into a derivation.

    @param inputs: the outputs of all of C{drv.inputDrvs}, at least those that it wants.
    @return: the derivation without input derivations. Deferred outputs have become input-addressed.
    """
    sources = set(drv.inputSrcs)
    rewrites: dict[str, str] = {}
    for path, names in drv.inputDrvs.items():
        for name in names:
            sources.add(inputs[path][name])
            rewrites[upstreamPlaceholder(path, name)] = inputs[path][name]
    resolved = _rewrite(basicDerivation(drv, frozenset(sources)), rewrites)
    return _fillIn(resolved, storeDir) if drv.kind() is OutputKind.DEFERRED else resolved


def _rewrite(drv: BasicDerivation, rewrites: Mapping[str, str]) -> BasicDerivation:
    """Replace texts wherever Nix does: in the builder, the arguments, and the names and values of the environment."""
    if not rewrites:
        return drv
    substitute = re.compile("|".join(map(re.escape, rewrites))).sub

    def changed(text: str) -> str:
        return substitute(lambda match: rewrites[match[0]], text)

    return replace(
        drv,
        builder=changed(drv.builder),
        args=tuple(map(changed, drv.args)),
        env={changed(name): changed(value) for name, value in drv.env.items()},
    )


def _fillIn(drv: BasicDerivation, storeDir: StoreDir) -> BasicDerivation:
    """Give deferred outputs their paths, which follow from the derivation now that it has no input derivations."""
    masked = hashBytes("sha256", unparse(drv, maskOutputs=True))
    paths = {name: storeDir.makeOutputPath(name, masked, drv.name) for name in drv.outputs}
    return replace(
        drv,
        outputs={name: DerivationOutput(path) for name, path in paths.items()},
        env={name: paths.get(name, value) for name, value in drv.env.items()},
    )

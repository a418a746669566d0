"""
What a remote may answer to a build: the derivation decides where outputs are and what is in them, as far as it says,
and not whoever built it.

  - Input-addressed: the path is the derivation's. What is in it nobody can check.
  - Fixed: the path is the derivation's, and the contents must have the hash that it states, whatever hash the remote
    has registered.
  - Floating: the path is the remote's to tell, but called as the derivation would have it, and computed from the
    contents in the way that it asks for.

Contents are compared by the store that takes them: all it needs is the content address of whoever knows it, in the
place of the remote's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from nixserve.codec.buildresult import UNKNOWN_DRV_HASH, BuildResult, Realisation
from nixserve.codec.derivation import BasicDerivation, DerivationOutput, OutputKind
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.realisation import realisations
from nixserve.codec.storepath import StoreDir, StorePath, outputPathName
from nixserve.errors import RemoteError

__all__ = ["KnownOutputs", "asPromised", "checkBuiltOutputs", "outputsOf", "promisedOutputs"]

KnownOutputs = Mapping[StorePath, DerivationOutput]
"""What derivations say of paths that are outputs of theirs."""


def checkBuiltOutputs(
    remote: str, drvPath: StorePath, drv: BasicDerivation, result: BuildResult, storeDir: StoreDir
) -> None:
    """
    Make sure that what a remote says about outputs is about those of the derivation that was sent there.

    @param remote: what it is called.
    @param drv: as it was sent.
    @raise RemoteError: it is not.
    """
    for name in sorted(result.builtOutputs.keys() - drv.outputs.keys()):
        raise _wrong(remote, drvPath, f"has built the output '{name:.200}'", f"only {', '.join(sorted(drv.outputs))}")
    stated = {name: realisation.outPath for name, realisation in result.builtOutputs.items()}
    expected = realisations(drv, stated, storeDir) if stated else {}
    for name, realisation in sorted(result.builtOutputs.items()):
        _checkPath(remote, drvPath, name, drv, realisation.outPath)
        _checkHash(remote, drvPath, name, realisation, expected[name])


def outputsOf(
    remote: str,
    drvPath: StorePath,
    drv: BasicDerivation,
    result: BuildResult,
    wanted: Collection[str],
    storeDir: StoreDir,
) -> dict[str, StorePath]:
    """
    Where the outputs are after a build that succeeded: all whose paths are known, and of the others those that the
    remote tells.

    @param wanted: names of outputs that it must tell.
    @raise RemoteError: it does not, or what it tells is not about this derivation.
    """
    checkBuiltOutputs(remote, drvPath, drv, result, storeDir)
    outputs = drv.knownOutputPaths
    for name in sorted(drv.outputs.keys() - outputs.keys()):
        if name in result.builtOutputs:
            outputs[name] = result.builtOutputs[name].outPath
        elif name in wanted:
            raise RemoteError(f"{_named(remote)} does not say where the output '{name}' of '{drvPath}' is")
    return outputs


def promisedOutputs(drv: BasicDerivation, outputs: Mapping[str, StorePath]) -> dict[StorePath, DerivationOutput]:
    """
    What C{drv} says about its outputs, by their paths.

    @param outputs: the paths by name.
    """
    return {path: drv.outputs[name] for name, path in outputs.items()}


def asPromised(remote: str, info: ValidPathInfo, known: KnownOutputs) -> ValidPathInfo:
    """
    What a store here is to be told about an object that a remote describes: the content address is that of the
    derivation which we have. A store takes nothing whose contents are not as the content address says.

    @return: C{info}, perhaps with another content address.
    @raise RemoteError: it could not be what the derivation says, whatever is in it.
    """
    output = known.get(info.path)
    if output is None or output.kind is OutputKind.INPUT_ADDRESSED:
        return info
    if output.contentAddress is not None:
        for reference in sorted(info.references):
            raise RemoteError(
                f"{_named(remote)} says that '{info.path}' refers to '{reference}', but its derivation fixes its "
                "contents to a hash, and such outputs refer to nothing"
            )
        return replace(info, ca=output.contentAddress)
    if output.hashAlgo and (info.ca is None or (info.ca.method, info.ca.hash.algo) != output.methodAndAlgo):
        stated = f"'{info.ca}'" if info.ca else "none"
        raise RemoteError(
            f"{_named(remote)} says that the content address of '{info.path}' is {stated}, but its derivation asks for "
            f"one of the kind '{output.hashAlgo}'"
        )
    return info


def _checkPath(remote: str, drvPath: StorePath, name: str, drv: BasicDerivation, path: StorePath) -> None:
    asked = drv.outputs[name].path
    if asked is not None and path != asked:
        raise _wrong(remote, drvPath, f"has built '{path}' as its output '{name}'", f"'{asked}'")
    called = outputPathName(drv.name, name)
    if asked is None and path.name != called:
        raise _wrong(remote, drvPath, f"has built '{path}' as its output '{name}'", f"a path called '{called}'")


def _checkHash(remote: str, drvPath: StorePath, name: str, stated: Realisation, expected: Realisation) -> None:
    # Servers from 2.35 on say nothing; and of a derivation that had input derivations nobody here knows it.
    if UNKNOWN_DRV_HASH not in (stated.drvHash, expected.drvHash) and stated.drvHash != expected.drvHash:
        raise _wrong(
            remote,
            drvPath,
            f"has built the output '{name}' of the derivation '{stated.drvHash:.200}'",
            f"that of '{expected.drvHash}'",
        )


def _wrong(remote: str, drvPath: StorePath, what: str, asked: str) -> RemoteError:
    return RemoteError(f"{_named(remote)}, asked to build '{drvPath}', says that it {what}; asked for was {asked}")


def _named(remote: str) -> str:
    return remote or "the remote"

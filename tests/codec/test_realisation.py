"""What identifies the outputs of a derivation to Nix."""

import dataclasses

from nixserve.codec.buildresult import UNKNOWN_DRV_HASH, Realisation
from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import BasicDerivation, DerivationOutput, unparse
from nixserve.codec.hashes import hashBytes
from nixserve.codec.realisation import realisations
from nixserve.codec.storepath import StoreDir

STORE = StoreDir()
SOME_PATH = STORE.parse("/nix/store/00000000000000000000000000000000-x")


def derivation(**outputs):
    """One without inputs, whose environment names its outputs."""
    env = {name: str(output.path or f"/placeholder-{name}") for name, output in outputs.items()}
    return BasicDerivation("x", outputs, frozenset(), "x86_64-linux", "/bin/sh", ("-c", ":"), env)


def leaf(*names):
    """One whose outputs are where its own hash puts them, and that hash."""
    masked = hashBytes("sha256", unparse(derivation(**dict.fromkeys(names, DerivationOutput(None))), maskOutputs=True))
    return derivation(**{name: DerivationOutput(STORE.makeOutputPath(name, masked, "x")) for name in names}), masked


def test_inputAddressed():
    """By the hash that gave the outputs their paths; all are identified by the same."""
    drv, masked = leaf("out", "dev")
    expected = {name: Realisation(path, masked.hexText) for name, path in drv.knownOutputPaths.items()}
    assert realisations(drv, drv.knownOutputPaths, STORE) == expected


def test_onlyWhatIsThere():
    """Nothing is said of other outputs."""
    drv, masked = leaf("out", "dev")
    dev = drv.outputs["dev"].path
    assert realisations(drv, {"dev": dev}, STORE) == {"dev": Realisation(dev, masked.hexText)}


def test_ofInputDerivations():
    """What had input derivations cannot be hashed without them: its outputs are elsewhere than what is left says."""
    drv, _ = leaf("out", "dev")
    drv = dataclasses.replace(drv, outputs={**drv.outputs, "dev": DerivationOutput(SOME_PATH)})
    found = realisations(drv, drv.knownOutputPaths, STORE)
    assert {realisation.drvHash for realisation in found.values()} == {UNKNOWN_DRV_HASH}


def test_fixed():
    """By what stands for it in other derivations, which is nothing but its contents and its path."""
    ca = ContentAddress(ContentAddressMethod.NAR, hashBytes("sha256", b"hello"))
    path = STORE.makeContentAddressedPath(ca, "x")
    drv = derivation(out=DerivationOutput(path, "r:sha256", ca.hash.hex))
    drvHash = hashBytes("sha256", f"fixed:out:r:sha256:{ca.hash.hex}:{path}".encode()).hexText
    assert realisations(drv, {"out": path}, STORE) == {"out": Realisation(path, drvHash)}


def test_floating():
    """By the recipe, wherever the output came to lie: only variables called like outputs are masked."""
    drv = derivation(out=DerivationOutput(None, "r:sha256"))
    drv = dataclasses.replace(drv, env={**drv.env, "other": "thing"})
    masked = dataclasses.replace(drv, env={"out": "", "other": "thing"})
    drvHash = hashBytes("sha256", unparse(masked)).hexText
    assert realisations(drv, {"out": SOME_PATH}, STORE) == {"out": Realisation(SOME_PATH, drvHash)}

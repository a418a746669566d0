"""
L{nixserve.protocol.buildoutputs}: what a build must have made, told from the derivation.
"""

import pytest

from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.derivation import BasicDerivation, DerivationOutput
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import RemoteError
from nixserve.protocol.buildoutputs import outputsOf


def test_outputs():
    """All known outputs come back, and of the others those that are wanted."""
    drvPath, known, found = (StorePath(f"/nix/store/{'0' * 32}-{name}") for name in ("x.drv", "known", "x"))
    floating = DerivationOutput(None, "r:sha256")
    drv = BasicDerivation("x", {"out": DerivationOutput(known)}, frozenset(), "x", "x", (), {})
    assert outputsOf("m", drvPath, drv, BuildResult(BuildStatus.BUILT), [], StoreDir()) == {"out": known}
    drv = BasicDerivation("x", {"out": floating, "dev": floating}, frozenset(), "x", "x", (), {})
    result = BuildResult(BuildStatus.BUILT, builtOutputs={"out": Realisation(found)})
    assert outputsOf("m", drvPath, drv, result, ["out"], StoreDir()) == {"out": found}
    with pytest.raises(RemoteError, match=f"m does not say where the output 'dev' of '{drvPath}' is"):
        outputsOf("m", drvPath, drv, result, ["dev"], StoreDir())

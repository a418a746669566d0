"""Derivations with what came of their inputs written into them."""

import pytest

from nixserve.codec.derivation import Derivation, DerivationOutput, OutputKind, verifyBasicDerivation
from nixserve.codec.hashes import hashBytes
from nixserve.codec.resolution import basicDerivation, mustResolve, outputPlaceholder, resolve, upstreamPlaceholder
from nixserve.codec.storepath import StoreDir, StorePath

STORE = StoreDir()
FLOATING = DerivationOutput(None, "r:sha256", "")
DEFERRED = DerivationOutput(None)


def path(name):
    """A store path that nothing in particular led to."""
    return STORE.makeStorePath("test", hashBytes("sha256", name.encode()), name)


KNOWN = DerivationOutput(path("x"))
FIXED = DerivationOutput(path("x"), "sha256", "00" * 32)
INPUT = path("input.drv")


def derivation(output, inputs=(INPUT,), **fields):
    """One with a single output, that uses C{out} and C{dev} of others."""
    values = {"inputSrcs": frozenset({path("source")}), "builder": "/bin/sh", "args": (), "env": {"out": ""}, **fields}
    wanted = {drv: frozenset({"out", "dev"}) for drv in inputs}
    return Derivation(name="x", outputs={"out": output}, platform="x86_64-linux", inputDrvs=wanted, **values)


def test_placeholders():
    """As Nix 2.8 computes them."""
    assert outputPlaceholder("out") == "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"
    drvPath = StorePath("/nix/store/wmpxl795pbhhnlqc2wr5qzl4g0227slp-ca.drv")
    assert upstreamPlaceholder(drvPath, "out") == "/1yc80liqblgvcc51rn5narn4y6736fj2izzgr96x1448bcjnd5b6"


@pytest.mark.parametrize(
    ("output", "inputKind", "expected"),
    [
        (KNOWN, OutputKind.INPUT_ADDRESSED, False),
        (KNOWN, OutputKind.FIXED, False),
        (KNOWN, OutputKind.FLOATING, True),
        (FIXED, OutputKind.INPUT_ADDRESSED, False),
        (FIXED, OutputKind.DEFERRED, True),
        (DEFERRED, OutputKind.FLOATING, True),
        (FLOATING, OutputKind.INPUT_ADDRESSED, True),
    ],
)
def test_mustResolve(output, inputKind, expected):
    """What has placeholders in it, or paths that depend on its inputs; never what has no input derivations."""
    assert mustResolve(derivation(output), {INPUT: inputKind}) is expected
    assert mustResolve(derivation(output, ()), {}) is False


def test_resolve():
    """The paths of inputs stand where the placeholders stood, everywhere, and are sources; the recipes are gone."""
    out, dev = upstreamPlaceholder(INPUT, "out"), upstreamPlaceholder(INPUT, "dev")
    drv = derivation(FLOATING, builder=f"{dev}/bin/sh", args=(f"<{out}{dev}>",), env={f"a{out}": f"{dev}:b", "c": "d"})
    outputs = {"out": path("made"), "dev": path("made-dev"), "doc": path("unused")}
    resolved = resolve(drv, {INPUT: outputs}, STORE)
    assert not isinstance(resolved, Derivation)
    assert resolved.outputs == drv.outputs
    assert resolved.inputSrcs == {path("source"), path("made"), path("made-dev")}
    assert resolved.builder == f"{path('made-dev')}/bin/sh"
    assert resolved.args == (f"<{path('made')}{path('made-dev')}>",)
    assert resolved.env == {f"a{path('made')}": f"{path('made-dev')}:b", "c": "d"}


def test_resolveDeferred():
    """Deferred outputs have the paths that follow from what is left, in the environment too."""
    resolved = resolve(derivation(DEFERRED), {INPUT: {"out": path("made"), "dev": path("made-dev")}}, STORE)
    verifyBasicDerivation(path("x.drv"), resolved, STORE)
    assert resolved.env == {"out": resolved.outputs["out"].path}


def test_resolvedToTheSame():
    """Inputs that turn out the same make their users the same."""
    made = {"out": path("made"), "dev": path("made-dev")}
    users = [
        resolve(derivation(FLOATING, (other,), env={"x": upstreamPlaceholder(other, "out")}), {other: made}, STORE)
        for other in (path("one.drv"), path("two.drv"))
    ]
    assert users[0] == users[1]


def test_basicDerivation():
    """All but the inputs stays."""
    drv = derivation(KNOWN)
    basic = basicDerivation(drv, frozenset({path("other")}))
    assert not isinstance(basic, Derivation) and basic.inputSrcs == {path("other")}
    assert (basic.name, basic.outputs, basic.builder, basic.env) == (drv.name, drv.outputs, drv.builder, drv.env)

"""
Options of derivations, and the checks that they ask for.
"""

import json

import pytest

from nixserve.builder.drvoptions import DerivationOptions, OutputChecks
from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.derivation import DerivationOutput
from nixserve.codec.hashes import hashBytes
from nixserve.errors import BuildError
from tests.builder.drvs import DEV, OUT, derivation, structured


def test_longAttributes():
    """An attribute that means something here is no longer than a variable of a process; others may be."""
    text = 128 * 1024 * "x"
    assert DerivationOptions.of(derivation({"passAsFile": text, "other": text + "x"})).passAsFile == {text}
    for name in ("requiredSystemFeatures", "allowedReferences", "passAsFile", "impureEnvVars", "exportReferencesGraph"):
        with pytest.raises(BuildError, match=f"'{name}' of derivation is longer than 131072 bytes"):
            DerivationOptions.of(derivation({name: text + "x"}))


def test_defaults():
    """What a derivation that says nothing wants."""
    assert DerivationOptions.of(derivation()) == DerivationOptions(
        outputChecks={"out": OutputChecks(ignoreSelfRefs=True)}
    )


def test_optionsInEnvironment():
    """Words in the environment: lists of words, and C{1} for true."""
    options = DerivationOptions.of(
        derivation(
            {
                "requiredSystemFeatures": " kvm\n\tbig-parallel ",
                "preferLocalBuild": "1",
                "allowSubstitutes": "",
                "__noChroot": "true",
                "impureEnvVars": "b a",
                "passAsFile": "x y",
                "allowedReferences": "",
                "disallowedReferences": f"out {OUT}",
                "disallowedRequisites": "dev",
                "exportReferencesGraph": "a /x b /y",
                "outputChecks": "ignored",
                "unsafeDiscardReferences": "ignored",
                "maxSize": "ignored",
            }
        )
    )
    assert options == DerivationOptions(
        structuredAttrs=None,
        requiredSystemFeatures=frozenset({"kvm", "big-parallel"}),
        preferLocalBuild=True,
        allowSubstitutes=False,
        noChroot=False,
        impureEnvVars=("b", "a"),
        passAsFile=frozenset({"x", "y"}),
        exportReferencesGraph={"a": ("/x",), "b": ("/y",)},
        outputChecks={
            "out": OutputChecks(
                allowedReferences=frozenset(),
                allowedRequisites=None,
                disallowedReferences=frozenset({"out", OUT}),
                disallowedRequisites=frozenset({"dev"}),
                ignoreSelfRefs=True,
            )
        },
    )


def test_optionsInJSON():
    """The same among structured attributes, where checks are separate for each output."""
    attrs = {
        "requiredSystemFeatures": ["kvm"],
        "preferLocalBuild": True,
        "allowSubstitutes": False,
        "__noChroot": True,
        "impureEnvVars": ["a b"],
        "passAsFile": ["ignored"],
        "allowedReferences": ["ignored"],
        "exportReferencesGraph": {"a": "/x", "b": ["/y", ["/z"]]},
        "outputChecks": {
            "out": {"allowedReferences": [], "maxSize": 10, "maxClosureSize": 20, "allowedRequisites": ["dev"]},
            "other": {"maxSize": 1},
        },
        "unsafeDiscardReferences": {"out": True, "dev": False},
    }
    drv = derivation({"__json": json.dumps(attrs)}, {"out": DerivationOutput(OUT), "dev": DerivationOutput(DEV)})
    options = DerivationOptions.of(drv)
    assert options == DerivationOptions(
        structuredAttrs=attrs,
        requiredSystemFeatures=frozenset({"kvm"}),
        preferLocalBuild=True,
        allowSubstitutes=False,
        noChroot=True,
        impureEnvVars=("a b",),
        exportReferencesGraph={"a": ("/x",), "b": ("/y", "/z")},
        unsafeDiscardReferences=frozenset({"out"}),
        outputChecks={
            "out": OutputChecks(
                allowedReferences=frozenset(), allowedRequisites=frozenset({"dev"}), maxSize=10, maxClosureSize=20
            ),
            "dev": OutputChecks(),
        },
    )


@pytest.mark.parametrize("output", [(None, "r:sha256"), (None, "r:sha256", "impure"), (None,)])
def test_unknownPathsNeedAFeature(output):
    """Outputs whose path is not known need a machine that can do so."""
    options = DerivationOptions.of(derivation(outputs={"out": DerivationOutput(*output)}))
    assert options.requiredSystemFeatures == {"ca-derivations"}


def test_fixedNeedsNoFeature():
    """The path of a fixed output is known."""
    output = DerivationOutput(OUT, "sha256", hashBytes("sha256", b"").hex)
    assert DerivationOptions.of(derivation(outputs={"out": output})).requiredSystemFeatures == frozenset()


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"preferLocalBuild": "1"}, "attribute 'preferLocalBuild' of derivation must be a Boolean"),
        ({"allowSubstitutes": None}, "attribute 'allowSubstitutes' of derivation must be a Boolean"),
        ({"impureEnvVars": "a"}, "attribute 'impureEnvVars' of derivation must be a list of strings"),
        ({"requiredSystemFeatures": [1]}, "attribute 'requiredSystemFeatures' of derivation must be a list of strings"),
        ({"outputChecks": []}, "attribute 'outputChecks' of derivation must be an object"),
        ({"outputChecks": {"out": 1}}, "attribute 'outputChecks.out' of derivation must be an object"),
        (
            {"outputChecks": {"out": {"allowedReferences": "x"}}},
            "attribute 'outputChecks.out.allowedReferences' of derivation must be a list of strings",
        ),
        (
            {"outputChecks": {"out": {"maxSize": True}}},
            "attribute 'outputChecks.out.maxSize' of derivation must be a number of bytes",
        ),
        ({"outputChecks": {"out": {"maxClosureSize": -1}}}, "must be a number of bytes"),
        (
            {"unsafeDiscardReferences": {"out": 1}},
            "attribute 'unsafeDiscardReferences.out' of derivation must be a Boolean",
        ),
        ({"exportReferencesGraph": {"a": [1]}}, "attribute 'exportReferencesGraph' of derivation must be a list of"),
    ],
)
def test_wrongTypes(attrs, message):
    """A structured attribute of the wrong type is an error of the build that names it."""
    with pytest.raises(BuildError, match=message) as raised:
        DerivationOptions.of(structured(**attrs))
    assert raised.value.status == BuildStatus.MISC_FAILURE

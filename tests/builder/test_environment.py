"""What builders get to see, compared with what they saw of the real Nix: see tests/vectors/regenerate_builder.py."""

import json
from pathlib import Path

import pytest

from nixserve.builder import environment as environmentModule
from nixserve.builder.drvoptions import DerivationOptions, OutputChecks
from nixserve.builder.environment import builderEnvironment, outputRewrites
from nixserve.builder.structuredattrs import parseStructuredAttrs, writeJSON
from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.contentaddress import ContentAddress
from nixserve.codec.derivation import BasicDerivation, DerivationOutput, parseDerivation
from nixserve.codec.hashes import Hash, hashBytes
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.resolution import outputPlaceholder
from nixserve.codec.storepath import StoreDir, StorePath, outputPathName
from nixserve.errors import BuildError
from nixserve.store.api import InvalidPath

VECTORS = Path(__file__).parents[1] / "vectors" / "builder"
STORE_DIR = StoreDir("/tmp/nixserve-vectors/store")
CASES = sorted(file.stem for file in VECTORS.glob("*.drv"))
OUTSIDE = {"SEEN_FROM_OUTSIDE": "from outside", "both": "from outside", "unasked": "from outside"}


class Inputs:
    """Knows the references of a few paths."""

    def __init__(self, described):
        """
        @param described: by path, as C{nix path-info --json} gives it; C{outputs} of derivations besides.
        """
        self.infos = {STORE_DIR.parse(path): self._info(item) for path, item in described.items()}
        self.outputs = {
            STORE_DIR.parse(path): STORE_DIR.parseMany(item.get("outputs", [])) for path, item in described.items()
        }

    def _info(self, item):
        return ValidPathInfo(
            STORE_DIR.parse(item["path"]),
            Hash.parse(item["narHash"]),
            item["narSize"],
            frozenset(STORE_DIR.parseMany(item["references"])),
            ca=ContentAddress.parse(item["ca"]) if "ca" in item else None,
        )

    def queryPathInfos(self, paths):
        """As a session does."""
        return {path: self.infos[path] for path in paths}

    def queryClosure(self, paths, includeOutputs=False):
        """As a session does."""
        closure, new = set(), set(paths)
        while new:
            closure |= new
            for path in new - self.infos.keys():
                raise InvalidPath(path)
            following = {reference for path in new for reference in self.infos[path].references}
            if includeOutputs:
                following |= {output for path in new for output in self.outputs[path]}
            new = following - closure
        return closure


INPUTS = Inputs(json.loads((VECTORS / "inputs.json").read_text()))


def scratchPath(drvPath, drv, name, redirected):
    """Where Nix lets the builder write an output that has no path yet, or that is not to be overwritten."""
    output = drv.outputs[name]
    if output.path is not None and not redirected:
        return output.path
    which = f"name:{name}" if output.path is None else output.path.baseName
    zero = Hash("sha256", bytes(32))
    return STORE_DIR.makeStorePath(f"rewrite:{drvPath.baseName}:{which}", zero, outputPathName(drv.name, name))


@pytest.mark.parametrize("case", CASES)
def test_sameAsNix(case):
    """Environment, arguments and files are exactly those that a builder saw of Nix 2.8."""
    seen = json.loads((VECTORS / f"{case}.json").read_text())
    drvPath = STORE_DIR.parse(seen["drvPath"])
    drv = parseDerivation((VECTORS / f"{case}.drv").read_bytes(), drvPath.name.removesuffix(".drv"), STORE_DIR)
    files = builderEnvironment(
        drv,
        buildTop=seen["env"]["NIX_BUILD_TOP"] if case != "overriding" else seen["env"]["TEMP"],
        storeDir=STORE_DIR,
        cores=3,
        outputPaths={name: scratchPath(drvPath, drv, name, name in seen["redirected"]) for name in drv.outputs},
        inputs=INPUTS,
        impure=OUTSIDE,
        inputClosure=INPUTS.infos.keys(),
        options=DerivationOptions.of(drv),
    )
    assert files.env == seen["env"]
    # The first is the name of the builder.
    assert list(files.args) == seen["args"][1:]
    assert {name: data.decode() for name, data in files.files.items()} == seen["files"]


OUT = StorePath("/nix/store/fcx9xzs072fd3nqwzb44vb5dl80vwhx1-leaf")
DEV = StorePath("/nix/store/qczjas54a9hqfzzngs1ggix0sl4klq0c-leaf-dev")


def derivation(env=None, outputs=None, args=()):
    """A derivation with these environment variables."""
    outputs = outputs or {"out": DerivationOutput(OUT)}
    return BasicDerivation("leaf", outputs, frozenset(), "x86_64-linux", "/bin/sh", args, env or {})


def structured(**attrs):
    """A derivation with structured attributes."""
    return derivation({"__json": json.dumps(attrs)})


def environment(drv, **more):
    """What its builder sees."""
    arguments = {
        "buildTop": "/build",
        "storeDir": StoreDir(),
        "cores": 1,
        "outputPaths": {name: output.path for name, output in drv.outputs.items()},
        "inputs": INPUTS,
        "impure": {},
        "inputClosure": frozenset(),
        "options": DerivationOptions.of(drv),
    }
    return builderEnvironment(drv, **{**arguments, **more})


def test_allCores(monkeypatch):
    """Zero cores mean as many as this process may use."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 5, 7})
    assert environment(derivation(), cores=0).env["NIX_BUILD_CORES"] == "3"


def test_impureDerivation():
    """Where outputs have no fixed hash but may differ each time, the outside is visible as well."""
    drv = derivation({"impureEnvVars": "a b"}, {"out": DerivationOutput(None, "r:sha256", "impure")})
    files = environment(drv, outputPaths={"out": OUT}, impure={"a": "1"})
    assert (files.env["a"], files.env["b"]) == ("1", "")
    assert "NIX_OUTPUT_CHECKED" not in files.env


def test_anyBytes():
    """Bytes that are no UTF-8 come through, in files too."""
    files = environment(derivation({"x": "\udcff", "y": "\udcfe\n", "passAsFile": "y"}))
    assert files.env["x"] == "\udcff"
    assert list(files.files.values()) == [b"\xfe\n"]


def test_whatNobodyCouldRead():
    """Strings end at NUL; variables without a name are left out."""
    env = {"a": "1\0002", "b\0": "3", "": "4", "c=d": "5"}
    files = environment(derivation(env, args=("x\0y",)))
    assert {name: files.env.get(name) for name in ("a", "b", "", "c")} == {"a": "1", "b": None, "": None, "c": "d=5"}
    assert files.args == ("x",)


def test_outputRewrites():
    """Placeholders become paths; a known path that is not used has its hash part replaced."""
    drv = derivation(outputs={"out": DerivationOutput(OUT), "dev": DerivationOutput(DEV)})
    elsewhere = StorePath("/nix/store/im1dsfa74w0ng9vprb17n00xzi39cin7-leaf-dev")
    assert outputRewrites(drv, {"out": OUT, "dev": elsewhere}) == {
        outputPlaceholder("out"): OUT,
        outputPlaceholder("dev"): elsewhere,
        DEV.hashPart: elsewhere.hashPart,
    }


OUTER = next(path for path in INPUTS.infos if path.name == "outer")


@pytest.mark.parametrize(
    ("value", "status", "message"),
    [
        ("a b c", 4, "odd number of tokens in 'exportReferencesGraph': 'a b c'"),
        (f"a/b {OUTER}", 9, "invalid file name 'a/b' in 'exportReferencesGraph'"),
        (f".attrs.json {OUTER}", 9, "invalid file name '.attrs.json' in 'exportReferencesGraph'"),
        ("a /etc/passwd", 4, "'exportReferencesGraph' contains a non-store path '/etc/passwd'"),
        (f"a {STORE_DIR.path}/xyz", 9, "'xyz' is too short to be a valid store path"),
        (
            f"a {OUTER}",
            4,
            f"cannot export references of path '{OUTER}' because it is not in the input closure of the derivation",
        ),
    ],
)
def test_badGraphs(value, status, message):
    """Graphs of what is no input, or into files that cannot be, end the build before it begins."""
    with pytest.raises(BuildError) as raised:
        environment(derivation({"exportReferencesGraph": value}), storeDir=STORE_DIR)
    assert message in str(raised.value)
    assert raised.value.status == status


def test_invalidInput():
    """An input that is not valid is an error of the build."""
    path = StorePath(f"{STORE_DIR.path}/{OUT.baseName}")
    with pytest.raises(BuildError, match="is not valid"):
        environment(derivation({"exportReferencesGraph": f"a {path}"}), storeDir=STORE_DIR, inputClosure={path})


def test_outputsOfDerivationsInGraphs():
    """A derivation in a graph brings its outputs with it."""
    [drvPath] = [path for path in INPUTS.infos if path.isDerivation]
    files = environment(
        derivation({"exportReferencesGraph": f"graph {drvPath}"}), storeDir=STORE_DIR, inputClosure={drvPath}
    )
    assert INPUTS.outputs[drvPath]
    assert INPUTS.outputs[drvPath][0] in files.files["graph"].decode().split("\n")


def test_nestedGraphs():
    """Nix from 2.26 on takes lists of lists in structured attributes."""
    attrs = {"exportReferencesGraph": {"g": [[[OUTER]]]}}
    files = environment(structured(**attrs), storeDir=STORE_DIR, inputClosure={OUTER})
    described = json.loads(files.files[".attrs.json"])["g"]
    assert [item["path"] for item in described] == sorted(INPUTS.queryClosure([OUTER]))


# Structured attributes.


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "1",
        "{",
        '{"a":NaN}',
        '{"a":-Infinity}',
        '{"a":1e999}',
        '{"a":"\\ud800"}',
        '{"a":"\udcff"}',
        '{"a":"\n"}',
        '{"a":1,}',
        '{"a":1} x',
        '{"a":' + 100_000 * "[",
        '{"a":' + 20_000 * "9" + "}",
    ],
)
def test_badJSON(text):
    """What is no JSON object is an error of the build."""
    with pytest.raises(BuildError, match="cannot process __json") as raised:
        parseStructuredAttrs(text)
    assert raised.value.status == BuildStatus.MISC_FAILURE


def test_manyJSONValues():
    """
    There is a limit to values: reading is one call, during which nothing else of the server runs. Long texts are no
    matter.
    """
    assert len(parseStructuredAttrs('{"a":[' + ",".join(200_000 * "1") + "]}")["a"]) == 200_000
    assert len(parseStructuredAttrs('{"a":"' + 4_000_000 * "x" + '"}')["a"]) == 4_000_000
    for value in ("1,", "[],", "{},"):
        with pytest.raises(BuildError, match="more than 250000 values"):
            parseStructuredAttrs('{"a":[' + 130_000 * value + 130_000 * value + "1]}")


def test_longAttributes():
    """An attribute that means something here is no longer than a variable of a process; others may be."""
    text = 128 * 1024 * "x"
    assert DerivationOptions.of(derivation({"passAsFile": text, "other": text + "x"})).passAsFile == {text}
    for name in ("requiredSystemFeatures", "allowedReferences", "passAsFile", "impureEnvVars", "exportReferencesGraph"):
        with pytest.raises(BuildError, match=f"'{name}' of derivation is longer than 131072 bytes"):
            DerivationOptions.of(derivation({name: text + "x"}))


@pytest.mark.parametrize("structured", [False, True])
def test_manyGraphs(monkeypatch, structured):
    """All that is described to a builder is bounded, however often it asks, and can be given up at any time."""
    monkeypatch.setattr(environmentModule, "_MAX_DESCRIBED", 100_000)
    graphs = {f"g{number}": OUTER for number in range(100)}
    env = {"exportReferencesGraph": " ".join(f"{name} {path}" for name, path in graphs.items())}
    if structured:
        env = {"__json": json.dumps({"exportReferencesGraph": graphs})}
    arguments = {"storeDir": STORE_DIR, "inputs": INPUTS, "inputClosure": INPUTS.infos.keys()}
    with pytest.raises(BuildError, match="asks for more than 0 MiB of descriptions"):
        environment(derivation(env), **arguments)

    def giveUp():
        raise BuildError(BuildStatus.TIMED_OUT, "enough")

    with pytest.raises(BuildError, match="enough"):
        environment(derivation(env), proceed=giveUp, **arguments)


def test_deepJSON():
    """There is a limit to lists in lists; what keeps to it can be written again."""
    text = '{"a":' + 99 * "[" + 99 * "]" + "}"
    assert writeJSON(parseStructuredAttrs(text)) == text
    with pytest.raises(BuildError, match="more than 100 levels deep"):
        parseStructuredAttrs('{"a":' + 100 * "[" + 100 * "]" + "}")


# Options.


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

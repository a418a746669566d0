"""What builders get to see, compared with what they saw of the real Nix: see tests/vectors/regenerate_builder.py."""

import json
from pathlib import Path

import pytest

from nixserve.builder import environment as environmentModule
from nixserve.builder.drvoptions import DerivationOptions
from nixserve.builder.environment import builderEnvironment, outputRewrites
from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.contentaddress import ContentAddress
from nixserve.codec.derivation import DerivationOutput, parseDerivation
from nixserve.codec.hashes import Hash
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.resolution import outputPlaceholder
from nixserve.codec.storepath import StoreDir, StorePath, outputPathName
from nixserve.errors import BuildError
from nixserve.store.api import InvalidPath
from tests.builder.drvs import DEV, OUT, derivation, structured

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

"""Derivations, against real Nix: the vectors are made by tests/vectors/regenerate_derivations.py."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.aterm import BadATerm
from nixserve.codec.contentaddress import ContentAddress
from nixserve.codec.derivation import (
    MAX_KEPT_SIZE,
    BadDerivation,
    BasicDerivation,
    Derivation,
    DerivationOutput,
    OutputKind,
    checkDerivationOutputs,
    derivationName,
    drvPathOf,
    hashDerivationModulo,
    outputPaths,
    parseDerivation,
    unparse,
    verifyBasicDerivation,
)
from nixserve.codec.hashes import Hash, hashBytes
from nixserve.codec.messages import BuildDerivation
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import FormatError
from tests import strategies

STORE = StoreDir()
VECTORS = Path(__file__).parent.parent / "vectors" / "derivations"
PATHS = json.loads((VECTORS / "paths.json").read_text())
ATTRIBUTES = {described["drvPath"]: attribute for attribute, described in PATHS.items()}

SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
SHA1 = "aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d"
SOME_PATH = STORE.parse("/nix/store/00000000000000000000000000000000-x")


def drvPath(attribute):
    """Where Nix put the vector."""
    return STORE.parse(PATHS[attribute]["drvPath"])


def vector(attribute):
    """The derivation of a vector."""
    return lookup(drvPath(attribute))


def text(attribute):
    """The .drv of a vector."""
    return (VECTORS / f"{attribute}.drv").read_bytes()


def lookup(path):
    """Find a vector by its path."""
    return parseDerivation(text(ATTRIBUTES[path]), derivationName(path), STORE)


def basic(drv):
    """What the wire carries of a derivation."""
    return BasicDerivation(drv.name, drv.outputs, drv.inputSrcs, drv.platform, drv.builder, drv.args, drv.env)


def masked(drv):
    """The SHA-256 from which the paths of input-addressed outputs are made."""
    inputs = {}
    for path, names in drv.inputDrvs.items():
        inputs.setdefault(hashDerivationModulo(lookup(path), lookup, STORE, {}).hex, set()).update(names)
    return hashBytes("sha256", unparse(drv, True, inputs)).hex


def small(**fields):
    """A derivation with little in it."""
    defaults = {
        "name": "x",
        "outputs": {"out": DerivationOutput(SOME_PATH)},
        "inputSrcs": frozenset(),
        "platform": "x86_64-linux",
        "builder": "/bin/sh",
        "args": (),
        "env": {},
        "inputDrvs": {},
    }
    return Derivation(**(defaults | fields))


# What an independent implementation computed: masked and unmasked hashes.
HASHES = [
    (
        "leaf",
        "91ea49dda419f4f24a4d5433273f82a635c6c8ce6bda5a714b5a72d19f43517b",
        "e736dd87dfb433337caa2a689b3ab343c18eb3e3abc78be9d67098c0e2f1c519",
    ),
    (
        "multi",
        "341615841a2a1f50df6dcdec8682745b28d042ff6b48e0ebd7770754e9a079d0",
        "c224df65694fb56ef9ef066e2c86e2470c3066ec92b544c6c0470843be1eb199",
    ),
    (
        "srcdep",
        "8acd750d7aa2d59403751cd2c48d613a244039fd9798db3ce69b3d042626c88c",
        "755ecbdf711f4e1e9c4fd424905a16347c5b23ab3d44da4b67272c4bd5fd4039",
    ),
    (
        "two",
        "c5612b73a7405e899f11ea1403a9f76abf2a8a29ad081551b3e6e54db71c01eb",
        "47dcfe32a829c503cbdb1cda7259a19d2bf726067561a15af75e47a0f5bf77cc",
    ),
    (
        "dep",
        "046e3eb1859e46311bac82f8055bb8ebcd393127fe66930aaa032b1d230b3f59",
        "96ab8a63bd45209533783d06b99bb2ab46aa6fbd73b70df01b35259394f748f7",
    ),
    ("flat", None, "46cd378ade58fcb01002a594b43af7c33be45c7ac0f28679075f915e1419c8d4"),
    ("flat1", None, "03d13acb906c528c92c742608bb235ef511dcb414b976bd133a5972ec4bfe1be"),
    ("recursive", None, "a7152dfd7e48bdae776713fea0a43e6f6cbe5a6db736a20b1d19a547dbdfaf2a"),
    ("rec1", None, "4a2384fee4645bcdd06aa2e4e1ad741985b8554e418ec50994c7fdefb8320fb4"),
    (
        "esc",
        "c7015a34f506d6c0ebeab23447316fbdef4b3f53f3671b6ad898e5bf1cd606ac",
        "8e75b6bc4d21326aa1b87e61bdbfe8a59c40bf4c58abded48bffb7c5ddd4731c",
    ),
    (
        "structured",
        "0a1326460b7432f17c4405bd0a9b936e2ed704e7c7eed457857355b39f8738da",
        "fb4e367e6ec0b452e46c0a89db63b362d629407a7a0df94c904307b1bc10bb63",
    ),
]

# Where Nix put some of these, so that the vectors cannot drift away when they are made again.
DRV_PATHS = {
    "leaf": "c54cnxji5m9ydi2j3qj70fchyq15cns7-leaf.drv",
    "multi": "0gdl8g7iky1p5wls4393xlrn68rp124v-multi.drv",
    "srcdep": "j2d28zliw7p4mmsknhk685ab05h91phh-srcdep.drv",
    "two": "5f20rj924f67kjqy723kxq5jnzr81gf6-two.drv",
    "dep": "215ridmnfwfdgdibr98b4rkiip9kxvsz-dep.drv",
    "flat": "q9bfjnqc8b4lmgcw2zk82fzyzj6a0jw5-flat.drv",
    "flat1": "kdd0ydv307izykzbgi29pmbzn0zhr6l1-flat1.drv",
    "recursive": "9q8z6ldyryy8la1f9qxl879xim5cy0c4-rec.drv",
    "rec1": "8yva0fjgmsn52sirk1mz81gc0grrdndc-rec1.drv",
    "esc": "lsvj0h0vxwi9gc1fkxcyj12b514j9c48-esc.drv",
    "floating": "wmpxl795pbhhnlqc2wr5qzl4g0227slp-ca.drv",
    "deferred": "w7v3d3r2f4g22an4c079x74q39agb4hw-cadep.drv",
    "structured": "mhs01zy1i1swpqdqm8adbn4r7hil26q6-sa.drv",
}


@pytest.mark.parametrize("attribute", PATHS)
def test_vectors(attribute):
    """From each .drv of real Nix follow its text, its own path and the paths of its outputs."""
    path = drvPath(attribute)
    drv = vector(attribute)
    assert unparse(drv) == text(attribute)
    assert drvPathOf(drv, STORE) == path
    assert outputPaths(drv, lookup, STORE, {}) == PATHS[attribute]["outputs"]
    assert {name: output.path for name, output in drv.outputs.items()} == PATHS[attribute]["outputs"]
    checkDerivationOutputs(path, drv, lookup, STORE)


def test_vectorsAreMany():
    """The vectors are there, each kind among them."""
    assert {vector(attribute).kind() for attribute in PATHS} == set(OutputKind)
    assert {attribute: drvPath(attribute).baseName for attribute in DRV_PATHS} == DRV_PATHS


@pytest.mark.parametrize(("attribute", "maskedHash", "unmaskedHash"), HASHES)
def test_hashes(attribute, maskedHash, unmaskedHash):
    """Both hashes are those that an independent implementation found."""
    drv = vector(attribute)
    assert hashDerivationModulo(drv, lookup, STORE, {}) == Hash("sha256", bytes.fromhex(unmaskedHash))
    if maskedHash:
        assert masked(drv) == maskedHash


@pytest.mark.parametrize("attribute", ["floating", "floatingMulti", "deferred", "deferredTwice", "impure"])
def test_deferredHashes(attribute):
    """Where a path is not known there is no hash."""
    assert hashDerivationModulo(vector(attribute), lookup, STORE, {}) is None


def test_maskedText():
    """Masking empties output paths and the variables named like outputs, and nothing else."""
    assert unparse(vector("leaf"), maskOutputs=True) == (
        b'Derive([("out","","","")],[],[],"x86_64-linux","/bin/sh",["-c","echo hi > $out"],'
        b'[("FOO","bar"),("builder","/bin/sh"),("name","leaf"),("out",""),("system","x86_64-linux")])'
    )
    assert unparse(vector("bare"), True, {"b": ["y", "x"], "a": ["out"]}) == (
        b'Derive([("out","","","")],[("a",["out"]),("b",["x","y"])],[],"x86_64-linux","/bin/sh",[],'
        b'[("builder","/bin/sh"),("name","bare"),("out",""),("system","x86_64-linux")])'
    )
    assert unparse(small(env={"a": "1"}), maskOutputs=True).endswith(b'[("a","1")])')


def test_fixedInputsAreWhatTheyContain():
    """Derivations that differ in how a fixed input comes about have the same outputs."""
    assert drvPath("mirrorA") != drvPath("mirrorB")
    one, other = (outputPaths(vector(attribute), lookup, STORE, {}) for attribute in ("multiA", "multiB"))
    assert one == other
    assert drvPath("multiA") != drvPath("multiB")


def test_memo():
    """Each input is looked up once, and not at all when its hash is known."""
    seen = []

    def countingLookup(path):
        seen.append(path)
        return lookup(path)

    memo = {}
    hashDerivationModulo(vector("dep"), countingLookup, STORE, memo)
    assert sorted(seen) == sorted(set(seen)) == sorted(memo)
    assert {ATTRIBUTES[path] for path in seen} == {"two", "multi", "leaf", "flat", "recursive"}
    hashDerivationModulo(vector("dep"), countingLookup, STORE, memo)
    outputPaths(vector("dep"), countingLookup, STORE, memo)
    assert len(seen) == 5


def test_inputsOfFixedAreNotLookedUp():
    """The hash of a fixed output depends on nothing else."""
    drv = vector("fixedWithInputs")
    assert drv.inputDrvs
    assert hashDerivationModulo(drv, {}.__getitem__, STORE, {}) is not None


def chainOf(length, **fields):
    """Derivations each of which uses the one before it, by path."""
    graph = {}
    inputDrvs = {}
    for i in range(length):
        drv = small(name=f"x{i}", inputDrvs=inputDrvs, **fields)
        path = StorePath(f"/nix/store/{i:032}-x{i}.drv")
        graph[path] = drv
        inputDrvs = {path: frozenset({"out"})}
    return graph, drv


def test_deepGraph():
    """A chain of thousands of derivations needs no stack of Python's."""
    graph, last = chainOf(5000)
    memo = {}
    assert hashDerivationModulo(last, graph.__getitem__, STORE, memo) is not None
    assert len(memo) == 4999


@pytest.mark.parametrize("fields", [{"env": {"x": "x" * MAX_KEPT_SIZE}}, {"args": ("x" * MAX_KEPT_SIZE,)}, {}])
def test_chainOfLargeOnes(fields):
    """Of a chain of large derivations only one is in memory at a time: each is looked up again when it is its turn."""
    graph, last = chainOf(10, **fields)
    looked, memo, expected = Counter(), {}, {}

    def looking(path):
        looked[path] += 1
        # Another one each time, as from a store.
        return dataclasses.replace(graph[path])

    found = hashDerivationModulo(last, looking, STORE, memo)
    for drv in graph.values():
        expected[drv.name] = hashDerivationModulo(drv, graph.__getitem__, STORE, {})
    assert (
        found == expected[last.name] and {path.name[:-4]: memo[path] for path in memo} | {last.name: found} == expected
    )
    assert set(looked.values()) == {2 if fields else 1}


def test_cycle():
    """A lookup that leads round in a circle is an error, not an endless loop."""
    a, b = (StorePath(f"/nix/store/{c * 32}-x.drv") for c in "ab")
    graph = {a: small(inputDrvs={b: frozenset({"out"})}), b: small(inputDrvs={a: frozenset({"out"})})}
    with pytest.raises(BadDerivation, match="cycle detected"):
        hashDerivationModulo(graph[a], graph.__getitem__, STORE, {})


# Text.


@given(strategies.derivations())
def test_roundTrip(drv):
    """Any derivation reads back as it was written."""
    assert parseDerivation(unparse(drv), drv.name, STORE) == drv


def test_orderIsThatOfBytes():
    """Where the order of characters is another than that of bytes, that of the bytes counts."""
    drv = small(env={"\udcff": "last", "\U0001f642": "first"})
    data = unparse(drv)
    assert data.endswith(b'[("\xf0\x9f\x99\x82","first"),("\xff","last")])')
    assert parseDerivation(data, "x", STORE) == drv


LEAF = text("leaf")
TWO = text("two")
FIXED = text("flat")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not start with 'Derive' or 'DrvWithVersion': found the end at offset 0"),
        (b"Derive", "does not start with 'Derive'"),
        (b" " + LEAF, "does not start with 'Derive'"),
        (b'DrvWithVersion("xp-dyn-drv",[])', "has the form 'DrvWithVersion', which is not supported"),
        (LEAF + b"\n", "expected the end"),
        (LEAF[:-1], r"expected string '\)': found the end"),
        (LEAF.replace(b",[],[],", b", [],[],"), r"expected string '\['"),
        (LEAF.replace(b'["-c"', b'[,"-c"'), "expected string"),
        (LEAF.replace(b'("FOO","bar"),', b'("builder","x"),'), "environment variables are not in ascending order"),
        (LEAF.replace(b'"FOO"', b'"zoo"'), "environment variables are not in ascending order"),
        (LEAF.replace(b'"FOO"', rb'"\FOO"'), "an escape that Nix does not write"),
        (LEAF.replace(b'"x86_64-linux","/bin', rb'"x\n","/bin'), "an escape where none can be"),
        (LEAF.replace(b"/nix/store/fcx9", b"/nix/store//fcx9", 1), "is not canonical"),
        (LEAF.replace(b"/nix/store/fcx9", b"/nix/other/fcx9", 1), "is not in the Nix store, right before this: found"),
        (LEAF.replace(b'("out","/nix', b'("o/t","/nix', 1), "name 'o/t' contains illegal character '/'"),
        (LEAF.replace(b'leaf","",""', b'leaf","","00"', 1), "has a hash without an algorithm"),
        (LEAF.replace(b'leaf","",""', b'leaf","sha256",""', 1), "bad path .* this output is floating"),
        (FIXED.replace(b'"sha256","2c', b'"sha257","2c', 1), "unknown hash algorithm 'sha257'"),
        (FIXED.replace(b'"sha256","2c', b'"sha256","2C', 1), "is not in base-16"),
        (FIXED.replace(b'"sha256","2c', b'"sha256","c', 1), "has wrong length"),
        (FIXED.replace(b'"/nix/store/55rlr5xql78vj5r1xpimlfvz0jzzlxn9-flat"', b'""', 1), "bad path ''"),
        (text("multi").replace(b'"dev"', b'"pub"', 1), "outputs are not in ascending order"),
        (text("multi").replace(b'"dev"', b'"out"', 1), "outputs are not in ascending order"),
        (TWO.replace(b"store/0gdl", b"store/zgdl"), "input derivations are not in ascending order"),
        (TWO.replace(b'["dev"]', b"[]"), "inputDrvs entry for '.*-multi.drv' specifies no outputs"),
        (TWO.replace(b'["dev"]', b'["dev","dev"]'), "wanted outputs are not in ascending order"),
        (TWO.replace(b'["dev"]', b'["out","dev"]'), "wanted outputs are not in ascending order"),
        (TWO.replace(b'["dev"]', b'(["dev"],[])'), r"expected string '\['"),
        (TWO.replace(b"multi.drv", b"multi.d"), "is not a derivation"),
        (text("textdep").replace(b'-text"]', b'-text","/nix/store/' + b"0" * 32 + b'-a"]'), "input sources are not"),
    ],
)
def test_badTexts(data, message):
    """Every text that Nix does not write is refused, with a reason and an offset."""
    with pytest.raises(BadATerm, match=message) as caught:
        parseDerivation(data, "x", STORE)
    assert 0 <= caught.value.offset <= len(data)


@given(st.sampled_from(sorted(PATHS)), st.data())
def test_damagedTexts(attribute, data):
    """A changed text is refused or is another derivation, which has that text."""
    original = text(attribute)
    start = data.draw(st.integers(0, len(original)))
    end = start + data.draw(st.integers(0, 3))
    changed = (
        original[:start] + data.draw(st.binary(max_size=2) | st.sampled_from([b'"', b"\\", b","])) + original[end:]
    )
    try:
        drv = parseDerivation(changed, "x", STORE)
    except BadATerm:
        return
    assert unparse(drv) == changed


@pytest.mark.parametrize("fields", [{"platform": 'x","/bin/sh'}, {"outputs": {'o"': DerivationOutput(None)}}])
def test_noInjection(fields):
    """A raw string cannot end early, which would make the text that of another derivation."""
    drv = small(**fields)
    with pytest.raises(FormatError, match="no quotes and backslashes"):
        unparse(drv)
    with pytest.raises(FormatError, match="no quotes and backslashes"):
        outputPaths(dataclasses.replace(drv, outputs={'o"': DerivationOutput(SOME_PATH)}), lookup, STORE, {})


def test_otherHashForms():
    """A fixed hash may come from the wire in nix32 or base-64; its text is the same."""
    hash = Hash("sha256", bytes.fromhex(SHA256))
    drv = vector("flat")
    for form in (hash.nix32, hash.base64, hash.hex.upper()):
        output = DerivationOutput(drv.outputs["out"].path, "sha256", form)
        other = dataclasses.replace(drv, outputs={"out": output})
        assert unparse(other) == text("flat")
        assert hashDerivationModulo(other, lookup, STORE, {}) == hashDerivationModulo(drv, lookup, STORE, {})


# Outputs.


@pytest.mark.parametrize(
    ("triple", "kind", "ca"),
    [
        ((SOME_PATH, "", ""), OutputKind.INPUT_ADDRESSED, None),
        ((None, "", ""), OutputKind.DEFERRED, None),
        ((None, "r:sha256", ""), OutputKind.FLOATING, None),
        ((None, "text:sha256", ""), OutputKind.FLOATING, None),
        ((None, "r:sha256", "impure"), OutputKind.IMPURE, None),
        ((SOME_PATH, "sha256", SHA256), OutputKind.FIXED, f"fixed:sha256:{SHA256}"),
        ((SOME_PATH, "r:sha1", SHA1), OutputKind.FIXED, f"fixed:r:sha1:{SHA1}"),
        ((SOME_PATH, "text:sha256", SHA256), OutputKind.FIXED, f"text:sha256:{SHA256}"),
        ((SOME_PATH, "git:sha1", SHA1), OutputKind.FIXED, f"fixed:git:sha1:{SHA1}"),
    ],
)
def test_outputKinds(triple, kind, ca):
    """What the three strings of an output say."""
    output = DerivationOutput(*triple)
    assert output.kind is kind
    assert output.contentAddress == (ca and ContentAddress.parse(ca))


@pytest.mark.parametrize(
    ("triple", "message"),
    [
        ((None, "", SHA256), "a hash without an algorithm"),
        ((None, "sha256", SHA256), "bad path '' in derivation: this output is fixed"),
        ((SOME_PATH, "r:sha256", ""), "this output is floating"),
        ((SOME_PATH, "r:sha256", "impure"), "this output is impure"),
        ((SOME_PATH, "sha256", SHA1), "has wrong length for hash type 'sha256'"),
        ((SOME_PATH, "sha256", f"sha256:{SHA256}"), "has wrong length for hash type 'sha256'"),
        ((None, "x:sha256", ""), "unknown hash algorithm 'x:sha256'"),
        ((None, "r:", "impure"), "unknown hash algorithm ''"),
    ],
)
def test_badOutputs(triple, message):
    """Three strings that mean nothing are no output."""
    with pytest.raises(FormatError, match=message):
        DerivationOutput(*triple)


FIXED_OUTPUT = DerivationOutput(SOME_PATH, "sha256", SHA256)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "must have at least one output"),
        ({"a": DerivationOutput(None), "out": FIXED_OUTPUT}, "can't mix derivation output types"),
        ({"a": DerivationOutput(SOME_PATH), "out": DerivationOutput(None)}, "can't mix derivation output types"),
        ({"a": FIXED_OUTPUT, "out": FIXED_OUTPUT}, "only one fixed output is allowed for now"),
        ({"dev": FIXED_OUTPUT}, 'single fixed output must be named "out"'),
        (
            {"a": DerivationOutput(None, "r:sha1"), "out": DerivationOutput(None, "r:sha256")},
            "all floating outputs must use the same hash algorithm",
        ),
    ],
)
def test_badKinds(outputs, message):
    """Outputs that do not go together are refused in Nix's words, wherever their kind matters."""
    drv = small(outputs=outputs)
    with pytest.raises(BadDerivation, match=message):
        drv.kind()
    with pytest.raises(BadDerivation, match=message):
        outputPaths(drv, lookup, STORE, {})
    with pytest.raises(BadDerivation, match=message):
        hashDerivationModulo(drv, lookup, STORE, {})
    with pytest.raises(BadDerivation, match=message):
        verifyBasicDerivation(STORE.parse(f"{SOME_PATH}.drv"), basic(drv), STORE)


def test_floatingMethodsMayDiffer():
    """Only the algorithm of floating outputs must be the same."""
    outputs = {"a": DerivationOutput(None, "sha256"), "out": DerivationOutput(None, "r:sha256")}
    assert small(outputs=outputs).kind() is OutputKind.FLOATING


def test_mentioned():
    """What must not vanish during a build are its sources, and its outputs as far as it says where they go."""
    source, other = STORE.parse(SOME_PATH + "-source"), STORE.parse(SOME_PATH + "-other")
    outputs = {
        "out": DerivationOutput(SOME_PATH),
        "dev": DerivationOutput(None, "r:sha256"),
        "doc": DerivationOutput(None),
    }
    drv = BasicDerivation("x", outputs, frozenset({source, other}), "x", "/bin/sh", (), {})
    assert drv.knownOutputPaths == {"out": SOME_PATH}
    assert drv.mentioned == {SOME_PATH, source, other}
    asked = STORE.parse(SOME_PATH + ".drv")
    assert BuildDerivation(asked, drv).mentioned == {asked, SOME_PATH, source, other}


def test_derivationName():
    """The name is what remains between hash part and extension."""
    assert derivationName(drvPath("leaf")) == "leaf"
    assert derivationName(StorePath(f"{SOME_PATH}.drv.drv")) == "x.drv"
    with pytest.raises(BadDerivation, match="is not a derivation"):
        derivationName(SOME_PATH)


# Checks.


def changed(attribute, **fields):
    """A vector with other fields; C{env} is merged."""
    drv = vector(attribute)
    if "env" in fields:
        fields["env"] = {k: v for k, v in (dict(drv.env) | fields["env"]).items() if v is not None}
    return dataclasses.replace(drv, **fields)


@pytest.mark.parametrize(
    ("attribute", "fields", "message"),
    [
        (
            "two",
            {"outputs": {"out": DerivationOutput(SOME_PATH)}},
            f"has incorrect output '{SOME_PATH}', should be '.*-two'",
        ),
        ("two", {"args": ()}, "has incorrect output '.*-two', should be '.*-two'"),
        ("two", {"inputDrvs": {}}, "has incorrect output"),
        ("two", {"env": {"out": SOME_PATH}}, "has incorrect environment variable 'out', should be '.*-two'"),
        ("multi", {"env": {"dev": ""}}, "has incorrect environment variable 'dev', should be '.*-multi-dev'"),
        ("flat", {"env": {"out": None}}, "has incorrect environment variable 'out', should be '.*-flat'"),
        ("flat", {"env": {"out": SOME_PATH}}, "has incorrect environment variable 'out', should be '.*-flat'"),
        ("flat", {"outputs": {"out": FIXED_OUTPUT}}, f"has incorrect output '{SOME_PATH}', should be '.*-flat'"),
        (
            "deferred",
            {"outputs": {"out": DerivationOutput(SOME_PATH)}},
            "has incorrect output .* whose path is not known before its inputs are built",
        ),
        ("leaf", {"name": "other"}, "has the wrong name: expected 'leaf', found 'other'"),
    ],
)
def test_checkDerivationOutputs(attribute, fields, message):
    """A derivation that claims other outputs than follow from it is refused in Nix's words."""
    path = drvPath(attribute)
    with pytest.raises(BadDerivation, match=f"^derivation '{path}' {message}"):
        checkDerivationOutputs(path, changed(attribute, **fields), lookup, STORE)


def test_checkNeedsVariables():
    """Registering wants the variable of every output, as Nix 2.8 does, although the hash covers its absence."""
    env = {"builder": "/bin/sh"}
    [path] = outputPaths(small(env=env), lookup, STORE, {}).values()
    drv = small(env=env, outputs={"out": DerivationOutput(path)})
    at = drvPathOf(drv, STORE)
    with pytest.raises(BadDerivation, match="has incorrect environment variable 'out'"):
        checkDerivationOutputs(at, drv, lookup, STORE)
    verifyBasicDerivation(at, basic(drv), STORE)


VERIFIABLE = [
    attribute
    for attribute in PATHS
    if vector(attribute).kind() in (OutputKind.FIXED, OutputKind.FLOATING) or not vector(attribute).inputDrvs
]


@pytest.mark.parametrize("attribute", sorted(set(VERIFIABLE) - {"impure"}))
def test_verify(attribute):
    """What the wire carries proves itself if there were no input derivations, or the outputs do not depend on them."""
    verifyBasicDerivation(drvPath(attribute), basic(vector(attribute)), STORE)


def test_verifyKnown():
    """These at least must be among what can be verified."""
    assert {"leaf", "multi", "srcdep", "structured", "flat", "fixedWithInputs", "floating"} <= set(VERIFIABLE)


@pytest.mark.parametrize("attribute", sorted(set(PATHS) - set(VERIFIABLE) | {"impure"}))
def test_verifyNeedsInputs(attribute):
    """Nothing else proves itself, be it with inputs forgotten or with their outputs in their place."""
    drv = vector(attribute)
    outputs = frozenset(
        path for drvPath in drv.inputDrvs for path in outputPaths(lookup(drvPath), lookup, STORE, {}).values() if path
    )
    with pytest.raises(BadDerivation):
        verifyBasicDerivation(drvPath(attribute), basic(drv), STORE)
    resolved = dataclasses.replace(basic(drv), inputSrcs=drv.inputSrcs | outputs)
    with pytest.raises(BadDerivation):
        verifyBasicDerivation(drvPath(attribute), resolved, STORE)
    if drv.inputDrvs:
        with pytest.raises(BadDerivation):
            verifyBasicDerivation(drvPath(attribute), drv, STORE)


def test_resolvedPath():
    """With its inputs' outputs as sources the vector would go elsewhere, to the path that Nix then wants."""
    drv = vector("two")
    sources = frozenset({vector("leaf").outputs["out"].path, vector("multi").outputs["dev"].path})
    resolved = dataclasses.replace(drv, inputDrvs={}, inputSrcs=sources)
    with pytest.raises(BadDerivation, match="should be '/nix/store/vdaqfm751wdyrccywsvpk330gbw97023-two'"):
        verifyBasicDerivation(drvPath("two"), basic(resolved), STORE)


@pytest.mark.parametrize(
    ("attribute", "fields", "message"),
    [
        ("leaf", {"args": ()}, "has incorrect output"),
        ("leaf", {"builder": "/bin/bash"}, "has incorrect output"),
        ("leaf", {"platform": "i686-linux"}, "has incorrect output"),
        ("leaf", {"env": {"FOO": ""}}, "has incorrect output"),
        ("leaf", {"env": {"FOO": None}}, "has incorrect output"),
        ("leaf", {"env": {"out": None}}, "has incorrect output"),
        ("leaf", {"env": {"out": ""}}, "has incorrect environment variable 'out'"),
        ("leaf", {"inputSrcs": frozenset({SOME_PATH})}, "has incorrect output"),
        ("leaf", {"outputs": {"out": DerivationOutput(SOME_PATH)}}, "has incorrect output"),
        ("leaf", {"outputs": {"out": DerivationOutput(None)}}, "its outputs are deferred"),
        ("leaf", {"outputs": {"lib": vector("leaf").outputs["out"]}}, "has incorrect output"),
        ("flat", {"outputs": {"out": FIXED_OUTPUT}}, "has incorrect output"),
        ("flat", {"env": {"out": SOME_PATH}}, "has incorrect environment variable 'out'"),
        ("leaf", {"name": "x"}, "has the wrong name"),
    ],
)
def test_verifyRejects(attribute, fields, message):
    """Whatever is changed in a derivation, it no longer proves its outputs."""
    with pytest.raises(BadDerivation, match=message):
        verifyBasicDerivation(drvPath(attribute), basic(changed(attribute, **fields)), STORE)

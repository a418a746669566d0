"""Derivations that real Nix makes: we read them, and compute the same paths."""

import base64
import hashlib
import random
from collections import Counter

import pytest

from nixserve.codec.derivation import (
    OutputKind,
    checkDerivationOutputs,
    drvPathOf,
    outputPaths,
    parseDerivation,
    unparse,
)
from nixserve.codec.storepath import StoreDir
from tests.interop.stores import physical

COUNT = 200
STORE_DIR = StoreDir()
WORDS = ["plain", "two words", 'quo\\"te', "back\\\\slash", "new\\nline", "tab\\t", "é€😀", "$dollar", "''", "-", ""]


def makeExpression(seed):
    """
    C{COUNT} derivations of every kind, of which later ones use earlier ones.

    @return: a Nix expression, a list.
    """
    chance = random.Random(seed)
    lines, outputs = ["let"], []
    for number in range(COUNT):
        # What depends on a floating output has no known path either: few of them, and late.
        kinds = (
            ["plain"] * 8 + ["structured"] * 2 + ["flat", "recursive"] + (["floating"] if number > COUNT // 2 else [])
        )
        kind = chance.choice(kinds)
        names = ["out"] if kind in ("flat", "recursive") else chance.choice([["out"], ["out", "dev"], ["lib", "out"]])
        used = chance.sample(outputs, min(len(outputs), chance.randrange(4)))
        uses = [f"{drv}.{chance.choice(chosen)}" for drv, chosen in used]
        attributes = {
            "name": f'"drv-{number}{chance.choice(["", ".x", "_y", "+z"])}"',
            "system": chance.choice(['"x86_64-linux"', '"aarch64-linux"', '"builtin"']),
            "builder": chance.choice(['"/bin/sh"', '"builtin:fetchurl"']),
            "args": "[ " + " ".join(f'"{chance.choice(WORDS).replace("$", "")}"' for _ in range(3)) + " ]",
            "uses": "[ " + " ".join(uses) + " ]",
            f"_{chance.randrange(1000)}": f'"{chance.choice(WORDS)}"',
            "outputs": "[ " + " ".join(f'"{name}"' for name in names) + " ]",
        }
        attributes.update(kindAttributes(kind, chance))
        if chance.random() < 0.2:
            attributes["src"] = f'builtins.toFile "source-{number}" "{chance.choice(WORDS)}"'
        body = " ".join(f"{name} = {value};" for name, value in attributes.items())
        lines.append(f"  d{number} = derivation {{ {body} }};")
        outputs.append((f"d{number}", names))
    return "\n".join([*lines, "in [", *(f"d{number}" for number in range(COUNT)), "]"])


def kindAttributes(kind, chance):
    """The attributes that make a derivation one of this kind."""
    if kind == "structured":
        return {"__structuredAttrs": "true", "nested": '{ a = [ 1 2.5 true null ]; b = "é"; }'}
    if kind == "floating":
        mode = chance.choice(["recursive", "flat"])
        return {"__contentAddressed": "true", "outputHashMode": f'"{mode}"', "outputHashAlgo": '"sha256"'}
    if kind in ("flat", "recursive"):
        algorithm = chance.choice(["md5", "sha1", "sha256", "sha512"])
        digest = hashlib.new(algorithm, str(chance.random()).encode())
        text = chance.choice([digest.hexdigest(), f"{algorithm}-{base64.b64encode(digest.digest()).decode()}"])
        return {"outputHash": f'"{text}"', "outputHashAlgo": f'"{algorithm}"', "outputHashMode": f'"{kind}"'}
    return {}


@pytest.mark.parametrize("seed", [1, 2])
def test_generated(nix, directory, seed):
    """
    The text, the path of the .drv and the output paths of generated derivations of every kind are recomputed; the
    output paths of those that use others rest on the others' hashes modulo their recipes.
    """
    expression = directory / "all.nix"
    expression.write_text(makeExpression(seed))
    features = "extra-experimental-features = nix-command ca-derivations\n"
    environment = {"NIX_CONFIG": nix.environment["NIX_CONFIG"] + features}
    paths = nix.lines("nix-instantiate", str(expression), store=directory / "store", environment=environment)
    assert len(set(paths)) == COUNT
    read = {}

    def lookup(path):
        if path not in read:
            data = physical(directory / "store", path).read_bytes()
            read[path] = parseDerivation(data, path.name.removesuffix(".drv"), STORE_DIR)
            assert unparse(read[path]) == data
        return read[path]

    memo, kinds = {}, Counter()
    for path in map(STORE_DIR.parse, (line.partition("!")[0] for line in paths)):
        drv = lookup(path)
        assert drvPathOf(drv, STORE_DIR) == path
        checkDerivationOutputs(path, drv, lookup, STORE_DIR, memo)
        assert outputPaths(drv, lookup, STORE_DIR, memo) == {name: output.path for name, output in drv.outputs.items()}
        kinds[drv.kind()] += 1
    assert all(kinds[kind] >= 3 for kind in OutputKind if kind is not OutputKind.IMPURE), kinds

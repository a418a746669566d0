"""
A store that real Nix made, with one closure that holds everything that a copy could get wrong.
"""

import hashlib
import json
import os
from dataclasses import dataclass

from nixserve.store.files import dumpPath
from tests.interop.stores import ODD_TREES, loadDatabase, named, physical
from tests.vectors.nar.trees import write

EXPRESSION = """
let
  sh = args: derivation (args // { system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" ": > $out" ]; });
  dependency = sh { name = "dependency"; };
in sh {
  name = "odd";
  outputs = [ "out" "dev" ];
  inherit dependency;
  source = builtins.toFile "source" "text that refers to ${builtins.toFile "other" "nothing"}";
}
"""


@dataclass(frozen=True)
class OddStore:
    """
    @ivar root: of the store.
    @ivar paths: the closure, all that there is.
    @ivar top: refers to everything else.
    @ivar secretKey: file of the key that some of it is signed with.
    """

    root: object
    paths: list
    top: str
    secretKey: object


def makeOddStore(nix, directory):
    """Have real Nix make such a store below an empty directory."""
    root, trees = directory / "root", directory / "trees"
    trees.mkdir()
    for name, tree in ODD_TREES.items():
        write(tree, os.fsencode(trees / name))
    sources = nix.lines("nix-store", "--add", *(trees / name for name in ODD_TREES), store=root)
    (drv,) = nix.lines("nix-instantiate", "-E", EXPRESSION, store=root)
    drvs = [
        path for path in nix.lines("nix-store", "--query", "--requisites", drv, store=root) if path.endswith(".drv")
    ]
    for one in drvs:
        for output in nix.lines("nix-store", "--query", "--outputs", one, store=root):
            place(nix, root, output, f"made by {one}", sources[:1], one)
    myself = named("refers-to-itself")
    place(nix, root, myself, f"I am {myself}", [myself])
    nix.run("nix", "store", "make-content-addressed", myself, "--store", root)
    _sign(nix, root, directory, [*sources[:2], myself])
    top = named("top")
    place(nix, root, top, "top", sorted(_all(nix, root)))
    return OddStore(root, sorted(_all(nix, root)), top, directory / "key-1")


def place(nix, root, path, text, references=(), deriver=""):
    """A file in the store, registered by real Nix."""
    where = physical(root, path)
    where.write_text(text)
    where.chmod(0o444)
    os.utime(where, (1, 1))
    nar = b"".join(dumpPath(str(where)))
    loadDatabase(nix, root, [(path, hashlib.sha256(nar).hexdigest(), len(nar), deriver, references)])


def _sign(nix, root, directory, paths):
    """With two keys."""
    for number in (1, 2):
        key = directory / f"key-{number}"
        key.write_bytes(nix.run("nix", "key", "generate-secret", "--key-name", f"interop-{number}").stdout)
        nix.run("nix", "store", "sign", "--key-file", key, "--store", root, *paths)


def _all(nix, root):
    return [info["path"] for info in json.loads(nix.run("nix", "path-info", "--json", "--all", "--store", root).stdout)]

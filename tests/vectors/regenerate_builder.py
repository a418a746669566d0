"""
Make the vectors in C{builder/} again, with the C{nix-build} on C{PATH}::

    python tests/vectors/regenerate_builder.py

Builds every attribute of C{derivations.nix} without a sandbox, in a store of its own whose place is always the same,
since store paths depend on it. Per attribute: C{<attribute>.drv}, the derivation; and C{<attribute>.json}:

  - C{env}, C{args}, C{files}: what the builder saw. Files are text, by name.
  - C{redirected}: outputs that were valid before this build, which is then the second one.

C{inputs.json} holds what the store knows about inputs: hash, size, references, content address; and for derivations the
outputs. Made with Nix 2.8; from 2.26 on graphs in structured attributes have a member more.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

VECTORS = Path(__file__).parent / "builder"
ROOT = Path("/tmp/nixserve-vectors")
DUMP = ROOT / "dump"
FEATURES = "ca-derivations nix-command"
INPUTS = {"inner", "outer", "made", "made.drv"}
"""The names of what C{derivations.nix} asks the references of."""


def nix(*command):
    """Run a command of Nix on the store in L{ROOT}; gives its output."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(ROOT),
        "TMPDIR": str(ROOT / "tmp"),
        "NIX_STORE_DIR": str(ROOT / "store"),
        "NIX_STATE_DIR": str(ROOT / "state"),
        "NIX_LOG_DIR": str(ROOT / "log"),
        "NIX_CONF_DIR": str(ROOT / "etc"),
        "SEEN_FROM_OUTSIDE": "from outside",
        "both": "from outside",
        "unasked": "from outside",
    }
    # What it says on the way is of interest only if it fails.
    done = subprocess.run(command, check=False, capture_output=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return done.stdout


def build(attribute):
    """
    Build one attribute.

    @return: where its derivation is.
    """
    expression = [str(VECTORS / "derivations.nix"), "--argstr", "dump", str(DUMP)]
    expression += ["--argstr", "text", (VECTORS / "numbers.txt").read_text(), "--attr", attribute]
    drvPath = nix("nix-instantiate", *expression).decode().strip()
    nix("nix-build", "--no-out-link", *expression)
    return drvPath


def split(file):
    """The strings in a file of those that end with NUL."""
    return [text.decode() for text in file.read_bytes().split(b"\0")[:-1]]


def describe(attribute, **more):
    """Write what the builder of C{attribute} saw, and forget it."""
    files = DUMP / f"{attribute}.files"
    seen = {
        "args": split(DUMP / f"{attribute}.args"),
        "env": dict(variable.split("=", 1) for variable in split(DUMP / f"{attribute}.env")),
        "files": {file.name: file.read_text() for file in files.iterdir()},
        **more,
    }
    shutil.rmtree(files)
    return seen


def write(name, value):
    """Write one vector."""
    (VECTORS / name).write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def attributes():
    """The names of the derivations."""
    query = f"builtins.attrNames (import {VECTORS}/derivations.nix {{ dump = null; text = null; }})"
    return json.loads(nix("nix-instantiate", "--eval", "--strict", "--json", "--expr", query))


def generate():
    """Replace the vectors."""
    drvPaths = {}
    for attribute in attributes():
        drvPaths[attribute] = build(attribute)
        (VECTORS / f"{attribute}.drv").write_bytes(Path(drvPaths[attribute]).read_bytes())
        write(f"{attribute}.json", describe(attribute, drvPath=drvPaths[attribute], redirected=[]))
    # Once more, with one of two outputs already there.
    out, _ = nix("nix-store", "--query", "--binding", "out", drvPaths["multi"]).decode().split("\n")
    nix("nix-store", "--delete", out)
    build("multi")
    shutil.copy(VECTORS / "multi.drv", VECTORS / "multiAgain.drv")
    write("multiAgain.json", describe("multi", drvPath=drvPaths["multi"], redirected=["dev"]))
    infos = json.loads(nix("nix", "path-info", "--all", "--json"))
    inputs = {info["path"]: info for info in infos if info["path"].split("-", 2)[-1] in INPUTS}
    for path in inputs:
        if path.endswith(".drv"):
            inputs[path]["outputs"] = nix("nix-store", "--query", "--outputs", path).decode().split()
    write("inputs.json", inputs)


def main():
    """Prepare a store, replace the vectors, remove the store."""
    for directory in (ROOT / "tmp", ROOT / "etc", DUMP):
        directory.mkdir(parents=True)
    settings = ["sandbox = false", "build-users-group =", "substituters =", f"experimental-features = {FEATURES}"]
    (ROOT / "etc" / "nix.conf").write_text("\n".join([*settings, "cores = 3", ""]))
    try:
        for old in [*VECTORS.glob("*.drv"), *VECTORS.glob("*.json")]:
            old.unlink()
        generate()
    finally:
        subprocess.run(["chmod", "-R", "u+w", ROOT], check=True)
        shutil.rmtree(ROOT)


if __name__ == "__main__":
    main()

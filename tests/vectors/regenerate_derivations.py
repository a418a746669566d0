"""
Make the vectors in C{derivations/} again, with the C{nix-instantiate} on C{PATH}, in a store of its own::

    python tests/vectors/regenerate_derivations.py

Per attribute of C{derivations.nix}: C{<attribute>.drv}, the file that Nix writes; and in C{paths.json} where it lies
and where its outputs go (C{null}: not known before the build). Made with Nix 2.8; from 2.26 on floats in structured
attributes are written otherwise.
"""

import json
import subprocess
import tempfile
from pathlib import Path

VECTORS = Path(__file__).parent / "derivations"


def instantiate(root):
    """
    Instantiate every derivation in the store below C{root}.

    @return: by attribute: C{drvPath} and C{outputs}, as Nix evaluates them.
    """
    command = [
        "nix-instantiate",
        "--eval",
        "--strict",
        "--json",
        "--read-write-mode",
        "--store",
        root,
        "--option",
        "experimental-features",
        "ca-derivations impure-derivations",
        str(VECTORS / "derivations.nix"),
    ]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main():
    """Replace the vectors."""
    for old in VECTORS.glob("*.drv"):
        old.unlink()
    with tempfile.TemporaryDirectory() as root:
        paths = instantiate(root)
        for attribute, described in paths.items():
            (VECTORS / f"{attribute}.drv").write_bytes(Path(root + described["drvPath"]).read_bytes())
            for name, path in described["outputs"].items():
                # Until it is built, a placeholder stands for a path that is not known.
                if not path.startswith("/nix/store/"):
                    described["outputs"][name] = None
        # Nix makes what it stores read-only, which would keep it from being deleted.
        subprocess.run(["chmod", "-R", "u+w", root], check=True)
    (VECTORS / "paths.json").write_text(json.dumps(paths, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

"""
Small derivations, plain and with structured attributes.
"""

import json

from nixserve.codec.derivation import BasicDerivation, DerivationOutput
from nixserve.codec.storepath import StorePath

OUT = StorePath("/nix/store/fcx9xzs072fd3nqwzb44vb5dl80vwhx1-leaf")


DEV = StorePath("/nix/store/qczjas54a9hqfzzngs1ggix0sl4klq0c-leaf-dev")


def derivation(env=None, outputs=None, args=()):
    """A derivation with these environment variables."""
    outputs = outputs or {"out": DerivationOutput(OUT)}
    return BasicDerivation("leaf", outputs, frozenset(), "x86_64-linux", "/bin/sh", args, env or {})


def structured(**attrs):
    """A derivation with structured attributes."""
    return derivation({"__json": json.dumps(attrs)})

"""NARs are written as Nix writes them."""

import hashlib

import pytest

from nixserve.codec.nar import Contents, Regular
from nixserve.codec.narwriter import encodeNar
from tests.vectors.nar.trees import TREES, File, events, nar


def encode(tree):
    """The NAR of a tree."""
    return b"".join(encodeNar(events(tree)))


@pytest.mark.parametrize("name", TREES)
def test_writesAsNix(name):
    """Every byte is as real Nix writes it."""
    assert encode(TREES[name]) == nar(name)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("regular", "1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13"),
        ("empty", "77ac62e2629d8e45f624589c0c8bf99e24b3a722349bf1e79bc186008534e246"),
        ("executable", "6283c1668260f903d1a895c0cd6b822fa4b68762bb0b17cedef2d39d97e26554"),
        ("symlink", "f0354c661ecd8be3792780312361f09aef4869a89c8465deeb5fcc3b87818bbb"),
        ("emptyDirectory", "a50a5ab6d992f5598edd92105059fae9acfc192981e08bd88534c2167e92526a"),
        ("directory", "29325bf5796e1314db1b7b13b4f8f5bc4d3208f5fc42cec56de20003169156b6"),
    ],
)
def test_knownHashes(name, digest):
    """The hashes of a few NARs are known from elsewhere."""
    assert hashlib.sha256(encode(TREES[name])).hexdigest() == digest


def test_writesPiecesOfContents():
    """Contents may come in pieces; the padding follows the last."""
    pieces = [Regular(b"", False, 5), Contents(b"ab"), Contents(memoryview(b"cde"))]
    assert b"".join(encodeNar(pieces)) == encode(File(b"abcde"))

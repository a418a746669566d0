"""What the package offers under its own name."""

import subprocess
import sys

import pytest

import nixserve


@pytest.mark.parametrize("name", nixserve.__all__)
def test_names(name):
    """Each name that is offered is there, and listed."""
    assert getattr(nixserve, name) is not None
    assert name in dir(nixserve)


def test_unknownName():
    """Any other is an error as with any module."""
    with pytest.raises(AttributeError, match="module 'nixserve' has no attribute 'conect'"):
        nixserve.conect  # noqa: B018


def test_typesKnowTheSame():
    """What type checkers see is what there is."""
    with open(nixserve.__file__, encoding="utf-8") as file:
        typed = {line.split()[-1] for line in file if line.startswith("    from nixserve.")}
    assert typed | {"__version__"} == set(nixserve.__all__)


def test_storesNeedNoTwisted():
    """A program that only reads a store does not import Twisted."""
    code = (
        "import sys, nixserve; nixserve.LocalStore; sys.exit(any(name.startswith('twisted') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

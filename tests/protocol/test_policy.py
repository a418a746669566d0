"""Rights: what texts give, what refuses, and what is left of two."""

import pytest

from nixserve.errors import PolicyError, UsageError
from nixserve.protocol.policy import EVERYTHING, NOTHING, READ_ONLY, Policy, Right


def test_nothingByDefault():
    """A policy that was told nothing permits nothing."""
    assert Policy() == NOTHING
    for right in Right:
        with pytest.raises(PolicyError, match=r"^no$"):
            NOTHING.demand(right, "no")


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("read", READ_ONLY),
        (" read ,", READ_ONLY),
        ("read,write,build,trust", EVERYTHING),
        ("trust, build,read,write,read", EVERYTHING),
    ],
)
def test_parse(text, policy):
    """Rights are words in any order, blanks do not matter."""
    assert Policy.parse(text) == policy


@pytest.mark.parametrize("text", ["", "read,write", "write", "trust", "read,build"])
def test_notApartYet(text):
    """Combinations that would need verification are refused rather than promised."""
    with pytest.raises(UsageError, match="cannot be given apart"):
        Policy.parse(text)


def test_unknownWord():
    """An unknown word is named, with those there are."""
    with pytest.raises(UsageError, match="unknown right 'admin'; the rights are read, write, build, trust"):
        Policy.parse("read,admin")


def test_demand():
    """What is there passes, what is not raises the given line."""
    READ_ONLY.demand(Right.READ, "no")
    for right in (Right.WRITE, Right.BUILD, Right.TRUST):
        with pytest.raises(PolicyError):
            READ_ONLY.demand(right, "no")
        EVERYTHING.demand(right, "no")


def test_cutDownTo():
    """Only what both allow is left."""
    assert EVERYTHING.cutDownTo(READ_ONLY) == READ_ONLY.cutDownTo(EVERYTHING) == READ_ONLY
    assert EVERYTHING.cutDownTo(NOTHING) == NOTHING


def test_str():
    """The text of a policy is what gives it."""
    assert [str(policy) for policy in (NOTHING, READ_ONLY, EVERYTHING)] == ["none", "read", "read,write,build,trust"]
    assert Policy.parse(str(EVERYTHING)) == EVERYTHING

"""The words of docs/architecture.md are those of the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/architecture.md").read_text().split("## Words of this house\n")[1].split("\n## ")[0]
ROWS = [line.strip("|").split(" | ") for line in SECTION.splitlines() if line.startswith("| ")][1:]


def wordsIn(text):
    """The words of a text in lower case: parts of a name count, plurals count as what they are of."""
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)}
    return words | {word.removesuffix("s") for word in words}


@pytest.mark.parametrize(("words", "files"), [(row[0], row[-1]) for row in ROWS], ids=[row[0].strip() for row in ROWS])
def test_wordsAreUsed(words, files):
    """Each word is in the modules that are named with it, and none of those is without a word."""
    words = {word.lower() for word in words.strip().split(", ")}
    found = {name: words & wordsIn((ROOT / "nixserve" / name).read_text()) for name in re.findall(r"`([^`]+)`", files)}
    assert found and set().union(*found.values()) == words
    assert [name for name, used in found.items() if not used] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("return", {"return"}),
        ("NarInflow, _inflow", {"nar", "inflow"}),
        ("takeTurns(turn)", {"take", "turn", "turns"}),
        ("# MAX_SLOTS: see SSHTransport", {"max", "slots", "slot", "see", "ssh", "transport"}),
    ],
)
def test_wordsAreWhole(text, words):
    """What only has the letters of a word within a longer one is not that word."""
    assert wordsIn(text) == words

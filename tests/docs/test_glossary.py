"""The words of docs/architecture.md are those of the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/architecture.md").read_text().split("## Words of this house\n")[1].split("\n## ")[0]
ROWS = [line.strip("|").split(" | ") for line in SECTION.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize(("words", "files"), [(row[0], row[-1]) for row in ROWS], ids=[row[0].strip() for row in ROWS])
def test_wordsAreUsed(words, files):
    """Each word is in the modules that are named with it."""
    texts = [(ROOT / "nixserve" / name).read_text().lower() for name in re.findall(r"`([\w/]+\.py)`", files)]
    assert texts
    for word in words.strip().split(", "):
        assert any(word.lower() in text for text in texts), word

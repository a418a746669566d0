"""The pictures of docs/architecture.md that say which module uses which."""

import re

import pytest

from tests.importgraph import ROOT, sourceGraph

PAGE = (ROOT / "docs/architecture.md").read_text()

LINE = re.compile(r"(?P<branch>[ │]*(?:[├└]▶ )?)(?P<module>[a-z]+/[a-z_]+)(?:  .*)?")
"""A module, behind the arrow that leads to it, and what is said of it."""


def arrows(picture):
    """
    The arrows of a picture that is drawn as a tree: each leads from the line above that begins further left.

    @return: pairs of dotted names; lines that are none of a tree, such as blank ones, end it.
    """
    found, above = [], []
    for line in picture.splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            assert "▶" not in line, f"not understood: {line}"
            above = []
            continue
        column, module = len(match["branch"]), "nixserve." + match["module"].replace("/", ".")
        while above and above[-1][0] >= column:
            above.pop()
        if "▶" in match["branch"]:
            found.append((above[-1][1], module))
        else:
            assert column == 0 and not above, f"nothing leads to it: {line}"
        above.append((column, module))
    return found


def picture(heading):
    """The first block under a heading."""
    return re.search(rf"^## {re.escape(heading)}\n.*?^```\n(.*?)^```$", PAGE, re.M | re.S)[1]


def test_wayOfABuild():
    """Each arrow on the way of a build is an import, and the way leads from who asks to who builds."""
    drawn = arrows(picture("Where is a build?"))
    imported = sourceGraph()
    assert [arrow for arrow in drawn if arrow[1] not in imported.get(arrow[0], ())] == []
    reached = {"nixserve.app.service"}
    for source, target in drawn:
        if source in reached:
            reached.add(target)
    assert {"nixserve.protocol.server", "nixserve.builder.child", "nixserve.protocol.client"} <= reached


def test_arrows():
    """A picture is read as it looks."""
    drawn = arrows("a/b    begins\n├▶ c/d\n│  └▶ e/f  says\n└▶ g/h\n   └▶ i/j\n\n~ a break: a/b ~\n\nk/l\n└▶ a/b\n")
    names = [(source.removeprefix("nixserve."), target.removeprefix("nixserve.")) for source, target in drawn]
    assert names == [("a.b", "c.d"), ("c.d", "e.f"), ("a.b", "g.h"), ("g.h", "i.j"), ("k.l", "a.b")]


@pytest.mark.parametrize("line", ["a/b\n└▶ c", "a/b\n├▶ C/d", "a/b\n├▶ c/d▶", "  a/b", "a/b\n\n└▶ c/d"])
def test_notUnderstood(line):
    """What is no such picture is not passed over."""
    with pytest.raises((AssertionError, IndexError)):
        arrows(line)

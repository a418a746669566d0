"""
The picture of docs/architecture.md that says which module uses which; and that modules which pages name are there.
"""

import re

import pytest

from tests.importgraph import ROOT, sourceGraph

PAGE = (ROOT / "docs/architecture.md").read_text()

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAYERS = {file.parent.name for file in ROOT.glob("nixserve/*/__init__.py")}

LINE = re.compile(r"(?P<branch>[ │]*(?:[├└]▶ )?)(?P<module>[a-z]+/[a-z_]+)(?:  .*)?")
"""A module, behind the arrow that leads to it, and what is said of it."""


NAMED = re.compile(r"`(?:nixserve/)?([a-z]+/\w+)(?:\.py)?`")
"""A module, or something else whose name looks so."""

EXPECTED = "## Where the code differs from the obvious layout\n"
"""Below this a table begins each line with what one might expect."""

BESIDE = re.compile(r" {2,}([a-z]+/[a-z]+(?:, (?:[a-z]+/)?[a-z]+)*)$", re.M)
"""The right column of a picture that is no tree: modules; one without a layer is in that of the one before."""


def named(text):
    """The modules that a page names, C{layer/module}, but for those that one might expect and that are not there."""
    before, _, table = text.partition(EXPECTED)
    text = before + re.sub(r"^\|[^|]*\|", "", table, flags=re.M)
    modules = {name for name in NAMED.findall(text) if name.split("/")[0] in LAYERS}
    for block in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S):
        for column in BESIDE.findall(block):
            layer = ""
            for name in column.split(", "):
                layer, _, module = name.rpartition("/") if "/" in name else (layer, "", name)
                modules.add(f"{layer}/{module}")
    return modules


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_namedModulesAreThere(page):
    """Each module that a page names is a file."""
    assert [name for name in sorted(named(page.read_text())) if not (ROOT / f"nixserve/{name}.py").is_file()] == []


def test_namesAreFound():
    """They are found in text, in tables and beside pictures, with or without their ending."""
    text = "`codec/a` and `codec/b.py`, `nixserve/codec/c.py`, `tests/d`, codec/e\n```\n  x y    ssh/f, g, app/h\n```\n"
    table = f"{EXPECTED}\n| one might expect | there is |\n|---|---|\n| `ssh/i.py` | `ssh/j.py` |\n"
    assert named(text + table) == {"codec/a", "codec/b", "codec/c", "ssh/f", "ssh/g", "app/h", "ssh/j"}
    assert {"hook/lastseen", "protocol/relay", "store/contents"} <= named(PAGE)

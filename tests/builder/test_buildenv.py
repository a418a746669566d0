"""
C{builtin:buildenv}: many packages become one tree, as with real Nix.
"""

import inspect
import os
import sys

import pytest

from nixserve.builder.builtinjob import BuiltinFailed, BuiltinJob
from nixserve.builder.builtins import runBuiltin
from tests.builder.builtinruns import run, tree


def makeTree(top, described):
    """Make a tree as L{tree} describes it; files are text."""
    for name, value in described.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            path.mkdir(exist_ok=True)
        elif value.startswith("-> "):
            path.symlink_to(value.removeprefix("-> "))
        else:
            path.write_text(value)
    return top


PACKAGES = {
    "p1": {
        "bin/one": "1",
        "bin/both": "from p1",
        "share/doc/one": "1",
        "share/only1/x": "1",
        ".hidden": "x",
        "nix-support/propagated-user-env-packages": "@p3@ @p4@\n@p1@",
        "nix-support/propagated-build-inputs": "x",
        "info/dir": "x",
        "info/other": "x",
        "log": "x",
        "lib/perllocal.pod": "x",
        "lib/log/x": "x",
        "manifest.nix": "x",
        "manifest.json": "x",
        "dangling": "-> nowhere",
        "tofile": "-> bin/one",
        "todir": "-> share",
        "etc": "-> share",
    },
    "p2": {
        "bin/two": "2",
        "bin/both": "from p2",
        "share/doc/two": "2",
        "etc/x": "2",
        "info/third": "x",
        "todir/two": "2",
        "lib/log/y": "x",
    },
    "p3": {"bin/both": "from p3", "bin/three": "3", "nix-support/propagated-user-env-packages": "@p5@"},
    "p4": {"share/doc/four": "4", "bin/three": "from p4"},
    "p5": {"five": "5", "share/deep/er/five": "5"},
    "p6": {"inactive": "6"},
    "notdir": None,
}


@pytest.fixture
def packages(tmp_path):
    """Directories to merge, by name."""
    places = {name: tmp_path / "packages" / name for name in PACKAGES}

    def fill(text):
        for name, place in places.items():
            text = text.replace(f"@{name}@", str(place))
        return text

    for name, described in PACKAGES.items():
        if described is None:
            places[name].write_text("x")
        else:
            places[name].mkdir(parents=True)
            makeTree(places[name], {path: value and fill(value) for path, value in described.items()})
    return places


def derivations(packages, *described):
    """The attribute of that name, from triples of whether it is active, priority and name."""
    return " ".join(f"{active} {priority} 1 {packages[name]}" for active, priority, name in described)


CHOICE = (("true", "5", "p1"), ("true", "6", "p2"), ("false", "1", "p6"), ("1", "-7", "notdir"))


def test_environment(packages, out, capfd):
    """Many packages, one tree: links to what only one has, merged directories, the better of two files."""
    run("buildenv", out, derivations=derivations(packages, *CHOICE), manifest="/manifest")
    found = {path: target for path, target in tree(out).items() if target is not None}
    p1, p2, p3, p4, p5 = (packages[name] for name in ("p1", "p2", "p3", "p4", "p5"))
    assert found == {
        "bin/both": f"{p1}/bin/both",
        "bin/one": f"{p1}/bin/one",
        "bin/two": f"{p2}/bin/two",
        "bin/three": f"{p3}/bin/three",
        "etc/doc": f"{p1}/share/doc",
        "etc/only1": f"{p1}/share/only1",
        "etc/x": f"{p2}/etc/x",
        "five": f"{p5}/five",
        "info/other": f"{p1}/info/other",
        "info/third": f"{p2}/info/third",
        "manifest.nix": "/manifest",
        "share/deep": f"{p5}/share/deep",
        "share/doc/four": f"{p4}/share/doc/four",
        "share/doc/one": f"{p1}/share/doc/one",
        "share/doc/two": f"{p2}/share/doc/two",
        "share/only1": f"{p1}/share/only1",
        "todir/doc": f"{p1}/share/doc",
        "todir/only1": f"{p1}/share/only1",
        "todir/two": f"{p2}/todir/two",
        "tofile": f"{p1}/tofile",
    }
    log = capfd.readouterr().err
    assert f"not including '{packages['notdir']}'" in log
    assert f"skipping dangling symlink '{out}/dangling'" in log


def test_oneOfSeveralOutputs(packages, out):
    """A package may have several outputs, each with its priority."""
    paths = f"{packages['p4']} {packages['p5']}"
    run("buildenv", out, derivations=f"true 5 2 {paths}", manifest="/manifest")
    assert {"bin", "five", "share"} <= tree(out).keys()


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (
            (("true", "5", "p1"), ("true", "5", "p2")),
            "packages '.*/p2/bin/both' and '.*/p1/bin/both' have the same",
        ),
        ((("true", "5", "fileBin"), ("true", "6", "p2")), "collision between '.*/p2/bin' and non-directory '.*/bin'"),
        (
            (("true", "5", "p1"), ("true", "6", "p2"), ("true", "7", "fileBin")),
            "collision between non-directory '.*/fileBin/bin' and directory '.*/out/bin'",
        ),
    ],
)
def test_collisions(packages, tmp_path, out, described, message):
    """Neither of two files wins; a file and a directory cannot be merged."""
    packages["fileBin"] = makeTree(tmp_path / "fileBin", {"bin": "x"})
    with pytest.raises(BuiltinFailed, match=message):
        run("buildenv", out, derivations=derivations(packages, *described), manifest="/manifest")


@pytest.mark.parametrize("text", ["true", "true x 1 /a", "true 5 2 /a", "true 5"])
def test_malformedDerivations(out, text):
    """The list of packages must be complete; real Nix crashes."""
    with pytest.raises(BuiltinFailed, match="attribute 'derivations' is malformed"):
        run("buildenv", out, derivations=text, manifest="/manifest")


def test_missingPackage(tmp_path, out):
    """A package that is not there is an error."""
    with pytest.raises(FileNotFoundError):
        run("buildenv", out, derivations=f"true 5 1 {tmp_path}/nowhere", manifest="/manifest")


def test_deepPackages(tmp_path, out):
    """Trees may be deeper than Python's stack."""
    deep = "/".join(150 * ["d"])
    a, b = (makeTree(tmp_path / name, {f"{deep}/{name}": "x"}) for name in ("a", "b"))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        run("buildenv", out, derivations=f"1 5 1 {a} 1 6 1 {b}", manifest="/m")
    finally:
        sys.setrecursionlimit(limit)
    assert os.readlink(out / deep / "a") == f"{a}/{deep}/a"
    assert os.readlink(out / deep / "b") == f"{b}/{deep}/b"


@pytest.mark.interop
def test_environmentAsNix(packages, out, nixBuild):
    """The tree is the one that Nix makes of the same packages."""
    choice = f'''"{" ".join(f"{active} {priority} 1 ${{{packages[name]}}}" for active, priority, name in CHOICE)}"'''
    drv, theirs = nixBuild(
        'derivation { name = "env"; system = "builtin"; builder = "builtin:buildenv"; '
        f'manifest = builtins.toFile "m" ""; derivations = {choice}; }}'
    )
    runBuiltin(BuiltinJob(drv.builder, drv.env, str(out)))
    assert tree(out) == tree(theirs)

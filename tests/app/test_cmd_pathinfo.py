"""
C{nixserve path-info}, beside real Nix.
"""

import json

import pytest

from nixserve.app.sample import addTree
from nixserve.testing import addObject, makeInfo, makeNar
from tests.interop.nix import requireProgram


class TestPathInfo:
    """What it prints."""

    def test_columns(self, box):
        """Paths alone; sizes, closure sizes and signatures on demand, separated by tabs; references first."""
        root, store = box.store()
        session = store.openSession()
        nar = makeNar(b"leaf")
        signed = "key:" + "A" * 86 + "=="
        leaf = makeInfo("leaf", nar, sigs=frozenset({signed}))
        addObject(session, leaf, nar)
        top = makeInfo("top", nar, [leaf.path])
        addObject(session, top, nar)
        session.close()
        store.close()
        done = box.run("nixserve", "path-info", "--store", root, "-r", "-s", "-S", "--sigs", top.path)
        size = len(nar)
        assert [line.split("\t") for line in done.stdout.splitlines()] == [
            [leaf.path, str(size), str(size), signed],
            [top.path, str(size), str(2 * size), ""],
        ]
        assert box.run("nixserve", "path-info", "--store", root, top.path).stdout == f"{top.path}\n"

    def test_links(self, box):
        """A file inside an object, or a symbolic link that leads there, stands for the object."""
        root, store = box.store()
        nar = makeNar({"bin": {"tool": b""}})
        info = makeInfo("tool", nar)
        addObject(store.openSession(), info, nar)
        store.close()
        (box.path / "result").symlink_to(info.path)
        for name in ("result", f"{info.path}/bin/tool"):
            assert box.run("nixserve", "path-info", "--store", root, name).stdout == f"{info.path}\n"

    @pytest.mark.interop
    def test_realNix(self, box):
        """It says the same as Nix of a store that Nix has made."""
        requireProgram("nix")
        root = box.path / "nix-store"
        environment = {"NIX_REMOTE": str(root), "NIX_CONFIG": "substituters ="}
        (box.path / "expression.nix").write_text(
            'let a = builtins.toFile "a" "text"; b = builtins.toFile "b" "refers to ${a}";'
            ' in builtins.toFile "c" "refers to ${a} and ${b}"'
        )
        evaluate = ["nix-instantiate", "--eval", "--read-write-mode", "--json", "expression.nix"]
        top = json.loads(box.run(*evaluate, env=environment).stdout)
        (box.path / "tree").mkdir()
        (box.path / "tree/file").write_text("x" * 1000)
        tree = box.run("nix-store", "--add", "tree", env=environment).stdout.strip()
        flags = ["-r", "-s", "-S", "--sigs", top, tree]
        nix = ["nix", "--extra-experimental-features", "nix-command", "path-info"]
        theirs = box.run(*nix, *flags, env=environment)
        assert theirs.returncode == 0, theirs.stderr
        ours = box.run("nixserve", "path-info", "--store", root, *flags)
        assert ours.returncode == 0, ours.stderr
        words = lambda text: sorted(line.split() for line in text.splitlines())  # noqa: E731
        assert words(ours.stdout) == words(theirs.stdout)
        theirs = json.loads(box.run(*nix, "--json", "-r", "-S", top, tree, env=environment).stdout)
        ours = box.run("nixserve", "path-info", "--store", root, "--json", "-r", "-S", top, tree).stdout
        byPath = lambda infos: {info["path"]: info for info in infos}  # noqa: E731
        assert byPath(map(json.loads, ours.splitlines())) == byPath(theirs)

    @pytest.mark.interop
    def test_addTree(self, box):
        """Files added under a computed path get the path, hash and content address that Nix gives them."""
        requireProgram("nix-store")
        tree = box.path / "tree"
        tree.mkdir()
        (tree / "file").write_text("x" * 1000)
        (tree / "link").symlink_to("file")
        root, store = box.store()
        info = addTree(store.openSession(), "tree", str(tree))
        store.close()
        environment = {"NIX_REMOTE": str(root), "NIX_CONFIG": "substituters ="}
        assert box.run("nix-store", "--add", "tree", env=environment).stdout.strip() == info.path
        done = box.run("nix-store", "--verify", "--check-contents", env=environment)
        assert done.returncode == 0, done.stderr

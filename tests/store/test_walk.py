"""L{nixserve.store.walk}: the way through a tree, and what is told when it is blocked."""

import errno
import os
import stat

import pytest

from nixserve.errors import StoreError
from nixserve.store.walk import MAX_OPEN, Walk, lstatNode


@pytest.fixture
def tree(tmp_path):
    """
    @return: the path of a directory with a file, a link, and a directory with a file in it.
    """
    (tmp_path / "x" / "c").mkdir(parents=True)
    (tmp_path / "x" / "a").write_bytes(b"")
    (tmp_path / "x" / "b").symlink_to("c")
    (tmp_path / "x" / "c" / "d").write_bytes(b"")
    return str(tmp_path / "x")


def visit(path, wanted=lambda name: True):
    """
    @return: what comes: for each the name, and whether it has been left.
    """
    found = []
    with Walk(path, "look at") as walk:
        for name, left in walk.nodes():
            found.append((walk.path(name).removeprefix(path), left))
            if not left and stat.S_ISDIR(lstatNode(name, walk.fd).st_mode) and wanted(name):
                walk.enter(name)
    return found


def test_nodes(tree):
    """Everything comes once, links as themselves; a directory before what is in it and once more after that."""
    found = visit(tree)
    assert sorted(found) == [
        ("", False), ("", True), ("/a", False), ("/b", False), ("/c", False), ("/c", True), ("/c/d", False),
    ]  # fmt: skip
    assert (found[0], found[-1]) == (("", False), ("", True))
    assert found.index(("/c", False)) + 1 == found.index(("/c/d", False)) == found.index(("/c", True)) - 1


def test_notEntered(tree):
    """What is in a directory that nobody enters does not come, nor does that come again."""
    assert sorted(visit(tree, lambda name: name != b"c")) == [
        ("", False), ("", True), ("/a", False), ("/b", False), ("/c", False),
    ]  # fmt: skip
    assert visit(f"{tree}/a") == [("", False)]


def test_deep(tmp_path):
    """A tree may be deeper than a walk has directories open."""
    (tmp_path / "x" / "/".join("y" * 3 * MAX_OPEN)).mkdir(parents=True)
    found = visit(f"{tmp_path}/x")
    assert len(found) == 2 * (3 * MAX_OPEN + 1)
    down, up = found[: len(found) // 2], found[len(found) // 2 :]
    assert up == [(path, True) for path, _ in reversed(down)]


def test_removedMeanwhile(tree):
    """A directory that is removed when it has been entered has nothing in it, and the walk goes on where it was."""
    found = []
    with Walk(tree, "look at") as walk:
        for name, left in walk.nodes():
            found.append((name, left))
            if name == b"x" and not left:
                walk.enter(name)
            elif name == b"c" and not left:
                walk.enter(name)
                os.unlink(f"{tree}/c/d")
                os.rmdir(f"{tree}/c")
    assert sorted(found) == [(b"a", False), (b"b", False), (b"c", False), (b"c", True), (b"x", False), (b"x", True)]


@pytest.mark.parametrize("file", ["a", "c"])
def test_errorsNameTheFile(tree, file):
    """What the system refuses within the block is told with what was being worked on, a file or a directory."""
    with pytest.raises(StoreError, match=f"^cannot look at '{tree}/{file}': "), Walk(tree, "look at") as walk:
        for name, left in walk.nodes():
            if name in (b"x", b"c") and not left:
                walk.enter(name)
            if name == file.encode():
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_noPlace(tree):
    """So is a tree in a directory that is none."""
    with pytest.raises(StoreError, match=f"^cannot look at '{tree}/a/b': Not a directory$"):
        Walk(f"{tree}/a/b", "look at")


def test_otherErrorsPass(tree):
    """What is no refusal of the system's is no error of ours."""
    with pytest.raises(KeyError), Walk(tree, "look at"):
        raise KeyError

"""L{nixserve.store.fileerrors}: what a refusal of the file system is told as."""

import errno

import pytest

from nixserve.errors import StoreError
from nixserve.store.fileerrors import fileSystemErrors, refused, shortened


def test_saysWhatWasTried():
    """An error of the operating system becomes one of ours, which says what was tried and has it as its cause."""
    expected = r"^cannot open '/x': No such file or directory$"
    with pytest.raises(StoreError, match=expected) as caught, fileSystemErrors("cannot open '/x'"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/x")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("error", [StoreError("ours"), ValueError("a bug")])
def test_othersPass(error):
    """Whatever else is raised passes as it is."""
    with pytest.raises(type(error)) as caught, fileSystemErrors("cannot open '/x'"):
        raise error
    assert caught.value is error


def test_withoutNumber():
    """An error that Python made itself has no text of the system's, and is told as it is."""
    assert str(refused("cannot talk", OSError("timed out"))) == "cannot talk: timed out"


def test_shortened():
    """What would fill the screen is cut in its middle; what would not stays."""
    path = "/a" + "b" * 600 + "c"
    assert shortened(path[:400]) == path[:400]
    assert shortened(path) == f"/a{'b' * 198}[...]{'b' * 199}c"

"""
L{nixserve.store.pathlocks}: locks on store paths, shared with real Nix.
"""

import fcntl
import os

import pytest

from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.store.pathlocks import PathLocks


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "object")


def hold(path):
    """Lock the lock file as another program would; its file descriptor."""
    fd = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def test_excludes(path):
    """A held lock excludes us, and ours excludes others."""
    fd = hold(path)
    with pytest.raises(Busy, match=r"the lock on '.*object'"):
        PathLocks([path])
    os.close(fd)
    locks = PathLocks([path])
    with pytest.raises(BlockingIOError):
        hold(path)
    with pytest.raises(Busy):
        PathLocks([path])
    locks.unlock()
    PathLocks([path]).unlock()


def test_unlock(path):
    """After success the file is gone, and whoever still has it open finds it stale."""
    locks = PathLocks([path])
    waiting = os.open(path + ".lock", os.O_RDWR)
    locks.unlock()
    assert not os.path.exists(path + ".lock")
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert os.read(waiting, 10) == b"d"
    os.close(waiting)
    locks.unlock()
    locks.abandon()


def test_abandon(path):
    """After failure the file stays, empty and free, and is taken over."""
    locks = PathLocks([path])
    inode = os.stat(path + ".lock").st_ino
    locks.abandon()
    assert os.path.getsize(path + ".lock") == 0
    locks = PathLocks([path])
    assert os.stat(path + ".lock").st_ino == inode
    locks.unlock()
    assert os.listdir(os.path.dirname(path)) == []


def test_mode(path):
    """Others cannot open it: they could lock it for ever."""
    locks = PathLocks([path])
    assert os.stat(path + ".lock").st_mode & 0o777 == 0o600
    assert not os.get_inheritable(locks._held[0][0])
    locks.unlock()


def test_leftBehind(path):
    """A lock file that is not empty, on which Nix would spin for ever, is removed and replaced."""
    with open(path + ".lock", "wb") as file:
        file.write(b"d")
    locks = PathLocks([path])
    assert os.path.getsize(path + ".lock") == 0
    locks.unlock()


def test_leftBehindButHeld(path):
    """One that somebody holds is left alone."""
    fd = hold(path)
    os.write(fd, b"d")
    with pytest.raises(Busy):
        PathLocks([path])
    assert os.path.getsize(path + ".lock") == 1
    os.close(fd)


@pytest.mark.parametrize("mark", [b"d", b""])
def test_removedBetween(path, monkeypatch, mark):
    """A file that loses its name between opening and locking does not count, marked or not."""
    flock, raced = fcntl.flock, []

    def race(fd, how):
        if not raced:
            raced.append(fd)
            os.unlink(path + ".lock")
            os.write(fd, mark)
        flock(fd, how)

    monkeypatch.setattr("fcntl.flock", race)
    locks = PathLocks([path])
    assert raced
    assert os.fstat(locks._held[0][0]).st_ino == os.stat(path + ".lock").st_ino
    locks.unlock()


def test_allOrNone(tmp_path):
    """Of several locks either all are taken or none, and in sorted order."""
    paths = [str(tmp_path / name) for name in "cab"]
    fd = hold(paths[0])
    with pytest.raises(Busy):
        PathLocks(paths)
    os.close(fd)
    for path in paths:
        os.close(hold(path))
    locks = PathLocks([*paths, paths[0]])
    assert [path for _, path in locks._held] == sorted(path + ".lock" for path in paths)
    locks.unlock()
    assert os.listdir(tmp_path) == []


def test_refused(tmp_path):
    """What the file system refuses is an error with the name of the file; symbolic links are not followed."""
    with pytest.raises(StoreError, match=r"cannot open lock file '.*missing/x.lock'"):
        PathLocks([str(tmp_path / "missing" / "x")])
    os.symlink(tmp_path / "elsewhere", tmp_path / "x.lock")
    with pytest.raises(StoreError, match="cannot open lock file"):
        PathLocks([str(tmp_path / "x")])
    assert not os.path.exists(tmp_path / "elsewhere")

"""
L{nixserve.store.pathlocks}: locks on store paths, shared with real Nix.
"""

import fcntl
import os
import stat

import pytest

from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.store.pathlocks import PathLocks, moveInto, vacate


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
    fd = hold(path)
    os.write(fd, b"d")
    os.close(fd)
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
    with pytest.raises(StoreError, match="is no lock file"):
        PathLocks([str(tmp_path / "x")])
    assert not os.path.exists(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"cannot lock '.*': the name of its lock file would have 256 bytes"):
        PathLocks([str(tmp_path / ("x" * 251))])
    PathLocks([str(tmp_path / ("x" * 250))]).unlock()


def makeFile(place, data=b"", mode=0o600):
    with open(place, "wb") as file:
        file.write(data)
    os.chmod(place, mode)


def makeLinked(place):
    makeFile(place)
    os.link(place, f"{os.path.dirname(place)}/another")


def makeForeign(place):
    makeFile(place)
    os.chown(place, 12345, 12345)


FOREIGN = {
    "object": lambda place: makeFile(place, b"the contents", 0o444),
    "emptyObject": lambda place: makeFile(place, b"", 0o444),
    "inTheMaking": lambda place: makeFile(place, b"", 0o755),
    "contents": lambda place: makeFile(place, b"dd"),
    "linked": makeLinked,
    "directory": os.mkdir,
    "link": lambda place: os.symlink("nowhere", place),
    "fifo": os.mkfifo,
    "foreign": pytest.param(makeForeign, marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root")),
}


@pytest.mark.parametrize("make", list(FOREIGN.values()), ids=list(FOREIGN))
def test_whatIsNoLockFileIsLeftAlone(path, make):
    """Something else in the place of a lock file, an object above all, is neither opened for writing nor removed."""
    make(path + ".lock")
    before = os.lstat(path + ".lock")
    with pytest.raises(StoreError, match=r"cannot lock '.*/object': '.*/object\.lock' is no lock file") as caught:
        PathLocks([path])
    assert not isinstance(caught.value, Busy) and "\n" not in str(caught.value)
    assert os.lstat(path + ".lock") == before


def test_swappedWhileOpening(path, monkeypatch):
    """What is there is looked at again once it is open."""
    makeFile(path + ".lock")
    flock = fcntl.flock

    def race(fd, how):
        os.chmod(path + ".lock", 0o444)
        flock(fd, how)

    monkeypatch.setattr("fcntl.flock", race)
    with pytest.raises(StoreError, match="is no lock file"):
        PathLocks([path])
    assert stat.S_IMODE(os.lstat(path + ".lock").st_mode) == 0o444


def replaceName(place):
    os.unlink(place)
    makeFile(place, b"the contents", 0o444)


@pytest.mark.parametrize(
    "change", [lambda place: os.chmod(place, 0o444), replaceName], ids=["madeAnObject", "replaced"]
)
def test_unlockRemovesOnlyItsOwn(path, change):
    """If others, as real Nix does, make an object where a held lock file lies, giving back the lock leaves it there."""
    locks = PathLocks([path])
    change(path + ".lock")
    before = os.lstat(path + ".lock")
    locks.unlock()
    assert os.lstat(path + ".lock") == before


def test_vacate(path):
    """What lies where an object is to be made is removed."""
    vacate(path)
    os.mkdir(path)
    makeFile(path + "/file", b"x", 0o444)
    os.chmod(path, 0o555)
    vacate(path)
    assert os.listdir(os.path.dirname(path)) == []


def test_vacateLockFile(path):
    """A lock file is removed by whoever holds it alone; what is none, and bears such a name, like anything else."""
    fd = hold(path)
    with pytest.raises(Busy, match=r"the lock on '.*/object'"):
        vacate(path + ".lock")
    assert os.path.exists(path + ".lock")
    waiting = os.open(path + ".lock", os.O_RDWR)
    os.close(fd)
    vacate(path + ".lock")
    assert not os.path.exists(path + ".lock")
    assert os.read(waiting, 10) == b"d"
    os.close(waiting)
    makeFile(path + ".lock", b"half an object", 0o444)
    vacate(path + ".lock")
    assert os.listdir(os.path.dirname(path)) == []


def test_vacateSandbox(tmp_path):
    """The sandbox of a build of real Nix, which nothing locks, stays; what is no sandbox, and called so, does not."""
    place = tmp_path / "x.drv.chroot"
    for mode in (0o700, 0o750):
        place.mkdir(mode)
        with pytest.raises(StoreError, match="there is the sandbox of a build"):
            vacate(str(place))
        place.rmdir()
    place.mkdir(0o755)
    vacate(str(place))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "make", [makeFile, lambda place: os.symlink("x", place), os.mkdir], ids=["file", "link", "dir"]
)
def test_moveInto(tmp_path, make):
    """An object gets its name, but never takes a lock file's away."""
    source, target = str(tmp_path / "made"), str(tmp_path / "x.lock")
    make(source)
    fd = hold(str(tmp_path / "x"))
    with pytest.raises(OSError):
        moveInto(source, target)
    assert os.fstat(fd).st_nlink == 1 and os.path.lexists(source)
    os.close(fd)
    os.unlink(target)
    moveInto(source, target)
    assert os.listdir(tmp_path) == ["x.lock"]

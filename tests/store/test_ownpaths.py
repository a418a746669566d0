"""Whether a path is ours: L{nixserve.store.ownpaths}."""

import grp
import os
import stat

import pytest

from nixserve.errors import StoreError
from nixserve.store import ownpaths
from nixserve.store.ownpaths import UnsafePath, makeOwnDirectory, requireOwn

STRANGER = 12345


@pytest.fixture
def asRoot():
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")


def modes(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_ours(tmp_path):
    """A path that only root and we can change is ours, whether all of it exists or not."""
    (tmp_path / "file").write_text("x")
    assert requireOwn(f"{tmp_path}/file")
    assert requireOwn(f"{tmp_path}/./x/../file") is False
    assert not requireOwn(f"{tmp_path}/missing/too")


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o1777])
def test_openDirectory(tmp_path, mode):
    """A directory that everybody may write to is not ours to keep files in, sticky or not."""
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(UnsafePath, match=f"'{directory}' may be written to by everybody"):
        makeOwnDirectory(str(directory))


def test_openAbove(tmp_path):
    """Nor is what lies anywhere below one, existing or not."""
    (tmp_path / "open/state").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    for path in ("open/state", "open/missing", "open/state/deep/er"):
        where = f"'{tmp_path}/open', on the way to '{tmp_path}/{path}',"
        with pytest.raises(UnsafePath, match=rf"{where} may be written to by everybody \(mode 0777\): chmod go-w it"):
            makeOwnDirectory(f"{tmp_path}/{path}")
    assert not (tmp_path / "open/missing").exists()


def test_sticky(tmp_path):
    """Below a directory like /tmp is ours what belongs to us."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    makeOwnDirectory(f"{tmp_path}/tmp/state")
    assert modes(tmp_path / "tmp/state") == 0o700
    makeOwnDirectory(f"{tmp_path}/tmp", shared=True)


@pytest.mark.parametrize("what", ["directory", "link"])
def test_planted(tmp_path, asRoot, what):
    """What somebody else has made there before us is refused, a link too."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    (tmp_path / "ours").mkdir()
    planted = tmp_path / "tmp/state"
    if what == "link":
        planted.symlink_to(tmp_path / "ours")
    else:
        planted.mkdir()
    os.chown(planted, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(UnsafePath, match=f"'{planted}' belongs to user {STRANGER}, neither root nor"):
        makeOwnDirectory(str(planted))


def test_ofSomebodyElse(tmp_path, asRoot):
    """A directory of somebody else on the way is refused, and so is a file of theirs, and one that others may write."""
    (tmp_path / "their/ours").mkdir(parents=True)
    os.chown(tmp_path / "their", STRANGER, STRANGER)
    with pytest.raises(UnsafePath, match=f"'{tmp_path}/their', on the way to '.*/ours', belongs to user {STRANGER}"):
        requireOwn(f"{tmp_path}/their/ours")
    (tmp_path / "file").write_text("x")
    os.chown(tmp_path / "file", STRANGER, STRANGER)
    with pytest.raises(UnsafePath, match="file' belongs to user"):
        requireOwn(f"{tmp_path}/file")
    os.chown(tmp_path / "file", 0, 0)
    (tmp_path / "file").chmod(0o666)
    with pytest.raises(UnsafePath, match=r"file' may be written to by everybody \(mode 0666\)"):
        requireOwn(f"{tmp_path}/file")


def test_links(tmp_path):
    """Links of ours are followed, and what they lead through is judged."""
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real/deep")
    (tmp_path / "far").symlink_to(tmp_path / "link")
    makeOwnDirectory(f"{tmp_path}/far/state")
    assert (tmp_path / "real/deep/state").is_dir()
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(UnsafePath, match=f"'{tmp_path}/real', on the way"):
        makeOwnDirectory(f"{tmp_path}/far/state")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="Too many levels"):
        requireOwn(f"{tmp_path}/circle/x")


def test_groups(tmp_path, asRoot, monkeypatch):
    """A group in which nobody else is may write; one with members, or without a name, may not."""
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(0o775)
    os.chown(directory, 0, 4711)
    groups = {4711: grp.struct_group(("private", "x", 4711, []))}
    monkeypatch.setattr(grp, "getgrgid", groups.__getitem__)
    makeOwnDirectory(str(directory))
    groups[4711] = grp.struct_group(("shared", "x", 4711, ["root", "nobody"]))
    with pytest.raises(UnsafePath, match=r"may be written to by group 4711 \(mode 0775\)"):
        makeOwnDirectory(str(directory))
    del groups[4711]
    with pytest.raises(UnsafePath, match="group 4711"):
        makeOwnDirectory(str(directory))


def test_accessControlLists(tmp_path, monkeypatch):
    """Where a list says who may write, the group bits speak of more than a group."""
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(0o775)
    monkeypatch.setattr(ownpaths, "_isOurGroup", lambda gid: True)
    makeOwnDirectory(str(directory))
    monkeypatch.setattr(os, "listxattr", lambda path: ["system.posix_acl_access"])
    with pytest.raises(UnsafePath, match="by group"):
        makeOwnDirectory(str(directory))


def test_umask(tmp_path):
    """What is made is ours whatever the umask, the directories above included."""
    before = os.umask(0)
    try:
        makeOwnDirectory(f"{tmp_path}/a/b/c")
    finally:
        os.umask(before)
    assert [modes(tmp_path / path) for path in ("a", "a/b", "a/b/c")] == [0o755, 0o755, 0o700]


def test_notADirectory(tmp_path):
    """A file in the way is an error of the file system, as ever."""
    (tmp_path / "file").write_text("x")
    for path in ("file", "file/state"):
        with pytest.raises(NotADirectoryError):
            makeOwnDirectory(f"{tmp_path}/{path}")


def test_relative(tmp_path, monkeypatch):
    """A relative path is judged from the root on."""
    (tmp_path / "open/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "open/here")
    makeOwnDirectory("state")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafePath, match=f"'{tmp_path}/open', on the way to 'state'"):
        makeOwnDirectory("state")


def test_openFiles():
    """What /dev/stderr stands for is ours."""
    assert requireOwn("/dev/stderr")
    assert issubclass(UnsafePath, StoreError)


def test_unmappedOwners(tmp_path, asRoot, monkeypatch):
    """In a user namespace the rest of the machine belongs to a number that is nobody's; elsewhere it is somebody's."""
    directory = tmp_path / "state"
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    with pytest.raises(UnsafePath, match="belongs to user 65534"):
        makeOwnDirectory(str(directory))
    monkeypatch.setattr(ownpaths, "_isUnmapped", lambda uid: True)
    makeOwnDirectory(str(directory))

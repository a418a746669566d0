"""
L{nixserve.store.opening}: what is made where a store is to be.
"""

import grp
import os
import stat
from dataclasses import replace

import pytest

from nixserve.errors import StoreError
from nixserve.store.database import Database
from nixserve.store.opening import RESERVED_SIZE, prepareDirectories


def test_directories(layout):
    """A new store has the directories and files of real Nix, with their modes."""
    prepareDirectories(layout)
    Database(layout).close()
    state = layout.stateDir
    for path in (state, layout.dbDir, layout.tempRootsDir, layout.gcRootsDir, layout.profilesDir, layout.linksDir):
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o755, path
    for path in (f"{layout.profilesDir}/per-user", f"{layout.gcRootsDir}/per-user"):
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o755, path
    assert os.readlink(f"{layout.gcRootsDir}/profiles") == layout.profilesDir
    assert stat.S_IMODE(os.stat(layout.bigLockPath).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(layout.reservedPath).st_mode) == 0o600
    assert os.path.getsize(layout.reservedPath) == RESERVED_SIZE
    with open(layout.schemaPath, "rb") as file:
        assert file.read() == b"10"
    assert set(os.listdir(layout.dbDir)) == {"big-lock", "reserved", "schema", "db.sqlite"}


def test_reserve(layout):
    """The reserve that a collector has given up, or of another size, is made again."""
    prepareDirectories(layout, 4096)
    os.unlink(layout.reservedPath)
    prepareDirectories(layout, 8192)
    assert os.path.getsize(layout.reservedPath) == 8192
    prepareDirectories(layout, 4096)
    assert os.path.getsize(layout.reservedPath) == 4096


def test_umask(layout):
    """Directories for each user's roots can be read by all, whatever the umask."""
    before = os.umask(0o077)
    try:
        prepareDirectories(layout, 0)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(layout.profilesDir).st_mode) == 0o700
    for path in (f"{layout.profilesDir}/per-user", f"{layout.gcRootsDir}/per-user"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give the directory away")
def test_storeDirOfBuildUsers(layout, monkeypatch):
    """Where the group exists the store directory is the build users' too, and is made so again on each open."""
    group = grp.struct_group(("nixbld", "x", 12345, []))
    monkeypatch.setattr("grp.getgrnam", lambda name: {"nixbld": group}[name])
    prepareDirectories(layout, 0)
    os.chmod(layout.realStoreDir, 0o755)
    prepareDirectories(layout, 0)
    found = os.stat(layout.realStoreDir)
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 12345, 0o1775)


def test_storeDirWithoutGroup(layout, monkeypatch):
    """Without the group it stays the owner's."""
    monkeypatch.setattr("grp.getgrnam", {}.__getitem__)
    prepareDirectories(layout, 0)
    assert stat.S_IMODE(os.stat(layout.realStoreDir).st_mode) == 0o755


def test_symlinkedStore(root, layout):
    """A store directory behind a symbolic link is refused, unless that is allowed."""
    os.makedirs(f"{root}/elsewhere")
    os.symlink(f"{root}/elsewhere", f"{root}/nix")
    with pytest.raises(StoreError, match=f"the path '{root}/nix' is a symlink"):
        prepareDirectories(layout, 0)
    prepareDirectories(replace(layout, allowSymlinkedStore=True), 0)


def test_inTheWay(root, layout):
    """A file in the place of a directory is an error, not a traceback."""
    with open(f"{root}/nix", "w"):
        pass
    with pytest.raises(StoreError, match="cannot create the directories of the store"):
        prepareDirectories(layout, 0)

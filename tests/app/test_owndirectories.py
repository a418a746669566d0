"""What the service and the hook find in directories that exist already: what others could have put there is refused."""

import os

import pytest

from nixserve.app.handover import Preloaded
from nixserve.app.hookcommand import _requireWritable
from nixserve.builder.users import BuildUser
from nixserve.builder.workspace import makeBuildDir
from nixserve.codec.storepath import StorePath
from nixserve.errors import StoreError
from nixserve.hook.aside import Aside
from nixserve.hook.claims import Claims
from nixserve.hook.lastseen import LastSeen
from nixserve.hook.machines import parseMachines
from nixserve.hook.queue import Queue
from nixserve.ssh.keys import AuthorizedKeysFile, loadHostKey
from nixserve.store.layout import StoreLayout
from nixserve.store.logs import BuildLogFile
from nixserve.store.ownpaths import UnsafePath
from tests.app.box import refused

OPEN = "may be written to by everybody"


@pytest.fixture
def opened(tmp_path):
    """A directory that anybody could have made and filled."""
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    return directory


def start(box, *options):
    return refused(box.run("twistd", "-n", "--pidfile=", "nixserve", "--listen", "tcp:0:interface=127.0.0.1", *options))


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_stateDirectory(box, mode):
    """A state directory that is open to others is not used, with whatever lies in it."""
    state = box.path / "planted"
    state.mkdir()
    loadHostKey(f"{state}/ssh_host_ed25519_key")
    state.chmod(mode)
    assert f"'{state}' {OPEN} (mode {mode:04o}): ch" in start(box, "--state", state)
    assert os.listdir(state) == ["ssh_host_ed25519_key"]


def test_aboveIt(box):
    """Nor is one below a directory that is open to others."""
    state = box.path / "open/state"
    state.mkdir(parents=True, mode=0o700)
    (box.path / "open").chmod(0o777)
    said = start(box, "--state", state)
    assert f"'{box.path}/open', on the way to '{state}', {OPEN} (mode 0777): chmod go-w it" in said


@pytest.mark.parametrize("option", ["--host-key", "--socket"])
def test_otherPlaces(box, option):
    """The same for a host key and a socket elsewhere."""
    (box.path / "open").mkdir()
    (box.path / "open").chmod(0o777)
    said = start(box, "--state", box.path / "state", option, box.path / "open/x")
    assert OPEN in said and f"{box.path}/open'" in said


def test_embeddedStore(box):
    """And for the store in the state directory."""
    root = box.path / "state/store/nix"
    root.mkdir(parents=True, mode=0o700)
    for path in (root, root.parent, root.parent.parent):
        path.chmod(0o755)
    root.chmod(0o777)
    assert f"'{root}', on the way to" in start(box, "--state", box.path / "state")


def test_plantedHostKey(tmp_path):
    """A host key that belongs to somebody else is none of ours."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    path = f"{tmp_path}/key"
    loadHostKey(path)
    os.chown(path, 12345, 12345)
    with pytest.raises(UnsafePath, match="key' belongs to user 12345, neither root nor the user of this process"):
        loadHostKey(path)


def test_authorizedKeys(opened):
    """An authorized_keys that others could replace lets nobody in, from the moment on when they could."""
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8mF3T9iHJtfkK4KPSIHNSXQzM1p7JLyvJnoHzHt6aJ"
    directory = opened / "ours"
    directory.mkdir(mode=0o700)
    path = directory / "authorized_keys"
    path.touch(0o600)
    path.write_text(f"{key}\n")
    opened.chmod(0o755)
    file = AuthorizedKeysFile(str(path))
    file.find(b"")
    blob = next(iter(file._keys))
    assert file.find(blob)
    opened.chmod(0o777)
    assert not file.find(blob)
    opened.chmod(0o755)
    assert file.find(blob)


def test_hookState(opened, monkeypatch):
    """The hook's state is refused with what to do, and there is no loaded process."""
    (opened / "hook").mkdir(mode=0o700)
    with pytest.raises(StoreError, match=OPEN):
        _requireWritable(str(opened / "hook"))
    assert Preloaded.find({"NIXSERVE_HOOK_STATE": str(opened / "hook")}) is None
    monkeypatch.undo()


MACHINE = parseMachines("ssh://host x86_64-linux", lambda path: None, "x86_64-linux").usable[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda directory: Aside(directory, "run", lambda: 0.0).attempt(MACHINE).failed("reason"),
        lambda directory: Claims(directory, MACHINE),
        lambda directory: LastSeen(directory, lambda: 0.0).worked(MACHINE),
        lambda directory: Queue(directory, "/state").take([MACHINE]),
    ],
    ids=["aside", "claims", "seen", "queue"],
)
def test_hookFiles(opened, tmp_path, use):
    """No part of it is kept where others could put links, nor through a link that others could have made."""
    with pytest.raises(StoreError, match=OPEN):
        use(str(opened))
    assert list(opened.iterdir()) == []
    if os.geteuid() == 0:
        (tmp_path / "ours").mkdir()
        opened.chmod(0o1777)
        (opened / "link").symlink_to(tmp_path / "ours")
        os.chown(opened / "link", 12345, 12345, follow_symlinks=False)
        with pytest.raises(StoreError, match="belongs to user 12345"):
            use(str(opened / "link"))
        assert list((tmp_path / "ours").iterdir()) == []


def test_buildDirectories(opened, tmp_path):
    """Directories of builds are made where nobody can rename them; in one like /tmp they are."""
    layout = StoreLayout.underRoot(str(tmp_path))
    user = BuildUser(os.geteuid(), os.getegid(), False)
    with pytest.raises(StoreError, match=OPEN):
        makeBuildDir(layout, str(opened), "x", user, True)
    opened.chmod(0o1777)
    makeBuildDir(layout, str(opened), "x", user, True).remove()


def test_buildLogs(opened, tmp_path):
    """A log does not follow a link to another file, and lies where nobody else can put one."""
    drvPath = StorePath("/nix/store/" + "0" * 32 + "-x.drv")
    with pytest.raises(StoreError, match=OPEN):
        BuildLogFile(StoreLayout(StoreLayout.underRoot("/").storeDir, "/s", "/t", str(opened)), drvPath)
    layout = StoreLayout.underRoot(str(tmp_path))
    log = BuildLogFile(layout, drvPath)
    log.close()
    (tmp_path / "precious").write_text("precious")
    os.unlink(log.path)
    os.symlink(tmp_path / "precious", log.path)
    log = BuildLogFile(layout, drvPath)
    log.write(b"a line")
    log.close()
    assert (tmp_path / "precious").read_text() == "precious" and not os.path.islink(log.path)

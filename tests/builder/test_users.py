"""The uids that builders have on the host."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from nixserve.builder import users
from nixserve.builder.users import BuildUser
from nixserve.errors import StoreError
from nixserve.store.api import Busy

needsRoot = pytest.mark.skipif(
    os.geteuid() != 0 or not users._ownsRange(), reason="needs root with more than the ids of a container"
)


@pytest.fixture(autouse=True)
def machinePool(tmp_path, monkeypatch):
    """Keeps the uids of this test apart from those in use on the machine: other slots, other locks."""
    monkeypatch.setattr(users, "_MACHINE_POOL", str(tmp_path / "machine"))
    monkeypatch.setattr(users, "_START_ID", users._START_ID + 100 * users._SLOT_SIZE)
    monkeypatch.setattr(users, "_SLOTS", 2)
    monkeypatch.setattr(users, "_ID_COUNT", 2 * users._SLOT_SIZE)


@needsRoot
class TestRoot:
    """Root gives every build a uid."""

    def test_distinct(self, tmp_path):
        """Two builds at one time have different uids, far apart, and nobody else's."""
        first, second = (BuildUser.acquire(str(tmp_path)) for _ in range(2))
        assert second.uid - first.uid == 65536
        assert first.own and first.gid == first.uid
        first.release()
        second.release()

    def test_nixNumbers(self, monkeypatch):
        """The first uid of the range is that of Nix's setting start-id."""
        monkeypatch.undo()
        assert users._START_ID == 872415232 and users._SLOTS == 128

    def test_busy(self, tmp_path):
        """When all are taken, one has to wait; a released one is free again. Releasing twice frees no other."""
        first, second = (BuildUser.acquire(str(tmp_path)) for _ in range(2))
        with pytest.raises(Busy, match="a free build user ID"):
            BuildUser.acquire(str(tmp_path))
        first.release()
        again = BuildUser.acquire(str(tmp_path))
        assert again.uid == first.uid
        first.release()
        with pytest.raises(Busy):
            BuildUser.acquire(str(tmp_path))
        again.release()
        second.release()

    def test_lockedByNix(self, tmp_path):
        """A slot whose file another program has locked is passed over."""
        (tmp_path / "userpool2").mkdir()
        with open(tmp_path / "userpool2" / "slot-0", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            user = BuildUser.acquire(str(tmp_path))
        assert user.uid == users._START_ID + 65536
        user.release()

    def test_locksAsNix(self, tmp_path):
        """Another program sees our lock where Nix looks."""
        user = BuildUser.acquire(str(tmp_path))
        with open(tmp_path / "userpool2" / "slot-0") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        user.release()

    def test_twoStores(self, tmp_path):
        """Builds for two stores have different uids, too: each begins by killing whoever has its uid."""
        first, second = (BuildUser.acquire(str(tmp_path / name)) for name in ("a", "b"))
        assert first.uid != second.uid
        first.release()
        second.release()

    def test_killAll(self, tmp_path):
        """All processes of the user are killed, whatever session they are in, and no others."""
        user = BuildUser.acquire(str(tmp_path))
        run = f"import os, time; os.setsid(); os.setuid({user.uid}); print(flush=True); time.sleep(60)"
        victim = subprocess.Popen([sys.executable, "-c", run], stdout=subprocess.PIPE)
        bystander = subprocess.Popen(["sleep", "60"])
        try:
            victim.stdout.readline()
            user.killAll()
            assert victim.wait(10) == -signal.SIGKILL
            assert bystander.poll() is None
            user.killAll()
        finally:
            for process in (victim, bystander):
                process.kill()
                process.wait()
            victim.stdout.close()
            user.release()

    def test_unwritable(self, tmp_path):
        """An error names the file that stands in the way."""
        (tmp_path / "userpool2").write_text("")
        with pytest.raises(StoreError, match="userpool2"):
            BuildUser.acquire(str(tmp_path))

    def test_container(self, tmp_path, monkeypatch):
        """Root of a container that has not got the ids builds as itself."""
        maps = tmp_path / "uid_map"
        maps.write_text("0 100000 65536\n65536 300000 10\n")
        assert not users._isMapped(str(maps))
        maps.write_text("0 0 4294967295\n")
        assert users._isMapped(str(maps))
        monkeypatch.setattr(users, "_ownsRange", lambda: False)
        assert BuildUser.acquire(str(tmp_path)).own is False


def test_caller(tmp_path, monkeypatch):
    """Who is not root builds as themselves, locks nothing, and never kills all their own processes."""
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    user = BuildUser.acquire(str(tmp_path))
    assert (user.uid, user.own) == (1234, False)
    assert not list(tmp_path.iterdir())
    user.killAll()
    user.release()

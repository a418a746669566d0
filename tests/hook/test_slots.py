"""
L{nixserve.hook.slots}: slots of machines, counted with Nix's own lock files.
"""

import fcntl
import os
import stat
import threading
import time

import pytest

from nixserve.errors import StoreError
from nixserve.hook.slots import Slots
from nixserve.store.api import Busy
from tests.hook.machinelist import machine, machines
from tests.otherprocess import otherProcess

TAKE = """
import sys
from nixserve.hook.slots import Slots
from tests.hook.machinelist import machines
slot = Slots(sys.argv[1]).take(machines(sys.argv[2]), wait=True)
print(slot and slot.machine.uri, end="")
"""


class ReleasedSlots(Slots):
    """Slots of which none outlives its test."""

    def __init__(self, stateDir):
        super().__init__(stateDir)
        self.taken = []

    def take(self, machines, wait=False):
        """As documented."""
        slot = super().take(machines, wait)
        self.taken += [slot] if slot else []
        return slot


@pytest.fixture
def slots(tmp_path):
    """The slots in a state directory that is not there yet."""
    made = ReleasedSlots(str(tmp_path / "state"))
    yield made
    for slot in made.taken:
        slot.release()


@pytest.fixture
def directory(tmp_path):
    """Where the lock files are."""
    return tmp_path / "state" / "current-load"


def test_untilAllAreBusy(slots):
    """As many slots as the machine has jobs; one that is released can be taken again, with its number."""
    made = machines("h - - 2")
    first, second = slots.take(made), slots.take(made)
    assert (first.load, second.load) == (0, 1)
    assert slots.take(made) is None
    assert slots.load(made[0]) == 2
    first.release()
    first.release()
    assert slots.load(made[0]) == 1
    with slots.take(made) as third:
        assert third.load == 1 and slots.take(made) is None
    assert slots.take(made) is not None


def test_files(slots, directory):
    """Names, modes and contents are those that Nix's hook makes."""
    slots.take(machines("ssh://h?remote-store=/x - - 2"))
    slots.take(machines("ssh://h?remote-store=/x - - 2"))
    names = {"main-lock", "ssh:__h?remote-store=_x-0", "ssh:__h?remote-store=_x-1"}
    assert set(os.listdir(directory)) == names
    for name in names:
        found = os.stat(directory / name)
        assert (stat.S_IMODE(found.st_mode), found.st_size) == (0o600, 0)


def test_directoryMode(slots, directory):
    """The directory is made for everybody, as far as the user's umask allows."""
    before = os.umask(0o002)
    try:
        slots.load(machine())
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o775


def test_touched(slots, directory):
    """A slot has the time of its last use, and only that which was taken."""
    made = machines("h - - 2")
    slots.take(made).release()
    assert slots.load(made[0]) == 0
    for number in (0, 1):
        os.utime(directory / f"ssh:__h-{number}", (5, 5))
    slots.take(made)
    assert os.stat(directory / "ssh:__h-0").st_mtime > time.time() - 60
    assert os.stat(directory / "ssh:__h-1").st_mtime == 5


def test_choice(slots):
    """Each time the best machine with a free slot is taken; nothing of the others is held."""
    made = machines("a - - 1 1; b - - 3 2; c - - 9 1; d - - 0 9")
    assert [slots.take(made).machine.uri[-1] for _ in range(6)] == ["b", "a", "c", "b", "b", "c"]
    assert [slots.load(each) for each in made] == [1, 3, 2, 0]


def test_noMachines(slots):
    """None of none."""
    assert slots.take([]) is None
    assert slots.take(machines("h - - 0")) is None


def test_namedTwice(slots):
    """A machine that stands in the file twice, with different features say, has its slots once."""
    made = machines("h - - 2 1 a; h - - 2 1 b")
    first, second = slots.take(made), slots.take(made)
    assert slots.take(made) is None
    assert {first.machine.uri, second.machine.uri} == {"ssh://h"}


def test_longName(slots, directory):
    """A URI that makes no name of a file has slots all the same."""
    made = machines("ssh://h?remote-store=" + "/x" * 200)
    slot = slots.take(made)
    assert slots.take(made) is None
    slot.release()
    assert all(len(name) <= 255 for name in os.listdir(directory))


def test_busyChoice(slots, directory):
    """Who is not to wait for others that are choosing is told that they are."""
    slots.load(machine())
    with open(directory / "main-lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="main-lock") as caught:
            slots.take([machine()])
        assert 0 < caught.value.retryAfter < 1
        waiting = []
        thread = threading.Thread(target=lambda: waiting.append(slots.take([machine()], wait=True)))
        thread.start()
        thread.join(0.1)
        assert waiting == []
    thread.join(20)
    assert waiting[0].machine == machine()


def test_refused(tmp_path):
    """What the file system has against it, the error says."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot make the directory '.*/file/current-load'"):
        Slots(str(tmp_path / "file")).take([machine()])
    (tmp_path / "current-load" / "main-lock").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot open the lock file '.*main-lock'"):
        Slots(str(tmp_path)).take([machine()])


@pytest.mark.parametrize("name", ["main-lock", "ssh:__h1-0"])
def test_links(slots, directory, tmp_path, name):
    """A link that somebody has put in the place of a lock file is not followed: nothing is made or locked elsewhere."""
    with slots.take([machine()]):
        os.unlink(directory / name)
    os.symlink(tmp_path / "elsewhere", directory / name)
    with pytest.raises(StoreError, match="cannot open the lock file"):
        slots.take([machine()])
    assert not (tmp_path / "elsewhere").exists()


def test_otherProcess(slots, tmp_path):
    """Slots are counted over processes; those of one that is killed are free."""
    made = machines("h - - 2")
    with otherProcess(TAKE, tmp_path / "state", "h - - 2") as other:
        assert other.said == "ssh://h"
        with slots.take(made):
            assert slots.take(made) is None
            with otherProcess(TAKE, tmp_path / "state", "h - - 2") as third:
                assert third.said == "None"
        other.kill()
        other.wait()
        assert slots.load(made[0]) == 0


def test_threads(slots):
    """Threads exclude each other like processes: never more holders than slots."""
    made = machines("a - - 2; b - - 1 3")
    holders, most, mutex = [], [], threading.Lock()

    def work():
        for _ in range(20):
            slot = slots.take(made, wait=True)
            if slot is not None:
                with mutex:
                    holders.append(slot.machine.uri)
                    most.append((holders.count("ssh://a"), holders.count("ssh://b")))
                time.sleep(0.001)
                with mutex:
                    holders.remove(slot.machine.uri)
                slot.release()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert max(a for a, _ in most) == 2 and max(b for _, b in most) == 1


def test_notInherited(slots):
    """A program that is started, such as ssh, does not keep the slot when its starter is gone."""
    slot = slots.take([machine()])
    assert not os.get_inheritable(slot._fd)


def test_failsHalfWay(slots, directory):
    """Slots that were found free before something failed are not kept."""
    other, (two,) = machine("b"), machines("a - - 2")
    slots.load(two)
    (directory / "ssh:__a-1").unlink()
    (directory / "ssh:__a-1").mkdir()
    with pytest.raises(StoreError):
        slots.take([other, two])
    assert slots.load(other) == 0 and slots.load(machine("a")) == 0

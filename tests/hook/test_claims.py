"""
L{nixserve.hook.claims}: each path is sent by one.
"""

import os
import random
import threading
import time

import pytest

from nixserve.errors import StoreError
from nixserve.hook import claims as claimsModule
from nixserve.hook.claims import Claims
from nixserve.store.api import Busy
from tests.hook.infos import infos, path
from tests.hook.machinelist import machine
from tests.otherprocess import otherProcess

CLAIM = """
import sys
from nixserve.hook.claims import Claims
from tests.hook.machinelist import machine
from tests.hook.infos import infos
claims = Claims(sys.argv[1], machine("ssh://h1"))
print(*(info.path.name for info in claims.claim(infos(sys.argv[2]))), end="")
"""


@pytest.fixture
def make(tmp_path):
    """Senders to one machine."""
    made = []

    def sender(uri="ssh://h1"):
        made.append(Claims(str(tmp_path / "claims"), machine(uri)))
        return made[-1]

    yield sender
    for each in made:
        each.close()


def claim(claims, text):
    """The names of what could be claimed."""
    return " ".join(info.path.name for info in claims.claim(infos(text)))


def test_once(make):
    """What one has claimed, another cannot; until it is released."""
    one, two = make(), make()
    assert claim(one, "a b c") == "a b c"
    assert claim(two, "a b c d") == "d"
    one.release(path("b"))
    assert claim(two, "a b c") == "b"
    two.release(path("a"))
    assert claim(make(), "a") == "", "nobody can release what somebody else claimed"


def test_closure(make):
    """Only what needs nothing of somebody else's is claimed, however far away that is."""
    one, two = make(), make()
    assert claim(one, "b") == "b"
    assert claim(two, "a b c:b d:a e:a,c f:e g:g,a") == "a d g"
    one.release(path("b"))
    assert claim(two, "b c:b e:a,c f:e") == "b c e f"


def test_referencesThatAreThere(make):
    """What is not to be sent is there: whoever needs it need not care."""
    assert claim(make(), "b:a c:b,a") == "b c"


def test_claimedAgain(make):
    """What is claimed already is claimed no second time, and counts as claimed for the rest."""
    one = make()
    assert claim(one, "a") == "a"
    assert claim(one, "a b:a") == "b"


def test_check(make):
    """To wait for a path is to ask whether somebody else sends it."""
    one, two = make(), make()
    one.claim(infos("a"))
    one.check(path("a"))
    with pytest.raises(Busy, match=r"another build hook to send '/nix/store/.*-a'") as caught:
        two.check(path("a"))
    assert 0 < caught.value.retryAfter < 1
    two.check(path("b"))
    one.release(path("a"))
    two.check(path("a"))


def test_close(make):
    """Whoever ends claims nothing."""
    one, two = make(), make()
    one.claim(infos("a b"))
    one.close()
    one.close()
    one.release(path("a"))
    assert claim(two, "a b") == "a b"


def test_block(make):
    """Nor after a block, however it ends."""
    with make() as one:
        one.claim(infos("a"))
    assert claim(make(), "a") == "a"


def test_perMachine(make):
    """What is sent to one machine says nothing about another."""
    assert claim(make("ssh://h1"), "a") == claim(make("ssh://h2"), "a") == "a"


def test_limit(make, monkeypatch):
    """No more is claimed at a time than leaves others something to do."""
    monkeypatch.setattr(claimsModule, "MAX_CLAIMED", 3)
    one, two = make(), make()
    assert claim(one, "a b c d e") == "a b c"
    assert claim(two, "a b c d e f:e g:a") == "d e f"
    one.release(path("a"))
    assert claim(one, "d h i") == "h"


def test_noTraces(make, tmp_path):
    """One empty file for each machine is all that there ever is."""
    for _ in range(3):
        make().claim(infos("a b c"))
    (file,) = (tmp_path / "claims").iterdir()
    assert (file.name, file.stat().st_size, file.stat().st_mode & 0o777) == ("ssh:__h1.claims", 0, 0o600)
    assert os.stat(tmp_path / "claims").st_mode & 0o777 == 0o700


def test_link(make, tmp_path):
    """A link in place of the file is not followed."""
    make()
    (file,) = (tmp_path / "claims").iterdir()
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="cannot open the lock file"):
        make()
    assert not (tmp_path / "elsewhere").exists()


def test_refused(tmp_path):
    """What the file system has against it, the error says."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot open the lock file"):
        Claims(str(tmp_path / "file"), machine())


def test_otherProcess(make, tmp_path):
    """Processes see each other's claims; those of one that is killed are gone."""
    two = make()
    with otherProcess(CLAIM, tmp_path / "claims", "a b:a") as other:
        assert other.said == "a b"
        assert claim(two, "a b:a c") == "c"
        with pytest.raises(Busy):
            two.check(path("b"))
        other.kill()
        other.wait()
        two.check(path("b"))
        assert claim(two, "a b:a") == "a b"


def test_together(make):
    """
    Several senders of overlapping closures, each in the documented way, all come to an end, and each path is sent
    once, after what it refers to.
    """
    dice = random.Random(5)
    names = [f"n{number}" for number in range(60)]
    graph = {name: dice.sample(names[:number], min(number, dice.randrange(4))) for number, name in enumerate(names)}
    everything = infos(" ".join(f"{name}:{','.join(references)}" for name, references in graph.items()))
    arrived, sent, mutex = set(), [], threading.Lock()

    def closure(roots):
        wanted = set(roots)
        for info in reversed(everything):
            if info.path in wanted:
                wanted |= info.references
        return [info for info in everything if info.path in wanted]

    def send(wanted, claims):
        deadline = time.monotonic() + 60
        while missing := [info for info in wanted if info.path not in arrived]:
            assert time.monotonic() < deadline
            claimed = claims.claim(missing)
            for info in claimed:
                if info.path not in arrived:
                    time.sleep(0.0005)
                    with mutex:
                        assert info.references <= arrived
                        sent.append(info.path)
                        arrived.add(info.path)
                claims.release(info.path)
            if not claimed:
                try:
                    claims.check(missing[0].path)
                except Busy:
                    time.sleep(0.001)
        done.append(True)

    done = []
    threads = []
    for _ in range(6):
        wanted = closure(info.path for info in dice.sample(everything, 8))
        threads.append(threading.Thread(target=send, args=(wanted, make())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 6
    assert len(sent) == len(set(sent)) == len(arrived)


def test_manyAreFast(make):
    """The kernel's search through a file's locks stays short."""
    many = infos(" ".join(f"n{number}" for number in range(5000)))
    started = time.monotonic()
    senders = [make() for _ in range(4)]
    assert [len(each.claim(many)) for each in senders] == [claimsModule.MAX_CLAIMED] * 4
    assert time.monotonic() - started < 30

"""
L{nixserve.hook.aside}: machines put aside after failures.
"""

import fcntl
import json
import os
import threading

import pytest

from nixserve.errors import StoreError
from nixserve.hook.aside import FIRST_PAUSE, FORGOTTEN_AFTER, LONGEST_PAUSE, Aside
from tests.hook.machinelist import machine
from tests.otherprocess import otherProcess

H1, H2 = machine("ssh://h1"), machine("ssh://h2")
START = 1_000_000_000.0

TRY = """
import sys
from nixserve.hook.aside import Aside
from tests.hook.machinelist import machine
aside = Aside(sys.argv[1], "run", lambda: float(sys.argv[2]))
attempt = aside.attempt(machine("ssh://h1"))
"""


class Clock:
    """Time that passes when told."""

    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """The time of all hooks."""
    return Clock()


@pytest.fixture
def directory(tmp_path):
    """Where the files are; not there yet."""
    return tmp_path / "state" / "aside"


@pytest.fixture
def make(directory, clock):
    """One hook's view of the machines; called with its run."""
    return lambda run="run": Aside(str(directory), run, clock)


def fail(aside, made=H1, reason="no answer"):
    """Try a machine in vain."""
    return aside.attempt(made).failed(reason)


def test_nothingKnown(make, directory):
    """A machine without failures may be tried by any number at once, and leaves no files."""
    aside = make()
    attempts = [aside.attempt(H1) for _ in range(3)]
    for attempt in attempts:
        attempt.succeeded()
    assert None not in attempts and not directory.exists()
    assert aside.failure(H1) is None and aside.news(H1) is None


def test_putAside(make, clock):
    """After a failure nobody tries the machine for a while, then one does; other machines are not concerned."""
    failure = fail(make())
    assert (failure.count, failure.reason, failure.until) == (1, "no answer", START + FIRST_PAUSE)
    assert make().attempt(H1) is None
    assert make().attempt(H2) is not None
    clock.now += FIRST_PAUSE - 0.1
    assert make().attempt(H1) is None
    clock.now += 0.1
    trial = make().attempt(H1)
    assert trial.failure == failure
    assert make().attempt(H1) is None, "only one tries"
    trial.leave()
    trial.leave()
    with make().attempt(H1) as again:
        assert again is not None
    assert make().attempt(H1) is not None, "who did not try after all lets others"


def test_grows(make, clock):
    """The pause doubles up to its limit."""
    pauses = []
    for _ in range(10):
        failure = fail(make())
        pauses.append(failure.until - clock.now)
        clock.now = failure.until
    assert pauses == [10, 20, 40, 80, 160, 320, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_success(make, clock, directory):
    """A machine that works again is as new."""
    clock.now = fail(make()).until
    make().attempt(H1).succeeded()
    assert make().failure(H1) is None
    assert not list(directory.glob("*.json*"))
    assert fail(make()).count == 1


def test_atTheSameTime(make, clock):
    """Failures of attempts that went on at once are one failure, and start the pause anew."""
    attempts = [make().attempt(H1) for _ in range(4)]
    attempts[0].failed("no answer")
    clock.now += 3
    for attempt in attempts[1:]:
        failure = attempt.failed("no answer")
    assert failure.count == 1 and failure.until == clock.now + FIRST_PAUSE


def test_lateFailure(make, clock):
    """A failure of an attempt from before the last one adds nothing."""
    late = make().attempt(H1)
    clock.now = fail(make()).until
    assert fail(make()).count == 2
    assert late.failed("no answer").count == 2


def test_lateFailureDuringTrial(make, clock):
    """A trial adds nothing to a failure that somebody else counted while it went on."""
    late = make().attempt(H1)
    fail(make())
    trial = make().attempt(H1, early=True)
    clock.now += 1
    assert late.failed("no answer").count == 1
    assert trial.failed("no answer").count == 1


def test_triedMeanwhile(make, clock):
    """Who finds that somebody else just tried in vain leaves the machine alone, however urgent."""
    aside = make()
    clock.now = fail(aside).until
    known, aside.failure = aside.failure, None

    def outdated(made):
        found, aside.failure = known(made), known
        make().attempt(made).failed("still no answer")
        return found

    aside.failure = outdated
    assert aside.attempt(H1, early=True) is None
    assert aside.attempt(H1, early=True) is not None, "nothing is held"


def test_early(make):
    """Who has no other machine need not wait for the end of the pause; but only one at a time."""
    fail(make())
    with make().attempt(H1, early=True) as attempt:
        assert attempt.failure.count == 1
        assert make().attempt(H1, early=True) is None
        assert attempt.failed("no answer").count == 2


def test_forgotten(make, clock):
    """A failure of long ago says nothing about now."""
    clock.now = fail(make()).until + FORGOTTEN_AFTER
    assert make().failure(H1) is None
    assert fail(make()).count == 1


def test_toldOnceInARun(make, clock):
    """A reason is told once in each run; again when it changes, and after a success."""
    failure = fail(make("a"))
    assert make("a").news(H1).reason == failure.reason == "no answer"
    assert make("a").news(H1) is None
    assert make("b").news(H1).reason == "no answer"
    assert make("b").news(H1) is None
    clock.now = failure.until
    failure = fail(make("a"))
    assert make("a").news(H1) is None
    clock.now = failure.until
    failure = fail(make("a"), reason="wrong host key")
    assert [make(run).news(H1).reason for run in "abc"] == ["wrong host key"] * 3
    clock.now = failure.until
    make("a").attempt(H1).succeeded()
    fail(make("a"), reason="wrong host key")
    assert make("a").news(H1).reason == "wrong host key"


def test_tellingKeepsThePause(make, clock):
    """To hear of a failure changes nothing about it; of many runs the last are remembered."""
    failure = fail(make())
    clock.now += 1
    for number in range(100):
        assert make(f"run {number}").news(H1) is not None
    known = make().failure(H1)
    assert (known.until, known.count) == (failure.until, 1)
    assert "run 99" in known.told and "run 0" not in known.told


def test_oneWrites(make, directory):
    """Files are changed by one at a time."""
    fail(make())
    with open(directory / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = []
        thread = threading.Thread(target=lambda: told.append(make().news(H1)))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and make().failure(H1).told == ()
    thread.join(10)
    assert told[0].reason == "no answer" and make().failure(H1).told == ("run",)


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff\x00", b"[]", b"{}", b"null", b'"x"', b"[" * 60000, b'{"uri": "ssh://h1"']
)
def test_garbage(make, directory, garbage):
    """A file that says nothing is as none, and is replaced."""
    fail(make())
    (file,) = directory.glob("*.json")
    file.write_bytes(garbage)
    assert make().attempt(H1).failure is None
    assert make().news(H1) is None
    assert fail(make()).count == 1
    assert make().attempt(H1) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"until": START + LONGEST_PAUSE + 1},
        {"until": START - 1},
        {"until": float("nan")},
        {"until": "soon"},
        {"count": 0},
        {"count": []},
        {"failedAt": None},
        {"reason": 5},
        {"told": 5},
        {"uri": "ssh://h2"},
        {"more": 1},
    ],
)
def test_nonsense(make, directory, changes):
    """A file that says what nobody wrote is as none."""
    fail(make())
    (file,) = directory.glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert make().failure(H1) is None and make().attempt(H1) is not None


def test_clockSetBack(make, clock):
    """A clock that is set back does not put machines aside for years."""
    fail(make())
    clock.now -= 5000
    with make().attempt(H1) as attempt:
        assert attempt.failure.count == 1
        assert make().attempt(H1) is None
        assert attempt.failed("no answer").until == clock.now + 2 * FIRST_PAUSE
    assert make().attempt(H1) is None


def test_clockSetForward(make, clock):
    """A clock that is set forward ends the pauses."""
    fail(make())
    clock.now += 1e9
    assert make().attempt(H1) is not None


def test_private(make, directory):
    """What failed is nobody else's business, and nobody else may put machines aside."""
    fail(make())
    assert os.stat(directory).st_mode & 0o777 == 0o700


def test_refused(tmp_path, make, directory):
    """What the file system has against it, the error says."""
    directory.parent.mkdir()
    directory.write_text("")
    with pytest.raises(StoreError, match="cannot read"):
        make().failure(H1)
    with pytest.raises(StoreError, match="cannot"):
        Aside(f"{directory}/below", "run", lambda: START).attempt(H1)


def test_otherProcess(make, clock, directory):
    """Hooks learn of each other's failures; who dies in trying lets the next one try."""
    with otherProcess(TRY + "attempt.failed('no answer')", directory, START):
        assert make().failure(H1).reason == "no answer"
        assert make().attempt(H1) is None
    clock.now += FIRST_PAUSE
    with otherProcess(TRY + "print(attempt.failure.count, end='')", directory, clock.now) as other:
        assert other.said == "1"
        assert make().attempt(H1) is None
        other.kill()
        other.wait()
        assert make().attempt(H1) is not None

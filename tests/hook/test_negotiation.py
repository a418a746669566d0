"""
L{nixserve.hook.negotiation}: which machine takes a build, or why none does, as far as that needs no connection; and the
whole program, where it needs none.
"""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from nixserve.codec.wire import Writer
from nixserve.errors import RemoteProtocolError
from nixserve.hook.aside import FIRST_PAUSE
from nixserve.hook.choice import Refusal
from nixserve.hook.conversation import HookLog
from nixserve.hook.machines import Machines
from nixserve.hook.negotiation import RECENT_SECONDS, NixPipes, Taken
from nixserve.hook.queue import WAITING_PER_SLOT
from nixserve.hook.slots import Slots
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from tests.hook.chooserbench import QUESTION, Bench, asks
from tests.hook.machinelist import machine, machines
from tests.otherprocess import ROOT


@pytest.fixture
def bench(tmp_path):
    """A state directory."""
    return Bench(tmp_path)


def test_nextOne(bench):
    """A machine that fails leaves the build to the next one, in this process and in others."""
    chooser = bench.chooser("a - - 1 2; b")
    taken = chooser.choose(QUESTION)
    assert taken.machine.uri == "ssh://a"
    chooser.failed(taken, "it burns")
    assert chooser.choose(QUESTION).machine.uri == "ssh://b"
    assert bench.chooser("a - - 1 2; b", run="2").choose(QUESTION) is Refusal.POSTPONE
    bench.now += FIRST_PAUSE
    assert bench.chooser("a - - 1 2; b").choose(QUESTION).machine.uri == "ssh://a"


def test_slotAfterFailure(bench):
    """A machine that failed keeps no slot."""
    chooser = bench.chooser("a")
    chooser.failed(chooser.choose(QUESTION), "it burns")
    bench.now += FIRST_PAUSE
    assert isinstance(chooser.choose(QUESTION), Taken)


def test_toldOnce(bench):
    """A reason is told once in a run, whichever process of it has met with it, and again in the next run."""
    chooser = bench.chooser("a; b")
    chooser.failed(chooser.choose(QUESTION), "it burns")
    assert list(bench.chooser("a; b").news()) == ["build machine ssh://a is put aside: it burns"]
    assert list(chooser.news()) == []
    assert len(list(bench.chooser("a; b", run="2").news())) == 1


def test_onlyOne(bench):
    """The only machine is tried in spite of an old failure; after one in the same run it is given up at once."""
    chooser = bench.chooser("a", since=900.0)
    chooser.failed(chooser.choose(QUESTION), "it burns")
    assert bench.chooser("a", since=900.0).choose(QUESTION) is Refusal.DECLINE
    bench.now += 1
    later = bench.chooser("a", since=1000.5)
    taken = later.choose(QUESTION)
    assert taken.machine.uri == "ssh://a"
    assert bench.chooser("a", since=1000.5).choose(QUESTION) is Refusal.POSTPONE, "somebody tries it"
    later.failed(taken, "it burns")
    assert bench.chooser("a", since=1000.5).choose(QUESTION) is Refusal.DECLINE


def test_mayRecover(bench):
    """The only machine, if it has worked in this run, is waited for, but not for ever."""
    chooser = bench.chooser("a")
    taken = chooser.choose(QUESTION)
    chooser.succeeded(taken)
    chooser.failed(taken, "it burns")
    decisions = []
    for _ in range(5):
        decisions.append(chooser.choose(QUESTION))
        bench.now += 400
        taken = chooser.choose(QUESTION)
        chooser.failed(taken, "it burns")
    assert decisions == [Refusal.POSTPONE] * 3 + [Refusal.DECLINE] * 2


def putAside(bench, text):
    """Machines that have failed, and may be tried again."""
    for made in machines(text):
        chooser = bench.chooser(made.uri)
        chooser.failed(chooser.choose(QUESTION), "it burns")
    bench.now += FIRST_PAUSE


def test_leave(bench):
    """Who leaves a machine that was put aside leaves it for others to try, with its slot."""
    putAside(bench, "a")
    taken = bench.chooser("a").choose(QUESTION)
    assert not isinstance(bench.chooser("a").choose(QUESTION), Taken)
    taken.leave()
    assert isinstance(bench.chooser("a").choose(QUESTION), Taken)


def test_othersAreLeft(bench):
    """Of several machines that may be tried again, those that are not chosen are left for others to try."""
    putAside(bench, "a; b")
    chosen = [bench.chooser("a; b").choose(QUESTION).machine.uri for _ in range(2)]
    assert chosen == ["ssh://a", "ssh://b"]


def test_busyAreLeft(bench):
    """So are those that have no free slot."""
    putAside(bench, "a")
    slot = Slots(str(bench._directory)).take(machines("a"))
    assert bench.chooser("a").choose(QUESTION) is Refusal.POSTPONE
    slot.release()
    assert isinstance(bench.chooser("a").choose(QUESTION), Taken)


def test_localInstead(bench):
    """Nobody waits for machines, nor tries those put aside, if Nix can build it itself."""
    chooser = bench.chooser("a", system="x86_64-linux", max_jobs="1")
    local = replace(QUESTION, amWilling=True)
    taken = chooser.choose(local)
    assert chooser.choose(local) is Refusal.DECLINE
    chooser.failed(taken, "it burns")
    assert bench.chooser("a", since=2000.0, system="x86_64-linux", max_jobs="1").choose(local) is Refusal.DECLINE


def test_excluded(bench):
    """A machine that has lost the build does not get it again; if it was the only one, nobody does."""
    chooser = bench.chooser("a - - 1 2; b")
    assert chooser.choose(QUESTION, machines("a - - 1 2")).machine.uri == "ssh://b"
    assert chooser.choose(QUESTION, machines("a - - 1 2; b")) is Refusal.DECLINE


def test_unseen(bench):
    """
    A build is accepted before there is a connection if Nix could never build it, or if the machine has just worked.
    """
    only = bench.chooser("a - - 9", system="x86_64-linux", max_jobs="0")
    assert only.mayAcceptUnseen(QUESTION, only.choose(QUESTION))
    either = bench.chooser("a - - 9", system="x86_64-linux", max_jobs="1")
    taken = either.choose(QUESTION)
    assert not either.mayAcceptUnseen(QUESTION, taken)
    either.succeeded(taken)
    assert either.mayAcceptUnseen(QUESTION, either.choose(QUESTION))
    bench.now += RECENT_SECONDS + 1
    assert not either.mayAcceptUnseen(QUESTION, either.choose(QUESTION))
    other = bench.chooser("a i686-linux - 9", system="x86_64-linux", max_jobs="1")
    question = replace(QUESTION, system="i686-linux")
    assert other.mayAcceptUnseen(question, other.choose(question))


def test_unseenAfterFailure(bench):
    """A machine that has failed since it worked is seen before it is accepted for."""
    chooser = bench.chooser("a - - 9; b", system="x86_64-linux", max_jobs="1")
    taken = chooser.choose(QUESTION)
    chooser.succeeded(taken)
    chooser.failed(taken, "it burns")
    bench.now += FIRST_PAUSE
    assert not chooser.mayAcceptUnseen(QUESTION, chooser.choose(QUESTION))


def test_queue(bench):
    """Builds wait in place of Nix, as far as there is room, if it could not build them itself."""
    chooser = bench.chooser("a - - 1; b arm", max_jobs="0")
    places = [chooser.queue(QUESTION) for _ in range(WAITING_PER_SLOT)]
    assert {machine.uri for machine, _ in places} == {"ssh://a"}
    assert chooser.queue(QUESTION) is None
    places[0][1].leave()
    assert chooser.queue(QUESTION) is not None
    assert bench.chooser("a - - 9", system="x86_64-linux", max_jobs="1").queue(QUESTION) is None


def test_refusalLines(bench):
    """What Nix accepts and we do not is told with a refusal, a machine at a time; nothing with a postponement."""
    chooser = bench.chooser("ssh-ng://a; b arm")
    log = HookLog(3, 1)
    assert chooser.refusalLines(QUESTION, Refusal.POSTPONE, log) == b""
    said = chooser.refusalLines(QUESTION, Refusal.DECLINE, log)
    assert b"warning: the setting 'builders', line 1, column 1: 'ssh-ng://a'" in said
    assert b"no machine of the setting 'builders' can build" in said
    assert chooser.machines != Machines()


# --- the program ------------------------------------------------------------------------------------------


def settings(root, **values):
    """What Nix sends first."""
    writer = Writer()
    for name, value in sorted({"store": str(root), "system": "x86_64-linux", **values}.items()):
        writer.u64(1).text(name).text(value)
    return bytes(writer.u64(0))


def run(directory, data, *arguments, timed=False):
    """
    The hook as a process.

    @param timed: have Python tell what it imports.
    @return: exit status, and what it says.
    """
    code = "from nixserve.app.hookentry import main; main()"
    done = subprocess.run(
        [sys.executable, *(["-X", "importtime"] if timed else []), "-c", code, *(arguments or ["3"])],
        input=data,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "NIXSERVE_HOOK_STATE": str(directory / "state"), "HOME": str(directory)},
        timeout=30,
    )
    return done.returncode, done.stderr.decode()


@pytest.fixture
def root(tmp_path):
    """Of an empty store."""
    LocalStore(StoreLayout.underRoot(str(tmp_path / "root")), reservedSize=0).close()
    return tmp_path / "root"


def test_noMachines(tmp_path, root):
    """Without machines the hook says so once and for all."""
    assert run(tmp_path, settings(root) + asks()) == (0, "# decline-permanently\n")


def test_declineWithoutTwisted(tmp_path, root):
    """Questions that need no machine are answered one after the other, without Twisted."""
    status, said = run(tmp_path, settings(root, builders="a arm") + asks() * 3, timed=True)
    assert status == 0 and said.count("# decline\n") == 3
    assert "twisted" not in said and "nixserve.hook.negotiation" in said


@pytest.mark.parametrize("data", [b"", b"other"])
def test_noQuestion(tmp_path, root, data):
    """Another word than the one for a question, or none, is the end of it."""
    assert run(tmp_path, settings(root, builders="a") + data) == (0, "")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"builders": "a - - many"}, "column 4"),
        ({"store": "daemon"}, "only its own hook can write to"),
        ({"store": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_impossible(tmp_path, root, values, expected):
    """What cannot be is one line of Nix's log, and exit status 1."""
    status, said = run(tmp_path, settings(root, **values) + asks())
    assert status == 1 and said.count("\n") == 1
    assert said.startswith('@nix {"action":"msg"') and expected in said


def test_stateCannotBeWritten(tmp_path, root):
    """If nothing can be shared that is said, with what would help; where there are no machines it does not matter."""
    (tmp_path / "state").touch()
    status, said = run(tmp_path, settings(root, builders="a - - 1") + asks())
    assert status == 1 and said.count("\n") == 1
    assert f"cannot make the directory '{tmp_path}/state'" in said and "set NIXSERVE_HOOK_STATE" in said
    assert run(tmp_path, settings(root) + asks()) == (0, "# decline-permanently\n")


def test_byHand(tmp_path):
    """Who runs it by hand is told what it is for."""
    status, said = run(tmp_path, b"", "--please")
    assert status == 2 and "build-hook" in said


def test_pipesEnd():
    """A Nix that is gone before it has said anything is an error; while the hook waits, too."""
    reading, writing = os.pipe()
    os.close(writing)
    pipes = NixPipes(3, 1, requests=reading)
    with pytest.raises(RemoteProtocolError):
        pipes.readSettings()
    os.close(reading)
    reading, writing = os.pipe()
    pipes = NixPipes(3, 1, replies=writing)
    pipes.sleep(0.01)
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        pipes.sleep(10)
    os.close(writing)


def test_hookProcessEnds():
    """So is the end of the process that Nix waits for, in place of this one."""
    waiting, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with waiting, theirs:
        pipes = NixPipes(3, 1, replies=writing, waiting=waiting.fileno())
        pipes.sleep(0.01)
        theirs.close()
        with pytest.raises(BrokenPipeError):
            pipes.sleep(10)
    os.close(reading), os.close(writing)


def test_acceptanceClosesTheLog():
    """With the answer nobody but Nix can read the log any more, so it is known when Nix is gone."""
    reading, writing = os.pipe()
    pipes = NixPipes(3, 1, logWriting=writing, logReading=reading)
    pipes.conversation.receiveData(settings("auto") + asks())
    assert pipes.readSettings().store == "auto" and pipes.readEvent() == QUESTION
    assert pipes.acceptance(machine()) == b"# accept\nssh://h1\n"
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    os.close(writing)

"""
The build hook's parts beside real Nix's own hook, C{build-remote}: both are asked the same, on the same machines file
and with the same slots busy.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nixserve.codec.wire import Writer
from nixserve.errors import FormatError, RemoteProtocolError
from nixserve.hook.choice import canBuildLocally, isSuitable, refuse
from nixserve.hook.conversation import BuildQuestion, HookConversation
from nixserve.hook.machines import parseMachines
from nixserve.hook.slots import Slots
from tests.interop.nix import unavailable
from tests.interop.stores import named, opened

SYSTEM = "x86_64-linux"
ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests" / "vectors" / "hook"

#: Of each kind at once.
THREADS = 3

#: How often a hook of each kind is to hold a slot.
TURNS = 10


@pytest.fixture(scope="session")
def realHook(nix):
    """The program that real Nix uses as its hook."""
    (line,) = (line for line in nix.lines("nix", "show-config") if line.startswith("build-hook = "))
    program = line.partition(" = ")[2]
    if " " in program or not os.access(program, os.X_OK):
        unavailable(f"the build hook of this Nix is no program of its own: '{program}'")
    return program


class Bench:
    """
    A store with machines to build for it.

    @ivar root: of the store.
    @ivar sshLog: one line for each time that C{ssh} was run.
    """

    def __init__(self, nix, program, directory):
        self._nix = nix
        self._program = program
        self.root = directory / "here"
        self.sshLog = directory / "ssh.log"
        self._bin = directory / "bin"
        self._bin.mkdir()
        fake = self._bin / "ssh"
        # Leads to one store, whatever the host; except for hosts that are dead.
        fake.write_text(
            f'#!/bin/sh\necho "$@" >> {self.sshLog}\ncase "$*" in dead*) exit 255;; esac\n'
            f"exec nix-store --serve --write --store {shlex.quote(str(directory / 'there'))}\n"
        )
        fake.chmod(0o755)
        with opened(self.root):
            pass

    @property
    def slots(self):
        """Those that the real hook counts too."""
        return Slots(f"{self.root}/nix/var/nix")

    def settings(self, builders):
        """What Nix sends first."""
        settings = {
            "builders": builders,
            "store": str(self.root),
            "system": SYSTEM,
            "extra-platforms": "i686-linux",
            "system-features": "here",
        }
        writer = Writer()
        for name, value in sorted(settings.items()):
            writer.u64(1).text(name).text(value)
        return bytes(writer.u64(0))

    def request(self, builders, question):
        """What Nix sends until it waits for an answer."""
        writer = Writer().text("try").u64(question.amWilling).text(question.system).text(question.drvPath)
        return self.settings(builders) + bytes(writer.textSet(question.requiredFeatures))

    def exitStatus(self, data):
        """Of the real hook, if this is all that it is sent."""
        command = ["sh", "-c", 'exec "$0" 5 4>/dev/null 5</dev/null', self._program]
        path = f"{self._bin}:{self._nix.environment['PATH']}"
        return self._nix.run(*command, check=False, stdin=data, environment={"PATH": path}).returncode

    @contextlib.contextmanager
    def asked(self, builders, question):
        """
        The real hook, after it was asked. A machine that it accepts for is its own until the end of the block.

        @return: a L{Reply}.
        """
        process = self._nix.start(
            *("sh", "-c", 'exec "$0" 5 4>/dev/null 5</dev/null', self._program),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            environment={"PATH": f"{self._bin}:{self._nix.environment['PATH']}"},
            cwd="/",
        )
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(self.request(builders, question))
                process.stdin.flush()
            yield Reply(process)
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stderr.read()
            process.wait(20)
            process.stderr.close()

    def real(self, builders, question):
        """What the real hook answers."""
        with self.asked(builders, question) as reply:
            return reply.answer

    def ours(self, builders, question):
        """What our parts answer, put together as simply as can be."""
        conversation = HookConversation()
        conversation.receiveData(self.request(builders, question))
        settings, heard = conversation.nextEvent(), conversation.nextEvent()
        assert heard == question
        machines = parse(settings.builders, settings.system).usable
        suitable = [machine for machine in machines if isSuitable(machine, heard)]
        slot = self.slots.take(suitable, wait=True)
        if slot is not None:
            slot.release()
            return conversation.accept(slot.machine.uri).decode().split()[1:]
        refusal = refuse(machines, suitable, canBuildLocally(heard, settings))
        return getattr(conversation, refusal.value)().decode().split()[1:]


class Reply:
    """
    What a hook said.

    @ivar answer: the word of the answer, and the machine; empty if it ended without one.
    @ivar said: the messages before the answer: level and text.
    """

    def __init__(self, process):
        self.answer, self.said = [], []
        for line in process.stderr:
            if line.startswith(b"# "):
                self.answer = line.decode().split()[1:]
                break
            if line.startswith(b"@nix "):
                value = json.loads(line[5:])
                self.said += [(value["level"], value["msg"])] if value["action"] == "msg" else []
        if self.answer == ["accept"]:
            self.answer.append(process.stderr.readline().decode().strip())


@pytest.fixture
def bench(nix, realHook, directory):
    """A store and machines of the test's own."""
    return Bench(nix, realHook, directory)


def parse(text, system=SYSTEM):
    """The machines of a text."""

    def read(path):
        with contextlib.suppress(FileNotFoundError), open(path) as stream:
            return stream.read()
        return None

    return parseMachines(text, read, system)


def question(system=SYSTEM, features="", amWilling=False):
    """One of Nix's questions."""
    return BuildQuestion(amWilling, system, named("some.drv"), frozenset(features.split()))


THREE = "a - - 2 1 f; b i686-linux,x86_64-linux - 3 2 f,g h; c - - 1 4"

DECISIONS = [
    # Machines, what is asked, how many slots of which are busy, the answer.
    ("", question(), {}, "decline-permanently"),
    ("# nothing\n;", question(amWilling=True), {}, "decline-permanently"),
    ("a", question("armv7l-linux"), {}, "decline"),
    ("a", question(features="f"), {}, "decline"),
    ("a - - 1 1 f m", question(features="f"), {}, "decline"),
    ("a - - 1 1 f m", question(), {}, "decline"),
    ("a - - 1 1 f m", question(features="f m"), {}, "accept ssh://a"),
    ("a - - 1 1 f", question(), {}, "accept ssh://a"),
    ("a", question(), {"a": 1}, "postpone"),
    ("a", question(amWilling=True), {"a": 1}, "decline"),
    ("a", question("i686-linux", amWilling=True), {}, "decline"),
    ("a i686-linux", question("i686-linux", amWilling=True), {"a": 1}, "decline"),
    ("a arm", question("arm", amWilling=True), {"a": 1}, "postpone"),
    ("a - - 1 1 f", question(features="f", amWilling=True), {"a": 1}, "postpone"),
    ("a - - 1 1 here", question(features="here", amWilling=True), {"a": 1}, "decline"),
    ("a - - 1 1 here", question(features="here"), {"a": 1}, "postpone"),
    ("a", question("builtin"), {}, "accept ssh://a"),
    ("a", question("builtin"), {"a": 1}, "postpone"),
    ("a", question("builtin", amWilling=True), {"a": 1}, "postpone"),
    ("a - - 0", question(), {}, "postpone"),
    ("a - - 0; b", question(), {}, "accept ssh://b"),
    ("u@a", question(), {}, "accept ssh://u@a"),
    (THREE, question(), {}, "accept ssh://c"),
    (THREE, question(), {"c": 1}, "accept ssh://a"),
    (THREE, question(), {"c": 1, "a": 1}, "accept ssh://a"),
    (THREE, question(), {"c": 1, "a": 2}, "postpone"),
    (THREE, question(), {"c": 1, "a": 2, "b": 3}, "postpone"),
    (THREE, question(features="g h"), {"b": 2}, "accept ssh://b"),
    (THREE, question(features="f h"), {"b": 3}, "postpone"),
    (THREE, question("i686-linux", "h"), {}, "accept ssh://b"),
    (THREE, question("builtin"), {"c": 1}, "accept ssh://a"),
    ("a - - 2; b - - 2", question(), {}, "accept ssh://a"),
    ("a - - 2; b - - 2", question(), {"a": 1}, "accept ssh://b"),
    ("a - - 2; b - - 2", question(), {"a": 1, "b": 1}, "accept ssh://a"),
    ("a - - 2 1; b - - 2 2", question(), {}, "accept ssh://b"),
    ("a - - 2 0; b - - 2 1", question(), {"a": 1}, "accept ssh://b"),
    ("a - - 2 0; b - - 2 1", question(), {}, "accept ssh://a"),
    ("a - - 9 2; b - - 9 1", question(), {"a": 4, "b": 2}, "accept ssh://a"),
    ("a - - 9 1; b - - 9 2", question(), {"a": 2, "b": 4}, "accept ssh://b"),
    ("a - - 9 2; b - - 9 2", question(), {"a": 4, "b": 2}, "accept ssh://b"),
    ("a - - 3 1 f; a - - 3 1 g", question(features="g"), {"a": 2}, "accept ssh://a"),
]


@pytest.mark.parametrize(("builders", "asked", "busy", "answer"), DECISIONS)
def test_decisions(bench, builders, asked, busy, answer):
    """Both hooks decide alike, on slots that we hold."""
    machines = {machine.uri: machine for machine in parse(builders).usable}
    with contextlib.ExitStack() as held:
        for host, number in busy.items():
            for _ in range(number):
                held.enter_context(bench.slots.take([machines[f"ssh://{host}"]]))
        assert bench.real(builders, asked) == answer.split()
        assert bench.ours(builders, asked) == answer.split()


def test_slotsOfTheReal(bench):
    """What the real hook holds we count, as long as it lives; and its files are those that we would make."""
    (machine,) = parse("a - - 2").usable
    with bench.asked("a - - 2", question()) as first, bench.asked("a - - 2", question()) as second:
        assert first.answer == second.answer == ["accept", "ssh://a"]
        assert bench.slots.load(machine) == 2 and bench.slots.take([machine]) is None
        files = bench.root / "nix/var/nix/current-load"
        assert {path.name for path in files.iterdir()} == {"main-lock", "ssh:__a-0", "ssh:__a-1"}
        theirs = {(path.stat().st_mode, path.stat().st_size) for path in files.iterdir()}
        mode = files.stat().st_mode
    assert bench.slots.load(machine) == 0
    for path in files.iterdir():
        path.unlink()
    files.rmdir()
    bench.slots.take([machine]).release()
    assert {(path.stat().st_mode, path.stat().st_size) for path in files.iterdir()} == theirs
    assert files.stat().st_mode == mode


def test_theRealWaits(bench):
    """While we choose, the real hook waits."""
    answers = []
    with bench.slots._choosing(wait=True):
        thread = threading.Thread(target=lambda: answers.append(bench.real("a", question())))
        thread.start()
        thread.join(1)
        assert answers == []
    thread.join(30)
    assert answers == [["accept", "ssh://a"]]


def test_bothAtOnce(bench):
    """Real hooks and ours together fill a machine's slots, and never take one more."""
    builders, jobs = "a - - 2; b - - 1 3", {"ssh://a": 2, "ssh://b": 1}
    machines = parse(builders).usable
    holders, seen, mutex = [], {uri: set() for uri in jobs}, threading.Lock()
    took = {"real": 0, "ours": 0}

    def hold(who, uri):
        with mutex:
            took[who] += 1
            holders.append(uri)
            seen[uri].add(holders.count(uri))
        time.sleep(0.02)
        with mutex:
            holders.remove(uri)

    def goesOn():
        return min(took.values()) < TURNS and time.monotonic() < deadline

    def real():
        while goesOn():
            with bench.asked(builders, question()) as reply:
                if reply.answer[0] == "accept":
                    hold("real", reply.answer[1])
                else:
                    assert reply.answer == ["postpone"]

    def ours():
        while goesOn():
            slot = bench.slots.take(machines, wait=True)
            if slot is not None:
                hold("ours", slot.machine.uri)
                slot.release()
            time.sleep(0.02)

    deadline = time.monotonic() + 45
    threads = [threading.Thread(target=work) for work in (real, ours) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {uri: max(counts) for uri, counts in seen.items()} == jobs
    assert min(took.values()) >= TURNS


LISTED = [
    "a",
    "a;b x,y - 3 1 f,g m,n",
    "a - - - - - -",
    " \ta\t-\t-\t7 ",
    "a # comment\n#b\nc#d",
    "a x - 1 1 f - - further columns",
    "a x,,y - 1 1 ,f, ,",
    "@{file}; z",
    "@ {file}\nz",
    "z\n@{file} # comment\n",
    "@{file}.missing\nz",
    "a\r\nb\r",
]


@pytest.mark.parametrize("text", LISTED)
def test_machinesFiles(bench, directory, text):
    """Both hooks read the same from a machines file: what the real one has it lists when no machine fits."""
    inner = directory / "inner"
    inner.write_text("one - - 2\n@" + str(directory / "innermost"))
    (directory / "innermost").write_text("two s1,s2 - 3; three")
    text = text.replace("{file}", str(inner))
    with bench.asked(text, question("none-such", "nor-this")) as reply:
        assert reply.answer == ["decline"]
        ((level, said),) = [each for each in reply.said if "available machines" in each[1]]
    assert level == 1
    rows = said.replace("\x1b[35;1m", "").replace("\x1b[0m", "").splitlines()
    listed = rows[rows.index("(systems, maxjobs, supportedFeatures, mandatoryFeatures)") + 1 :]
    machines = parse(text).usable
    assert len(machines) == len(listed)
    for machine, row in zip(machines, listed, strict=True):
        systems, features, mandatory = machine.systems, machine.supportedFeatures, machine.mandatoryFeatures
        words = {*systems, *features, *mandatory, str(machine.maxJobs)}
        assert set(row.strip("()").replace(",", " ").split()) == words


@pytest.mark.parametrize(
    "text", ["a - - x", "a - - -1", "a - - 1 x", "a - - 1 -1", "- x86_64-linux", "a - - 1 1 - - a.b", "a\nb - - 1.5"]
)
def test_badMachinesFiles(bench, text):
    """What the real hook refuses, we refuse."""
    assert bench.real(text, question()) == []
    with pytest.raises(FormatError):
        parse(text)


def test_columnsTakePrecedence(bench):
    """What columns say goes before the parameters of the URI, for the real hook as for us."""
    text = "ssh://u@h?ssh-key=/of/uri - /of/column"
    assert bench.real(text, question()) == ["accept", "ssh://u@h?ssh-key=/of/uri"]
    (machine,) = parse(text).usable
    assert f"-i {machine.address.sshKey} " in bench.sshLog.read_text()
    assert machine.uri == "ssh://u@h?ssh-key=/of/uri"


def test_unreachable(bench):
    """The next best machine takes the build if the best cannot be reached; what cannot be reached is not waited for."""
    with bench.asked("dead - - 1 9; a", question()) as reply:
        assert reply.answer == ["accept", "ssh://a"]
    with bench.asked("dead - - 1 9", question()) as reply:
        assert reply.answer == ["decline"]
        assert any("cannot build on 'ssh://dead'" in text for _, text in reply.said)
    machines = parse("dead - - 1 9").usable
    assert refuse(machines, [], False).value == "decline"


def test_cut(bench):
    """Wherever Nix goes away in the middle, both hooks take it for the end or for an error alike."""
    settings, task = bench.settings("a"), bytes(Writer().textSet([named("input")]).textSet(["out"]))
    data = bench.request("a", question()) + task
    asked = len(data) - len(task)
    ends = {}
    for length in (0, 3, len(settings) - 1, *(len(settings) + more for more in (0, 5, 8, 15, 16, 20)), asked - 8):
        ends[length] = bench.exitStatus(data[:length])
    for length in (asked, asked + 12, len(data) - 8):
        ends[length] = bench.exitStatus(data[:length])
    assert {length: ourExitStatus(data[:length]) for length in ends} == ends
    assert set(ends.values()) == {0, 1}
    other = settings + bytes(Writer().text("other"))
    assert bench.exitStatus(other) == ourExitStatus(other) == 0


def ourExitStatus(data):
    """What a hook on our parts would exit with."""
    conversation = HookConversation()
    try:
        for piece in (data, b""):
            conversation.receiveData(piece)
            while (event := conversation.nextEvent()) is not None:
                if isinstance(event, BuildQuestion):
                    conversation.accept("ssh://a")
    except RemoteProtocolError:
        return 1
    return 0


HOOK = r"""
import os, sys
from nixserve.hook.conversation import BuildQuestion, HookConversation, HookLog
conversation, log = HookConversation(), HookLog(int(sys.argv[-1]), os.getpid())
answers = os.environ["ANSWERS"].split()

def say(data):
    os.write(2, data)

def ask(kind):
    while (event := conversation.nextEvent()) is None:
        conversation.receiveData(os.read(0, 65536))
    return event if type(event).__name__ == kind else sys.exit(0)

settings = ask("HookSettings")
while answers[0] != "accept":
    question = ask("BuildQuestion")
    say(log.message(1, f"asked for {question.drvPath}: {answers[0]} \udcff"))
    say(getattr(conversation, answers.pop(0))())
    if not answers:
        sys.exit(0)
ask("BuildQuestion")
number, line = log.start(3, "something that takes long", 103)
say(line + log.result(number, 105, [1, 2, 0, 0]) + log.message(5, "not to be seen"))
os.close(5)
say(conversation.accept("ssh://the-machine"))
task = ask("BuildTask")
os.write(4, b"from the builder \xff\n")
say(log.stop(number) + log.error(f"cannot make {','.join(sorted(task.wantedOutputs))} \udcff, for a reason"))
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("decline", ["decline \ufffd", "unable to start any build"]),
        ("declinePermanently", ["declinePermanently \ufffd", "unable to start any build"]),
        ("postpone decline", ["postpone \ufffd", "decline \ufffd", "unable to start any build"]),
        (
            "postpone accept",
            [
                "postpone \ufffd",
                "on 'ssh://the-machine'",
                "something that takes long",
                "from the builder",
                "error: cannot make dev,out \ufffd, for a reason",
            ],
        ),
    ],
)
def test_nixUnderstands(nix, directory, answers, expected):
    """Real Nix takes all that our hook says as it is meant."""
    (directory / "hook.py").write_text(HOOK)
    hook = directory / "hook"
    hook.write_text(f'#!/bin/sh\nexport PYTHONPATH={ROOT}\nexec {sys.executable} {directory}/hook.py "$@"\n')
    hook.chmod(0o755)
    options = {"build-hook": hook, "max-jobs": 0, "build-poll-interval": 1, "builders": "ssh://the-machine"}
    done = nix.run(
        *("nix-build", VECTORS / "derivations.nix", "-A", "built", "--no-out-link"),
        *(word for name, value in options.items() for word in ("--option", name, value)),
        store=directory / "here",
        check=False,
        environment={"ANSWERS": answers},
    )
    said = done.stderr.decode(errors="replace")
    assert done.returncode != 0
    assert [text for text in expected if text not in said] == []
    assert "not to be seen" not in said

"""
The processes of the build hook: the small one that Nix starts, the one that is loaded already, and its children, one
for each build. Nix is the test, or a process that it starts.
"""

import fcntl
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nixserve.app import handover, statedirs
from nixserve.app.preloaded import CHILD_NAME, LOADED_NAME
from nixserve.codec.wire import encodeString, encodeU64
from tests.interop.stores import isLocked
from tests.interop.watching import until
from tests.otherprocess import otherProcess

MACHINE = "ssh://machine.invalid x86_64-linux - 2"
"""Nobody ever connects to it: its slots are busy, or Nix does not say what a build needs."""


def settings(**values):
    """What Nix says first."""
    words = [encodeU64(1) + text(name.replace("_", "-")) + text(value) for name, value in values.items()]
    return b"".join(words) + encodeU64(0)


def question():
    """Whether this may be built elsewhere, from a Nix that builds nothing itself."""
    path = "/nix/store/00000000000000000000000000000000-x.drv"
    return text("try") + encodeU64(0) + text("x86_64-linux") + text(path) + encodeU64(0)


def text(value):
    """A text as it is sent."""
    return encodeString(value.encode())


class Nix:
    """
    Starts hook processes as Nix does, with one store and one directory for what they share.
    """

    def __init__(self, directory):
        self.state = directory / "s"
        self.root = directory / "root"
        for name in ("nix/store", "nix/var/nix/db", "nix/var/nix/current-load"):
            (self.root / name).mkdir(parents=True)
        self.environ = {**os.environ, "NIXSERVE_HOOK_STATE": str(self.state)}
        self.started = []
        self.busy = None

    def occupy(self):
        """Have the slots, so that builds are accepted and wait."""
        self.busy = [os.open(path, os.O_RDWR | os.O_CREAT) for path in self.slots]
        for fd in self.busy:
            fcntl.flock(fd, fcntl.LOCK_EX)

    def release(self):
        """Have them no more."""
        while self.busy:
            os.close(self.busy.pop())

    @property
    def slots(self):
        """Their files."""
        return [self.root / f"nix/var/nix/current-load/ssh:__machine.invalid-{number}" for number in range(2)]

    def start(self, *options, **environ):
        """
        A hook process, which has heard the settings. As from Nix 2.8, its descriptors 1 and 2 are one pipe and 4 and 5
        the ends of another, of which Nix keeps both.
        """
        (said, saying), (log, logging) = os.pipe(), os.pipe()
        # Out of the way of the numbers that they are to have.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in (logging, log)]
        os.close(logging), os.close(log)

        def place():
            os.dup2(high[0], 4), os.dup2(high[1], 5)

        process = subprocess.Popen(
            [Path(sys.executable).with_name("nixserve-hook"), *options, "3"],
            stdin=subprocess.PIPE,
            stdout=saying,
            stderr=saying,
            env={**self.environ, **environ},
            preexec_fn=place,
            pass_fds=(4, 5),
            start_new_session=True,
        )
        os.close(saying)
        process.said = os.fdopen(said, "rb", buffering=0)
        process.log = high
        self.started.append(process)
        machine = MACHINE if self.busy is not None else ""
        process.stdin.write(settings(store=str(self.root), builders=machine, system="x86_64-linux", max_jobs="0"))
        process.stdin.flush()
        return process

    def ask(self, process):
        """Ask. @return: the last line of the answer."""
        process.stdin.write(question())
        process.stdin.flush()
        while (line := process.said.readline()).startswith(b"@nix "):
            pass
        return line

    def waiting(self, **environ):
        """A hook process whose build has been accepted, and waits for a slot."""
        process = self.start(**environ)
        assert self.ask(process) == b"# accept\n"
        assert process.said.readline() == b"ssh://machine.invalid\n"
        return process

    def first(self, **environ):
        """Likewise, the first one, which does the work itself and has the others' process loaded."""
        self.occupy()
        return self.waiting(**environ)

    def loaded(self):
        """The preloaded processes."""
        return self._called(LOADED_NAME)

    def children(self):
        """Their children."""
        return self._called(CHILD_NAME)

    def _called(self, name):
        mark = f"NIXSERVE_HOOK_STATE={self.state}\0"
        return [pid for pid in pids() if content(pid, "comm").strip() == name and mark in content(pid, "environ")]

    def end(self):
        """Whatever was started."""
        for process in self.started:
            process.kill()
            process.wait()
            process.stdin.close()
            process.said.close()
            for fd in process.log:
                os.close(fd)
        until(lambda: not self.children())
        for pid in self.loaded():
            os.kill(pid, signal.SIGKILL)
        if self.busy is not None:
            self.release()


def pids():
    """All processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def content(pid, name):
    """A file about a process; empty if that has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def isRunning(pid):
    """It is there, and no zombie."""
    return content(pid, "stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


@pytest.fixture
def nix(tmp_path):
    """A L{Nix}."""
    nix = Nix(tmp_path)
    yield nix
    nix.end()


def test_first(nix):
    """The first hook process does the work itself; that which is loaded meanwhile does it for the others."""
    first = nix.first()
    assert nix.children() == []
    second = nix.waiting()
    assert len(nix.loaded()) == 1 and len(nix.children()) == 1
    assert first.poll() is None and second.poll() is None


def test_declines(nix):
    """Without a build nothing is loaded. If it is, an answer and a status come as if the process had been the child."""
    process = nix.start()
    assert nix.ask(process) == b"# decline-permanently\n" and process.wait(10) == 0
    assert nix.loaded() == []
    nix.first()
    nix.busy, busy = None, nix.busy
    process = nix.start()
    assert nix.ask(process) == b"# decline-permanently\n" and process.wait(10) == 0
    nix.busy = busy
    until(lambda: nix.children() == [])
    assert len(nix.loaded()) == 1


def test_fails(nix):
    """So do an error and its status."""
    nix.first()
    process = nix.start()
    process.stdin.write(text("try") + encodeU64(7))
    process.stdin.close()
    said = process.said.readall()
    assert process.wait(10) == 1
    assert b"build hook: " in said and b"Traceback" not in said
    assert len(nix.loaded()) == 1


def test_oneForAll(nix):
    """The hook processes of one Nix share one preloaded process, however many run at once."""
    nix.first()
    for _ in range(5):
        nix.waiting()
    assert len(nix.loaded()) == 1 and len(nix.children()) == 5
    assert {os.getsid(pid) for pid in nix.children()} == set(nix.children())


def test_descriptors(nix):
    """A child has what Nix has given to its hook process, and nothing of any other, or of the first."""
    nix.first()
    nix.waiting()
    hook = nix.waiting()
    (loaded,) = nix.loaded()
    theirs = {os.readlink(f"/proc/{pid}/fd/{fd}") for pid in nix.children() for fd in (0, 2, 4)}
    assert len(theirs) == 6
    for pid in nix.children():
        open_ = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert {fd for fd, name in open_.items() if name.startswith("pipe:")} == {0, 1, 2, 4}
        assert open_[1] == open_[2]
        others = [name for name in open_.values() if not name.startswith((str(nix.state), str(nix.root), "pipe:"))]
        assert len(others) == 1 and others[0].startswith("socket:")
    # The hook process itself keeps only those whose end is its own end.
    kept = {fd for fd in os.listdir(f"/proc/{hook.pid}/fd") if "pipe:" in os.readlink(f"/proc/{hook.pid}/fd/{fd}")}
    assert kept == {"1", "4"}
    names = {os.readlink(f"/proc/{loaded}/fd/{fd}").partition(":")[0] for fd in os.listdir(f"/proc/{loaded}/fd")}
    assert names == {"/dev/null", "socket", "anon_inode"}


def test_endIsTheLast(nix):
    """Nix sees no end of the pipe before the hook process has ended, for it kills what is left then."""
    nix.first()
    hook = nix.waiting()
    (child,) = nix.children()
    hook.send_signal(signal.SIGSTOP)
    os.kill(child, signal.SIGKILL)
    until(lambda: not isRunning(child))
    poll = select.poll()
    poll.register(hook.said, select.POLLIN)
    assert poll.poll(200) == []
    hook.send_signal(signal.SIGCONT)
    assert hook.said.readall() == b"" and hook.wait(10) == 128 + signal.SIGKILL


def test_hookKilled(nix):
    """The sudden death of the hook process ends its child, and no other."""
    first, killed, other = nix.first(), nix.waiting(), nix.waiting()
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(10) == -signal.SIGKILL
    until(lambda: len(nix.children()) == 1)
    assert first.poll() is None and other.poll() is None


def test_firstKilled(nix):
    """Nix kills the group of a hook process; what the first one has had loaded is for the others all the same."""
    first = nix.first()
    until(nix.loaded)
    loaded = nix.loaded()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    nix.waiting()
    assert nix.loaded() == loaded and len(nix.children()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_hookEnded(nix, number):
    """Other signals do so as well, and the child ends first: Nix goes on when the hook process has ended."""
    nix.first()
    hook = nix.waiting()
    (child,) = nix.children()
    hook.send_signal(number)
    assert hook.wait(10) == 128 + signal.SIGKILL
    assert not isRunning(child)


def test_childKilled(nix):
    """A child that is killed makes the hook process fail, as a shell has it."""
    nix.first()
    hook = nix.waiting()
    (child,) = nix.children()
    os.kill(child, signal.SIGKILL)
    assert hook.wait(10) == 128 + signal.SIGKILL
    assert nix.ask(nix.start()) == b"# accept\n"


def test_loadedKilled(nix):
    """Builds go on without the preloaded process, and the next one has another."""
    nix.first()
    hook = nix.waiting()
    (loaded,), (child,) = nix.loaded(), nix.children()
    os.kill(loaded, signal.SIGKILL)
    until(lambda: not nix.loaded())
    nix.waiting()
    nix.waiting()
    assert len(nix.loaded()) == 1 and len(nix.children()) == 2
    assert hook.poll() is None and isRunning(child)
    # What Nix reads ends: the child notices by itself.
    hook.said.close()
    hook.said = hook.stdin
    assert hook.wait(10) != 0


def test_loadedKilledEarly(nix):
    """A child tells its status itself."""
    nix.first()
    nix.busy, busy = None, nix.busy
    hook = nix.start()
    until(nix.children)
    os.kill(nix.loaded()[0], signal.SIGKILL)
    until(lambda: not nix.loaded())
    assert nix.ask(hook) == b"# decline-permanently\n" and hook.wait(10) == 0
    nix.busy = busy


def test_turns(nix):
    """Builds that wait take slots as soon as they are free, one after the other."""
    nix.first()
    nix.waiting()
    nix.release()
    until(lambda: all(map(isLocked, nix.slots)))


def test_nixIsGone(nix):
    """If Nix was killed, hook processes end whatever their children wait for."""
    nix.first()
    hook = nix.waiting()
    (child,) = nix.children()
    hook.said.close()
    hook.said = hook.stdin
    assert hook.wait(10) == 128 + signal.SIGKILL
    assert not isRunning(child)


def test_endsAfterAWhile(nix):
    """Without builds the preloaded process ends after the time that was set, and its socket with it."""
    nix.first(NIXSERVE_HOOK_SHARE="1").kill()
    until(nix.loaded)
    until(lambda: not nix.loaded(), 10)
    assert list(nix.state.glob("preloaded/*")) == []


def test_socketOfAnother(nix):
    """At its end it removes no socket that another one has put in the place of its own."""
    nix.first(NIXSERVE_HOOK_SHARE="1").kill()
    until(nix.loaded)
    (path,) = nix.state.glob("preloaded/*")
    path.rename(path.with_name("old"))
    path.touch()
    until(lambda: not nix.loaded(), 10)
    assert path.exists()


def test_otherEnvironment(nix):
    """Where the parent is no Nix, hooks may differ in more than their descriptors: then they share nothing."""
    nix.first()
    nix.waiting(NIX_SSHOPTS="-p 1")
    assert nix.children() == []
    until(lambda: len(nix.loaded()) == 2)


def test_endsWithNix(nix):
    """The preloaded process ends with its Nix, however that ends; and it is no other's."""
    nix.first()
    until(nix.loaded)
    (ours,) = nix.loaded()
    code = """if True:
        import os, subprocess, sys
        os.environ["NIXSERVE_HOOK_STATE"] = sys.argv[3]
        hook = subprocess.Popen(sys.argv[1:2] + ["3"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        hook.stdin.write(bytes.fromhex(sys.argv[2]))
        hook.stdin.flush()
        assert hook.stderr.readline() == b"# accept\\n"
        hook.kill()
    """
    program = Path(sys.executable).with_name("nixserve-hook")
    said = settings(store=str(nix.root), builders=MACHINE, system="x86_64-linux", max_jobs="0") + question()
    with otherProcess(code, program, said.hex(), nix.state):
        until(lambda: len(nix.loaded()) == 2, 20)
    until(lambda: nix.loaded() == [ours], 20)


def test_leftovers(nix):
    """Sockets that were left by such as have been killed are removed by the next."""
    nix.first()
    until(nix.loaded)
    (path,) = nix.state.glob("preloaded/*")
    _, rest = path.name.split("-", 1)
    for name in ("4194305-" + rest, "4194305-1-2-3"):
        (nix.state / "preloaded" / name).touch()
    os.kill(nix.loaded()[0], signal.SIGKILL)
    nix.waiting()
    until(lambda: sorted(each.name for each in nix.state.glob("preloaded/*")) == sorted([path.name, "4194305-1-2-3"]))


@pytest.mark.parametrize("options, environ", [(["--no-share"], {}), ([], {"NIXSERVE_HOOK_SHARE": "0"})])
def test_notShared(nix, options, environ):
    """It can be turned off."""
    nix.occupy()
    assert nix.ask(nix.start(*options, **environ)) == b"# accept\n"
    assert nix.loaded() == [] and not (nix.state / "preloaded").exists()


def test_openToOthers(nix):
    """Where others could make sockets none is used: each hook process does the work itself."""
    (nix.state / "preloaded").mkdir(parents=True)
    (nix.state / "preloaded").chmod(0o770)
    nix.first()
    nix.waiting()
    assert nix.loaded() == nix.children() == [] and list(nix.state.glob("preloaded/*")) == []


def test_ofOthers(nix, monkeypatch):
    """Nor is one of another user's, nor a process of another user's that listens in ours."""
    nix.first()
    until(nix.loaded)
    (path,) = nix.state.glob("preloaded/*")
    ours, environ = handover.Preloaded(str(path), 60), {"NIXSERVE_HOOK_STATE": str(nix.state)}
    assert handover.Preloaded.find(environ) is not None
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert ours._connect() is None
    assert handover.Preloaded.find(environ) is None


def test_endsBehindTheChild():
    """The status is known when nothing of the child runs any more, not when it has told it."""
    control, theirs = handover.socket.socketpair(handover.socket.AF_UNIX, handover.socket.SOCK_SEQPACKET)
    results = []
    waiting = threading.Thread(target=lambda: results.append(handover._result(control, True)))
    waiting.start()
    theirs.send(b"\7")
    waiting.join(0.2)
    assert results == []
    theirs.close()
    waiting.join(10)
    assert results == [7]
    control.close()


def test_inheritedGroup(nix):
    """A directory whose group is inherited is as private as another."""
    nix.state.mkdir()
    nix.state.chmod(0o2700)
    nix.first()
    until(nix.loaded)


def test_longPath(nix):
    """Where a path is too long for sockets, a private directory stands for it."""
    nix.state = nix.state / ("x" * 80)
    nix.environ["NIXSERVE_HOOK_STATE"] = str(nix.state)
    directory = Path(statedirs.socketDirectory(str(nix.state), "preloaded"))
    assert len(str(directory)) < 70 and directory.parent == Path("/tmp")
    try:
        nix.first()
        nix.waiting()
        assert len(nix.children()) == 1
        assert directory.stat().st_mode & 0o777 == 0o700
    finally:
        shutil.rmtree(directory)


def test_fewDescriptors(nix):
    """A hook process whose descriptors do not reach the child does the work itself."""
    nix.first()
    until(nix.loaded)
    (path,) = nix.state.glob("preloaded/*")
    before = path.stat().st_ino
    resource.prlimit(nix.loaded()[0], resource.RLIMIT_NOFILE, (10, 10))
    nix.waiting()
    assert nix.children() == [] and len(nix.loaded()) == 1
    # And has no other one loaded for each build.
    assert path.stat().st_ino == before


def test_stopped(nix, monkeypatch):
    """A preloaded process that does nothing is waited for, and then done without."""
    nix.first()
    until(nix.loaded)
    (loaded,) = nix.loaded()
    (path,) = nix.state.glob("preloaded/*")
    monkeypatch.setattr(handover, "_PATIENCE", 0.2)
    preloaded = handover.Preloaded(str(path), 60)
    os.kill(loaded, signal.SIGSTOP)
    assert preloaded._connect() is None
    os.kill(loaded, signal.SIGCONT)
    monkeypatch.undo()
    control = preloaded._connect()
    assert control is not None
    control.close()


@pytest.mark.parametrize("module", ["hookentry", "handover"])
def test_imports(module):
    """The small process imports nothing that takes long."""
    code = f"import os, sys; before = set(sys.modules); import nixserve.app.{module}; print(*set(sys.modules) - before)"
    # Without what an installation has Python import before.
    python, environ = [sys.executable, "-S"], {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*python, "-c", code], capture_output=True, text=True, check=True, env=environ)
    ours = {"", ".app", ".app.handover", ".app.hookentry", ".app.statedirs", ".errors", ".store", ".store.ownpaths"}
    known = {"importlib", "warnings", "_socket", "__future__", "errno", "grp", "pwd"}
    imported = set(done.stdout.split())
    assert {name for name in imported if name.startswith("nixserve")} <= {f"nixserve{name}" for name in ours}
    assert {name.partition(".")[0] for name in imported} <= known | {"nixserve"}

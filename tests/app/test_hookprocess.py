"""
The processes of the build hook: the small one that Nix starts, the one that is loaded already, and its children, one
for each build. Nix is the test, or a process that it starts.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nixserve.app import hookentry, statedirs
from nixserve.codec.wire import encodeString, encodeU64
from tests.hook.hooksupport import otherProcess
from tests.interop.watching import until

MACHINE = "ssh://machine.invalid x86_64-linux - 1"
"""Nobody ever connects to it: its one slot is busy."""


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
        """Have the slot, so that builds are accepted and wait."""
        self.busy = os.open(self.root / "nix/var/nix/current-load/ssh:__machine.invalid-0", os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.busy, fcntl.LOCK_EX)

    def start(self, *options, **environ):
        """A hook process, which has heard the settings."""
        reading, writing = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in (writing, reading)]
        os.close(reading), os.close(writing)

        def place():
            os.dup2(high[0], 4), os.dup2(high[1], 5)

        process = subprocess.Popen(
            [Path(sys.executable).with_name("nixserve-hook"), *options, "3"],
            stdin=subprocess.PIPE,
            stdout=high[0],
            stderr=subprocess.PIPE,
            env={**self.environ, **environ},
            preexec_fn=place,
            pass_fds=(4, 5),
            start_new_session=True,
        )
        os.close(high[0])
        process.log = os.fdopen(high[1], "rb")
        self.started.append(process)
        machine = MACHINE if self.busy is not None else ""
        process.stdin.write(settings(store=str(self.root), builders=machine, system="x86_64-linux", max_jobs="0"))
        process.stdin.flush()
        return process

    def ask(self, process):
        """Ask. @return: the last line of the answer."""
        process.stdin.write(question())
        process.stdin.flush()
        while (line := process.stderr.readline()).startswith(b"@nix "):
            pass
        return line

    def waiting(self):
        """A hook process whose build has been accepted, and waits for a slot."""
        process = self.start()
        assert self.ask(process) == b"# accept\n"
        assert process.stderr.readline() == b"ssh://machine.invalid\n"
        return process

    def loaded(self):
        """The preloaded processes."""
        return [pid for pid in pids() if f"{self.state}/preloaded/" in commandLine(pid) and parentOf(pid) not in pids()]

    def children(self):
        """The children of the preloaded process."""
        (loaded,) = self.loaded()
        return [pid for pid in pids() if parentOf(pid) == loaded]

    def end(self):
        """Whatever was started."""
        for process in self.started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stderr, process.log):
                stream.close()
        for pid in self.loaded():
            os.kill(pid, signal.SIGKILL)
        if self.busy is not None:
            os.close(self.busy)


def pids():
    """All preloaded processes and their children."""
    return [
        int(name) for name in os.listdir("/proc") if name.isdecimal() and "nixserve.app.preloaded" in commandLine(name)
    ]


def commandLine(pid):
    """Its words; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def parentOf(pid):
    """@return: 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture
def nix(tmp_path):
    """A L{Nix}."""
    nix = Nix(tmp_path)
    yield nix
    nix.end()


def test_declines(nix):
    """An answer and an exit status come as if the small process had done the work."""
    process = nix.start()
    assert nix.ask(process) == b"# decline-permanently\n"
    assert process.wait(10) == 0
    assert len(nix.loaded()) == 1


def test_fails(nix):
    """So do an error and its status."""
    process = nix.start()
    process.stdin.write(text("try") + encodeU64(7))
    process.stdin.close()
    said = process.stderr.read()
    assert process.wait(10) == 1
    assert b"build hook: " in said and b"Traceback" not in said
    process.stdin = process.stderr


def test_oneForAll(nix):
    """The hook processes of one Nix share one preloaded process, however many run at once."""
    nix.occupy()
    hooks = [nix.waiting() for _ in range(5)]
    assert len(nix.loaded()) == 1 and len(nix.children()) == 5
    assert {os.getsid(pid) for pid in nix.children()} == set(nix.children())
    assert len(hooks) == 5


def test_descriptors(nix):
    """A child has what Nix has given to its hook process, and nothing of any other."""
    nix.occupy()
    nix.waiting()
    hook = nix.waiting()
    theirs = {os.readlink(f"/proc/{pid}/fd/{fd}") for pid in nix.children() for fd in (0, 2, 4)}
    assert len(theirs) == 6
    for pid in nix.children():
        open_ = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert {fd for fd, name in open_.items() if name.startswith("pipe:")} == {0, 1, 2, 4}
        assert open_[1] == open_[4]
        assert all(name.startswith((str(nix.state), str(nix.root), "pipe:")) for name in open_.values())
    # The hook process itself keeps only those whose end is its own end.
    kept = {fd for fd in os.listdir(f"/proc/{hook.pid}/fd") if "pipe:" in os.readlink(f"/proc/{hook.pid}/fd/{fd}")}
    assert kept == {"1", "4"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_hookKilled(nix, number):
    """Whatever ends the hook process ends its child, and no other."""
    nix.occupy()
    killed, other = nix.waiting(), nix.waiting()
    killed.send_signal(number)
    assert killed.wait(10) == -number
    until(lambda: len(nix.children()) == 1)
    assert other.poll() is None


def test_childKilled(nix):
    """A child that is killed makes the hook process fail, as a shell has it."""
    nix.occupy()
    hook = nix.waiting()
    (child,) = nix.children()
    os.kill(child, signal.SIGKILL)
    assert hook.wait(10) == 128 + signal.SIGKILL
    assert nix.ask(nix.start()) == b"# accept\n"


def test_loadedKilled(nix):
    """When the preloaded process dies so do the hook processes; children end with Nix's pipes; the next one works."""
    nix.occupy()
    hook = nix.waiting()
    (loaded,), (child,) = nix.loaded(), nix.children()
    os.kill(loaded, signal.SIGKILL)
    assert hook.wait(10) == 1
    hook.stderr.close()
    hook.stderr = hook.stdin
    until(lambda: child not in pids())
    assert nix.ask(nix.start()) == b"# accept\n"


def test_endsAfterAWhile(nix):
    """Without builds the preloaded process ends after the time that was set, and its socket with it."""
    process = nix.start(NIXSERVE_HOOK_SHARE="1")
    assert nix.ask(process) == b"# decline-permanently\n"
    until(lambda: not nix.loaded(), 10)
    assert [path.name for path in nix.state.glob("preloaded/*")] == ["lock"]


def test_endsWithNix(nix):
    """The preloaded process ends with its Nix, however that ends; and it is no other's."""
    assert nix.ask(nix.start()) == b"# decline-permanently\n"
    (ours,) = nix.loaded()
    code = "import subprocess, sys; subprocess.run([sys.argv[1], '3'], input=bytes.fromhex(sys.argv[2]))"
    program = Path(sys.executable).with_name("nixserve-hook")
    before, os.environ["NIXSERVE_HOOK_STATE"] = os.environ.get("NIXSERVE_HOOK_STATE"), str(nix.state)
    try:
        with otherProcess(code, program, settings(store=str(nix.root)).hex()):
            assert len(nix.loaded()) == 2
    finally:
        del os.environ["NIXSERVE_HOOK_STATE"]
        if before is not None:
            os.environ["NIXSERVE_HOOK_STATE"] = before
    until(lambda: nix.loaded() == [ours])


@pytest.mark.parametrize("options, environ", [(["--no-share"], {}), ([], {"NIXSERVE_HOOK_SHARE": "0"})])
def test_notShared(nix, options, environ):
    """It can be turned off."""
    assert nix.ask(nix.start(*options, **environ)) == b"# decline-permanently\n"
    assert nix.loaded() == []


def test_openToOthers(nix):
    """Where others could make sockets none is used: the hook process does the work itself."""
    (nix.state / "preloaded").mkdir(parents=True)
    (nix.state / "preloaded").chmod(0o770)
    assert nix.ask(nix.start()) == b"# decline-permanently\n"
    assert nix.loaded() == []


def test_longPath(nix):
    """Where a path is too long for sockets, a private directory stands for it."""
    nix.state = nix.state / ("x" * 80)
    nix.environ["NIXSERVE_HOOK_STATE"] = str(nix.state)
    directory = Path(statedirs.socketDirectory(str(nix.state), "preloaded"))
    assert len(str(directory)) < 70 and directory.parent == Path("/tmp")
    try:
        process = nix.start()
        assert nix.ask(process) == b"# decline-permanently\n" and process.wait(10) == 0
        assert directory.stat().st_mode & 0o777 == 0o700
        (loaded,) = (pid for pid in pids() if f"{directory}/" in commandLine(pid))
        os.kill(loaded, signal.SIGKILL)
    finally:
        shutil.rmtree(directory)


def test_silent(nix, monkeypatch):
    """A preloaded process that does nothing is waited for, and then done without."""
    assert nix.ask(nix.start()) == b"# decline-permanently\n"
    (loaded,) = nix.loaded()
    (path,) = [path for path in nix.state.glob("preloaded/*") if path.is_socket()]
    monkeypatch.setattr(hookentry, "_PATIENCE", 0.2)
    os.kill(loaded, signal.SIGSTOP)
    assert hookentry._connect(str(path)) is None
    os.kill(loaded, signal.SIGCONT)
    control = hookentry._connect(str(path))
    assert control is not None
    control.close()


def test_imports():
    """The small process imports nothing that takes long."""
    code = "import sys; before = set(sys.modules); import nixserve.app.hookentry; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    known = {"nixserve", "importlib", "warnings", "_socket", "__future__"}
    assert {name.partition(".")[0] for name in done.stdout.split()} <= known

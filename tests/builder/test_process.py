"""Builders as processes: what they inherit, how they end, and that their output gets out of them."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

from nixserve.builder import spawn
from nixserve.builder.loglines import _MAX_WAITING
from nixserve.builder.process import CancelToken, Ending, ProcessLimits, runBuilder
from nixserve.builder.users import BuildUser
from nixserve.codec.terminal import MAX_LINE
from nixserve.errors import BuildError
from tests.builder.workplace import needsSandbox, processesOf, workplace

needsRoot = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def place():
    """A L{Workplace} for one test."""
    with workplace() as made:
        yield made


@pytest.fixture(params=["alone", pytest.param("sandbox", marks=needsSandbox)])
def run(request, place):
    """Runs a script in the workplace, without and with a sandbox."""

    def run(script, **options):
        return place.run(script, place.sandbox() if request.param == "sandbox" else None, **options)

    return run


def gone(pid, timeout=5):
    """Does a process vanish, or become a zombie, in so many seconds?"""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def childrenOf(pid):
    """The numbers of a process's children."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


class TestStart:
    """What a builder begins with."""

    def test_environment(self, place, run):
        """The environment is what was asked for and nothing else."""
        run("env", env={"PATH": "/bin:/usr/bin", "x": "a b"})
        names = {line.partition("=")[0] for line in place.text.splitlines()}
        assert names - {"SHLVL", "PWD", "_", "OLDPWD"} == {"PATH", "x"}

    def test_name(self, place, run):
        """A builder is called by the last part of its path."""
        run("", args=["-c", "echo $0 $1"])
        assert place.text == "sh\n"

    def test_descriptors(self, place, run):
        """Standard input is /dev/null, output and errors the same terminal, and there is nothing else."""
        listing = "for fd in /proc/$$/fd/*; do test -L $fd && echo ${fd##*/}; done"
        run(f"readlink /proc/$$/fd/0; test /proc/$$/fd/1 -ef /proc/$$/fd/2 && echo same; {listing}")
        assert place.text.split() == ["/dev/null", "same", "0", "1", "2"]

    def test_input(self, place, run):
        """Standard input can be given."""
        run("wc -c", stdin=b"x" * 200000)
        assert place.text.split() == ["200000"]

    def test_raw(self, place, run):
        """The terminal changes nothing and echoes nothing."""
        run(r"printf 'a\nb\r\n\tc\004\003d\n'; printf 'e\n' >/dev/stderr")
        assert bytes(place.raw) == b"a\nb\r\n\tc\x04\x03d\ne\n"

    def test_limits(self, place, run):
        """umask 022, no core dumps, addresses not randomised, new privileges off, a filter on."""
        run("umask; ulimit -c; cat /proc/self/personality; grep -E 'NoNewP|Seccomp:|SigIgn|SigBlk' /proc/self/status")
        words = place.text.split()
        assert words[:3] == ["0022", "0", "00040000"]
        found = dict(zip(words[3::2], words[4::2], strict=True))
        assert (found["NoNewPrivs:"], found["Seccomp:"]) == ("1", "2")
        assert int(found["SigBlk:"], 16) == 0
        # busybox's shell ignores SIGQUIT, by itself.
        assert int(found["SigIgn:"], 16) & ~(1 << signal.SIGQUIT - 1) == 0

    def test_linux32(self, place):
        """A builder for 32 bits sees such a machine."""
        place.run("uname -m", linux32=True)
        assert place.text.strip() not in ("x86_64", "aarch64")

    @needsRoot
    def test_user(self, place):
        """Root's builders have a uid of their own, no groups, and a session without a terminal."""
        place.run("id -u; id -G; cut -d' ' -f7 /proc/$$/stat; cat /proc/1/environ; pwd")
        words = place.text.split()
        assert words[:3] == [str(place.user.uid), str(place.user.gid), "0"]
        assert "Permission denied" in place.text
        assert words[-1] == str(place.buildDir)

    def test_missingBuilder(self, place, run):
        """A builder that does not exist fails like any other, and the log says why."""
        outcome = run("", builder="/nope")
        assert (outcome.ending, outcome.code) == (Ending.EXIT, 1)
        assert place.text == "error: executing '/nope': No such file or directory\n"

    def test_setupFailure(self, place):
        """What goes wrong before the builder is an error of another kind."""
        with pytest.raises(BuildError, match=r"while setting up the build environment: .*No such file") as caught:
            place.run("", cwd="/does/not/exist")
        assert caught.value.status == 9

    def test_noInterpreter(self, place, monkeypatch):
        """So is a machine that cannot start another process."""
        monkeypatch.setattr(sys, "executable", "/does/not/exist")
        with pytest.raises(BuildError, match="while setting up the build environment"):
            place.run("")


class TestEnd:
    """How builds end."""

    @pytest.mark.parametrize(
        ("script", "ending", "code"),
        [
            ("exit 0", Ending.EXIT, 0),
            ("exit 42", Ending.EXIT, 42),
            ("sh -c 'kill -9 $$'; exit 7", Ending.EXIT, 7),
        ],
    )
    def test_status(self, run, script, ending, code):
        """The exit status comes through."""
        outcome = run(script)
        assert (outcome.ending, outcome.code, outcome.success) == (ending, code, code == 0)
        assert outcome.startTime <= outcome.stopTime <= time.time()

    def test_signal(self, place):
        """So does a signal."""
        outcome = place.run("kill -TERM $$")
        assert (outcome.ending, outcome.code, outcome.success) == (Ending.SIGNAL, signal.SIGTERM, False)

    def test_closedOutput(self, run):
        """A builder that closes its output is killed at once, as by Nix."""
        started = time.monotonic()
        outcome = run("exec >/dev/null 2>&1; sleep 20")
        assert (outcome.ending, outcome.code) == (Ending.SIGNAL, signal.SIGKILL)
        assert time.monotonic() - started < 5

    def test_backgroundOutput(self, place):
        """Outside a sandbox, a process left behind with the terminal open is waited for, as by Nix."""
        outcome = place.run("(sleep 0.5; echo late) & exit 3")
        assert (place.text, outcome.code) == ("late\n", 3)

    @needsSandbox
    def test_backgroundInSandbox(self, place):
        """In a sandbox it dies with the builder."""
        outcome = place.run("(sleep 20; echo late) & exit 3", place.sandbox())
        assert (place.text, outcome.code) == ("", 3)

    @pytest.mark.parametrize("own", [pytest.param(True, marks=needsRoot), False])
    def test_daemons(self, place, own):
        """Daemons die with the build: by their uid, or else because they cannot escape being descendants."""
        if not own:
            place.user.release()
            place.user = BuildUser(os.geteuid(), os.getegid(), False)
        pids = place.directory / "pids"
        pids.touch()
        pids.chmod(0o666)
        script = f"""daemon() {{
                setsid sh -c 'echo $$ >> {pids}; sleep 60 & echo $! >> {pids}; wait' </dev/null >/dev/null 2>&1 &
            }}
            daemon; (daemon); (setsid sh -c '(setsid sleep 60 & echo $! >> {pids})' >/dev/null 2>&1 &)
            until [ $(wc -l <{pids}) = 5 ]; do sleep 0.05; done"""
        started = time.monotonic()
        assert place.run(script).success
        assert time.monotonic() - started < 30
        found = pids.read_text().split()
        assert len(found) == 5
        assert all(gone(pid, 1) for pid in found)

    def test_silence(self, run):
        """Time without output runs out; any byte starts it again."""
        outcome = run("for i in 1 2 3; do printf .; sleep 0.7; done; sleep 60", limits=ProcessLimits(maxSilentTime=2))
        assert (outcome.ending, outcome.code) == (Ending.SILENCE, 0)
        assert outcome.logSize == 3

    def test_timeout(self, run):
        """Time runs out for a builder that never stops writing, too."""
        started = time.monotonic()
        assert run("while :; do echo x; done", limits=ProcessLimits(timeout=1)).ending is Ending.TIMEOUT
        assert 1 <= time.monotonic() - started < 10

    @pytest.mark.parametrize(("size", "ending"), [(1000, Ending.EXIT), (1001, Ending.LOG_LIMIT)])
    def test_logLimit(self, place, size, ending):
        """The limit of the log may be reached, not passed; what came before stays."""
        outcome = place.run(f"head -c {size} /dev/zero; sleep 0.1", limits=ProcessLimits(maxLogSize=1000))
        assert outcome.ending is ending
        assert len(place.raw) == size

    def test_endlessOutput(self, run):
        """Endless output ends at the limit of the log."""
        outcome = run("while :; do echo xxxxxxxxxxxxxxxxxxx; done", limits=ProcessLimits(maxLogSize=100000, timeout=20))
        assert outcome.ending is Ending.LOG_LIMIT
        assert outcome.logSize < 200000

    def test_cancel(self, run):
        """A build can be cancelled from another thread, at once."""
        cancel = CancelToken()
        threading.Timer(0.3, cancel.cancel).start()
        started = time.monotonic()
        assert run("sleep 30", cancel=cancel).ending is Ending.CANCELLED
        assert time.monotonic() - started < 10
        assert cancel.cancelled
        assert run("sleep 30", cancel=cancel).ending is Ending.CANCELLED
        cancel.cancel()

    @pytest.fixture
    def supervisors(self, monkeypatch):
        """The supervisors started in this test."""
        started = []
        start = spawn.startSupervisor
        monkeypatch.setattr(spawn, "startSupervisor", lambda *rest: started.append(start(*rest)) or started[-1])
        return started

    def test_supervisorKilled(self, place, run, supervisors, monkeypatch):
        """When the small program beside the build is killed, the builder dies, and the build is an error."""
        builders = []

        def log(data):
            builders.extend(childrenOf(supervisors[0].process.pid))
            os.kill(supervisors[0].process.pid, signal.SIGKILL)

        # The builder dies without this, which is for those that it left behind.
        monkeypatch.setattr(BuildUser, "killAll", lambda user: None)
        with pytest.raises(BuildError, match="supervisor"):
            run("echo started; exec sleep 30", log=log)
        assert builders
        assert all(gone(pid) for pid in builders)

    def test_supervisorEnvironment(self, place, supervisors):
        """The small program has nothing of the server: neither its variables nor its terminal's signals."""
        found = []

        def log(data):
            pid = supervisors[0].process.pid
            with open(f"/proc/{pid}/environ") as file:
                found.append(file.read())
            found.append(os.getsid(pid) == pid)

        place.run("echo started; sleep 0.3", log=log)
        assert found == ["", True]

    @pytest.mark.parametrize("sandboxed", [False, pytest.param(True, marks=needsSandbox)])
    def test_serverKilled(self, sandboxed):
        """When the server is killed, its builders die."""
        script = f"""
from tests.builder.workplace import workplace
with workplace() as place:
    place.run("(setsid sleep 61 >/dev/null 2>&1 &); echo started; sleep 61", place.sandbox() if {sandboxed} else None,
        log=lambda data: print(place.user.uid, place.directory, data, flush=True))
"""
        server = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        uid, directory, _ = server.stdout.readline().split()
        children = subprocess.run(["pgrep", "-x", "sleep", "-u", uid], capture_output=True, text=True).stdout.split()
        server.kill()
        server.wait()
        server.stdout.close()
        subprocess.run(["rm", "-rf", directory], check=True)
        assert children
        assert all(gone(pid) for pid in children)

    def test_failingRecord(self, place):
        """When the log cannot be written, the builder does not go on."""

        def record(data):
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            runBuilder(place.spec("echo $$; exec sleep 30"), place.log.extend, ProcessLimits(), CancelToken(), record)
        assert not processesOf(place.user)

    def test_nothingRemains(self, place):
        """Builds leave no descriptor, process or thread in the server."""
        place.run("exit 0")
        before = (sorted(os.listdir("/proc/self/fd")), threading.active_count())
        for _ in range(3):
            place.run("echo x")
        assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


class TestOutput:
    """What becomes of output that is too much."""

    def test_longLine(self, place):
        """A line without end takes no memory: it is cut, and what comes after the next LF is shown again."""
        tracemalloc.start()
        size = 0

        def record(data):
            nonlocal size
            size += len(data)

        try:
            script = "head -c 50000000 /dev/zero; echo; echo next"
            runBuilder(place.spec(script), place.log.extend, ProcessLimits(timeout=50), CancelToken(), record)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert size == 50000006
        assert place.log == MAX_LINE * b"\0" + b"\nnext\n"
        assert peak < 3_000_000

    def test_stalledReader(self, place):
        """Who watches and does not read holds up nothing: not the build, not its end, not the log on disk."""
        release = threading.Event()
        seen = []

        def log(data):
            seen.append(data)
            release.wait(30)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        outcome = place.run("yes | head -c 20000000", log=log)
        assert outcome.success and len(place.raw) == 20000000
        assert time.monotonic() - started < 20
        assert len(seen) == 1 and len(seen[0]) <= _MAX_WAITING
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80000
        release.set()

    def test_brokenWatcher(self, place):
        """Who watches and fails does not hurt the build."""

        def log(data):
            raise RuntimeError("gone")

        hook, threading.excepthook = threading.excepthook, lambda info: None
        try:
            assert place.run("echo a; sleep 0.1; echo b", log=log).success
        finally:
            threading.excepthook = hook
        assert place.raw == b"a\nb\n"

"""
Builds by the commands as they are installed, with real builders.
"""

import bz2
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nixserve.builder.settings import BuildSettings
from nixserve.codec.derivation import BasicDerivation, DerivationOutput
from nixserve.codec.hashes import hashBytes
from nixserve.codec.messages import BuildDerivation, BuildOptions
from nixserve.codec.serve import writeRequest
from nixserve.codec.storepath import StoreDir
from tests.app.box import HELLO, TIMEOUT, Relay, number, waitUntil
from tests.builder.workplace import needsSandbox

pytestmark = needsSandbox

INTERRUPTED = b"error: interrupted by the user\n"


def build(script, name="x"):
    """A request to build: a shell script whose output is floating."""
    placeholder = "/" + hashBytes("sha256", b"nix-output:out").nix32
    drv = BasicDerivation(
        name,
        {"out": DerivationOutput(None, "r:sha256")},
        frozenset(),
        BuildSettings().system,
        "/bin/sh",
        ("-c", script),
        {"out": placeholder},
    )
    drvPath = StoreDir().parse(f"/nix/store/{'0' * 32}-{name}.drv")
    return writeRequest(BuildDerivation(drvPath, drv, BuildOptions()), 0x208)


class Sleeper:
    """
    A build that sleeps.

    @ivar request: for it.
    """

    def __init__(self, name):
        # Long enough to be no other's.
        self.seconds = 1_000_000 + abs(hash((name, time.monotonic_ns()))) % 1_000_000_000
        self.request = build(f"echo sleeping; exec sleep {self.seconds}", name)

    @property
    def running(self):
        """Is there such a process?"""
        return any(self._isIt(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit())

    def _isIt(self, entry):
        try:
            return str(self.seconds).encode() in (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False


class Stdio:
    """C{nixserve-store --serve --write} on a store of its own, past the greeting."""

    def __init__(self, box):
        self.process = box.spawn(
            "nixserve-store", "--serve", "--write", "--store", box.path / "store",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.send(HELLO)
        assert len(self.process.stdout.read(16)) == 16

    def send(self, data):
        """Bytes to its standard input."""
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def end(self):
        """What it had left to say, and how long that took."""
        begun = time.monotonic()
        output, errors = self.process.communicate(timeout=TIMEOUT)
        return output, errors, time.monotonic() - begun


def ended(sleeper):
    """Its processes are gone."""
    waitUntil(lambda: not sleeper.running, 10)
    return True


class TestStdio:
    """A session on standard streams."""

    def test_build(self, box):
        """It builds, shows the log, and goes on with the next request."""
        session = Stdio(box)
        session.send(build("echo hello; echo contents > $out"))
        assert session.process.stderr.readline() == b"hello\n"
        assert session.process.stdout.read(16) == number(0) + number(0)
        session.send(build("echo bye; exit 3", "y"))
        assert session.process.stderr.readline() == b"bye\n"
        output = b""
        while b"failed with exit code 3" not in output:
            output += session.process.stdout.read1()
        _, errors, _ = session.end()
        assert (session.process.returncode, errors) == (0, b"")

    def test_halfClose(self, box):
        """The end of its input ends the build at once."""
        session, sleeper = Stdio(box), Sleeper("x")
        session.send(sleeper.request)
        assert session.process.stderr.readline() == b"sleeping\n"
        output, errors, seconds = session.end()
        assert (session.process.returncode, output, errors) == (1, b"", INTERRUPTED)
        assert seconds < 5 and ended(sleeper)
        assert list((box.path / "store/nix/var/nix/temproots").iterdir()) == []

    @pytest.mark.parametrize("signalNumber", [signal.SIGTERM, signal.SIGINT])
    def test_signal(self, box, signalNumber):
        """A signal ends the build with the process."""
        session, sleeper = Stdio(box), Sleeper("x")
        session.send(sleeper.request)
        assert session.process.stderr.readline() == b"sleeping\n"
        session.process.send_signal(signalNumber)
        begun = time.monotonic()
        assert session.process.wait(TIMEOUT) == 1
        assert time.monotonic() - begun < 5 and ended(sleeper)


class TestService:
    """The service, through relays."""

    def test_noJobs(self, box, service):
        """With no jobs a build is refused in one line, copying is not."""
        relay = Relay(box, service("--max-jobs", "0"))
        relay.send(number(1), number(0), number(0), number(0))
        assert relay.process.stdout.read(8) == number(0)
        relay.send(build(":"))
        _, errors = relay.process.communicate(timeout=TIMEOUT)
        assert errors.startswith(b"error: this nixserve does not build") and errors.count(b"\n") == 1

    def test_takingTurns(self, box, service):
        """With one job a second client waits, is told so, and builds when the first is gone."""
        running = service("--max-jobs", "1")
        sleeper = Sleeper("x")
        first = Relay(box, running)
        first.send(sleeper.request)
        assert first.process.stderr.readline() == b"sleeping\n"
        second = Relay(box, running)
        second.send(build("echo mine; echo x > $out", "y"))
        assert second.process.stderr.readline() == (
            b"waiting for a free build slot: 1 builds are running, 0 wait before this\n"
        )
        first.process.kill()
        assert second.process.stderr.readline() == b"mine\n"
        assert second.process.stdout.read(16) == number(0) + number(0)
        assert ended(sleeper)

    def test_joining(self, box, service):
        """Two clients of the same build see the same log, and one of them going does not end it."""
        running = service()
        sleeper = Sleeper("x")
        first, second = Relay(box, running), Relay(box, running)
        for relay in (first, second):
            relay.send(sleeper.request)
            assert relay.process.stderr.readline() == b"sleeping\n"
        first.process.kill()
        first.process.wait(TIMEOUT)
        time.sleep(0.5)
        assert sleeper.running
        second.process.kill()
        assert ended(sleeper)

    def test_stop(self, box, service):
        """The end of the service ends its builds."""
        running = service()
        sleeper = Sleeper("x")
        relay = Relay(box, running)
        relay.send(sleeper.request)
        assert relay.process.stderr.readline() == b"sleeping\n"
        assert running.stop() < 5
        assert ended(sleeper)
        assert b"the server is being stopped" in relay.process.communicate(timeout=TIMEOUT)[1]
        assert "Traceback" not in running.log

    def test_unreadLog(self, box, service):
        """A client that reads nothing does not keep the builder waiting; the log on disk is whole."""
        running = service()
        relay = Relay(box, running)
        relay.send(build("seq 1 400000; echo x > $out"))
        assert relay.process.stdout.read(16) == number(0) + number(0)
        relay.process.stdin.close()
        shown = relay.process.stderr.read()
        (log,) = (running.state / "store/nix/var/log/nix/drvs").glob("*/*.bz2")
        assert bz2.decompress(log.read_bytes()).count(b"\n") == 400_000
        assert shown.startswith(b"1\n2\n") and shown.count(b"\n") <= 400_000


def test_killedService(box, service):
    """What a build worked in whose service was killed is removed when the next one starts."""
    running = service()
    relay = Relay(box, running)
    relay.send(Sleeper("killed").request)
    assert relay.process.stderr.readline() == b"sleeping\n"
    storeDir = running.state / "store/nix/store"
    assert list(storeDir.glob("*-nixserve-build"))
    running.stop(signal.SIGKILL)
    assert list(storeDir.glob("*-nixserve-build"))
    service()
    waitUntil(lambda: not list(storeDir.glob("*-nixserve-build")))

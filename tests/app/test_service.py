"""
The service as twistd and twist run it: options, first start, end.
"""

import os
import signal
import socket
import subprocess
import textwrap

import pytest
from twisted.python import usage

from nixserve.app.service import Options, ServeService, makeService
from nixserve.app.settings import CONFIG_KEYS, ServiceSettings
from tests.app.box import Relay, number, refused, string, waitUntil

RUNNERS = [("twistd", "-n", "--pidfile="), ("twist",)]


@pytest.fixture(params=RUNNERS, ids=["twistd", "twist"])
def start(request, box):
    """Runs the service with options that keep it from starting, by either runner; gives the finished process."""

    def start(*options, **kwargs):
        state = [] if "--state" in options else ["--state", box.path / "state"]
        return box.run(*request.param, "nixserve", *state, *options, **kwargs)

    return start


def test_help(box, start):
    """The help names every option and stays within the width of a terminal."""
    done = start("--help")
    assert done.returncode == 0
    for option in ("config", *CONFIG_KEYS):
        assert f"--{option}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version(start):
    """The version is ours, not only Twisted's."""
    assert start("--version").stdout.startswith("nixserve ")


def test_unknownOption(start):
    """An unknown option is named, without a screen of help around it."""
    said = refused(start("--bogus"))
    assert "option --bogus not recognized" in said
    assert len(said.strip().splitlines()) <= 4


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("store = [", "is no TOML"),
        ("colour = 'red'", "unknown key 'colour'; the keys are store, state"),
        ("store = 1", "the value of 'store' must be a string"),
        ("max-jobs = -1", "the value of 'max-jobs' is '-1'; it must be a number, 0 or more"),
        ("sandbox = 'yes'", "the value of 'sandbox' is 'yes'; it must be auto, on or off"),
        ("default-rights = 'fly'", "unknown right 'fly'; the rights are read, write, build, trust"),
        ("default-rights = 'write'", "cannot be given apart"),
        ("store = 'https://elsewhere'", "cannot open store 'https://elsewhere'"),
        ("store = 'ssh://else where'", "is no name of a host"),
    ],
)
def test_badConfig(box, start, content, complaint):
    """A mistake in the configuration file is one line that says what is wrong."""
    (box.path / "config.toml").write_text(content)
    said = refused(start("--config", box.path / "config.toml"))
    assert complaint in said
    assert len(said.strip().splitlines()) <= 4


def test_noConfig(start):
    """A configuration file that is not there is named."""
    assert "configuration file '/nonexistent': No such file or directory" in refused(start("--config", "/nonexistent"))


def test_badEndpoint(start):
    """What is no endpoint is shown, with one that is."""
    said = refused(start("--listen", "2222"))
    assert "nixserve: error: '2222' is no endpoint" in said
    assert "tcp:2222:interface=127.0.0.1" in said


def test_portInUse(start):
    """A port that somebody else has ends the process with one line."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        said = refused(start("--listen", f"tcp:{other.getsockname()[1]}:interface=127.0.0.1"))
    assert "nixserve: error: cannot listen on 'tcp:" in said
    assert "Address already in use" in said


def test_unreadableHostKey(box, start):
    """A host key that others may read, or that is none, ends the process with one line."""
    key = box.path / "key"
    key.write_text("no key")
    key.chmod(0o644)
    assert "is open to others (mode 0644)" in refused(start("--host-key", key))
    key.chmod(0o600)
    assert "is no private key" in refused(start("--host-key", key))


def test_stateInTheWay(box, start):
    """A state directory that cannot be made is named."""
    (box.path / "file").write_text("")
    said = refused(start("--state", box.path / "file" / "state"))
    assert f"nixserve: error: {box.path}/file/state: Not a directory" in said


def test_socketTooLong(box, start):
    """A path too long for a unix socket ends the process with one line."""
    assert "cannot listen on 'unix:" in refused(start("--listen", "tcp:0", "--socket", box.path / ("x" * 120)))


def test_configAndCommandLine(box, service):
    """Options stand in a file; those of the command line win."""
    config = box.path / "config.toml"
    config.write_text(
        textwrap.dedent(
            f"""
            store = "{box.path}/elsewhere"
            listen = ["tcp:1:interface=127.0.0.1"]
            """
        )
    )
    running = service("--config", config)
    assert running.port != 1
    assert (box.path / "elsewhere/nix/var/nix/db/db.sqlite").exists()
    assert not (running.state / "store").exists()


class TestRemoteStore:
    """A store behind another program."""

    def test_serves(self, box, service):
        """It is opened when a client asks for something, and what the client adds is there."""
        root = box.path / "far"
        program = box.command("nixserve-store")[0]
        running = service("--store", f"ssh://localhost?remote-program={program}&remote-store={root}")
        relay = Relay(box, running)
        assert not root.exists()
        relay.send(number(1), number(1), number(0), number(1), string(f"/nix/store/{'0' * 32}-x"))
        assert relay.process.stdout.read(8) == number(0)
        assert len(os.listdir(root / "nix/var/nix/temproots")) == 1
        assert running.stop() < 10
        assert os.listdir(root / "nix/var/nix/temproots") == []

    def test_cannotConnect(self, box, service):
        """A store that cannot be reached fails the session that asks for it, with a line that says why."""
        running = service("--store", f"ssh://localhost?remote-program={box.path}/nothing")
        relay = Relay(box, running)
        relay.send(number(1), number(0), number(0), number(0))
        relay.send(number(1), number(1), number(0), number(1), string(f"/nix/store/{'0' * 32}-x"))
        _, errors = relay.process.communicate(timeout=20)
        assert relay.process.returncode == 1
        # The program is named in the log only: where it is, is the server's business.
        assert b"error: ssh://localhost: there is no program '[a path of the server]' on this machine" in errors
        assert running.process.poll() is None


class TestFirstStart:
    """Who is let in when there is no authorized_keys yet."""

    def test_loopback(self, ssh, box, service):
        """On loopback the invoking user's own keys are let in, each with the forced command; the log says so."""
        public = box.makeKey().with_suffix(".pub").read_text().strip()
        (box.home / ".ssh" / "other.pub").write_text("certificates and the like lie there too\n")
        running = service()
        written = running.state / "authorized_keys"
        assert written.read_text() == f'command="nix-store --serve --write" {public}\n'
        assert written.stat().st_mode & 0o777 == 0o600
        assert f"made {written} from 1 public keys in ~/.ssh" in running.log

    @pytest.mark.parametrize("mode", [0o777, 0o700])
    def test_keysOfOthers(self, ssh, box, service, mode):
        """A key that somebody else could have put there is not let in, and a queue holds up nobody."""
        public = box.makeKey().with_suffix(".pub")
        os.mkfifo(box.home / ".ssh" / "queue.pub")
        if mode == 0o700:
            public.chmod(0o666)
        (box.home / ".ssh").chmod(mode)
        running = service()
        assert not (running.state / "authorized_keys").exists()
        assert "no key is taken from ~/.ssh: '" in running.log
        assert "may be written to by everybody" in running.log

    def test_loopbackWithoutKeys(self, box, service):
        """Without keys nobody is let in, and the log says what to write where."""
        running = service()
        assert not (running.state / "authorized_keys").exists()
        line = f'command="nix-store --serve --write" ssh-ed25519 AAAA... somebody to {running.state}/authorized_keys'
        assert f"nobody is let in: write lines such as {line}" in running.log

    @pytest.mark.parametrize("endpoint", ["tcp:0", "tcp:0:interface=0.0.0.0", "tcp6:0:interface=\\:\\:"])
    def test_otherAddress(self, ssh, box, service, endpoint):
        """On any other address nobody is let in, whatever keys there are."""
        box.makeKey()
        running = service(endpoint=endpoint)
        assert not (running.state / "authorized_keys").exists()
        assert "nobody is let in: write lines such as" in running.log

    def test_existingFile(self, ssh, box, service):
        """A file that is there is left alone, even if it is empty."""
        box.makeKey()
        (box.path / "state").mkdir()
        (box.path / "state/authorized_keys").write_text("")
        running = service()
        assert (running.state / "authorized_keys").read_text() == ""

    def test_defaultState(self, box):
        """Nobody but root gets a state directory outside its home."""
        settings = ServiceSettings.complete({}, {"HOME": "/home/me"})
        expected = "/var/lib/nixserve" if os.geteuid() == 0 else "/home/me/.local/state/nixserve"
        assert settings.state == expected


class TestEnd:
    """SIGTERM and SIGINT."""

    @pytest.mark.parametrize("signalNumber", [signal.SIGTERM, signal.SIGINT])
    def test_endsWithSessions(self, box, service, signalNumber):
        """With sessions running, one in the middle of adding a path, it ends soon and leaves no roots or locks."""
        running = service()
        idle, busy = Relay(box, running), Relay(box, running)
        busy.beginToAdd()
        store = running.state / "store/nix"
        assert os.listdir(store / "var/nix/temproots")
        assert any(name.endswith(".lock") for name in os.listdir(store / "store"))
        assert running.stop(signalNumber) < 5
        assert "Traceback" not in running.log
        for relay in (idle, busy):
            _, errors = relay.process.communicate(timeout=10)
            assert relay.process.returncode == 1
            assert b"error: the server is being stopped" in errors
        assert os.listdir(store / "var/nix/temproots") == []
        assert not running.socket.exists()
        # A lock file may stay behind, as after a failure of real Nix, but nobody holds it.
        for name in os.listdir(store / "store"):
            if name.endswith(".lock"):
                assert subprocess.run(["flock", "-n", store / "store" / name, "true"], timeout=10).returncode == 0

    def test_startsAgain(self, box, service):
        """After a kill that nothing can be done about, it starts again on the same state."""
        running = service()
        running.stop(signal.SIGKILL)
        running.logPath.unlink()
        assert service().port


class TestDaemon:
    """twistd in the background, as an old init script starts it."""

    def test_starts(self, box):
        """It is listening when the command returns; SIGTERM to the number in the file ends it."""
        done = box.run("twistd", "--pidfile=pid", "--logfile=log", "nixserve", "--state=state", "--listen=tcp:0")
        assert done.returncode == 0, done.stdout + done.stderr
        number = int((box.path / "pid").read_text())
        waitUntil(lambda: "serving" in (box.path / "log").read_text())
        os.kill(number, signal.SIGTERM)
        waitUntil(lambda: not (box.path / "pid").exists())

    def test_cannotStart(self, box):
        """What keeps it from starting is a status other than 0, a line on the terminal, and one in the log."""
        done = box.run(
            "twistd", "--pidfile=pid", "--logfile=log", "nixserve", "--state=state", "--listen=bogus", timeout=20
        )
        assert "An error has occurred" in refused(done)
        assert "cannot start: 'bogus' is no endpoint" in (box.path / "log").read_text()
        assert "Traceback" not in (box.path / "log").read_text()
        assert not (box.path / "pid").exists()


def test_embedding(tmp_path):
    """Making the service opens nothing and listens nowhere; options are complete values."""
    options = Options()
    options.parseOptions(["--state", str(tmp_path / "state"), "--listen", "tcp:1", "-l", "tcp:2"])
    assert options.settings.listen == ("tcp:1", "tcp:2")
    assert isinstance(makeService(options), ServeService)
    assert not (tmp_path / "state").exists()
    with pytest.raises(usage.UsageError):
        Options().parseOptions(["--default-rights", "fly"])

"""
C{nixserve-store}: on a store of its own, and as a relay.
"""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from nixserve.codec.relay import Frame, encodeFrame
from nixserve.testing import makeInfo, makeNar
from tests.app.box import HELLO, TIMEOUT, Relay, number, refused, string, waitUntil


class TestUsage:
    """Mistakes on the command line."""

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ([], "'--serve' is missing; usage: nixserve-store --serve"),
            (["--write"], "'--serve' is missing"),
            (["--serve", "--wirte"], "unknown argument '--wirte'; usage:"),
            (["--serve", "now"], "unknown argument 'now'"),
            (["--serve", "--store"], "'--store' needs 1 more"),
            (["--serve", "--connect"], "'--connect' needs 1 more"),
            (["--serve", "--write", "--rights", "read"], "exclude each other"),
            (["--serve", "--rights", "read", "--rights", "read,write,build,trust"], "'--rights' is given twice"),
            (["--serve", "--connect", "/a", "--connect", "/b"], "'--connect' is given twice"),
            (["--serve", "--option", "restrict-eval", "true"], "'--option' is not obeyed here"),
            (["--serve", "--builders", "ssh://elsewhere"], "'--builders' is not obeyed here"),
            (["--serve", "--rights", "fly"], "unknown right 'fly'"),
            (["--serve", "--store", "ssh-ng://elsewhere"], "'ssh-ng://elsewhere' is for the protocol of the"),
        ],
    )
    def test_mistake(self, box, arguments, complaint):
        """Each is one line on standard error, with what is right, and status 2."""
        done = box.run("nixserve-store", *arguments)
        assert complaint in refused(done)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1

    def test_help(self, box):
        """Help and version need no C{--serve}."""
        assert "--connect SOCKET" in box.run("nixserve-store", "--help").stdout
        assert box.run("nixserve-store", "--version").stdout.startswith("nixserve-store (nixserve) ")

    def test_terminal(self, box):
        """Somebody who types it into a terminal is told what it is for."""
        controller, terminal = pty.openpty()
        try:
            done = box.run("nixserve-store", "--serve", stdin=terminal)
        finally:
            os.close(controller)
            os.close(terminal)
        assert done.returncode == 2
        assert "a protocol to a program, not to a person; usage:" in done.stderr


class TestOwnStore:
    """Without C{--connect}."""

    def test_serves(self, box):
        """It greets, answers, and ends with status 0 at the end of input; the store is made on the way."""
        request = HELLO + number(1) + number(0) + number(0) + number(0)
        done = box.run("nixserve-store", "--serve", "--store", box.path / "new", input=request, text=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == number(0x5452EECB) + number(0x208) + number(0)
        assert (box.path / "new/nix/var/nix/db/db.sqlite").exists()

    def test_readsWithoutRightToWrite(self, box):
        """A session that may only read needs no right to write the store."""
        root, store = box.store()
        store.close()
        for directory, _, _ in os.walk(root):
            os.chmod(directory, 0o555)
        request = HELLO + number(1) + number(0) + number(0) + number(0)
        options = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        # The other user may not be able to get at the tests' Python: it is loaded before.
        code = "import sys; from nixserve.app.storecommand import main; import nixserve.app.stdiosession\n"
        if options:
            os.chmod(box.path, 0o755)
            code += "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        code += "sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, "--serve", "--store", str(root)],
            input=request,
            capture_output=True,
            timeout=TIMEOUT,
            env=box.environ,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.endswith(number(0))

    def test_signal(self, box):
        """SIGTERM ends it and frees its temporary roots."""
        process = box.spawn(
            "nixserve-store", "--serve", "--write", "--store", box.path / "store",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        path = string("/nix/store/00000000000000000000000000000000-x")
        process.stdin.write(HELLO + number(1) + number(1) + number(0) + number(1) + path)
        process.stdin.flush()
        assert len(process.stdout.read(24)) == 24
        roots = box.path / "store/nix/var/nix/temproots"
        assert len(os.listdir(roots)) == 1
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        assert os.listdir(roots) == []

    def test_log(self, box):
        """Standard error is the client's; events go to the file that NIXSERVE_LOG names."""
        log = box.path / "log"
        done = box.run(
            "nixserve-store",
            "--serve",
            "--store",
            box.path / "s",
            input=HELLO,
            env={"NIXSERVE_LOG": str(log)},
            text=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert "session" in log.read_text()
        done = box.run("nixserve-store", "--serve", "--store", box.path / "s", env={"NIXSERVE_LOG": "/nonexistent/log"})
        said = refused(done)
        assert "NIXSERVE_LOG: cannot write '[a path of the server]'" in said and "/nonexistent" not in said

    def test_cannotOpen(self, box):
        """Why a store cannot be opened is told without its place, which the log has."""
        (box.path / "secret").write_text("")
        options = ("--serve", "--store", box.path / "secret/root")
        done = box.run("nixserve-store", *options, env={"NIXSERVE_LOG": str(box.path / "log")})
        said = refused(done)
        assert "Not a directory" in said and "secret" not in said
        assert f"{box.path}/secret/root" in (box.path / "log").read_text()


class TestRelay:
    """With C{--connect}."""

    def test_startsWithoutTwisted(self, box):
        """A relay imports no Twisted, which would cost more than all the rest of its start."""
        code = (
            "import sys; from nixserve.app import storecommand\n"
            "status = storecommand.main(['--serve', '--connect', '/nonexistent'])\n"
            "assert status == 1, status\n"
            "assert 'twisted' not in sys.modules and 'zope' not in sys.modules, sorted(sys.modules)"
        )
        done = box.run(sys.executable, "-c", code)
        assert done.returncode == 0, done.stderr

    def test_startsFast(self, box):
        """It starts in less time than importing Twisted alone takes; the best of some, for other work goes on."""
        begun, times = time.monotonic(), []
        for _ in range(5):
            box.run("nixserve-store", "--serve", "--connect", "/nonexistent")
            times.append(time.monotonic() - begun)
            begun = time.monotonic()
        assert min(times) < 0.5

    @pytest.mark.parametrize("path", ["/nonexistent/serve.sock", "/" + "x" * 200])
    def test_noService(self, box, path):
        """Without a service it says so, and what to look at; to the client, so not where the service would be."""
        done = box.run("nixserve-store", "--serve", "--connect", path)
        assert done.returncode == 1
        said = refused(done)
        assert "cannot connect to '[a path of the server]'" in said and path not in said
        assert "is 'twistd nixserve' running" in done.stderr

    def test_endOfInput(self, box, service):
        """The end of its input between requests ends it with status 0."""
        relay = Relay(box, service())
        output, errors = relay.process.communicate(timeout=TIMEOUT)
        assert (relay.process.returncode, output, errors) == (0, b"", b"")

    def test_status(self, box, service):
        """A session that fails passes on its line and its status."""
        relay = Relay(box, service(), "--rights", "read")
        relay.send(number(4))
        _, errors = relay.process.communicate(timeout=TIMEOUT)
        assert (relay.process.returncode, errors) == (1, b"error: importing paths is not allowed\n")

    def test_otherStore(self, box, service):
        """A store other than the one served is refused; the one served may be named."""
        running = service()
        done = box.run("nixserve-store", "--serve", "--store", "/elsewhere", "--connect", running.socket)
        assert "the store '/elsewhere' is not served here" in refused(done)
        done = box.run(
            "nixserve-store", "--serve", "--store", running.state / "store", "--connect", running.socket,
            input=HELLO, text=False,
        )  # fmt: skip
        assert (done.returncode, len(done.stdout)) == (0, 16)

    def test_serviceDies(self, box, service):
        """A service that is gone in the middle is said to be, with status 1."""
        running = service()
        relay = Relay(box, running)
        running.stop(signal.SIGKILL)
        _, errors = relay.process.communicate(timeout=TIMEOUT)
        assert relay.process.returncode == 1
        assert b"error: the service went away" in errors or b"error: the connection to the service broke" in errors

    def test_outputGone(self, box, service):
        """A relay whose output nobody reads any more ends, and with it its session."""
        running = service()
        relay = Relay(box, running)
        relay.process.stdout.close()
        relay.send(number(1), number(0), number(0), number(0))
        relay.process.wait(TIMEOUT)
        assert relay.process.returncode == 1
        waitUntil(lambda: "ends" in running.log)

    def test_bigTransfers(self, box, service):
        """Tens of megabytes go through it in both directions, unchanged."""
        running = service()
        nar = makeNar(os.urandom(1 << 20) * 24)
        info = makeInfo("big", nar)
        relay = Relay(box, running)
        threading.Thread(target=relay.send, args=(addToStoreNar(info), nar, number(3), string(info.path))).start()
        assert relay.process.stdout.read(8) == number(1)
        assert relay.process.stdout.read(len(nar)) == nar
        relay.process.communicate(timeout=TIMEOUT)
        assert relay.process.returncode == 0

    def test_slowErrorReader(self, box):
        """Megabytes of standard error that nobody reads hold up neither the output nor the end."""
        listener = fakeService(box.path / "sock")
        process = box.spawn(
            "nixserve-store", "--serve", "--connect", box.path / "sock",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        connection, _ = listener.accept()
        with connection:
            for _ in range(200):
                connection.sendall(encodeFrame(Frame.ERROR, b"x" * 65536) + encodeFrame(Frame.OUTPUT, b"y" * 100))
            connection.sendall(encodeFrame(Frame.EXIT, b"\x03"))
            assert process.stdout.read(20000) == b"y" * 20000
            process.wait(TIMEOUT)
        assert process.returncode == 3
        listener.close()

    def test_noService_butSomethingElse(self, box):
        """What is no nixserve at the other end is called that."""
        listener = fakeService(box.path / "sock")
        process = box.spawn(
            "nixserve-store",
            "--serve",
            "--connect",
            box.path / "sock",
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            _, errors = process.communicate(timeout=TIMEOUT)
        assert b"the service sent something else than frames" in errors
        assert process.returncode == 1
        listener.close()


def fakeService(path):
    """A socket that a relay takes for a service."""
    import socket

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.settimeout(TIMEOUT)
    return listener


def addToStoreNar(info):
    """The request, without the NAR."""
    head = number(9) + string(info.path) + string("") + string(info.narHash.hex) + number(0) + number(0)
    return head + number(info.narSize) + number(0) + number(0) + string("")


def test_openedByService(box, service):
    """What was added through a relay is in the store that the service serves, for everybody."""
    running = service()
    nar = makeNar(b"contents")
    info = makeInfo("file", nar)
    relay = Relay(box, running)
    relay.send(addToStoreNar(info), nar)
    assert relay.process.stdout.read(8) == number(1)
    relay.process.communicate(timeout=TIMEOUT)
    done = box.run("nixserve", "path-info", "--store", running.state / "store", info.path)
    assert done.stdout == f"{info.path}\n"

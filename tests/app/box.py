"""
A place for each test of the commands to run in, the service as a child process, a relay's session.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from nixserve.store.files import deletePath
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore

BIN = Path(sys.executable).parent

TIMEOUT = 60
"""Seconds for anything that a test starts, on a busy machine."""


class Box:
    """
    A directory with a home in it, and what runs there.

    @ivar path: of the directory; short, since sockets lie below it.
    @ivar environ: all that a command sees.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.home = self.path / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        (self.path / "tmp").mkdir()
        self.environ = {
            "HOME": str(self.home),
            "PATH": f"{BIN}:{os.environ.get('PATH', '/usr/bin:/bin')}",
            "TMPDIR": str(self.path / "tmp"),
            "LANG": "C.UTF-8",
            # The tests must not find another Nix store, nor be told of one.
            "NIX_REMOTE": "",
        }
        self._children = []

    def command(self, name, *arguments):
        """The words that run a command of this installation, or one of the system."""
        ours = BIN / name
        return [str(ours) if ours.exists() else name, *map(str, arguments)]

    def run(self, name, *arguments, env=None, **kwargs):
        """Run a command to its end, in the box."""
        options = {"capture_output": True, "text": True, "timeout": TIMEOUT, "stdin": subprocess.DEVNULL, **kwargs}
        if "input" in options:
            del options["stdin"]
        return subprocess.run(
            self.command(name, *arguments), env={**self.environ, **(env or {})}, cwd=self.path, check=False, **options
        )

    def spawn(self, name, *arguments, env=None, **kwargs):
        """Start a command, in the box; it is killed with the box."""
        child = subprocess.Popen(
            self.command(name, *arguments), env={**self.environ, **(env or {})}, cwd=self.path, **kwargs
        )
        self._children.append(child)
        return child

    def store(self, name="store"):
        """The path of a chroot store in the box, and the store, open."""
        root = self.path / name
        return root, LocalStore(StoreLayout.underRoot(str(root)), reservedSize=0)

    def makeKey(self, name="id_ed25519"):
        """A user's key pair in the home of the box; gives the path of the private one."""
        path = self.home / ".ssh" / name
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tester", "-f", str(path)],
            check=True,
            timeout=TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
        return path

    def close(self):
        """End everything that runs."""
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait(TIMEOUT)
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream is not None:
                    stream.close()


@contextmanager
def temporaryBox():
    """A L{Box}, removed afterwards with everything that runs in it."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = os.path.realpath(tempfile.mkdtemp(prefix="nsa-", dir=base))
    box = Box(path)
    try:
        yield box
    finally:
        box.close()
        deletePath(path)


class Service:
    """
    C{twistd -n nixserve}, listening.

    @ivar port: of its SSH endpoint.
    """

    def __init__(self, box, *options, endpoint="tcp:0:interface=127.0.0.1", **kwargs):
        """
        @param kwargs: for its process.
        """
        self.box = box
        self.state = box.path / "state"
        self.socket = self.state / "serve.sock"
        self.logPath = box.path / "log"
        with open(self.logPath, "ab") as log:
            self.process = box.spawn(
                "twistd", "-n", "--pidfile=", "nixserve", "--state", self.state, "--listen", endpoint, *options,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, **kwargs,
            )  # fmt: skip
        waitUntil(lambda: "serving " in self.log or self.process.poll() is not None)
        assert self.process.poll() is None, self.log
        found = re.search(r"listening on tcp6?:.*port=(\d+)", self.log)
        assert found, self.log
        self.port = int(found[1])

    @property
    def log(self):
        """Everything that it has logged."""
        return self.logPath.read_text(errors="replace")

    def stop(self, signalNumber=signal.SIGTERM):
        """
        End it.

        @return: how many seconds that took.
        """
        begun = time.monotonic()
        self.process.send_signal(signalNumber)
        self.process.wait(TIMEOUT)
        return time.monotonic() - begun


def waitUntil(condition, seconds=TIMEOUT):
    """Poll until C{condition} is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return value


class Relay:
    """A session through C{nixserve-store --connect}, past the greeting."""

    def __init__(self, box, service, *options):
        self.service = service
        self.process = box.spawn(
            "nixserve-store", "--serve", *(options or ["--write"]), "--connect", service.socket,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.send(HELLO)
        assert len(self.process.stdout.read(16)) == 16

    def send(self, *pieces):
        """Bytes to its standard input."""
        self.process.stdin.write(b"".join(pieces))
        self.process.stdin.flush()

    def beginToAdd(self, name="half"):
        """The head of AddToStoreNar and a part of its NAR; returns when the server has begun to write it."""
        baseName = f"00000000000000000000000000000000-{name}"
        store = self.service.state / "store/nix/store"
        before = set(store.glob("*-nixserve-import-*.lock"))
        self.send(
            *(number(9), string(f"/nix/store/{baseName}"), string(""), string("0" * 64), number(0), number(0)),
            *(number(1 << 20), number(0), number(0), string("")),
            *map(string, ("nix-archive-1", "(", "type", "regular", "contents")),
            *(number(1 << 19), b"x" * 1000),
        )
        waitUntil(lambda: set(store.glob("*-nixserve-import-*.lock")) - before)


def number(value):
    """Eight bytes of the protocol."""
    return value.to_bytes(8, "little")


def string(text):
    """A padded string of the protocol."""
    data = text.encode()
    return number(len(data)) + data + bytes(-len(data) % 8)


HELLO = number(0x390C9DEB) + number(0x208)
"""What a client begins with."""


def refused(done):
    """A run was refused for good reason: not 0, no traceback. Gives what it said."""
    said = done.stdout + done.stderr
    assert done.returncode not in (0, None), said
    assert "Traceback" not in said
    return said

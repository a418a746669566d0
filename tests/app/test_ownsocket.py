"""One service for one socket, whatever is left of those before it."""

import os
import signal
import socket
import subprocess

import pytest
from twisted.scripts._twistd_unix import ServerOptions

from nixserve.app.ownsocket import OwnSocket
from nixserve.errors import UsageError
from nixserve.store.ownpaths import UnsafePath
from tests.app.box import Relay, refused


@pytest.fixture
def path(tmp_path):
    return f"{tmp_path}/serve.sock"


def bind(path):
    """A listening socket."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    return listening


def test_onlyOne(path):
    """The second is refused in a line that says who is there; when the first lets go it may come."""
    first = OwnSocket(path)
    with pytest.raises(UsageError, match=f"another nixserve, process {os.getpid()}, listens on '{path}': stop it"):
        OwnSocket(path)
    first.release()
    first.release()
    OwnSocket(path).release()


@pytest.mark.parametrize("number", [1, os.getpid()])
def test_whatIsLeft(path, number):
    """A dead socket and the link of an older version go, though a process of that number lives."""
    bind(path).close()
    os.symlink(str(number), f"{path}.lock")
    own = OwnSocket(path)
    assert os.listdir(os.path.dirname(path)) == ["serve.sock.flock"]
    own.release()


def test_someoneElse(path):
    """A socket that somebody listens on without that lock is not taken away."""
    listening = bind(path)
    with pytest.raises(UsageError, match="another program listens on"):
        OwnSocket(path)
    assert os.path.exists(path)
    listening.close()
    OwnSocket(path).release()


def test_noSocket(path):
    """Nor is anything that is none."""
    with open(path, "w") as stream:
        stream.write("precious")
    with pytest.raises(UsageError, match="is no socket: remove it"):
        OwnSocket(path)
    with open(path) as stream:
        assert stream.read() == "precious"


def test_linkedLock(path, tmp_path):
    """The lock is no link to another file."""
    (tmp_path / "precious").write_text("precious")
    os.symlink("precious", f"{path}.flock")
    with pytest.raises(OSError, match="symbolic"):
        OwnSocket(path)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("kind", ["hard link", "writable", "queue"])
def test_foreignLock(path, tmp_path, kind):
    """What others may have put in the place of the lock is neither emptied, nor waited for, nor repeated from."""
    if kind == "queue":
        os.mkfifo(f"{path}.flock", 0o600)
    else:
        (tmp_path / "file").write_text("precious\x1b[31m")
        (tmp_path / "file").chmod(0o666 if kind == "writable" else 0o600)
        os.link(tmp_path / "file", f"{path}.flock")
        if kind == "writable":
            os.unlink(tmp_path / "file")
    with pytest.raises(UsageError, match=f"'{path}.flock' may be somebody else's: remove it"):
        OwnSocket(path)
    if kind != "queue":
        with open(f"{path}.flock") as stream:
            assert stream.read() == "precious\x1b[31m"


def test_openToOthers(tmp_path):
    """Where others could replace the socket there is none."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafePath, match="may be written to by everybody"):
        OwnSocket(f"{tmp_path}/open/serve.sock")


def test_afterKill(box, service):
    """After kill -9 the service starts again and serves, also if its number was given to somebody else."""
    first = service()
    first.stop(signal.SIGKILL)
    assert first.socket.exists()
    # As if the old version's link named a process that lives.
    os.symlink(str(os.getpid()), f"{first.socket}.lock")
    # The next one's begins anew.
    os.unlink(first.logPath)
    Relay(box, service())


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["-n"], ""), (["-n", "--pidfile=mine"], "mine"), ([], "twistd.pid"), (["-n", "--pidfile="], "")],
)
def test_pidFile(tmp_path, words, expected):
    """
    In the foreground there is no file of twistd's that names a process number, unless it was asked for: in a container
    that number is the next one's too, and twistd would not start.
    """
    options = ServerOptions()
    options.parseOptions([*words, "nixserve", "--state", str(tmp_path)])
    assert os.path.basename(options["pidfile"]) == expected


def test_secondService(box, service):
    """A second service on the same state directory ends with one line, and the first serves on."""
    first = service()
    options = ("--state", first.state, "--listen", "tcp:0:interface=127.0.0.1")
    said = refused(box.run("twistd", "-n", "--pidfile=", "nixserve", *options))
    assert f"another nixserve, process {first.process.pid}, listens on '{first.socket}': stop it, or give" in said
    Relay(box, first)


def test_afterTheEnd(service):
    """Nothing is left that a second one would stumble over."""
    first = service()
    first.stop()
    assert not first.socket.exists()
    assert subprocess.run(["flock", "-n", f"{first.socket}.flock", "true"], timeout=10).returncode == 0

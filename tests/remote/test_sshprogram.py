"""The arguments of the system's ssh, and what a program in its place is started with."""

import json
import os
import sys
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor

from nixserve.errors import UsageError
from nixserve.remote.address import RemoteAddress
from nixserve.remote.connecting import connect
from nixserve.remote.failures import CannotConnect
from nixserve.remote.master import SSHMaster
from nixserve.remote.openssh import sshArguments, sshEnvironment
from tests.remote.hostkeys import KEY, encoded

ALWAYS = ["-x", "-a", "-T", "-oControlMaster=no", "-oClearAllForwardings=yes", "-oRemoteCommand=none"]
ALONE = ["-oServerAliveInterval=15", "-S", "none", "--"]


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        ("ssh://host", {}, [*ALWAYS, *ALONE, "host"]),
        ("ssh://me@host", {}, [*ALWAYS, *ALONE, "me@host"]),
        ("ssh://me@host:2222", {}, [*ALWAYS, "-p", "2222", *ALONE, "me@host"]),
        ("ssh://me@[::1]:22", {}, [*ALWAYS, "-p", "22", *ALONE, "me@::1"]),
        ("ssh://host?ssh-key=/k", {}, [*ALWAYS, "-i", "/k", *ALONE, "host"]),
        ("ssh://host?compress=true", {}, [*ALWAYS, "-C", *ALONE, "host"]),
        (
            "ssh://host",
            {"NIX_SSHOPTS": "-o 'ProxyCommand=nc %h 22'  -v"},
            [*ALWAYS, "-o", "ProxyCommand=nc %h 22", "-v", *ALONE, "host"],
        ),
        (
            # What the URL says stands before NIX_SSHOPTS, the control path behind it: see the module.
            "ssh://host:7?ssh-key=/k&compress=1",
            {"NIX_SSHOPTS": "-p 8 -S /theirs"},
            [*ALWAYS, "-p", "7", "-i", "/k", "-C", "-p", "8", "-S", "/theirs", *ALONE, "host"],
        ),
    ],
)
def test_arguments(url, environ, expected):
    """Each part of the URL in its place."""
    address = RemoteAddress.parse(url)
    assert sshArguments(address, environ) == ["ssh", *expected]
    assert sshArguments(address, environ, command="a command") == ["ssh", *expected, "a command"]


def test_hostKey():
    """The file with the host key is the only one that counts, and comes before all that might say otherwise."""
    words = sshArguments(
        RemoteAddress.parse("ssh://host"), {"NIX_SSHOPTS": "-oStrictHostKeyChecking=no"}, knownHosts="/tmp/a 100%/k"
    )
    assert words[7:12] == [
        '-oUserKnownHostsFile="/tmp/a 100%%/k"',
        "-oGlobalKnownHostsFile=/dev/null",
        "-oStrictHostKeyChecking=yes",
        "-oUpdateHostKeys=no",
        "-oStrictHostKeyChecking=no",
    ]


def test_unreadableOptions():
    """Options that no shell could split."""
    with pytest.raises(UsageError, match="NIX_SSHOPTS: cannot read '-o \"x': no closing quotation"):
        sshArguments(RemoteAddress.parse("ssh://host"), {"NIX_SSHOPTS": '-o "x'})


def test_environment():
    """That of the user, but for the shell."""
    assert sshEnvironment({"SHELL": "/bin/fish", "A": "b"}) == {"SHELL": "/bin/sh", "A": "b"}


FAKE = """#!{python} -S
import json, os, sys
known = [word for word in sys.argv if word.startswith("-oUserKnownHostsFile")]
lines = [open(word.partition("=")[2].strip('"')).read() for word in known]
with open({record!r}, "a") as stream:
    json.dump({{"argv": sys.argv[1:], "shell": os.environ.get("SHELL"), "known": lines}}, stream)
    stream.write("\\n")
if "check" in sys.argv: sys.exit({check})
if "-f" in sys.argv: sys.exit(0)
os.write(1, bytes.fromhex("cbee525400000000 0702000000000000"))
while os.read(0, 65536): pass
"""


class FakeSSH:
    """
    A program in place of ssh, which keeps its arguments and answers like a server.

    @ivar environ: in which it is found.
    """

    def __init__(self, directory, check=255):
        self.record = directory / "record"
        program = directory / "bin/ssh"
        program.parent.mkdir()
        program.write_text(FAKE.format(python=sys.executable, record=str(self.record), check=check))
        program.chmod(0o755)
        self.temporary = directory / "t"
        self.temporary.mkdir()
        self.environ = {"PATH": f"{program.parent}:{os.defpath}", "SHELL": "/x", "TMPDIR": str(self.temporary)}

    def calls(self):
        """What it was started with, each time."""
        return [json.loads(line) for line in self.record.read_text().splitlines()]


@pytest_twisted.ensureDeferred
async def test_session(tmp_path):
    """One session is one ssh; a host key comes in a file that is gone when the session is there."""
    fake = FakeSSH(tmp_path)
    url = f"ssh://me@host:7?base64-ssh-public-host-key={encoded(KEY)}&remote-store=/a%20b"
    async with await connect(reactor, url, environ=fake.environ) as client:
        assert client.version == 0x207 and client.name == "ssh://me@host:7"
        assert list(fake.temporary.iterdir()) == []
    (call,) = fake.calls()
    assert call["argv"][-2:] == ["me@host", "nix-store --serve --write --store '/a b'"]
    assert (call["shell"], call["known"]) == ("/bin/sh", [f"* {KEY}\n"])


@pytest_twisted.ensureDeferred
async def test_master(tmp_path):
    """A master is asked for before each session, and started if there is none; sessions use its socket."""
    fake = FakeSSH(tmp_path)
    address = RemoteAddress.parse(f"ssh://host?base64-ssh-public-host-key={encoded(KEY)}")
    async with SSHMaster(reactor, address, fake.environ, persistSeconds=7) as master:
        async with await connect(reactor, address, environ=fake.environ, master=master):
            pass
        Path(master.controlPath).touch()
    check, start, session, stop = [call["argv"] for call in fake.calls()]
    control = ["-S", master.controlPath, "--", "host"]
    assert check[:2] == ["-O", "check"] and check[-4:] == control
    assert start[:4] == ["-f", "-N", "-oControlMaster=yes", "-oControlPersist=7"] and start[-4:] == control
    assert session[-5:] == [*control, "nix-store --serve --write"]
    assert stop[:2] == ["-O", "exit"] and stop[-4:] == control
    assert all(call["known"] == [f"* {KEY}\n"] for call in fake.calls())
    assert list(fake.temporary.iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_masterThatRuns(tmp_path):
    """One that answers is not started again."""
    fake = FakeSSH(tmp_path, check=0)
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path / "d"))
    await master.start()
    assert await master.check()
    assert [call["argv"][:2] for call in fake.calls()] == [["-O", "check"]] * 2


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ssh://host", "ssh://host?remote-store=/x&max-connections=3", True),
        ("ssh://host", "ssh://me@host", False),
        ("ssh://host", "ssh://host:22", False),
        ("ssh://host", "ssh://host?ssh-key=/k", False),
        ("ssh://host", "ssh://host?compress=true", False),
    ],
)
def test_controlPath(one, other, same):
    """What makes no difference to the connection shares it; nothing else does."""
    paths = [SSHMaster(reactor, RemoteAddress.parse(url), {}, "/d").controlPath for url in (one, other)]
    assert (paths[0] == paths[1]) is same
    more = SSHMaster(reactor, RemoteAddress.parse(one), {"NIX_SSHOPTS": "-4"}, "/d")
    assert more.controlPath not in paths


def test_longDirectory():
    """A socket's path is short: a long TMPDIR is passed over, a given directory refused."""
    address = RemoteAddress.parse("ssh://host")
    assert SSHMaster(reactor, address, {"TMPDIR": "/" + "t" * 60}).controlPath.startswith("/tmp/nixserve-")
    assert SSHMaster(reactor, address, {"TMPDIR": "/short"}).controlPath.startswith("/short/nixserve-")
    with pytest.raises(UsageError, match="is too long for a socket of ssh"):
        SSHMaster(reactor, address, {}, "/" + "d" * 80)


@pytest_twisted.ensureDeferred
async def test_openDirectory(tmp_path):
    """Others must not reach the socket."""
    fake = FakeSSH(tmp_path)
    tmp_path.chmod(0o755)
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path))
    with pytest.raises(CannotConnect, match="is open to others; chmod 700 it"):
        await master.start()

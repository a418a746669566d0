"""The arguments of the system's ssh, and what a program in its place is started with."""

import fcntl
import json
import os
import sys
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor

from nixserve.errors import UsageError
from nixserve.remote import master as masterModule
from nixserve.remote.address import RemoteAddress
from nixserve.remote.connecting import connect
from nixserve.remote.failures import CannotConnect
from nixserve.remote.localfiles import PrivateFile
from nixserve.remote.master import SSHMaster
from nixserve.remote.openssh import sshArguments, sshEnvironment
from tests.remote.hostkeys import KEY, encoded
from tests.ssh.loopback import sleep, within

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
    socket = os.path.exists(sys.argv[sys.argv.index("-S") + 1])
    json.dump({{"argv": sys.argv[1:], "shell": os.environ.get("SHELL"), "known": lines, "socket": socket}}, stream)
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
    # So it never sleeps for long over the end of a session; and it waits as long for the network as others do.
    assert start[4:6] == ["-oServerAliveInterval=5", "-oServerAliveCountMax=9"]
    assert session[-5:] == [*control, "nix-store --serve --write"]
    assert stop[:2] == ["-O", "exit"] and stop[-4:] == control
    assert all(call["known"] == [f"* {KEY}\n"] for call in fake.calls())
    assert list(fake.temporary.iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_longBanners(tmp_path, monkeypatch):
    """Of what a host has ssh say while nobody is logged in, the end is kept."""
    fake, kept = FakeSSH(tmp_path), []
    program = tmp_path / "bin/ssh"
    banners = """sys.stderr.write("x" * 1_000_000 + " Permission denied"); sys.exit(255)"""
    program.write_text(
        program.read_text().replace('if "-f" in sys.argv: sys.exit(0)', f'if "-f" in sys.argv: {banners}')
    )
    received = masterModule._Run.errorReceived

    def errorReceived(run, data):
        received(run, data)
        kept.append(len(run.errors))

    monkeypatch.setattr(masterModule._Run, "errorReceived", errorReceived)
    with pytest.raises(CannotConnect, match="refused all keys"):
        await SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path / "d")).start()
    assert 0 < max(kept) <= masterModule.MAX_SAID


@pytest_twisted.ensureDeferred
async def test_masterThatRuns(tmp_path):
    """One that answers is not started again."""
    fake = FakeSSH(tmp_path, check=0)
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path / "d"))
    await master.start()
    assert await master.check()
    assert [call["argv"][:2] for call in fake.calls()] == [["-O", "check"]] * 2


@pytest_twisted.ensureDeferred
async def test_deadMaster(tmp_path):
    """The socket of one that was killed is out of the way before another is started."""
    fake = FakeSSH(tmp_path)
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path / "d"))
    (tmp_path / "d").mkdir(0o700)
    Path(master.controlPath).touch()
    await master.start()
    assert [(call["argv"][0], call["socket"]) for call in fake.calls()] == [("-O", True), ("-f", False)]


@pytest_twisted.ensureDeferred
async def test_hangingMaster(tmp_path, monkeypatch):
    """One that does not answer is as good as dead."""
    monkeypatch.setattr(masterModule, "ANSWER_SECONDS", 0.3)
    fake = FakeSSH(tmp_path, check="__import__('time').sleep(60)")
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path / "d"))
    await within(reactor, 10, master.start())
    assert [call["argv"][0] for call in fake.calls()] == ["-O", "-f"]


@pytest_twisted.ensureDeferred
async def test_oneStarts(tmp_path):
    """
    Of processes that share a directory one starts a master at a time; the directory stays when one of them stops it.
    """
    fake = FakeSSH(tmp_path)
    directory = tmp_path / "d"
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(directory))
    directory.mkdir(0o700)
    with open(f"{master.controlPath}.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        starting = master.start()
        await sleep(reactor, 0.3)
        assert not fake.record.exists()
    await within(reactor, 10, starting)
    assert [call["argv"][0] for call in fake.calls()] == ["-O", "-f"]
    with open(f"{master.controlPath}.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    await master.stop()
    assert directory.exists()


@pytest_twisted.ensureDeferred
async def test_modes(tmp_path):
    """What a master needs is made for this user alone."""
    fake = FakeSSH(tmp_path)
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path / "d"))
    before = os.umask(0)
    try:
        await master.start()
    finally:
        os.umask(before)
    (lock,) = (tmp_path / "d").iterdir()
    assert [path.stat().st_mode & 0o777 for path in (lock, lock.parent)] == [0o600, 0o700]


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


@pytest_twisted.ensureDeferred
async def test_linkedDirectory(tmp_path):
    """A link may lead anywhere tomorrow."""
    fake = FakeSSH(tmp_path)
    (tmp_path / "d").mkdir(0o700)
    (tmp_path / "link").symlink_to("d")
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path / "link"))
    with pytest.raises(CannotConnect, match="is open to others"):
        await master.start()
    assert list((tmp_path / "d").iterdir()) == []


@pytest_twisted.ensureDeferred
async def test_noDirectory(tmp_path):
    """One that cannot be made is named."""
    (tmp_path / "file").touch()
    fake = FakeSSH(tmp_path)
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path / "file" / "d"))
    with pytest.raises(CannotConnect, match=f"a shared connection needs '{tmp_path}/file/d': Not a directory; choose"):
        await master.start()


@pytest_twisted.ensureDeferred
async def test_directoryOfOthers(tmp_path, monkeypatch):
    """Nor may they own the directory that it lies in."""
    fake = FakeSSH(tmp_path)
    (tmp_path / "d").mkdir(0o700)
    master = SSHMaster(reactor, RemoteAddress.parse("ssh://host"), fake.environ, str(tmp_path / "d"))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(CannotConnect, match="is open to others"):
        await master.start()
    assert list((tmp_path / "d").iterdir()) == []


def test_privateFile(tmp_path):
    """Others cannot get at it, whatever the umask, and nothing is left of it."""
    file = PrivateFile({"TMPDIR": str(tmp_path)}, "x")
    before = os.umask(0)
    try:
        file.write("secret")
    finally:
        os.umask(before)
    assert Path(file.path).read_text() == "secret" and Path(file.path).parent.stat().st_mode & 0o777 == 0o700
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []

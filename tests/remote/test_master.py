"""
The master connection that sessions share: started once, found again, and in nobody else's directory.
"""

import fcntl
import os
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor

from nixserve.errors import UsageError
from nixserve.remote import master as masterModule
from nixserve.remote.address import RemoteAddress
from nixserve.remote.connecting import connect
from nixserve.remote.failures import CannotConnect
from nixserve.remote.master import SSHMaster
from tests.remote.hostkeys import KEY, encoded
from tests.remote.standin import FakeSSH
from tests.waiting import sleep, within


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
    await master.start()
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

"""The arguments of the system's ssh, and what a program in its place is started with."""

import pytest
import pytest_twisted
from twisted.internet import reactor

from nixserve.errors import UsageError
from nixserve.remote.address import RemoteAddress
from nixserve.remote.connecting import connect
from nixserve.remote.openssh import sshArguments, sshEnvironment
from tests.remote.hostkeys import KEY, encoded
from tests.remote.standin import FakeSSH

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

"""
Lines of C{authorized_keys}.
"""

import time
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from hypothesis import given
from hypothesis import strategies as st
from twisted.conch.ssh.keys import Key

from nixserve.errors import FormatError
from nixserve.protocol.policy import EVERYTHING, READ_ONLY
from nixserve.ssh.authorizedkeys import fingerprint, parseAuthorizedKey
from nixserve.ssh.command import ServeCommand
from tests.ssh.userkeys import BLOB, LINE

# A key and what ssh-keygen -l prints for it.
FIXED = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsABgH5C9okWi0dh2l9GKJl"


FIXED_FINGERPRINT = "SHA256:vquJBo6EvVfnHbyPmuwuOg4XGi4Cmti6ZX2fnFN0Ti0"


def entry(options="", key=LINE, comment=""):
    return parseAuthorizedKey(f"{options} {key} {comment}".strip(), 7)


def test_fingerprint():
    """Fingerprints are those of ssh-keygen -l."""
    assert fingerprint(Key.fromString(FIXED)) == FIXED_FINGERPRINT


@pytest.mark.parametrize("line", ["", "   ", "# comment", "  # ssh-ed25519 AAAA", "\t\r\n"])
def test_emptyLines(line):
    """Blank lines and comments say nothing."""
    assert parseAuthorizedKey(line) is None


def test_plainLine():
    """A key without options lets in from everywhere, forever, with the client's command."""
    key = entry(comment="me on my laptop")
    assert (key.blob, key.comment, key.lineNumber, key.forced) == (BLOB, "me on my laptop", 7, None)
    assert key.refusal("192.0.2.1", time.time()) == key.refusal("", time.time()) == ""
    assert str(key) == f"{fingerprint(BLOB)} me on my laptop"


@pytest.mark.parametrize(
    ("options", "forced"),
    [
        ('command="nix-store --serve"', ServeCommand(READ_ONLY)),
        ('command="nix-store --serve --write",restrict', ServeCommand(EVERYTHING)),
        ('restrict,COMMAND="/bin/nix-store --serve"', ServeCommand(READ_ONLY)),
        ('command="nix-store --serve --store \\"a b\\"",no-pty', ServeCommand(READ_ONLY, "a b")),
        ("no-port-forwarding,no-X11-forwarding,no-agent-forwarding,no-pty,no-user-rc", None),
    ],
)
def test_options(options, forced):
    """Options are read with their quotes, names in any case."""
    assert entry(options).forced == forced


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("pty", "'pty'"),
        ('environment="A=b"', "'environment'"),
        ("cert-authority", "'cert-authority'"),
        ('tunnel="1"', "'tunnel'"),
        ('principals="me"', "'principals'"),
        ("verify-required", "'verify-required'"),
        ('restrict="yes"', "'restrict'"),
        ("command", "'command'"),
        ('command="nix-store --serve",command="nix-store --serve"', "repeated"),
        ('from="10.0.0.1",from="10.0.0.2"', "repeated"),
        ('command="bash"', "forced command"),
        ('command="nix-store --serve', "quote is not closed"),
        ("command=nix-store", "not in quotes"),
        ('command="nix-store --serve"x', "text after"),
        ('com"mand"', "quote in the wrong place"),
        ("restrict,", "''"),
        (",restrict", "''"),
        ('expiry-time="tomorrow"', "not a time"),
        ('expiry-time="20261301"', "not a time"),
        ('expiry-time="202601012460"', "not a time"),
        ('from="*.example.org"', "host names"),
        ('from="10.0.0.1/8"', "host bits"),
        ('from="10.0.0.0/33"', "cannot use"),
        ('from="*,!10.0.0"', "cannot use"),
        ('from="*,!2001:db8"', "cannot use"),
        ('from=""', "host names"),
        ('from="10.0.0.1,,10.0.0.2"', "host names"),
    ],
)
def test_optionsNotUnderstood(options, why):
    """A line with an option that is not obeyed here is refused as a whole, with the reason."""
    with pytest.raises(FormatError, match=why):
        entry(options)


def test_kindsOfKeys():
    """Ed25519, ECDSA and long RSA keys are accepted; DSA and short RSA keys are not, nor is a wrong label."""
    good = [ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)]
    for private in good:
        line = Key(private).public().toString("OPENSSH").decode()
        assert entry(key=line).blob == Key(private).public().blob()
    short = Key(rsa.generate_private_key(65537, 1024)).public().toString("OPENSSH").decode()
    with pytest.raises(FormatError, match="1024 bits"):
        entry(key=short)
    weak = Key(dsa.generate_private_key(1024)).public().toString("OPENSSH").decode()
    with pytest.raises(FormatError, match="ssh-dss"):
        entry(key=weak)
    with pytest.raises(FormatError, match="not of the type"):
        entry(key=LINE.replace("ssh-ed25519", "ssh-rsa"))
    with pytest.raises(FormatError, match="no public key"):
        parseAuthorizedKey("\x0b")
    for broken in ("ssh-ed25519", "ssh-ed25519 AAAA", "ssh-ed25519 %%%%", LINE[:-8]):
        with pytest.raises(FormatError):
            entry(key=broken)


@pytest.mark.parametrize(
    ("patterns", "address", "allowed"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.10", False),
        ("192.0.2.*", "192.0.2.10", True),
        ("192.0.2.?", "192.0.2.10", False),
        ("10.0.0.0/8,192.0.2.1", "10.250.3.4", True),
        ("10.0.0.0/8", "11.0.0.1", False),
        ("10.0.0.0/8,!10.1.0.0/16", "10.1.2.3", False),
        ("!10.1.0.0/16,10.0.0.0/8", "10.1.2.3", False),
        ("!10.1.0.0/16,10.0.0.0/8", "10.2.2.3", True),
        ("!10.1.0.0/16", "10.2.2.3", False),
        ("*", "2001:db8::1", True),
        ("*", "", False),
        ("2001:db8::/32", "2001:db8::1", True),
        ("2001:DB8::*", "2001:db8::1", True),
        ("2001:db8::/32", "10.0.0.1", False),
        ("10.0.0.0/8", "::ffff:10.0.0.1", True),
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("fe80::/10", "fe80::1%eth0", True),
        ("2001:db8:0:0::1", "2001:db8::1", True),
        ("2001:db8::/32,!2001:db8:0:0::1", "2001:db8::1", False),
        ("2001:db8::/32,!2001:DB8:0::1", "2001:db8::2", True),
        ("*,!::ffff:192.0.2.1", "192.0.2.1", False),
        ("*,!::ffff:192.0.2.0/120", "::ffff:192.0.2.1", False),
        ("::ffff:192.0.2.0/120", "192.0.2.1", True),
    ],
)
def test_from(patterns, address, allowed):
    """from= takes addresses, wildcards and networks, and an exclamation mark wins, as in sshd."""
    assert (entry(f'from="{patterns}"').refusal(address, 0.0) == "") is allowed


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("20260102Z", datetime(2026, 1, 2, tzinfo=UTC)),
        ("202601021530Z", datetime(2026, 1, 2, 15, 30, tzinfo=UTC)),
        ("20260102153045Z", datetime(2026, 1, 2, 15, 30, 45, tzinfo=UTC)),
        ("20260102", datetime(2026, 1, 2)),
        ("202601021530", datetime(2026, 1, 2, 15, 30)),
    ],
)
def test_expiry(text, moment):
    """expiry-time= is local time, or UTC with a Z; the key is good up to and including that second."""
    key = entry(f'expiry-time="{text}"')
    assert key.refusal("", moment.timestamp()) == ""
    assert "expired" in key.refusal("", moment.timestamp() + 1)


def test_earliestExpiryCounts():
    """Of several times the first counts."""
    key = entry('expiry-time="20300101Z",expiry-time="20260101Z",expiry-time="20310101Z"')
    assert key.expires == datetime(2026, 1, 1, tzinfo=UTC).timestamp()


@given(st.one_of(st.text(), st.text().map(lambda text: f"{text} {LINE}"), st.text().map(lambda text: f'a="{text}" x')))
def test_anyLineIsReadOrRefused(line):
    """Any text gives a key, nothing, or a FormatError."""
    try:
        parseAuthorizedKey(line)
    except FormatError as error:
        assert str(error)

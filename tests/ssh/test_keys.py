"""
Host keys and C{authorized_keys}.
"""

import base64
import os
import time
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from twisted.conch.error import ValidPublicKey
from twisted.conch.ssh.common import NS
from twisted.conch.ssh.keys import Key
from twisted.cred.error import UnauthorizedLogin
from twisted.logger import capturedLogs

from nixserve.errors import FormatError, UsageError
from nixserve.protocol.policy import EVERYTHING, READ_ONLY
from nixserve.ssh.authorizedkeys import fingerprint, parseAuthorizedKey
from nixserve.ssh.command import ServeCommand
from nixserve.ssh.keys import (
    MAX_AUTHORIZED_KEYS,
    AuthorizedKeysChecker,
    AuthorizedKeysFile,
    KeyCredentials,
    loadHostKey,
    readPrivateKey,
)
from tests.ssh.userkeys import BLOB, LINE, PRIVATE, write

OTHER = Key(ed25519.Ed25519PrivateKey.generate())
# A key and what ssh-keygen -l prints for it.
FIXED = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsABgH5C9okWi0dh2l9GKJl"
FIXED_FINGERPRINT = "SHA256:vquJBo6EvVfnHbyPmuwuOg4XGi4Cmti6ZX2fnFN0Ti0"


def entry(options="", key=LINE, comment=""):
    return parseAuthorizedKey(f"{options} {key} {comment}".strip(), 7)


# Host keys


def test_makesAHostKey(tmp_path):
    """A missing host key is made, for nobody else's eyes, leaving nothing behind; the next start finds it."""
    path = str(tmp_path / "host")
    key = loadHostKey(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert (tmp_path / "host").read_text().startswith("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    assert os.listdir(tmp_path) == ["host"]
    assert loadHostKey(path).blob() == key.blob()
    assert key.sshType() == b"ssh-ed25519"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_refusesAnOpenHostKey(tmp_path, mode):
    """A host key that others may read is refused, with the way out."""
    path = str(tmp_path / "host")
    loadHostKey(path)
    os.chmod(path, mode)
    with pytest.raises(UsageError, match=rf"mode {mode:04o}\): chmod 600"):
        loadHostKey(path)


def test_refusesWhatIsNoPrivateKey(tmp_path):
    """Garbage, a public key, a key with a passphrase, a directory and a missing directory are said to be such."""
    path = tmp_path / "host"
    cases = [
        (b"garbage", "no private key"),
        (b"", "no private key"),
        (LINE.encode(), "public key"),
        (PRIVATE.toString("OPENSSH", subtype="v1", passphrase=b"x"), "passphrase"),
        (PRIVATE.toString("OPENSSH", subtype="v1")[:200], "no private key"),
    ]
    for content, text in cases:
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(UsageError, match=text):
            readPrivateKey(str(path))
    with pytest.raises(UsageError, match="No such file"):
        loadHostKey(str(tmp_path / "missing" / "host"))


def test_fingerprint():
    """Fingerprints are those of ssh-keygen -l."""
    assert fingerprint(Key.fromString(FIXED)) == FIXED_FINGERPRINT


# Lines


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


# The file and the checker


def test_fileIsReadAgain(tmp_path):
    """The file is read again when it has changed, and only then."""
    path = str(tmp_path / "authorized_keys")
    keys = AuthorizedKeysFile(path)
    assert keys.find(BLOB) == []
    write(path, f"# mine\n\n{LINE} one\n")
    (found,) = keys.find(BLOB)
    assert (found.comment, found.lineNumber) == ("one", 3)
    assert keys.find(BLOB)[0] is found
    write(path, f"{LINE} two!\nrestrict {LINE} three\n")
    assert [key.comment for key in keys.find(BLOB)] == ["two!", "three"]
    os.unlink(path)
    assert keys.find(BLOB) == []


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_writableFileLetsNobodyIn(tmp_path, mode):
    """A file that others may write lets nobody in, until that is mended; it is said once."""
    path = str(tmp_path / "authorized_keys")
    write(path, LINE, mode)
    keys = AuthorizedKeysFile(path)
    with capturedLogs() as events:
        assert keys.find(BLOB) == []
        assert keys.find(BLOB) == []
    assert len(events) == 1
    assert f"mode {mode:04o}" in events[0]["reason"]
    os.chmod(path, 0o600)
    assert len(keys.find(BLOB)) == 1


def test_tooLargeFileLetsNobodyIn(tmp_path):
    """A file over the limit is not read in part."""
    path = str(tmp_path / "authorized_keys")
    write(path, LINE + "\n" + "#" * MAX_AUTHORIZED_KEYS)
    assert AuthorizedKeysFile(path).find(BLOB) == []


def test_badLineIsLoggedAndPassedOver(tmp_path):
    """A line that is not understood lets nobody in, is logged with its number, and hurts no other line."""
    path = str(tmp_path / "authorized_keys")
    write(path, f'environment="A=b" {LINE}\n{OTHER.public().toString("OPENSSH").decode()}\n\udcff\n'.encode(
        "utf-8", "surrogateescape").decode("latin-1"))  # fmt: skip
    keys = AuthorizedKeysFile(path)
    with capturedLogs() as events:
        assert keys.find(BLOB) == []
    assert [(event["line"], "environment" in event["reason"]) for event in events] == [(1, True), (3, False)]
    assert len(keys.find(OTHER.public().blob())) == 1


@pytest.mark.parametrize(
    "line",
    [
        'command="nix-store --serve --option restrict-eval true"',
        'command="NIX_REMOTE=daemon nix-store --serve"',
        'command="nix-store --serve --rights read --rights read"',
        'command="nix-store --serve",command="nix-store --serve"',
        "command=nix-store",
        'command="nix-store --serve',
        'command="nix-store --serve"x',
        'command ="nix-store --serve"',
        'from=""',
        'from="10.0.0.1",from="10.0.0.2"',
        'from="somewhere.example"',
        'expiry-time="tomorrow"',
        'expiry-time="٢٠٩٩٠١٠١"',
        'restrict=""',
        "restrict,",
        "restrict,,no-pty",
    ],
)
def test_oddLines(tmp_path, line):
    """An option that is not understood, odd in its quotes or given twice lets nobody in; a line says which and why."""
    path = str(tmp_path / "authorized_keys")
    write(path, f"# a comment\n{line} {LINE}\n")
    keys = AuthorizedKeysFile(path)
    with capturedLogs() as events:
        assert keys.find(BLOB) == []
    (event,) = events
    assert (event["path"], event["line"]) == (path, 2)
    assert event["reason"].isprintable()


def outcome(checker, signature=None, data=b"to be signed", blob=BLOB, address=""):
    results = []
    credentials = KeyCredentials(b"me", b"ssh-ed25519", blob, data, signature, address)
    checker.requestAvatarId(credentials).addBoth(results.append)
    return results[0]


@pytest.fixture
def checker(tmp_path):
    path = str(tmp_path / "authorized_keys")
    write(path, f'from="10.0.0.1" {LINE} inside\nexpiry-time="20260101Z",from="10.0.0.2" {LINE} old\n')
    return AuthorizedKeysChecker(AuthorizedKeysFile(path), lambda: datetime(2026, 6, 1, tzinfo=UTC).timestamp())


def test_checkerAnswersAQuestion(checker):
    """A known key without a signature may go on to sign; an unknown one may not."""
    assert outcome(checker, address="10.0.0.1").check(ValidPublicKey)
    assert outcome(checker, address="10.0.0.1", blob=OTHER.public().blob()).check(UnauthorizedLogin)
    assert outcome(checker, address="10.0.0.9").check(UnauthorizedLogin)
    assert outcome(checker, address="10.0.0.2").check(UnauthorizedLogin)


def test_checkerVerifies(checker):
    """Only the key's own signature over exactly the data lets in."""
    good = PRIVATE.sign(b"to be signed")
    assert outcome(checker, good, address="10.0.0.1").comment == "inside"
    bad = [OTHER.sign(b"to be signed"), PRIVATE.sign(b"other"), b"", b"x", b"\x00\x00\x00\xff", b"y" * 40, good[:-1]]
    for signature in bad:
        assert outcome(checker, signature, address="10.0.0.1").check(UnauthorizedLogin), signature


def test_securityKeys(tmp_path):
    """A security key must say that it was touched, unless its line has no-touch-required."""
    private = ed25519.Ed25519PrivateKey.generate()
    kind = b"sk-ssh-ed25519@openssh.com"
    blob = NS(kind) + NS(private.public_key().public_bytes_raw()) + NS(b"ssh:")
    line = f"{kind.decode()} {base64.b64encode(blob).decode()}"
    path = str(tmp_path / "authorized_keys")
    checker = AuthorizedKeysChecker(AuthorizedKeysFile(path))

    def login(flags):
        data = b"application, flags, counter and message" + flags
        signature = NS(kind) + NS(private.sign(data)) + flags + b"\x00\x00\x00\x01"
        return outcome(checker, signature, data, blob)

    write(path, line + " token")
    assert login(b"\x01").comment == "token"
    assert login(b"\x00").check(UnauthorizedLogin)
    write(path, "no-touch-required " + line)
    assert not login(b"\x00").touchRequired

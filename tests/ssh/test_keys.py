"""
Host keys and C{authorized_keys}.
"""

import base64
import os
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from twisted.conch.error import ValidPublicKey
from twisted.conch.ssh.common import NS
from twisted.conch.ssh.keys import Key
from twisted.cred.error import UnauthorizedLogin
from twisted.logger import capturedLogs

from nixserve.errors import UsageError
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

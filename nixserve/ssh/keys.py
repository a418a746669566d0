"""
Keys on disk: the endpoint's own, and those that it lets in, each with its policy.

The files are read on the calling thread, the reactor's in a service: an C{authorized_keys} is at most
L{MAX_AUTHORIZED_KEYS} bytes on a local disk and is read again only when it has changed; a login costs one C{stat}, and
so does each look at whether those who are logged in still may be (L{nixserve.ssh.keywatch}).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519
from twisted.conch.error import ValidPublicKey
from twisted.conch.ssh.common import getNS
from twisted.conch.ssh.keys import BadKeyError, EncryptedKeyError, Key
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import ISSHPrivateKey
from twisted.cred.error import UnauthorizedLogin
from twisted.internet.defer import Deferred, execute
from twisted.logger import Logger
from zope.interface import implementer

from nixserve.codec.text import decodeText
from nixserve.errors import FormatError, UsageError
from nixserve.protocol.peerlog import PeerLog
from nixserve.ssh.authorizedkeys import AuthorizedKey, parseAuthorizedKey
from nixserve.store.ownpaths import UnsafePath, requireOwn

__all__ = [
    "MAX_AUTHORIZED_KEYS",
    "AuthorizedKeysChecker",
    "AuthorizedKeysFile",
    "KeyCredentials",
    "KnownKeyRefused",
    "loadHostKey",
    "readPrivateKey",
]

# About 5,000 keys of 200 characters. The file is read and parsed on the reactor: 1 MiB takes about 0.1 s.
MAX_AUTHORIZED_KEYS = 1024 * 1024

# Of a security key's signature (PROTOCOL.u2f): somebody touched it.
_SK_TOUCHED = 0x01

# What the operator does to a file that is to let nobody in. Other errors (EIO, EMFILE, ESTALE) are faults.
_SAYS_NO = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP})

# Of lines that are not understood, so many are logged each time the file has changed.
_MAX_COMPLAINTS = 20

# What somebody has pasted into the file is no better than what a peer sends.
_log = PeerLog(Logger())


def loadHostKey(path: str) -> Key:
    """
    The private host key in the file C{path}; a new Ed25519 key, mode 0600, in OpenSSH's format, if there is none.

    Of several processes that start at once with no key, all end with the same one. Blocks on the disk.

    @raise UsageError: the file cannot be read or made, is no private key, needs a passphrase, or others may
        read it.
    @raise UnsafePath: others could put another in its place.
    """
    try:
        if not requireOwn(path):
            _createHostKey(path)
        return readPrivateKey(path)
    except OSError as error:
        raise UsageError(f"host key '{path}': {error.strerror}") from error


def readPrivateKey(path: str) -> Key:
    """
    Read a private key file. Blocks on the disk.

    @raise UsageError: it is no private key, needs a passphrase, or others may read it.
    @raise OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        # The rule of ssh(1) and sshd(8): a private key that others can read is no longer private.
        mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
        if mode & 0o077:
            raise UsageError(f"key '{path}' is open to others (mode {mode:04o}): chmod 600 it, or make a new one")
        content = stream.read()
    try:
        key: Key = Key.fromString(content)
    except EncryptedKeyError as error:
        raise UsageError(f"key '{path}' is protected by a passphrase, which cannot be asked for here") from error
    except (BadKeyError, UnsupportedAlgorithm, ValueError, IndexError, struct.error) as error:
        raise UsageError(f"'{path}' is no private key in a format known here") from error
    if key.isPublic():
        raise UsageError(f"'{path}' is a public key; the private one is needed")
    return key


def _createHostKey(path: str) -> None:
    """Make a key under another name, then link it into place: a link, unlike a rename, replaces nothing."""
    content = Key(ed25519.Ed25519PrivateKey.generate()).toString("OPENSSH", subtype="v1")
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass  # Another process was faster: its key counts.
    finally:
        os.unlink(temporary)


class AuthorizedKeysFile:
    """
    The keys of an C{authorized_keys} file, as the file is now.

    A file that others than its owner may write lets nobody in, nor does one that belongs to neither this process's user
    nor root, or lies where others could put another in its place (sshd's C{StrictModes}), is larger than
    L{MAX_AUTHORIZED_KEYS}, or is missing. Each such case, and each line that is not understood, is logged when the
    file has changed, not at each login. A file that cannot be read for reasons of its own lets nobody in either, for
    as long as that lasts.

    @ivar path: where it is; it need not exist.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._state: tuple[int, ...] = ()
        self._keys: dict[bytes, list[AuthorizedKey]] = {}
        self._trouble = ""

    def find(self, blob: bytes) -> list[AuthorizedKey]:
        """All lines for the key C{blob}, in the file's order. Reads the file if it has changed."""
        self.refresh()
        return self.known(blob)

    def known(self, blob: bytes) -> list[AuthorizedKey]:
        """As L{find}, without looking at the file."""
        return self._keys.get(blob, [])

    def refresh(self) -> bool:
        """
        Read the file if it has changed.

        @return: whether it is known what it says. If not, the disk or this process has a fault, which says nothing
            about the keys.
        """
        try:
            self._look()
        except UnsafePath as error:
            self._refuse((hash(error.reason),), str(error))
        except OSError as error:
            reason = error.strerror or "cannot be read"
            if error.errno in _SAYS_NO:
                self._refuse((error.errno or -1,), reason)
                return True
            if reason != self._trouble:
                _log.warn("{path} lets nobody in for now: {reason}", path=self.path, reason=reason)
            self._trouble, self._state, self._keys = reason, (), {}
            return False
        self._trouble = ""
        return True

    def _look(self) -> None:
        requireOwn(self.path)
        now = os.stat(self.path)
        state = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_mode, now.st_uid)
        if state == self._state:
            return
        if not stat.S_ISREG(now.st_mode):
            self._refuse(state, "it is no file")
            return
        with open(self.path, "rb") as stream:
            opened = os.fstat(stream.fileno())
            content = stream.read(MAX_AUTHORIZED_KEYS + 1)
        if opened.st_mode & 0o022:
            self._refuse(state, f"others may write it (mode {stat.S_IMODE(opened.st_mode):04o}): chmod go-w it")
        elif opened.st_uid not in (0, os.geteuid()):
            self._refuse(state, f"it belongs to user {opened.st_uid}, neither root nor the user of this process")
        elif len(content) > MAX_AUTHORIZED_KEYS:
            self._refuse(state, f"it is larger than {MAX_AUTHORIZED_KEYS} bytes")
        else:
            self._state = state
            self._keys = self._parse(content)

    def _refuse(self, state: tuple[int, ...], reason: str) -> None:
        if state != self._state:
            _log.warn("{path} lets nobody in: {reason}", path=self.path, reason=reason)
        self._state = state
        self._keys = {}

    def _parse(self, content: bytes) -> dict[bytes, list[AuthorizedKey]]:
        keys: dict[bytes, list[AuthorizedKey]] = {}
        bad = 0
        for number, line in enumerate(content.split(b"\n"), start=1):
            try:
                key = parseAuthorizedKey(decodeText(line), number)
            except FormatError as error:
                bad += 1
                if bad <= _MAX_COMPLAINTS:
                    _log.warn("{path}: line {line} lets nobody in: {reason}", path=self.path, line=number, reason=error)
                continue
            if key is not None:
                keys.setdefault(key.blob, []).append(key)
        if bad > _MAX_COMPLAINTS:
            _log.warn("{path}: {count} more lines let nobody in", path=self.path, count=bad - _MAX_COMPLAINTS)
        return keys


class KnownKeyRefused(UnauthorizedLogin):
    """A key that has a line is not let in: from there, now, or with that signature."""


@implementer(ISSHPrivateKey)
@dataclass(frozen=True, slots=True)
class KeyCredentials:
    """
    What a client shows of its key, and from where.

    @ivar signature: over C{sigData}; C{None} while it only asks whether the key would do.
    @ivar address: the text of the client's IP address, or empty.
    """

    username: bytes
    algName: bytes
    blob: bytes
    sigData: bytes | None
    signature: bytes | None
    address: str = ""


@implementer(ICredentialsChecker)
@dataclass(frozen=True)
class AuthorizedKeysChecker:
    """
    Checks L{KeyCredentials} against an L{AuthorizedKeysFile}. The user name means nothing: the key decides.

    Unlike L{twisted.conch.checkers.SSHPublicKeyChecker} it says no to an unknown key before it is asked to verify
    a signature, so a client with several keys moves on without waking its agent for each.

    @ivar now: the time, in seconds since the epoch.
    """

    keys: AuthorizedKeysFile
    now: Callable[[], float] = time.time
    credentialInterfaces: tuple[type[ISSHPrivateKey], ...] = field(default=(ISSHPrivateKey,), init=False)

    # The interface says that an avatar ID is bytes; a portal hands on whatever it is, and ours takes an AuthorizedKey.
    def requestAvatarId(self, credentials: KeyCredentials) -> Deferred[AuthorizedKey]:  # type: ignore[override]
        """
        @return: the line that lets the client in. Fails with L{ValidPublicKey} if the client only asked and may
            go on to sign, with L{UnauthorizedLogin} otherwise.
        """
        return execute(self._check, credentials)

    def _check(self, credentials: KeyCredentials) -> AuthorizedKey:
        entry = self._findLine(credentials)
        if credentials.signature is None:
            raise ValidPublicKey
        if not _verifies(credentials, entry.touchRequired):
            raise KnownKeyRefused("the signature does not verify")
        return entry

    def _findLine(self, credentials: KeyCredentials) -> AuthorizedKey:
        return self.choose(self.keys.find(credentials.blob), credentials.address)

    def choose(self, lines: Iterable[AuthorizedKey], address: str) -> AuthorizedKey:
        """
        The first of the lines for a key that lets it in from an address now, as sshd takes it.

        @raise UnauthorizedLogin: none does; the text says why the last one does not.
        """
        reason = ""
        for entry in lines:
            reason = entry.refusal(address, self.now())
            if not reason:
                return entry
        raise KnownKeyRefused(reason) if reason else UnauthorizedLogin("the key is not known")


def _verifies(credentials: KeyCredentials, touchRequired: bool) -> bool:
    """Is the signature good, and from a security key that was touched where that is asked for?"""
    if credentials.signature is None or credentials.sigData is None:
        return False
    try:
        key = Key.fromString(credentials.blob, type="BLOB")
        if touchRequired and key.isSecurityKey():
            _, _, trailer = getNS(credentials.signature, 2)
            if not trailer[0] & _SK_TOUCHED:
                return False
        return bool(key.verify(credentials.signature, credentials.sigData))
    except (BadKeyError, UnsupportedAlgorithm, ValueError, IndexError, struct.error):
        return False

"""
The lines of OpenSSH's C{authorized_keys}, read and judged. Touches no file.

The format is that of sshd(8), section AUTHORIZED_KEYS FILE FORMAT (OpenSSH 9.2). Of its options, those that only
take something away or bind the key to a purpose are obeyed; a line with any other option, or with a forced command
that is not C{nix-store --serve}, lets nobody in: an option that is not understood might have been a restriction.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import ipaddress
import re
import struct
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography.exceptions import UnsupportedAlgorithm
from twisted.conch.ssh.keys import BadKeyError, Key

from nixserve.codec.text import shownText
from nixserve.errors import FormatError, PolicyError
from nixserve.ssh.command import ServeCommand, parseForced

__all__ = ["AuthorizedKey", "fingerprint", "parseAuthorizedKey"]

_KEY_TYPES = frozenset(
    {
        "ssh-ed25519",
        "ssh-rsa",
        "ecdsa-sha2-nistp256",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp521",
        "sk-ssh-ed25519@openssh.com",
        "sk-ecdsa-sha2-nistp256@openssh.com",
    }
)
# Its signatures are over SHA-1, and short.
_WEAK_KEY_TYPE = "ssh-dss"
# NIST SP 800-57: less than 2048 bits is not to be used after 2013.
_MIN_RSA_BITS = 2048

# Nothing of what these forbid is offered here, so they are true as they stand.
_HARMLESS_OPTIONS = frozenset(
    {"restrict", "no-agent-forwarding", "no-port-forwarding", "no-pty", "no-user-rc", "no-x11-forwarding"}
)
_ADDRESS_PATTERN = re.compile(r"[0-9A-Fa-f:.*?]+")
_TIME = re.compile(r"(\d{4})(\d\d)(\d\d)(?:(\d\d)(\d\d)(\d\d)?)?(Z?)", re.ASCII)


def fingerprint(key: Key | bytes) -> str:
    """
    A key's fingerprint as C{ssh-keygen -l} prints it, C{SHA256:…}.

    @param key: a key, or a public key blob (RFC 4253, section 6.6).
    """
    blob = key if isinstance(key, bytes) else key.blob()
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode("ascii").rstrip("=")


@dataclass(frozen=True, slots=True)
class _AddressPattern:
    """One element of C{from="…"}: a network, or a pattern with C{*} and C{?} over the address's text."""

    text: str
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None

    @classmethod
    def parse(cls, text: str) -> _AddressPattern:
        """
        Addresses mean what they say and not how they are written: an exclamation mark before C{2001:db8:0::1} shuts out
        C{2001:db8::1} (OpenSSH 9.2, addrmatch.c:addr_match_list).

        @raise FormatError: what could never match, or a network with bits set outside its mask.
        """
        try:
            if not _ADDRESS_PATTERN.fullmatch(text.partition("/")[0]):
                raise ValueError("host names are not looked up here; write addresses")
            if "/" in text or not ("*" in text or "?" in text):
                return cls(text, _plainNetwork(text))
        except ValueError as error:
            raise FormatError(f"cannot use '{text}' in the option 'from': {error}") from error
        return cls(text, None)

    def matches(self, address: str) -> bool:
        if self.network is None:
            return fnmatch.fnmatchcase(address.lower(), self.text.lower())
        try:
            return ipaddress.ip_address(address) in self.network
        except ValueError:
            return False


def _plainNetwork(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """
    A network or a single address; of IPv4 addresses in IPv6's wrapping, without that, as L{_plainAddress} has them.

    @raise ValueError: it is neither.
    """
    network = ipaddress.ip_network(text)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return (
        network if mapped is None or network.prefixlen < 96 else ipaddress.ip_network((mapped, network.prefixlen - 96))
    )


@dataclass(frozen=True, slots=True)
class AuthorizedKey:
    """
    One line of C{authorized_keys} that is understood.

    @ivar blob: the public key in SSH's binary form.
    @ivar comment: what follows the key on its line.
    @ivar lineNumber: counted from 1.
    @ivar forced: the command of C{command="…"}, which alone decides; C{None} if the client's counts.
    @ivar expires: seconds since the epoch after which the line lets nobody in.
    @ivar touchRequired: a security key must say that it was touched.
    """

    blob: bytes
    comment: str = ""
    lineNumber: int = 0
    forced: ServeCommand | None = None
    expires: float | None = None
    touchRequired: bool = True
    _from: tuple[_AddressPattern, ...] | None = None
    _notFrom: tuple[_AddressPattern, ...] = ()

    def __str__(self) -> str:
        return f"{fingerprint(self.blob)} {shownText(self.comment, 80)}".rstrip()

    def refusal(self, address: str, now: float) -> str:
        """
        Why this line does not let in somebody from C{address} at C{now}, seconds since the epoch; empty if it
        does.

        @param address: the text of an IP address, or empty if the peer has none.
        """
        if self.expires is not None and now > self.expires:
            return "the key has expired"
        if self._from is None:
            return ""
        address = _plainAddress(address)
        allowed = any(pattern.matches(address) for pattern in self._from)
        if address and allowed and not any(pattern.matches(address) for pattern in self._notFrom):
            return ""
        return f"the key is not to be used from {address or 'a place without an IP address'}"


def _plainAddress(address: str) -> str:
    """An IPv4 address that came over an IPv6 socket, C{::ffff:192.0.2.1}, without its wrapping, as sshd does."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(parsed)


def parseAuthorizedKey(line: str, lineNumber: int = 0) -> AuthorizedKey | None:
    """
    Read one line: C{[options] type base64 [comment]}; C{None} for an empty line or a comment.

    @raise FormatError: not such a line, or an option that is not obeyed here; its text says which.
    """
    line = line.strip(" \t\r\n")
    if not line or line.startswith("#"):
        return None
    options: list[tuple[str, str | None]] = []
    if re.split("[ \t]", line, maxsplit=1)[0] not in (*_KEY_TYPES, _WEAK_KEY_TYPE):
        options, line = _splitOptions(line)
    blob, comment = _parseKey(line)
    return _applyOptions(options, blob, comment, lineNumber)


def _splitOptions(line: str) -> tuple[list[tuple[str, str | None]], str]:
    """
    Cut the options off: they end at the first blank outside quotes, and within quotes C{\\"} is a quote
    (OpenSSH 9.2, auth-options.c and misc.c:opt_dequote).

    @return: pairs of a lower-case name and a value, and the rest of the line.
    """
    options: list[tuple[str, str | None]] = []
    name, value = "", None
    position, quoted = 0, False
    while position < len(line):
        char = line[position]
        if quoted and line.startswith('\\"', position):
            value = (value or "") + '"'
            position += 1
        elif char == '"':
            if not quoted and (value is None or value):
                raise FormatError("a quote in the wrong place among the options")
            quoted = not quoted
        elif quoted:
            value = (value or "") + char
        elif char in " \t":
            break
        elif char == ",":
            options.append((name.lower(), value))
            name, value = "", None
        elif char == "=" and value is None:
            value = ""
            if not line.startswith('"', position + 1):
                raise FormatError(f"the value of the option '{name}' is not in quotes")
        elif value is not None:
            raise FormatError(f"text after the value of the option '{name}'")
        else:
            name += char
        position += 1
    if quoted:
        raise FormatError("a quote is not closed")
    options.append((name.lower(), value))
    return options, line[position:].lstrip(" \t")


def _parseKey(text: str) -> tuple[bytes, str]:
    fields = text.split(None, 2)
    if len(fields) < 2 or fields[0] not in _KEY_TYPES:
        found = fields[0][:40] if fields else "the end of the line"
        raise FormatError("no public key of a known type", expected=", ".join(sorted(_KEY_TYPES)), found=ascii(found))
    try:
        blob = base64.b64decode(fields[1], validate=True)
        key = Key.fromString(blob, type="BLOB")
    except (binascii.Error, BadKeyError, UnsupportedAlgorithm, ValueError, IndexError, struct.error) as error:
        raise FormatError("the public key is damaged") from error
    if key.sshType() != fields[0].encode("ascii"):
        raise FormatError(f"the public key is not of the type '{fields[0]}' that its line names")
    if key.type() == "RSA" and key.size() < _MIN_RSA_BITS:
        raise FormatError(f"an RSA key of {key.size()} bits is too short", expected=f"{_MIN_RSA_BITS} or more")
    return blob, fields[2] if len(fields) > 2 else ""


def _applyOptions(options: list[tuple[str, str | None]], blob: bytes, comment: str, lineNumber: int) -> AuthorizedKey:
    forced: ServeCommand | None = None
    sources: tuple[tuple[_AddressPattern, ...], tuple[_AddressPattern, ...]] | None = None
    expires: float | None = None
    touchRequired = True
    for name, value in options:
        if value is None and name in _HARMLESS_OPTIONS:
            continue
        if value is None and name == "no-touch-required":
            touchRequired = False
        elif value is not None and name == "command" and forced is None:
            forced = _parseForced(value)
        elif value is not None and name == "from" and sources is None:
            sources = _parseFrom(value)
        elif value is not None and name == "expiry-time":
            # Several: the earliest counts (OpenSSH 9.2, auth-options.c:sshauthopt_parse).
            moment = _parseTime(value)
            expires = moment if expires is None else min(expires, moment)
        else:
            raise FormatError(f"the option '{name}' is not known here, repeated, or has a value where none belongs")
    allowed, refused = sources if sources is not None else (None, ())
    return AuthorizedKey(blob, comment, lineNumber, forced, expires, touchRequired, allowed, refused)


def _parseForced(line: str) -> ServeCommand:
    try:
        return parseForced(line)
    except PolicyError as error:
        raise FormatError(f"the forced command is not understood: {error}") from error


def _parseFrom(text: str) -> tuple[tuple[_AddressPattern, ...], tuple[_AddressPattern, ...]]:
    elements = text.split(",")
    allowed = tuple(_AddressPattern.parse(element) for element in elements if not element.startswith("!"))
    refused = tuple(_AddressPattern.parse(element[1:]) for element in elements if element.startswith("!"))
    return allowed, refused


def _parseTime(text: str) -> float:
    """C{YYYYMMDD[Z]} or C{YYYYMMDDHHMM[SS][Z]}, local time unless Z says UTC."""
    match = _TIME.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        numbers = [int(part) for part in match.groups()[:6] if part is not None]
        moment = datetime(*numbers, tzinfo=UTC if match[7] else None)  # type: ignore[arg-type, misc]
        return moment.timestamp()
    except (ValueError, OverflowError) as error:
        raise FormatError(
            "not a time", expected="YYYYMMDD[Z] or YYYYMMDDHHMM[SS][Z]", found=ascii(text[:40])
        ) from error

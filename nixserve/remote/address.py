"""
Where another store is, as a URL says it: C{ssh://[user@]host[:port]?parameter=value&…} or C{unix:///path}.

The forms and parameters are those of Nix's C{ssh://} stores (Nix 2.8 to 2.36, src/libstore/legacy-ssh-store.cc and
ssh.cc). Where releases differ, the newer one is followed: a port is a port, a path behind the host is an error. One
parameter is ours: C{ssh-client=conch} connects within this process.
"""

from __future__ import annotations

import base64
import binascii
import enum
import ipaddress
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from nixserve.codec.storepath import StoreDir
from nixserve.errors import FormatError, UsageError

__all__ = ["RemoteAddress", "Via"]

SSH_PORT = 22
"""The port that a URL without one means, as far as this side can tell: ssh_config may say another."""

MAX_SOCKET_PATH = 107
"""Bytes, by the kernel's rule (unix(7))."""

_FOR_ANY_STORE = frozenset(
    {"path-info-cache-size", "priority", "remote-store", "store", "system-features", "trusted", "want-mass-query"}
)
"""
Parameters of every store, which machines files carry, and C{remote-store}. C{priority}, C{want-mass-query},
C{trusted} and C{path-info-cache-size} are about Nix's choice among its own stores: accepted, without effect here.
"""

_FOR_SSH = _FOR_ANY_STORE | {
    *("base64-ssh-public-host-key", "compress", "max-connections", "remote-program", "ssh-client", "ssh-key"),
}

_TRUE = frozenset({"true", "yes", "1"})
_FALSE = frozenset({"false", "no", "0"})

# What no host and no user has, and what a shell of some ssh_config (ProxyCommand, Match exec) would act upon.
_FOREIGN = re.compile(r"""[\x00-\x20\x7f"'`$\\;&<>|(){}*?!#,/\[\]]""")


class Via(enum.Enum):
    """The ways to another store."""

    OPENSSH = "openssh"
    """The system's C{ssh}, in a child process."""
    CONCH = "conch"
    """SSH within this process."""
    CHILD = "child"
    """The command runs on this machine, without SSH."""
    SOCKET = "socket"
    """The unix socket of a service on this machine."""


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """
    Where another store is.

    @ivar via: how to get there.
    @ivar host: a name or an address, IPv6 without brackets; empty for a socket.
    @ivar user: to log in as; empty for whatever is the default there.
    @ivar port: of the SSH server; C{None} for the default.
    @ivar socket: path of the unix socket, or empty.
    @ivar remoteProgram: words for the shell there that stand in place of C{nix-store}.
    @ivar remoteStore: URI of the store there, or empty for its default.
    @ivar sshKey: file of the private key to log in with, or empty.
    @ivar hostKey: the host's public key, as C{TYPE BASE64}, or empty if known_hosts files are to say.
    @ivar compress: have SSH compress.
    @ivar maxConnections: how many sessions at once are welcome there.
    @ivar storeDir: the logical store directory there.
    @ivar systemFeatures: what builds may require of that machine.
    """

    via: Via
    host: str = ""
    user: str = ""
    port: int | None = None
    socket: str = ""
    remoteProgram: str = "nix-store"
    remoteStore: str = ""
    sshKey: str = ""
    hostKey: str = ""
    compress: bool = False
    maxConnections: int = 1
    storeDir: StoreDir = field(default_factory=StoreDir)
    systemFeatures: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, url: str) -> RemoteAddress:
        """
        Read a URL. What has no scheme is a host, as for C{nix-copy-closure}.

        @raise UsageError: it names no store that can be reached; the text says what to write.
        """
        place, _, query = url.partition("?")
        scheme, separator, rest = place.partition("://")
        if not separator:
            scheme, rest = "ssh", place
        shown = f"{scheme}://{_withoutPassword(rest)}"
        if scheme == "ssh":
            fields = _parseAuthority(shown, rest) | _sshFields(shown, _parseParameters(shown, query, _FOR_SSH))
            return cls(**fields)
        if scheme == "unix":
            parameters = _parseParameters(shown, query, _FOR_ANY_STORE)
            return cls(via=Via.SOCKET, socket=_parseSocket(shown, rest), **_storeFields(shown, parameters))
        if scheme == "ssh-ng":
            raise UsageError(f"'{shown}' is for the protocol of the Nix daemon; write it with ssh:// in front")
        raise UsageError(f"'{shown}' is no remote store; write ssh://[USER@]HOST[:PORT] or unix:///PATH")

    @property
    def name(self) -> str:
        """The URL without its parameters: what errors begin with."""
        if self.via is Via.SOCKET:
            return f"unix://{self.socket}"
        return f"ssh://{self.login}" + (f":{self.port}" if self.port is not None else "")

    @property
    def login(self) -> str:
        """The host with the user, IPv6 in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}" if self.user else host

    @property
    def knownHostsName(self) -> str:
        """The host as known_hosts files have it (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""
        port = SSH_PORT if self.port is None else self.port
        host = self.host.lower()
        return host if port == SSH_PORT else f"[{host}]:{port}"

    def command(self, write: bool = True) -> str:
        """
        The command line for the shell there.

        Nix asks for C{--write} always; without it the session can only read.
        """
        return " ".join(
            [
                self.remoteProgram,
                "--serve",
                *(["--write"] if write else []),
                *(["--store", shlex.quote(self.remoteStore)] if self.remoteStore else []),
            ]
        )

    def commandWords(self, write: bool = True) -> list[str]:
        """The same in words, for this machine."""
        return shlex.split(self.command(write))


def _withoutPassword(authority: str) -> str:
    """For messages: they end in logs. What is before the last C{@} may be meant as one, whatever is in it."""
    return re.sub(r"^([^@:/]*):.*@", r"\1:…@", authority, flags=re.DOTALL)


def _parseAuthority(shown: str, authority: str) -> dict[str, Any]:
    """C{[user@]host[:port]}."""
    user, at, place = authority.rpartition("@")
    if ":" in user:
        raise UsageError(f"'{shown}': no password belongs into a URL; log in with a key, as with ssh-key=FILE")
    if "/" in place:
        host, _, path = place.partition("/")
        wanted = f"?remote-store=/{path}" if path else ""
        raise UsageError(f"'{shown}': nothing may follow the host; write 'ssh://{user}{at}{host}{wanted}'")
    host, port = _splitPort(shown, place)
    for kind, text in (("user", user), ("host", host)):
        # Either would end among the options of ssh.
        if text.startswith("-"):
            raise UsageError(f"'{shown}': the name of a {kind} does not begin with '-'")
        if _FOREIGN.search(text) or not text.isprintable():
            raise UsageError(f"'{shown}': {text!a} is no name of a {kind}")
    if not host or (at and not user):
        raise UsageError(
            f"'{shown}' names no {'user before the @' if host else 'host'}; write ssh://[USER@]HOST[:PORT]"
        )
    via = Via.CHILD if authority == "localhost" else Via.OPENSSH
    return {"via": via, "host": host, "user": user, "port": port}


def _splitPort(shown: str, place: str) -> tuple[str, int | None]:
    """The host, IPv6 without its brackets, and the port."""
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", place)
    if bracketed:
        return _ipv6(shown, bracketed[1]), _port(shown, bracketed[2])
    if place.count(":") > 1:
        return _ipv6(shown, place), None
    host, colon, port = place.partition(":")
    return host, _port(shown, port if colon else None)


def _ipv6(shown: str, text: str) -> str:
    # The percent sign of a zone may be encoded (RFC 6874, section 2).
    address = text.replace("%25", "%")
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        raise UsageError(f"'{shown}': '{text}' is no IPv6 address; write ssh://[ADDRESS]:PORT") from None
    return address


def _port(shown: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise UsageError(f"'{shown}': '{text}' is no port; it is a number from 1 to 65535")
    return int(text)


def _parseSocket(shown: str, path: str) -> str:
    decoded = unquote(path, errors="surrogateescape")
    if not decoded.startswith("/") or "\0" in decoded:
        raise UsageError(f"'{shown}' names no socket; write unix:///absolute/path/serve.sock")
    if len(decoded.encode("utf-8", "surrogateescape")) > MAX_SOCKET_PATH:
        raise UsageError(f"'{shown}': the path of a socket has at most {MAX_SOCKET_PATH} bytes; make a link to it")
    return decoded


def _parseParameters(shown: str, query: str, known: frozenset[str]) -> dict[str, str]:
    """The parameters behind the question mark, decoded; each at most once."""
    parameters: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, equals, value = pair.partition("=")
        if name == "log-fd":
            raise UsageError(f"'{shown}': the parameter 'log-fd' is between Nix and its own build hook; leave it out")
        if name not in known:
            raise UsageError(f"'{shown}': unknown parameter '{name}'; known are {', '.join(sorted(known))}")
        if not equals:
            raise UsageError(f"'{shown}': parameter '{name}' has no value; write '{name}=VALUE'")
        if name in parameters:
            raise UsageError(f"'{shown}': parameter '{name}' is given twice")
        if re.search(r"%(?![0-9A-Fa-f]{2})", value):
            raise UsageError(f"'{shown}': '{value}' is not percent-encoded; write '%25' for '%'")
        # Not unquote_plus: base64 has plus signs of its own.
        parameters[name] = unquote(value, errors="surrogateescape")
        if re.search(r"[\x00-\x1f\x7f]", parameters[name].rstrip("\n")):
            raise UsageError(f"'{shown}': the value of '{name}' has control characters")
    return parameters


def _storeFields(shown: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """What may be said of any store."""
    fields: dict[str, Any] = {
        "remoteStore": parameters.get("remote-store", ""),
        "systemFeatures": frozenset(parameters.get("system-features", "").split()),
    }
    if "store" in parameters:
        try:
            fields["storeDir"] = StoreDir(parameters["store"])
        except FormatError as error:
            raise UsageError(f"'{shown}': {error}") from error
    return fields


def _sshFields(shown: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    fields = _storeFields(shown, parameters)
    fields["remoteProgram"] = _program(shown, parameters.get("remote-program", "nix-store"))
    fields["sshKey"] = parameters.get("ssh-key", "")
    fields["hostKey"] = _hostKey(shown, parameters.get("base64-ssh-public-host-key", ""))
    fields["compress"] = _boolean(shown, "compress", parameters.get("compress", "false"))
    fields["maxConnections"] = _count(shown, "max-connections", parameters.get("max-connections", "1"))
    client = parameters.get("ssh-client", Via.OPENSSH.value)
    if client not in (Via.OPENSSH.value, Via.CONCH.value):
        raise UsageError(f"'{shown}': the value of 'ssh-client' is '{client}'; it must be openssh or conch")
    if client == Via.CONCH.value:
        fields["via"] = Via.CONCH
    return fields


def _program(shown: str, text: str) -> str:
    """One or more words, as for a shell; Nix 2.19 hands them to one, Nix 2.20 splits them at blanks."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"'{shown}': cannot read remote-program '{text}': {str(error).lower()}") from error
    if not words or words[0].startswith("-"):
        raise UsageError(f"'{shown}': the remote-program '{text}' is no command; write the path of a nix-store")
    return text


def _hostKey(shown: str, text: str) -> str:
    """C{TYPE BASE64} out of one more layer of base64, checked as far as it can be without cryptography."""
    if not text:
        return ""
    try:
        decoded = base64.b64decode(text, validate=True).decode("ascii")
        kind, key = decoded.split()[:2]
        blob = base64.b64decode(key, validate=True)
        if len(decoded.strip().splitlines()) != 1 or blob[4 : 4 + int.from_bytes(blob[:4], "big")] != kind.encode():
            raise ValueError
    except (ValueError, binascii.Error):
        raise UsageError(
            f"'{shown}': base64-ssh-public-host-key is no host key; write what 'base64 -w0' makes of the host's "
            "/etc/ssh/ssh_host_ed25519_key.pub"
        ) from None
    return f"{kind} {key}"


def _boolean(shown: str, name: str, value: str) -> bool:
    if value not in _TRUE | _FALSE:
        raise UsageError(f"'{shown}': '{value}', the value of '{name}', is neither 'true' nor 'false'")
    return value in _TRUE


def _count(shown: str, name: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", value) or int(value) < 1:
        raise UsageError(f"'{shown}': '{value}', the value of '{name}', is no number from 1 on")
    return int(value)

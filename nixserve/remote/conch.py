"""
SSH within this process: what L{SSHCommandEndpoint} must be given, from the user's files, and what its errors mean.

No agent, no passphrases, no ssh_config, no certificates: whoever needs those uses the system's C{ssh}.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twisted.conch.ssh.keys import Key
from twisted.internet.endpoints import connectProtocol
from twisted.internet.error import ConnectError, ConnectionRefusedError, DNSLookupError
from twisted.internet.interfaces import IProtocol, IStreamClientEndpoint

from nixserve.errors import UsageError
from nixserve.protocol.reactors import IClientReactor
from nixserve.protocol.workers import Door
from nixserve.remote.address import SSH_PORT, RemoteAddress
from nixserve.remote.failures import CannotConnect
from nixserve.ssh.client import HostKeyError, LoginError, SSHCommandEndpoint, SSHError, readKnownHosts
from nixserve.ssh.keys import readPrivateKey

__all__ = ["GLOBAL_KNOWN_HOSTS", "Login", "connectConch", "explainSSH", "makeEndpoint", "readLogin"]

GLOBAL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"
"""Host keys that the machine's administrator vouches for (ssh(1), FILES)."""

IDENTITIES = ("id_ed25519", "id_ecdsa", "id_rsa")
"""The user's keys in C{~/.ssh} that are tried, in this order."""

_USE_OPENSSH = "leave ssh-client=conch out of the URL: ssh asks for passphrases, or an agent"


async def connectConch(
    reactor: IClientReactor,
    address: RemoteAddress,
    environ: Mapping[str, str],
    protocol: IProtocol,
    command: str,
    timeoutSeconds: float,
    door: Door,
) -> None:
    """
    Connect C{protocol} to a command on the other host.

    @param door: what the user's files are read through.
    @raise CannotConnect: that is not possible.
    """
    login = await door.call(readLogin, address, environ)
    try:
        await connectProtocol(makeEndpoint(reactor, address, login, command, timeoutSeconds), protocol)
    except (SSHError, ConnectError, DNSLookupError) as e:
        raise explainSSH(address, login, e) from e


@dataclass(frozen=True, slots=True)
class Login:
    """
    Who logs in where.

    @ivar keys: private keys, with the files that they come from.
    @ivar hostKeys: public keys, any of which the host may show.
    @ivar knownHosts: the file in which the user keeps those of hosts.
    """

    user: str
    keys: Sequence[tuple[str, Key]]
    hostKeys: Sequence[Key]
    knownHosts: str


def readLogin(address: RemoteAddress, environ: Mapping[str, str]) -> Login:
    """
    Read the user's files. Blocks: for threads.

    @param environ: C{HOME}, and C{USER} or C{LOGNAME}, in it count.
    @raise UsageError: a file cannot be used, or what is needed is nowhere. The text says what to do.
    """
    if address.compress:
        raise UsageError(f"{address.name}: compress=true needs ssh; leave it or ssh-client=conch out of the URL")
    user = address.user or environ.get("USER") or environ.get("LOGNAME")
    if not user:
        raise UsageError(f"{address.name}: nothing says who logs in; write ssh://USER@{address.login}")
    directory = f"{environ.get('HOME') or '/'}/.ssh"
    knownHosts = f"{directory}/known_hosts"
    if address.hostKey:
        hostKeys = [Key.fromString(address.hostKey.encode("ascii"))]
    else:
        hostKeys = [
            key
            for path in (knownHosts, GLOBAL_KNOWN_HOSTS)
            for key in readKnownHosts(path, address.host.lower(), address.port or SSH_PORT)
        ]
    if address.sshKey:
        keys = [(address.sshKey, _readKey(address, address.sshKey))]
    else:
        keys = _readIdentities(address, directory)
    return Login(user, keys, hostKeys, knownHosts)


def _readIdentities(address: RemoteAddress, directory: str) -> list[tuple[str, Key]]:
    """Those of the user's keys that can be used."""
    keys: list[tuple[str, Key]] = []
    problem: UsageError | None = None
    for path in (f"{directory}/{name}" for name in IDENTITIES):
        if os.path.exists(path):
            try:
                keys.append((path, _readKey(address, path)))
            except UsageError as e:
                problem = problem or e
    if not keys:
        raise problem or UsageError(
            f"{address.name}: there is no key to log in with in {directory} ({', '.join(IDENTITIES)}); "
            "add ?ssh-key=FILE to the URL"
        )
    return keys


def _readKey(address: RemoteAddress, path: str) -> Key:
    try:
        return readPrivateKey(path)
    except UsageError as e:
        raise UsageError(f"{address.name}: {e}; {_USE_OPENSSH}") from e
    except OSError as e:
        raise UsageError(f"{address.name}: cannot read the key '{path}': {e.strerror}; correct ssh-key=FILE") from e


def makeEndpoint(
    reactor: IClientReactor, address: RemoteAddress, login: Login, command: str, timeoutSeconds: float
) -> IStreamClientEndpoint:
    """The endpoint that logs in and runs the command."""
    endpoint: IStreamClientEndpoint = SSHCommandEndpoint(
        reactor,
        address.host,
        address.port or SSH_PORT,
        login.user,
        command,
        keys=[key for _, key in login.keys],
        hostKeys=login.hostKeys,
        timeoutSeconds=timeoutSeconds,
    )
    return endpoint


def explainSSH(address: RemoteAddress, login: Login, error: Exception) -> CannotConnect:
    """
    The error for an endpoint that did not connect.

    @param error: an L{SSHError}, or Twisted's L{ConnectError} or L{DNSLookupError}.
    """
    match error:
        case HostKeyError():
            what, advice = _hostKeyTexts(address, login, error)
        case LoginError():
            tried = ", ".join(path for path, _ in login.keys)
            what = f"it refused all keys for user '{login.user}' (tried: {tried})"
            advice = "add a public key to its authorized_keys, or choose another with ssh-key=FILE in the URL"
        case SSHError():
            what, advice = str(error), "see the log of its SSH server"
        case DNSLookupError():
            what, advice = f"the host is unknown ({error.args[0]})", "correct its name, or add it to DNS or /etc/hosts"
        case ConnectionRefusedError():
            what = f"the connection was refused ({error})"
            advice = f"start its SSH server, or write its port: ssh://{address.login}:PORT"
        case _:
            what, advice = f"the host cannot be reached ({error})", "see whether it is up and lets us through"
    return CannotConnect(address.name, what, advice)


def _hostKeyTexts(address: RemoteAddress, login: Login, error: HostKeyError) -> tuple[str, str]:
    """What happened and what to do. A line for known_hosts is given whole, to be checked and copied."""
    if address.hostKey:
        encoded = base64.b64encode(error.key.encode("ascii")).decode("ascii")
        advice = f"if it really has a new one: base64-ssh-public-host-key={encoded}"
    else:
        advice = f"if that is its own, add this line to {login.knownHosts}: {address.knownHostsName} {error.key}"
    if not error.expected:
        return f"its host key {error.found} is not known", advice
    if not address.hostKey:
        advice = f"if it really has a new one: ssh-keygen -R '{address.knownHostsName}'; then {advice}"
    return f"it shows the host key {error.found}, and {', '.join(error.expected)} is known", advice

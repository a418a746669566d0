"""
What went wrong on the way to another store, in one line: which side, what, and what to do next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from twisted.internet.error import ProcessTerminated

from nixserve.errors import RemoteError
from nixserve.remote.address import RemoteAddress, Via

__all__ = ["SSH_FAILED", "CannotConnect", "Evidence", "explain", "noProgram", "tooSlow"]

MAX_SHOWN = 600
"""How many characters of what the other side said stand in an error: the last ones, where the reason is."""

NOT_FOUND = 127
"""What a shell, and env(1), exit with if there is no such command."""

NOT_RUNNABLE = 126
"""What a shell exits with if the command is there and cannot be run."""

SSH_FAILED = 255
"""What ssh exits with for an error of its own (ssh(1), EXIT STATUS)."""


class CannotConnect(RemoteError):
    """
    There is no session with the other store.

    @ivar name: which one, as L{RemoteAddress.name}.
    @ivar what: what happened, with what was said there.
    @ivar advice: what to do next.
    """

    def __init__(self, name: str, what: str, advice: str) -> None:
        self.name = name
        self.what = what
        self.advice = advice
        super().__init__(name, what, advice)

    def __str__(self) -> str:
        return f"{self.name}: {self.what}; {self.advice}"


@dataclass(frozen=True, slots=True)
class Evidence:
    """
    What is known about a session that did not come about.

    @ivar output: the first bytes that came in place of the protocol, or empty.
    @ivar errors: the last bytes of standard error.
    @ivar reason: how the connection ended, as the transport says it; C{None} if it was cut here.
    @ivar why: what the client did not like.
    """

    output: bytes
    errors: bytes
    reason: BaseException | None
    why: str


def explain(address: RemoteAddress, command: str, evidence: Evidence) -> CannotConnect:
    """
    The error for a connection that was made, or begun by C{ssh}, and led to no session.

    @param command: what was to run there.
    """
    # 1. Something answered, but it was no server: a message of the day, a login shell that says goodbye.
    text = oneLine(evidence.output)
    if text:
        return CannotConnect(
            address.name,
            f"text came in place of the protocol: {_with(text, evidence.errors)}",
            f"silence or mend what prints it there, the login shell or its profile: {_byHand(address, command)}",
        )
    status = evidence.reason.exitCode if isinstance(evidence.reason, ProcessTerminated) else None
    said = oneLine(evidence.errors)
    # 2. ssh itself did not get through.
    if address.via is Via.OPENSSH and status == SSH_FAILED:
        return _sshFailed(address, evidence.errors.decode("utf-8", "replace"), said)
    # 3. The command did not start, or ended with a message.
    if status in (NOT_FOUND, NOT_RUNNABLE):
        program = address.remoteProgram
        return CannotConnect(
            address.name,
            _said(f"the remote program '{program}' was not found or cannot be run there", said),
            "install Nix there, or add ?remote-program=/path/to/nix-store to the URL",
        )
    if address.via is Via.SOCKET and status is None:
        return CannotConnect(
            address.name,
            _said("the other side of the socket is no nixserve service", said),
            "give the serve.sock in the state directory of 'twistd nixserve'; for a Nix daemon, use ssh://localhost",
        )
    return CannotConnect(
        address.name, _said(_ending(evidence, command), said), f"try it by hand: {_byHand(address, command)}"
    )


def tooSlow(address: RemoteAddress, command: str, errors: bytes, seconds: float) -> CannotConnect:
    """
    The error for a remote that has not answered in time.

    @param errors: the last bytes of its standard error.
    """
    what = _said(f"no answer within {seconds:g} s", oneLine(errors))
    if address.via is Via.SOCKET:
        return CannotConnect(address.name, what, "see whether 'twistd nixserve' listens there, and its log")
    return CannotConnect(
        address.name, what, f"see whether the host is up and what the command does: {_byHand(address, command)}"
    )


def noProgram(address: RemoteAddress, program: str) -> CannotConnect:
    """The error for a program that this machine lacks."""
    advice = "install Nix, or add ?remote-program=/path/to/nix-store to the URL"
    if address.via is Via.OPENSSH:
        advice = "install OpenSSH's client, or add ?ssh-client=conch to the URL"
    return CannotConnect(address.name, f"there is no program '{program}' on this machine", advice)


def _ending(evidence: Evidence, command: str) -> str:
    reason = evidence.reason
    if reason is None:
        return f"the remote command '{command}' does not speak the protocol: {evidence.why}"
    if isinstance(reason, ProcessTerminated):
        how = f"was killed by signal {reason.signal}" if reason.signal else f"exited with status {reason.exitCode}"
        return f"the remote command '{command}' {how}"
    return f"the remote command '{command}' ended without an answer"


def _sshFailed(address: RemoteAddress, text: str, said: str) -> CannotConnect:
    known = f"ssh-keygen -R '{address.knownHostsName}'"
    if address.hostKey:
        known = "correct base64-ssh-public-host-key in the URL"
    advices = {
        "the host is unknown": "correct its name, or add it to DNS, /etc/hosts or ssh_config",
        "the connection was refused": f"start its SSH server, or write its port: ssh://{address.login}:PORT",
        "the host cannot be reached": f"see whether it is up: {_ssh(address)} true",
        "it shows another host key than the known one": f"if it really has a new one: {known}",
        "its host key is not known": f"check and accept it once: {_ssh(address)} true",
        "it refused all keys and ways to log in": (
            "add your public key to its authorized_keys, or choose another with ssh-key=FILE in the URL"
        ),
        "there is no such key to log in with": "correct ssh-key in the URL",
    }
    for pattern, what in _SSH_TEXTS:
        if re.search(pattern, text):
            if "IDENTIFICATION HAS CHANGED" in text:
                # A page of text, some of it about the temporary file with the key of the URL.
                said = " ".join(line for line in text.splitlines() if re.match(r"SHA256:|Host key ", line))
            return CannotConnect(address.name, _said(what, said), advices[what])
    return CannotConnect(address.name, _said("ssh failed", said), f"see where: {_ssh(address)} -v true")


_SSH_TEXTS = (
    (r"Could not resolve hostname", "the host is unknown"),
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|differs from the key for",
        "it shows another host key than the known one",
    ),
    (r"Host key verification failed|host key is known for", "its host key is not known"),
    (r"Identity file .* not accessible", "there is no such key to log in with"),
    (r"Permission denied|Too many authentication failures", "it refused all keys and ways to log in"),
    (r"Connection refused", "the connection was refused"),
    (r"No route to host|Network is unreachable|timed out", "the host cannot be reached"),
)
"""What OpenSSH 9.2 says (ssh.c, sshconnect.c, sshconnect2.c; misc.c), the first that fits."""


def oneLine(data: bytes) -> str:
    """Text of the other side, as one line without anything that a terminal would obey, its end if it is long."""
    lines = (line.strip() for line in data.decode("utf-8", "replace").splitlines())
    # ssh frames its warnings with @.
    kept = (line.strip("@ ") for line in lines if line.strip("@ "))
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(kept))
    return text if len(text) <= MAX_SHOWN else "…" + text[-MAX_SHOWN:]


def _said(what: str, said: str) -> str:
    return f"{what} ({said})" if said else what


def _with(text: str, errors: bytes) -> str:
    said = oneLine(errors)
    return f"'{text}'" + (f" and, as an error, '{said}'" if said else "")


def _ssh(address: RemoteAddress) -> str:
    port = "" if address.port is None else f" -p {address.port}"
    login = f"{address.user}@{address.host}" if address.user else address.host
    return f"ssh{port} {login}"


def _byHand(address: RemoteAddress, command: str) -> str:
    """A command line that shows a person the same."""
    return f"{command} </dev/null" if address.via is Via.CHILD else f"{_ssh(address)} {command} </dev/null"

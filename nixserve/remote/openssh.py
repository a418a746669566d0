"""
The system's C{ssh}: its arguments and its environment.

It brings what the user has set up: ssh_config, agents, jump hosts, security keys. Passphrases and unknown host keys it
asks about on the terminal, or with SSH_ASKPASS, as it does for Nix; where there is neither it fails with a message.
The arguments are like Nix's (Nix 2.36, src/libstore/ssh.cc), but what the URL says stands before C{NIX_SSHOPTS}: of an
option that is given twice, ssh takes the first (ssh_config(5)), so nothing there can undo the host key of a URL.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from nixserve.errors import UsageError
from nixserve.remote.address import RemoteAddress

__all__ = ["CONTROL_NONE", "knownHostsLine", "sshArguments", "sshEnvironment"]

CONTROL_NONE = "none"
"""A control path that is none: the connection is shared with nobody (ssh_config(5), ControlPath)."""

ALIVE_SECONDS = 15
"""How often ssh asks a silent host for a sign of life, unless C{NIX_SSHOPTS} says otherwise; three unanswered end the
connection. Without that a copy to a host that has vanished would wait for ever."""

_ALWAYS = (
    *("-x", "-a", "-T"),
    "-oControlMaster=no",
    # What an ssh_config may have for the same host when a person logs in there: forwarded ports, which a second
    # session could not have as well, and a command in place of ours.
    "-oClearAllForwardings=yes",
    "-oRemoteCommand=none",
)


def sshArguments(
    address: RemoteAddress,
    environ: Mapping[str, str],
    *,
    knownHosts: str = "",
    controlPath: str = CONTROL_NONE,
    options: Sequence[str] = (),
    command: str | None = None,
) -> list[str]:
    """
    Arguments of C{ssh}, the program's name first.

    @param environ: C{NIX_SSHOPTS} in it holds more options, split into words as a shell does (as Nix does from 2.26
        on; older ones split at blanks).
    @param knownHosts: a file with the host's key, if the URL has one.
    @param controlPath: socket of a master of ours. The user's own are never used: a session there would fail with
        theirs, and could outlive it.
    @param options: more of them, before everything else.
    @param command: for the shell there; C{None} for none.
    @raise UsageError: C{NIX_SSHOPTS} cannot be split.
    """
    words = ["ssh", *options, *_ALWAYS]
    if address.port is not None:
        words += ["-p", str(address.port)]
    if knownHosts:
        words += [
            f"-oUserKnownHostsFile={_quoted(knownHosts)}",
            "-oGlobalKnownHostsFile=/dev/null",
            "-oStrictHostKeyChecking=yes",
            # Keys that the host announces would be written to the file.
            "-oUpdateHostKeys=no",
        ]
    if address.sshKey:
        words += ["-i", address.sshKey]
    if address.compress:
        words.append("-C")
    words += [*_moreOptions(environ), f"-oServerAliveInterval={ALIVE_SECONDS}"]
    # Behind them, for unlike other options the last -S counts.
    words += ["-S", controlPath]
    # Nothing behind the dashes is an option, whatever it looks like.
    words += ["--", f"{address.user}@{address.host}" if address.user else address.host]
    return words if command is None else [*words, command]


def sshEnvironment(environ: Mapping[str, str]) -> dict[str, str]:
    """
    The environment of C{ssh}: that of the user, and a shell that ssh can run a ProxyCommand with, as with Nix from
    2.25 on.
    """
    return {**environ, "SHELL": "/bin/sh"}


def knownHostsLine(address: RemoteAddress) -> str:
    """
    The content of a known_hosts file with the host key of the URL. It holds for any name, because ssh asks for the
    one that ssh_config makes of the host; jump hosts are checked by an ssh of their own.
    """
    return f"* {address.hostKey}\n"


def _moreOptions(environ: Mapping[str, str]) -> list[str]:
    text = environ.get("NIX_SSHOPTS", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"NIX_SSHOPTS: cannot read '{text}': {str(error).lower()}") from error


def _quoted(path: str) -> str:
    """A file name as ssh_config has it: percent signs doubled, and in quotes for its blanks."""
    return '"' + os.fspath(path).replace("%", "%%") + '"'

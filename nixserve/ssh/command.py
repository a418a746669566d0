"""
Reads what a client asks an SSH endpoint to run. Knows C{nix-store --serve}, nothing else; runs nothing.

What real clients send: C{nix-store --serve --write}, with C{--store URI} added by C{remote-store}, and any
program name put in front by C{remote-program}, such as C{env NIX_REMOTE=x nix-store} (Nix 2.8 to 2.34, by
experiment). Up to Nix 2.19 the store URI is quoted for a shell, from 2.20 on it is not, so C{&} and C{?} come bare:
read here they are letters of the word, which is what the user meant.
"""

from __future__ import annotations

import re
import shlex
from collections import deque
from dataclasses import dataclass

from nixserve.errors import PolicyError, UsageError
from nixserve.protocol.policy import EVERYTHING, READ_ONLY, Policy

__all__ = ["MAX_COMMAND", "ServeCommand", "isDaemonCommand", "parseCommand"]

# A store URI is at most a few hundred characters; splitting words costs about a microsecond a character.
MAX_COMMAND = 4096
# How much of a refused command is repeated to the client.
_SHOWN = 120

_PROGRAMS = frozenset({"nix-store", "nixserve-store"})
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
# Nix 1.x's Perl scripts ended their command with 2>&4 (Nix 1.8, 1.11).
_REDIRECTION = re.compile(r"[0-9]*>&[0-9]+")

_ALLOWED = "this endpoint runs only 'nix-store --serve [--write] [--store URI]'"


@dataclass(frozen=True, slots=True)
class ServeCommand:
    """
    One C{nix-store --serve} command line.

    @ivar policy: the rights that it asks for.
    @ivar storeURI: the store that it names, or C{None} for whichever is served.
    """

    policy: Policy = READ_ONLY
    storeURI: str | None = None


def parseCommand(line: str) -> ServeCommand:
    """
    Read a command line with a shell's word rules: quotes and backslashes, but no expansion of any kind.

    Assignments before the program (C{X=y}, C{env X=y}) and C{exec} are dropped: a client chooses no
    environment here. So are C{--builders X} and C{--option NAME VALUE}, which clients may add to the server's
    command and which concern the settings of the machine that serves.

    @raise PolicyError: anything but C{[path/]nix-store|nixserve-store --serve [--write | --rights LIST]
        [--store URI]}; its text says what is allowed.
    """
    words = _split(line)
    _dropPrefix(words)
    if not words or _baseName(words.popleft()) not in _PROGRAMS:
        raise _refusal(line)
    return _parseArguments(words, line)


def isDaemonCommand(line: str) -> bool:
    """
    Does this start the other protocol, that of C{ssh-ng://} (C{nix-daemon --stdio}, C{nix daemon --stdio})?
    """
    try:
        words = _split(line)
    except PolicyError:
        return False
    _dropPrefix(words)
    if not words:
        return False
    program = _baseName(words[0])
    return program == "nix-daemon" or (program == "nix" and "daemon" in words)


def _split(line: str) -> deque[str]:
    if len(line) > MAX_COMMAND:
        raise PolicyError(f"the command is longer than {MAX_COMMAND} characters; {_ALLOWED}")
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise PolicyError(f"cannot read the command {_shown(line)}: {str(error).lower()}; {_ALLOWED}") from error
    return deque(word for word in words if not _REDIRECTION.fullmatch(word))


def _dropPrefix(words: deque[str]) -> None:
    """Drop C{exec}, C{env} and assignments, in any order, before the program."""
    while words and (words[0] == "exec" or _baseName(words[0]) == "env" or _ASSIGNMENT.fullmatch(words[0])):
        words.popleft()


def _parseArguments(words: deque[str], line: str) -> ServeCommand:
    serve = write = False
    rights: str | None = None
    store: str | None = None
    while words:
        word = words.popleft()
        if word == "--serve":
            serve = True
        elif word == "--write":
            write = True
        elif word == "--rights":
            rights = _argument(words, word, line)
        elif word == "--store":
            store = _argument(words, word, line)
        elif word == "--builders":
            _argument(words, word, line)
        elif word == "--option":
            _argument(words, word, line)
            _argument(words, word, line)
        else:
            raise _refusal(line)
    if not serve:
        raise _refusal(line)
    return ServeCommand(_policy(write, rights), store)


def _argument(words: deque[str], option: str, line: str) -> str:
    if not words:
        raise PolicyError(f"the option '{option}' lacks a value in {_shown(line)}; {_ALLOWED}")
    return words.popleft()


def _policy(write: bool, rights: str | None) -> Policy:
    if rights is None:
        return EVERYTHING if write else READ_ONLY
    if write:
        raise PolicyError("'--write' and '--rights' exclude each other: '--write' means all rights")
    try:
        return Policy.parse(rights)
    except UsageError as error:
        raise PolicyError(str(error)) from error


def _baseName(word: str) -> str:
    return word.rpartition("/")[2]


def _refusal(line: str) -> PolicyError:
    if isDaemonCommand(line):
        return PolicyError(
            "this endpoint speaks the protocol of 'nix-store --serve', not that of the Nix daemon: "
            "write the store URL with ssh:// instead of ssh-ng://"
        )
    return PolicyError(f"{_ALLOWED}, not {_shown(line)}")


def _shown(line: str) -> str:
    """The command, short and without anything that a terminal would obey."""
    short = line if len(line) <= _SHOWN else line[:_SHOWN] + "…"
    return ascii(short) if not short.isprintable() else f"'{short}'"

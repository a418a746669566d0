"""
Reads what a client asks an SSH endpoint to run, and what an operator forces it to. Knows C{nix-store --serve},
nothing else; runs nothing.

What real clients send: C{nix-store --serve --write}, with C{--store URI} added by C{remote-store}, and any
program name put in front by C{remote-program}, such as C{env NIX_REMOTE=x nix-store} (Nix 2.8 to 2.34, by
experiment). Up to Nix 2.19 the store URI is quoted for a shell, from 2.20 on it is not, so C{&} and C{?} come bare:
read here they are letters of the word, which is what the user meant. Hydra adds C{--builders ''}.

What a client adds to its own command beyond that is dropped: it chooses nothing here. What an operator adds to a forced
command may be meant as a restriction, so there each word is understood and obeyed, or the command is none.
"""

from __future__ import annotations

import re
import shlex
from collections import deque
from dataclasses import dataclass

from nixserve.codec.text import shownText
from nixserve.errors import PolicyError, UsageError
from nixserve.protocol.policy import EVERYTHING, READ_ONLY, Policy

__all__ = ["MAX_COMMAND", "ServeCommand", "isDaemonCommand", "parseCommand", "parseForced"]

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
    Read the command line of a client with a shell's word rules: quotes and backslashes, but no expansion of any kind.

    Assignments before the program (C{X=y}, C{env X=y}), C{exec} and redirections are dropped, and so are
    C{--builders X} and C{--option NAME VALUE}, which are the settings of the machine that serves.

    @raise PolicyError: anything but C{[path/]nix-store|nixserve-store --serve [--write | --rights LIST]
        [--store URI]}, each at most once; its text says what is allowed.
    """
    words = deque(word for word in _split(line) if not _REDIRECTION.fullmatch(word))
    _dropPrefix(words)
    return _Arguments(line).read(words)


def parseForced(line: str) -> ServeCommand:
    """
    Read a forced command, or the arguments of a program, which somebody meant as they stand: as L{parseCommand}, but
    nothing is dropped. Allowed besides are C{exec} before it, and C{--builders ''}, since no builds are passed on.

    @raise PolicyError: it holds something that is not obeyed here.
    """
    words = _split(line)
    if words and words[0] == "exec":
        words.popleft()
    if words and (_ASSIGNMENT.fullmatch(words[0]) or _baseName(words[0]) == "env"):
        raise PolicyError(f"{_shown(words[0])} before the program is not obeyed here, and might be a restriction")
    return _Arguments(line, isForced=True).read(words)


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
    return deque(words)


def _dropPrefix(words: deque[str]) -> None:
    """Drop C{exec}, C{env} and assignments, in any order, before the program."""
    while words and (words[0] == "exec" or _baseName(words[0]) == "env" or _ASSIGNMENT.fullmatch(words[0])):
        words.popleft()


class _Arguments:
    """
    The words of one command line from the program on.
    """

    def __init__(self, line: str, isForced: bool = False) -> None:
        self._line = line
        self._isForced = isForced
        # What has been given, each with its value if it takes one.
        self._given: dict[str, str] = {}

    def read(self, words: deque[str]) -> ServeCommand:
        """
        @raise PolicyError: they are not what is allowed.
        """
        if not words or _baseName(words.popleft()) not in _PROGRAMS:
            raise _refusal(self._line)
        while words:
            self._readOption(words.popleft(), words)
        if "--serve" not in self._given:
            raise _refusal(self._line)
        return ServeCommand(_policy("--write" in self._given, self._given.get("--rights")), self._given.get("--store"))

    def _readOption(self, option: str, words: deque[str]) -> None:
        if option in ("--serve", "--write"):
            self._give(option, "")
        elif option in ("--rights", "--store"):
            self._give(option, self._value(option, words))
        elif option == "--builders":
            if self._value(option, words) and self._isForced:
                raise PolicyError("'--builders' is not obeyed here unless its value is empty: no builds are passed on")
        elif option == "--option" and not self._isForced:
            self._value(option, words)
            self._value(option, words)
        elif option == "--option":
            raise PolicyError("'--option' is not obeyed here, and might be a restriction")
        else:
            raise _refusal(self._line)

    def _give(self, option: str, value: str) -> None:
        if option in self._given:
            raise PolicyError(f"'{option}' is given twice in {_shown(self._line)}")
        self._given[option] = value

    def _value(self, option: str, words: deque[str]) -> str:
        if not words:
            raise PolicyError(f"the option '{option}' lacks a value in {_shown(self._line)}; {_ALLOWED}")
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


def _shown(text: str) -> str:
    """Somebody's words, short and without anything that a terminal would obey."""
    return f"'{shownText(text, _SHOWN)}'"

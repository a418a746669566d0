"""
Machines files: which machines take builds, and what they are good for.

The grammar is that of Nix's setting C{builders} (Nix 2.8 to 2.36, src/libstore/machines.cc): entries end with a line
or at C{;}, a C{#} begins a comment, C{@FILE} stands for the entries of a file. Where releases differ, the newer one is
followed: a C{;} in a comment is part of the comment (2.29), and speed factors are fractions (2.20). Blanks before C{@}
and C{#} mean nothing; Nix 2.8 takes the one for the name of a machine and fails on the other.

Pure: whoever calls reads the files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

from nixserve.codec.text import encodeText
from nixserve.errors import FormatError, UsageError
from nixserve.remote.address import RemoteAddress

__all__ = ["BUILDERS_SETTING", "Machine", "Machines", "parseMachines"]

BUILDERS_SETTING = "the setting 'builders'"
"""What errors call the text that C{@} leads from."""

_MAX_FILE_NAME = 255
"""Bytes of a file name on every file system that Nix runs on (NAME_MAX)."""

_MAX_JOBS = 2**32 - 1
"""Nix reads an unsigned integer."""

# Not what Python takes for blanks as well, such as U+00A0.
_BLANKS = " \t\r"
_WORD = re.compile(rf"[^{_BLANKS}]+")
_ALREADY_STORES = re.compile(r"(?:auto|daemon|local)(?:\?.*)?", re.DOTALL)
_FRACTION = re.compile(r"([+-]?)((?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)")

_COLUMNS = (
    "store URI",
    "systems",
    "SSH key",
    "number of jobs",
    "speed factor",
    "supported features",
    "mandatory features",
    "host key",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """
    One machine, as a line of a machines file describes it.

    @ivar uri: the first column, with C{ssh://} in front if it was only a host: the name of the machine for Nix, for
        people and for the files of slots.
    @ivar address: how to get there, with all that the columns say about it.
    @ivar systems: that it builds for.
    @ivar maxJobs: how many builds it takes at once; none if 0.
    @ivar speedFactor: how fast it is beside others; above 0.
    @ivar supportedFeatures: what builds may require of it.
    @ivar mandatoryFeatures: what builds must require to be let in; supported as well.
    """

    uri: str
    address: RemoteAddress
    systems: frozenset[str]
    maxJobs: int = 1
    speedFactor: float = 1.0
    supportedFeatures: frozenset[str] = frozenset()
    mandatoryFeatures: frozenset[str] = frozenset()

    def fileName(self, suffix: str) -> str:
        """
        A file name that stands for this machine, as Nix makes them: the URI with C{_} in place of C{/}, then C{suffix}.
        Where that is too long for a file, a hash stands for the URI, as in the upload locks of Nix 2.36; for the other
        files Nix fails there.
        """
        name = self.uri.replace("/", "_") + suffix
        if len(encodeText(name)) <= _MAX_FILE_NAME:
            return name
        digest = hashlib.md5(encodeText(self.uri), usedforsecurity=False).digest()
        return base64.b64encode(digest).decode().replace("/", "_") + suffix


@dataclass(frozen=True, slots=True)
class Machines:
    """
    What a machines file came to.

    @ivar usable: in the order of the file, which decides between equals.
    @ivar unusable: a line of explanation for each entry that Nix accepts but nobody here can reach: C{ssh-ng://},
        a store of this machine, a URL or key that is none.
    """

    usable: tuple[Machine, ...] = ()
    unusable: tuple[str, ...] = ()


def parseMachines(text: str, read: Callable[[str], str | None], defaultSystem: str) -> Machines:
    """
    Read the setting C{builders}.

    @param read: gives the text of the file with this name, as it stands behind C{@}; C{None} if there is none.
    @param defaultSystem: that of machines which do not say: Nix's setting C{system}.
    @raise FormatError: an entry breaks the rules, and Nix would fail on it as well; or a file includes itself, which
        Nix follows until it crashes. The text names file, line and column.
    """
    usable, unusable = [], []
    for where, words in _entries(text, read, ()):
        try:
            usable.append(_Entry(where, words).machine(defaultSystem))
        except UsageError as error:
            unusable.append(f"{where}, column 1: {error}")
    return Machines(tuple(usable), tuple(unusable))


def _entries(
    text: str, read: Callable[[str], str | None], including: tuple[str, ...]
) -> Iterator[tuple[str, list[str]]]:
    """
    The entries of a text, and of the files that it includes.

    @param including: the files that led here, this one last; none for the setting itself.
    @return: where each stands, and its columns.
    """
    source = f"'{including[-1]}'" if including else BUILDERS_SETTING
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{source}, line {number}"
        for entry in line.partition("#")[0].split(";"):
            words = _WORD.findall(entry)
            if words and words[0].startswith("@"):
                # A name may have blanks within.
                file = entry.strip(_BLANKS)[1:].strip(_BLANKS)
                if file in including:
                    raise FormatError(f"{where}, column 1: '{file}' is included by itself: take one '@{file}' out")
                included = read(file)
                if included is not None:
                    yield from _entries(included, read, (*including, file))
            elif words:
                yield where, words


class _Entry:
    """
    One entry, by columns: C{-} and what is not there are the same.

    @ivar where: file and line, or the setting, as errors name it.
    """

    def __init__(self, where: str, words: list[str]) -> None:
        self.where = where
        self._words = [word if word != "-" else "" for word in words[: len(_COLUMNS)]]
        self._words += [""] * (len(_COLUMNS) - len(self._words))

    def machine(self, defaultSystem: str) -> Machine:
        """
        @raise FormatError: Nix would not read on.
        @raise UsageError: Nix would read on; nobody here gets to such a machine.
        """
        systems, supported, mandatory = self._set(2), self._set(6), self._set(7)
        maxJobs, speedFactor = self._maxJobs(), self._speedFactor()
        self._checkHostKey()
        uri = self._uri()
        return Machine(
            uri,
            self._address(uri, supported | mandatory),
            systems or frozenset({defaultSystem}),
            maxJobs,
            speedFactor,
            supported,
            mandatory,
        )

    def _refuse(self, column: int, problem: str) -> FormatError:
        """What is wrong with a column, counted from 1."""
        return FormatError(f"{self.where}, column {column} ({_COLUMNS[column - 1]}): {problem}")

    def _set(self, column: int) -> frozenset[str]:
        return frozenset(filter(None, self._words[column - 1].split(",")))

    def _uri(self) -> str:
        uri = self._words[0]
        if not uri:
            raise self._refuse(1, "it is missing; write ssh://HOST")
        # Source: Nix 2.8, machines.cc, constructor of Machine.
        if "/" in uri or _ALREADY_STORES.fullmatch(uri):
            return uri
        return f"ssh://{uri}"

    def _maxJobs(self) -> int:
        text = self._words[3] or "1"
        if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > _MAX_JOBS:
            raise self._refuse(4, f"'{text}' is no whole number from 0 on")
        return int(text)

    def _speedFactor(self) -> float:
        text = self._words[4] or "1"
        number = _FRACTION.fullmatch(text)
        if not number or not math.isfinite(value := float(text)):
            raise self._refuse(5, f"'{text}' is no number")
        if value < 0:
            raise self._refuse(5, f"'{text}' is negative; write 1 for an average machine, 2 for one twice as fast")
        return value or 1.0

    def _checkHostKey(self) -> None:
        try:
            base64.b64decode(self._words[7], validate=True)
        except (ValueError, binascii.Error):
            raise self._refuse(
                8, "it is no base64; write what 'base64 -w0' makes of the host's /etc/ssh/ssh_host_ed25519_key.pub"
            ) from None

    def _address(self, uri: str, features: frozenset[str]) -> RemoteAddress:
        """The URI with what the columns say as parameters, which take precedence over the URI's own."""
        place, _, query = uri.partition("?")
        scheme = place.partition("://")[0] if "://" in place else ""
        if scheme not in ("ssh", "unix"):
            raise UsageError(f"'{place}' takes no builds over the serve protocol; write ssh://HOST")
        columns = {"system-features": " ".join(sorted(features))}
        if scheme == "ssh":
            columns |= {"ssh-key": self._words[2], "base64-ssh-public-host-key": self._words[7]}
        given = {name: value for name, value in columns.items() if value}
        kept = [pair for pair in query.split("&") if pair.partition("=")[0] not in given]
        added = [f"{name}={quote(encodeText(value), safe='')}" for name, value in given.items()]
        parameters = "&".join(filter(None, kept + added))
        return RemoteAddress.parse(f"{place}?{parameters}" if parameters else place)

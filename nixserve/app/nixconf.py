"""
Nix's own settings, for the few that count here too.

Source: Nix 2.8, src/libstore/globals.cc (C{loadConfFile}, C{getUserConfigFiles}) and src/libutil/config.cc
(C{AbstractConfig::applyConfig}); nix.conf(5). What comes later wins: the file of the machine, those of the user
with the most important one last, then C{NIX_CONFIG}.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Final

from nixserve.errors import UsageError

__all__ = ["NixConf"]

_MAX_INCLUDES: Final = 32
"""Files that include each other. Real Nix has no limit, and dies of a circle."""

_BOOLEANS: Final = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class NixConf:
    """
    What is set. Of settings that nobody asks for nothing is judged: Nix does that.
    """

    def __init__(self, values: Mapping[str, tuple[str, str]]) -> None:
        """
        @param values: for each name its value, and where that stands.
        """
        self._values = values

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> NixConf:
        """
        Read the files, as the Nix of this user does. Blocks on the disk. A file that is not there, or not for this user
        to read, says nothing.

        @raise UsageError: an included file is missing, or includes go in a circle.
        """
        values: dict[str, tuple[str, str]] = {}
        for path in _files(environ):
            values |= _parse(_readFile(path) or "", path, 0)
        return cls(values | _parse(environ.get("NIX_CONFIG", ""), "NIX_CONFIG", 0))

    def boolean(self, name: str, default: bool) -> bool:
        """
        A setting that is true or false.

        @raise UsageError: it is neither.
        """
        if name not in self._values:
            return default
        value, place = self._values[name]
        if value not in _BOOLEANS:
            raise UsageError(f"{place}: the value of '{name}' is '{value}'; it must be true or false")
        return _BOOLEANS[value]


def _files(environ: Mapping[str, str]) -> Iterator[str]:
    """The files that may be there, the most important one last."""
    yield f"{environ.get('NIX_CONF_DIR') or '/etc/nix'}/nix.conf"
    if environ.get("NIX_USER_CONF_FILES"):
        users = environ["NIX_USER_CONF_FILES"].split(":")
    else:
        home = environ.get("XDG_CONFIG_HOME") or f"{environ.get('HOME') or ''}/.config"
        directories = [home, *(environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")]
        users = [f"{directory}/nix/nix.conf" for directory in directories]
    yield from reversed(users)


def _parse(text: str, place: str, depth: int) -> dict[str, tuple[str, str]]:
    values: dict[str, tuple[str, str]] = {}
    for line in text.split("\n"):
        words = line.partition("#")[0].split()
        if len(words) == 2 and words[0] in ("include", "!include"):
            values |= _include(words, place, depth + 1)
        elif len(words) > 1 and words[1] == "=":
            values[words[0]] = (" ".join(words[2:]), place)
    return values


def _include(words: list[str], place: str, depth: int) -> dict[str, tuple[str, str]]:
    path = os.path.join(os.path.dirname(place), words[1])
    if depth > _MAX_INCLUDES:
        raise UsageError(f"{place}: files that include each other are nested too deep; is '{path}' one of them?")
    text = _readFile(path)
    if text is None and words[0] == "include":
        raise UsageError(f"{place}: the included file '{path}' cannot be read")
    return _parse(text or "", path, depth)


def _readFile(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read()
    except OSError:
        return None

"""
What people write on command lines: store paths by their many names, and which outputs of which derivation.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

from nixserve.codec.storepath import StoreDir, StorePath, checkName
from nixserve.errors import FormatError, UsageError

__all__ = ["Target", "toStorePath"]

MAX_LINKS: Final = 40
"""Symbolic links on the way to the store, as many as Linux follows (path_resolution(7))."""


def toStorePath(storeDir: StoreDir, text: str) -> StorePath:
    """
    The object that C{text} names: it, a file in it, or what symbolic links outside the store lead to. Links within the
    store are part of what is there, so none is followed; nor need the store be there: it may be elsewhere.

    @raise FormatError: it names none.
    """
    place: str | None = text
    if not storeDir.isInStore(text):
        place = os.path.abspath(text)
        for _ in range(MAX_LINKS):
            if place is None or storeDir.isInStore(place):
                break
            place = _followFirst(place)
    return storeDir.toStorePath(text if place is None else place)


def _followFirst(path: str) -> str | None:
    """
    @param path: absolute, without dots.
    @return: the same place, one symbolic link nearer; C{None} if there is none on the way.
    """
    directory = "/"
    components = path.split("/")[1:]
    for number, component in enumerate(components, 1):
        place = os.path.join(directory, component)
        if os.path.islink(place):
            return os.path.normpath(os.path.join(directory, os.readlink(place), *components[number:]))
        directory = place
    return None


@dataclass(frozen=True, slots=True)
class Target:
    """
    What is to be built.

    @ivar drvPath: a derivation.
    @ivar outputs: the names of its outputs that are wanted; C{None} for all.
    """

    drvPath: StorePath
    outputs: frozenset[str] | None

    @classmethod
    def parse(cls, storeDir: StoreDir, text: str) -> Target:
        """
        Read C{DRV}, C{DRV!out,dev} or C{DRV^out,dev}, the last two with C{*} for all outputs.

        @param text: DRV is a .drv file in the store, or leads to one as for L{toStorePath}.
        @raise UsageError: it is none.
        """
        place, outputs = text, None
        # Neither may stand in the name of an object.
        if not os.path.lexists(text) and (match := re.fullmatch(r"(.*)[!^]([^!^/]*)", text, re.S)):
            place, outputs = match[1], None if match[2] == "*" else _outputNames(text, match[2])
        try:
            drvPath = toStorePath(storeDir, place)
        except FormatError as e:
            raise UsageError(f"{e}; give a .drv file, as nix-instantiate prints them") from e
        if not drvPath.isDerivation:
            raise UsageError(f"'{drvPath}' is no derivation; give a .drv file, as nix-instantiate prints them")
        return cls(drvPath, outputs)


def _outputNames(text: str, names: str) -> frozenset[str]:
    try:
        for name in names.split(","):
            checkName(name)
    except FormatError as e:
        raise UsageError(f"'{text}': {e}; write DRV!OUTPUT,…") from e
    return frozenset(names.split(","))

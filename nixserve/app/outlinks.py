"""
Links to what was built, which keep it from the collector: C{result}, C{result-dev} and so on.

They are indirect roots, as C{nix-store --add-root} makes them (Nix 2.8, src/libstore/gc.cc, addPermRoot and
addIndirectRoot): a link to the object where the user wants it, and below C{gcroots/auto} a link to that link, called
after the hash of its place. Removing the user's link ends the root.

Blocking.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Mapping

from nixserve.codec import base32
from nixserve.codec.hashes import hashBytes
from nixserve.codec.storepath import StorePath
from nixserve.errors import StoreError
from nixserve.store.fileerrors import fileSystemErrors
from nixserve.store.layout import StoreLayout

__all__ = ["OutLinks"]


class OutLinks:
    """
    The links of one command.
    """

    def __init__(self, layout: StoreLayout, prefix: str) -> None:
        """
        @param layout: of the store that the outputs are in.
        @param prefix: the place of the first link.
        """
        self._layout = layout
        self._prefix = os.path.abspath(prefix)
        self._numbers: dict[StorePath, int] = {}

    def place(self, drvPath: StorePath, outputName: str) -> str:
        """
        Where the link to an output is, called as C{nix-build} does it: C{result}, C{result-dev}; for the next
        derivation C{result-2}, C{result-2-dev}.
        """
        number = self._numbers.setdefault(drvPath, len(self._numbers) + 1)
        name = self._prefix if number == 1 else f"{self._prefix}-{number}"
        return name if outputName == "out" else f"{name}-{outputName}"

    def check(self, drvPath: StorePath, outputNames: Collection[str]) -> None:
        """
        Before a build that may last for hours: may there be such links?

        @raise StoreError: something else is in the way, or one would be in the store.
        """
        for outputName in sorted(outputNames):
            self._check(self.place(drvPath, outputName))

    def make(self, drvPath: StorePath, outputs: Mapping[str, StorePath]) -> dict[str, str]:
        """
        Make links to valid outputs, which are temporary roots meanwhile.

        @param outputs: by name.
        @return: where the links are, by output name.
        @raise StoreError: one cannot be made.
        """
        places = {}
        for outputName, path in sorted(outputs.items()):
            place = self.place(drvPath, outputName)
            self._check(place)
            _link(place, path)
            auto = f"{self._layout.gcRootsDir}/auto"
            with fileSystemErrors(f"cannot create '{auto}'"):
                os.makedirs(auto, exist_ok=True)
            _link(f"{auto}/{base32.encode(hashBytes('sha1', os.fsencode(place)).digest)}", place)
            places[outputName] = place
        return places

    def _check(self, place: str) -> None:
        if self._layout.storeDir.isInStore(place):
            raise StoreError(f"the link '{place}' would be in the Nix store; choose another place with --out-link")
        if not os.path.lexists(place):
            return
        if not os.path.islink(place) or not self._layout.storeDir.isInStore(os.readlink(place)):
            raise StoreError(
                f"'{place}' is there already and is no link to a store path; choose another place with --out-link"
            )


def _link(place: str, target: str) -> None:
    """Make a symbolic link, in place of another if there is one."""
    temporary = f"{place}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    with fileSystemErrors(f"cannot create the link '{place}'"):
        os.symlink(target, temporary)
        try:
            os.rename(temporary, place)
        except BaseException:
            os.unlink(temporary)
            raise

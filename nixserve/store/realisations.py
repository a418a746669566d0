"""
What is recorded about outputs whose paths were not known before they were built.

Nix has a table of its own for them, which is there once its experimental feature C{ca-derivations} was on (Nix 2.8,
src/libstore/ca-specific-schema.sql); a Nix that has asked for such a build looks there for what came of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from nixserve.codec.buildresult import Realisation
from nixserve.errors import StoreError
from nixserve.store.database import Database

__all__ = ["registerRealisations"]

_TABLE = "select 1 from sqlite_master where type = 'table' and name = 'Realisations'"

_KNOWN = "select 1 from Realisations where drvPath = ? and outputName = ?"

_REGISTER = """
    insert into Realisations (drvPath, outputName, outputPath, signatures)
    select ?, ?, id, ? from ValidPaths where path = ?"""


def registerRealisations(database: Database, outputs: Mapping[str, Realisation]) -> None:
    """
    Record outputs, all or none. What is recorded already stays.

    @param outputs: by name, all of them valid.
    @raise Busy: others are writing to the database; call again.
    @raise StoreError: this store has no room for such.
    """
    with database.writing() as connection:
        if connection.execute(_TABLE).fetchone() is None:
            raise StoreError(
                "the store here has no table of realisations; have Nix make it: experimental-features = ca-derivations"
            )
        for name, output in sorted(outputs.items()):
            if connection.execute(_KNOWN, (output.drvHash, name)).fetchone() is None:
                signatures = " ".join(sorted(output.signatures))
                connection.execute(_REGISTER, (output.drvHash, name, signatures, output.outPath))

"""
L{nixserve.store.realisations}.
"""

import pytest

from nixserve.codec.buildresult import Realisation
from nixserve.errors import StoreError
from nixserve.store.realisations import registerRealisations
from nixserve.testing import addObject, makeInfo, makeNar
from tests.store.realisationtables import REALISATION_ROWS, REALISATIONS


def add(store, name):
    """A valid path."""
    nar = makeNar(name.encode())
    info = makeInfo(name, nar)
    addObject(store.openSession(), info, nar)
    return info.path


def rows(store):
    """What is recorded."""
    with store.database.writing() as connection:
        return connection.execute(REALISATION_ROWS).fetchall()


def test_registers(store):
    """Each output is recorded by its name; what is recorded about one already stays."""
    made, other = add(store, "made"), add(store, "other")
    with store.database.writing() as connection:
        connection.execute(REALISATIONS)
    registerRealisations(store.database, {"out": Realisation(made, "sha256:1")})
    outputs = {"out": Realisation(other, "sha256:1"), "dev": Realisation(other, "sha256:1")}
    registerRealisations(store.database, outputs)
    assert rows(store) == [("sha256:1", "out", str(made)), ("sha256:1", "dev", str(other))]


def test_noTable(store):
    """Where Nix has made no table nothing is recorded, and it is said how to have it made."""
    with pytest.raises(StoreError, match="experimental-features = ca-derivations"):
        registerRealisations(store.database, {"out": Realisation(add(store, "made"), "sha256:1")})

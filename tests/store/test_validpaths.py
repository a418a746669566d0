"""
L{nixserve.store.validpaths}: what is registered about paths.
"""

from dataclasses import replace

import pytest

from nixserve.codec.contentaddress import ContentAddress
from nixserve.codec.storepath import StorePath
from nixserve.errors import StoreError
from nixserve.store.api import InvalidPath
from nixserve.testing import makeInfo
from tests.store.infos import HELLO, A, B, C, D


def test_row(valid, foreign):
    """A row holds what Nix writes: full paths, base-16, signatures sorted, null for what there is not."""
    sigs = frozenset({"b:2", "a:1"})
    ca = ContentAddress.parse("fixed:r:sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw")
    full = makeInfo("full", HELLO, ca=ca, sigs=sigs, ultimate=True, deriver=StorePath(f"{A.path}.drv"))
    valid.registerValidPaths([replace(A, narSize=0), full])
    query = "select hash, registrationTime, deriver, narSize, ultimate, sigs, ca from ValidPaths where path = ?"
    digest = "sha256:1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13"
    assert foreign.execute(query, (A.path,)).fetchone() == (digest, 1_600_000_000, *[None] * 5)
    assert foreign.execute(query, (full.path,)).fetchone() == (
        digest,
        1_600_000_000,
        f"{A.path}.drv",
        120,
        1,
        "a:1 b:2",
        str(ca),
    )


def test_registerAgain(valid, foreign):
    """Registering again updates all but deriver and time, keeps the row, and takes no reference away."""
    drv = StorePath(f"{B.path}.drv")
    valid.registerValidPaths([A, replace(B, references=frozenset({A.path}), deriver=drv)])
    ids = foreign.execute("select id from ValidPaths order by id").fetchall()
    valid.registerValidPaths([replace(B, narSize=7, registrationTime=5, ultimate=True)])
    info = valid.queryPathInfos([B.path])[B.path]
    assert info == replace(B, references=frozenset({A.path}), deriver=drv, narSize=7, ultimate=True)
    assert foreign.execute("select id from ValidPaths order by id").fetchall() == ids


def test_registerSet(valid):
    """Within a set the order is free; a missing reference undoes all of it."""
    valid.registerValidPaths([replace(B, references=frozenset({A.path, B.path})), A])
    assert valid.queryPathInfos([B.path])[B.path].references == {A.path, B.path}
    with pytest.raises(InvalidPath) as caught:
        valid.registerValidPaths([C, replace(D, references=frozenset({C.path, makeInfo("missing", HELLO).path}))])
    assert caught.value.path == makeInfo("missing", HELLO).path
    assert valid.queryAllValidPaths() == {A.path, B.path}
    valid.registerValidPaths([])


def test_registerCycle(valid):
    """A cycle is refused; Nix 2.34 registers it and fails later."""
    with pytest.raises(StoreError, match="cycle"):
        valid.registerValidPaths(
            [replace(A, references=frozenset({B.path})), replace(B, references=frozenset({A.path}))]
        )
    assert valid.queryAllValidPaths() == set()


def test_registerWrongCA(valid):
    """A content address that does not give the path is not registered."""
    ca = ContentAddress.parse("fixed:r:sha256:1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s")
    with pytest.raises(StoreError, match="claims to be content-addressed but isn't"):
        valid.registerValidPaths([replace(A, ca=ca)])


def test_derivationOutputs(valid):
    """Outputs are known by derivation and by path, but only valid derivations count."""
    drv = makeInfo("x.drv", HELLO)
    valid.registerValidPaths([drv], {drv.path: {"out": A.path, "dev": B.path}})
    assert valid.queryDerivationOutputs(drv.path) == {"out": A.path, "dev": B.path}
    assert valid.queryDerivationOutputs(A.path) == {}
    assert valid.queryValidDerivers(A.path) == {drv.path}
    assert valid.queryClosure([drv.path], includeOutputs=True) == {drv.path}
    valid.registerValidPaths([C, replace(A, references=frozenset({C.path}))])
    assert valid.queryClosure([drv.path], includeOutputs=True) == {drv.path, A.path, C.path}
    valid.invalidatePath(drv.path)
    assert valid.queryValidDerivers(A.path) == set()


def test_invalidate(valid, foreign):
    """A path in use stays valid; referring to itself is no use. Ids are not used again."""
    valid.registerValidPaths([replace(A, references=frozenset({A.path})), replace(B, references=frozenset({A.path}))])
    assert valid.queryReferrers(A.path) == {A.path, B.path}
    with pytest.raises(StoreError, match=f"cannot delete path '{A.path}' because it is in use by '{B.path}'"):
        valid.invalidatePath(A.path)
    valid.invalidatePath(B.path)
    valid.invalidatePath(A.path)
    valid.invalidatePath(A.path)
    assert foreign.execute("select count(*) from Refs").fetchone() == (0,)
    valid.registerValidPaths([C])
    assert foreign.execute("select id from ValidPaths").fetchall() == [(3,)]


def test_tolerance(valid, foreign):
    """What Nix would not write but understands is read: empty texts and zeros."""
    valid.registerValidPaths([A])
    foreign.execute("update ValidPaths set deriver = '', narSize = null, ultimate = 0, sigs = '', ca = ''")
    assert valid.queryPathInfos([A.path]) == {A.path: replace(A, narSize=0)}
    sri = f"sha256-{A.narHash.base64}"
    foreign.execute("update ValidPaths set hash = ?, sigs = 'malformed'", (sri,))
    assert valid.queryPathInfos([A.path]) == {A.path: replace(A, narSize=0, sigs=frozenset({"malformed"}))}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("hash", "sha256:1"),
        ("hash", A.narHash.hex),
        ("hash", b"\0"),
        ("deriver", "x"),
        ("narSize", -1),
        ("narSize", "many"),
        ("registrationTime", "now"),
        ("ca", "fixed"),
        ("sigs", b"x"),
    ],
)
def test_malformedRow(valid, foreign, column, value):
    """A value that makes no sense is an error that names path and column; other paths are not affected."""
    valid.registerValidPaths([A, B])
    foreign.execute(f"update ValidPaths set {column} = ? where path = ?", (value, A.path))
    with pytest.raises(StoreError, match=f"column '{column}' of path '{A.path}'"):
        valid.queryPathInfos([A.path, B.path])
    assert valid.queryPathInfos([B.path]) == {B.path: B}


def test_malformedReference(valid, foreign):
    """So is a reference that is no path, which some versions of Nix let in."""
    valid.registerValidPaths([A, replace(B, references=frozenset({A.path}))])
    foreign.execute("update ValidPaths set path = ? where path = ?", (f"{A.path[:43]}-.-x", A.path))
    with pytest.raises(StoreError, match=f"column 'references' of path '{B.path}'"):
        valid.queryPathInfos([B.path])
    with pytest.raises(StoreError, match="malformed path"):
        valid.queryClosure([B.path])


def test_isAnyValid(valid):
    """One valid path is enough."""
    assert not valid.isAnyValid([])
    assert not valid.isAnyValid([A.path])
    valid.registerValidPaths([A])
    assert valid.isAnyValid([B.path, A.path, C.path])


def test_consistentReading(valid, database):
    """A question that needs several queries sees one state of the database."""
    valid.registerValidPaths([A])
    with database.reading() as connection:
        assert connection.execute("select count(*) from ValidPaths").fetchone() == (1,)
        valid.registerValidPaths([B])
        assert connection.execute("select count(*) from ValidPaths").fetchone() == (1,)
    assert len(valid.queryAllValidPaths()) == 2

"""
What sessions remember of derivations, and what of that they share.
"""

from dataclasses import replace

import pytest

from nixserve.codec.derivation import BadDerivation, Derivation, DerivationOutput, drvPathOf, outputPaths
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.store import adding, drvhashes
from nixserve.store.contents import derivationOutputs
from nixserve.store.drvhashes import DerivationMemo, DrvHashes

STORE = StoreDir()
OUT = StorePath("/nix/store/c0s0sinnjqcd858h2lnk879jcixgh3h0-x")


class Drvs(dict):
    """
    Derivations by path.

    @ivar read: which were looked up.
    """

    def __init__(self):
        self.read = []

    def make(self, platform, inputs=(), path=None):
        """Add one that is built with others, perhaps under a path that does not follow from it."""
        bare = Derivation(
            *("x", {"out": DerivationOutput(OUT)}, frozenset(), platform, "b", (), {"out": ""}),
            inputDrvs={drvPath: frozenset(["out"]) for drvPath in inputs},
        )
        paths = outputPaths(bare, self.__getitem__, STORE, {})
        drv = replace(bare, outputs={name: DerivationOutput(path) for name, path in paths.items()}, env=paths)
        path = path or drvPathOf(drv, STORE)
        self[path] = drv
        return path

    def chain(self, length):
        """The last of so many, each built with the one before."""
        path = self.make("first")
        for number in range(1, length):
            path = self.make(f"next{number}", [path])
        return path

    def check(self, path, memo):
        """Check one as a session does; give which were looked up for it."""
        self.read = []
        derivationOutputs(path, self._lookup, STORE, memo)
        return self.read

    def _lookup(self, path):
        self.read.append(path)
        return self[path]


@pytest.fixture
def drvs():
    """No derivations yet."""
    return Drvs()


def test_bounded(drvs, monkeypatch):
    """The hashes of so many derivations are remembered and no more, shared ones and others."""
    monkeypatch.setattr(drvhashes, "MAX_REMEMBERED", 3)
    memo = DerivationMemo()
    for number in range(10):
        drvs.check(drvs.make("top", [drvs.make(f"low{number}")]), memo)
        strange = drvs.make(f"strange{number}", path=StorePath(f"/nix/store/{number:032}-x.drv"))
        drvs.check(drvs.make("top", [strange]), memo)
        assert 0 < len(memo.shared.hashes) <= 3
        assert 0 < len(memo.own) <= 3


def test_shared(drvs):
    """What one session has found out no other has to read again."""
    shared = DrvHashes()
    top = drvs.chain(50)
    assert len(drvs.check(top, DerivationMemo(shared))) == 50
    assert drvs.check(top, DerivationMemo(shared)) == [top]
    above = drvs.make("above", [top])
    assert set(drvs.check(above, DerivationMemo(shared))) == {above, top}


def test_sharedIfRefused(drvs):
    """Nor is it read again for whoever sends one wrong derivation after the other."""
    shared = DrvHashes()
    top = drvs.chain(50)
    drvs[top] = replace(drvs[top], outputs={"out": DerivationOutput(OUT)}, env={"out": OUT})
    for expected in (50, 1):
        with pytest.raises(BadDerivation, match="incorrect output"):
            drvs.check(top, DerivationMemo(shared))
        assert len(drvs.read) == expected


def test_onlyCertaintiesAreShared(drvs):
    """
    A path that does not follow from the text may have another text tomorrow: neither its hash is shared nor what comes
    of it, not even if the session remembered it from before.
    """
    shared = DrvHashes()
    strange = StorePath(f"/nix/store/{0:032}-x.drv")
    middle = drvs.make("middle", [drvs.make("low", path=strange)])
    top = drvs.make("top", [middle])
    for memo in (DerivationMemo(shared), DerivationMemo(shared)):
        drvs.check(middle, memo)
        drvs.check(top, memo)
        # From its own memory.
        assert drvs.check(top, memo) == [top]
        assert shared.hashes == {}
    drvs.make("another", path=strange)
    with pytest.raises(BadDerivation, match="incorrect output"):
        drvs.check(top, DerivationMemo(shared))


def test_sessionsOfAStore(store, drvs, monkeypatch):
    """The sessions of a store share."""
    top = drvs.chain(20)
    session = store.openSession()
    for drv in drvs.values():
        session.addDerivation(drv)
    session.close()
    reads = []
    readDerivation = adding.readDerivation
    monkeypatch.setattr(adding, "readDerivation", lambda path, *rest: reads.append(path) or readDerivation(path, *rest))
    session = store.openSession()
    above = session.addDerivation(drvs[drvs.make("above", [top])])
    assert set(reads) == {above, top}
    assert session.queryValidPaths([above]) == {above}
    session.close()

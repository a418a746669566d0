"""
L{nixserve.store.memory}: the contract without a disk.
"""

import unittest

from nixserve.codec.storepath import StoreDir
from nixserve.store.memory import MemoryStore
from nixserve.testing import StoreContract, addObject, makeInfo, makeNar


class MemoryStoreTests(StoreContract, unittest.TestCase):
    """MemoryStore keeps the contract."""

    def makeStore(self):
        return MemoryStore()

    def collectGarbage(self, store):
        store.collectGarbage()


def test_collectGarbageTells():
    """The collector says what it dropped."""
    store = MemoryStore()
    session = store.openSession()
    nar = makeNar(b"x")
    info = makeInfo("x", nar)
    addObject(session, info, nar)
    assert store.collectGarbage() == set()
    session.close()
    assert store.collectGarbage() == {info.path}


def test_otherStoreDir():
    """A store may have another logical directory."""
    storeDir = StoreDir("/foo/store")
    store = MemoryStore(storeDir)
    nar = makeNar(b"x")
    info = makeInfo("x", nar, storeDir=storeDir)
    session = store.openSession()
    addObject(session, info, nar)
    assert session.queryValidPaths([info.path]) == {info.path}
    assert info.path.storeDir == "/foo/store"

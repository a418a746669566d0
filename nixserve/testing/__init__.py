"""
For our tests and those of our users: contract suites that an implementation runs, stores that record and fail when
told, and a client and a server joined in memory.

A suite is a mixin for L{unittest.TestCase}; pytest, trial and unittest run it::

    class MyStoreTests(StoreContract, unittest.TestCase):
        def makeStore(self) -> Store:
            return MyStore()
"""

from nixserve.testing.building import Built, Script, ScriptedBuilds, buildTrees
from nixserve.testing.contract import StoreContract
from nixserve.testing.fakestore import FakeStore
from nixserve.testing.joined import ImmediateWorkers, Joined, MemoryTransport, Pair
from nixserve.testing.objects import Executable, Tree, addObject, makeInfo, makeNar

__all__ = [
    "Built",
    "Executable",
    "FakeStore",
    "ImmediateWorkers",
    "Joined",
    "MemoryTransport",
    "Pair",
    "Script",
    "ScriptedBuilds",
    "StoreContract",
    "Tree",
    "addObject",
    "buildTrees",
    "makeInfo",
    "makeNar",
]

"""
For our tests and those of our users: contract suites that an implementation runs, stores that record and fail when
told, transports and workers that do what a test says, and a client and a server joined in memory.

A suite is a mixin for L{unittest.TestCase}; pytest, trial and unittest run it::

    class MyStoreTests(StoreContract, unittest.TestCase):
        def makeStore(self) -> Store:
            return MyStore()
"""

from nixserve.testing.building import Built, Script, ScriptedBuilds, buildTrees
from nixserve.testing.contract import StoreContract
from nixserve.testing.deferreds import result
from nixserve.testing.fakestore import FakeStore
from nixserve.testing.joined import Joined, Pair
from nixserve.testing.objects import Executable, Tree, addObject, makeInfo, makeNar
from nixserve.testing.transports import MemoryTransport, RecordingTransport
from nixserve.testing.workers import ImmediateWorkers, ManualWorkers

__all__ = [
    "Built",
    "Executable",
    "FakeStore",
    "ImmediateWorkers",
    "Joined",
    "ManualWorkers",
    "MemoryTransport",
    "Pair",
    "RecordingTransport",
    "Script",
    "ScriptedBuilds",
    "StoreContract",
    "Tree",
    "addObject",
    "buildTrees",
    "makeInfo",
    "makeNar",
    "result",
]

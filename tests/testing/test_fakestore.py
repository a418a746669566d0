"""
A store that records and fails.
"""

import pytest

from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.testing import FakeStore, addObject, makeInfo, makeNar


class TestFakeStore:
    """A store that records and fails."""

    def test_records(self):
        """Calls are recorded with their arguments, those on writers as well."""
        store = FakeStore()
        session = store.openSession()
        nar = makeNar(b"x")
        info = makeInfo("x", nar)
        addObject(session, info, nar)
        assert store.calls == [("openSession", ()), ("addToStore", (info,)), ("feed", (nar,)), ("finish", ())]
        assert store.names == ["openSession", "addToStore", "feed", "finish"]
        assert store.valid([info]) == [info]
        session.addToStore(makeInfo("y", nar)).abort()
        session.importPath().abort()
        assert store.names[4:] == ["addToStore", "abort", "importPath", "abort"]
        session.queryClosure([], includeOutputs=True)
        assert store.calls[-1] == ("queryClosure", ([], True))
        session.close()
        store.close()

    def test_fails(self):
        """A call fails as often as was said, at the one that was said."""
        store = FakeStore()
        store.fail("queryValidPaths", None, Busy("a lock"), StoreError("no"))
        session = store.openSession()
        assert session.queryValidPaths([]) == set()
        with pytest.raises(Busy):
            session.queryValidPaths([])
        with pytest.raises(StoreError, match="no"):
            session.queryValidPaths([])
        assert session.queryValidPaths([]) == set()

    def test_sessions(self):
        """Sessions are remembered; one that cannot be opened is none."""
        store = FakeStore()
        store.fail("openSession", None, StoreError("no such store"))
        session = store.openSession()
        with pytest.raises(StoreError, match="no such store"):
            store.openSession()
        assert store.sessions == [session]

    def test_madeUpNars(self):
        """A NAR may be made up, of a path that need not be valid; its chunks are counted, and one may fail."""
        store = FakeStore()
        path = makeInfo("x", b"").path
        store.madeUp[path] = [b"a", b"b", OSError("the disk")]
        session = store.openSession()
        for chunks in (session.narFromPath(path), session.narsFromPaths([path])):
            assert [next(chunks), next(chunks)] == [b"a", b"b"]
        assert list(session.narsFromPaths([])) == []
        store.calls.pop()
        assert store.chunksRead == 4 and store.names == ["openSession", "narFromPath", "narsFromPaths"]
        with pytest.raises(OSError, match="the disk"):
            next(chunks)

"""
A client and a server without a connection.
"""

import pytest
from twisted.internet.defer import Deferred

from nixserve.errors import NixServeError, RemoteError
from nixserve.protocol.copying import copyClosure
from nixserve.protocol.policy import READ_ONLY
from nixserve.protocol.workers import Door
from nixserve.store.api import Busy
from nixserve.store.memory import MemoryStore
from nixserve.testing import FakeStore, ImmediateWorkers, Joined, makeInfo, makeNar


class TestJoined:
    """A client and a server without a connection."""

    @pytest.mark.parametrize("piece", [1, 1 << 20])
    def test_conversation(self, piece):
        """Whatever is asked is answered, however bytes are cut."""
        store = FakeStore()
        info = store.add("x", b"hello")
        joined = Joined(store, piece=piece)
        assert joined.result(joined.client.queryValidPaths([info.path])) == {info.path}
        assert joined.result(joined.client.ready) == 0x208
        joined.result(joined.client.close())
        assert joined.pair.over and joined.server.ended.called

    def test_nothingMovesByItself(self):
        """Nothing happens before it is said, and each turn is one step."""
        joined = Joined()
        asked = joined.client.queryValidPaths([])
        assert not asked.called
        with pytest.raises(AssertionError, match="there is no result"):
            joined.result(Deferred())
        assert asked.called and not joined.turn()

    def test_emptyStore(self):
        """Without a store there is an empty one."""
        joined = Joined()
        assert isinstance(joined.store, MemoryStore)

    def test_standardError(self):
        """What the server says arrives, and is in the error."""
        heard = []
        joined = Joined(policy=READ_ONLY, onError=heard.append)
        info = makeInfo("x", makeNar(b"x"))
        door = Door(ImmediateWorkers(joined.clock))
        with pytest.raises(RemoteError, match=r"^memory: .*importing paths is not allowed"):
            joined.result(joined.client.addToStoreNar(info, door, lambda: iter([makeNar(b"x")])))
        assert joined.said == b"".join(heard) == b"error: importing paths is not allowed\n"

    @pytest.mark.parametrize("turns", range(5))
    def test_cut(self, turns):
        """At whatever moment the connection breaks, both ends hear of it, and what was asked fails."""
        joined = Joined()
        joined.client.ready.addErrback(lambda _: None)
        asked = [joined.client.queryClosure([makeInfo("x", b"").path]), joined.client.queryValidPaths([])]
        for _ in range(turns):
            joined.turn()
        joined.cut()
        for deferred in asked:
            with pytest.raises(NixServeError):
                joined.result(deferred)
        assert joined.server.ended.called and joined.client.ended.called

    def test_serverEnds(self):
        """The server may end the session, too."""
        joined = Joined()
        joined.result(joined.client.ready)
        asked = joined.client.queryValidPaths([])
        joined.server.stop()
        with pytest.raises(RemoteError, match="the server is being stopped"):
            joined.result(asked)

    def test_time(self):
        """Time passes when it is told to: a lock is waited for on the clock."""
        store = FakeStore()
        store.fail("addTempRoots", Busy("a collector", 5.0))
        joined = Joined(store)
        asked = joined.client.queryValidPaths([])
        joined.advance(4)
        assert not asked.called
        joined.advance(1)
        assert joined.result(asked) == frozenset()

    def test_backPressure(self):
        """A side that takes nothing stops the other one."""
        store = FakeStore()
        info = store.add("x", bytes(10_000_000))
        joined = Joined(store)
        joined.result(joined.client.ready)
        joined.pair.clientSide.pauseProducing()
        pieces = []
        dumped = joined.client.dumpStorePath(info.path, pieces.append)
        joined.flush()
        assert pieces == [] and 0 < len(joined.pair.serverSide.written) < 2_000_000
        joined.pair.clientSide.resumeProducing()
        joined.result(dumped)
        assert b"".join(pieces) == makeNar(bytes(10_000_000))

    def test_copying(self):
        """A copy between a store of the test's and the served one."""
        here, there = FakeStore(), FakeStore()
        first = here.add("first", b"1")
        second = here.add("second", b"2", [first.path])
        joined = Joined(there)
        copied = joined.result(copyClosure(joined.session(here), joined.client, [second.path]))
        assert [info.path for info in copied.infos] == [first.path, second.path]
        assert len(there.valid([first, second])) == 2

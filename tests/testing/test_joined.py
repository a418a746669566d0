"""
L{nixserve.testing}: what users' tests stand on does what it says.
"""

import pytest
from twisted.internet.defer import Deferred

from nixserve.codec.buildresult import BuildResult, BuildStatus
from nixserve.codec.derivation import BasicDerivation, Derivation, DerivationOutput, drvPathOf, outputPaths, unparse
from nixserve.codec.hashes import hashBytes
from nixserve.codec.storepath import StoreDir
from nixserve.errors import NixServeError, RemoteError, StoreError
from nixserve.protocol.copying import copyClosure
from nixserve.protocol.policy import READ_ONLY
from nixserve.protocol.workers import Door
from nixserve.store.api import Busy
from nixserve.store.memory import MemoryStore
from nixserve.testing import Built, FakeStore, ImmediateWorkers, Joined, addObject, buildTrees, makeInfo, makeNar

STORE_DIR = StoreDir()


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


def basic(name):
    """A derivation with known output, and its path."""
    draft = BasicDerivation(name, {"out": DerivationOutput(None)}, frozenset(), "x", "/bin/sh", (), {"out": ""})
    out = STORE_DIR.makeOutputPath("out", hashBytes("sha256", unparse(draft, maskOutputs=True)), name)
    drv = BasicDerivation(name, {"out": DerivationOutput(out)}, frozenset(), "x", "/bin/sh", (), {"out": str(out)})
    return drvPathOf(drv, STORE_DIR), drv, out


class TestBuilds:
    """Builds that a function answers."""

    def script(self, drvPath, drv):
        """A builder that writes the name of what it builds."""
        return buildTrees(drvPath, drv, {"out": drv.name.encode()}, b"building\n")

    def test_buildDerivation(self):
        """The result, the log and the output are what the function says; a second time there is nothing to build."""
        joined = Joined(build=self.script)
        drvPath, drv, out = basic("x")
        built = joined.result(joined.client.buildDerivation(drvPath, drv))
        assert built.status == BuildStatus.BUILT and built.builtOutputs["out"].outPath == out
        assert joined.said == b"building\n"
        pieces = []
        joined.result(joined.client.dumpStorePath(out, pieces.append))
        assert b"".join(pieces) == makeNar(b"x")
        again = joined.result(joined.client.buildDerivation(drvPath, drv))
        assert again.status == BuildStatus.ALREADY_VALID and joined.said == b"building\n"

    def test_buildPaths(self):
        """Derivations in the store are built with what they need, which the function is asked for first."""
        store = FakeStore()
        firstPath, first, firstOut = basic("first")
        store.add("first.drv", unparse(first), path=firstPath)
        draft = Derivation(
            *("second", {"out": DerivationOutput(firstOut)}, frozenset(), "x", "/bin/sh", (), {"out": ""}),
            inputDrvs={firstPath: frozenset({"out"})},
        )
        known = Derivation(
            *("first", {"out": DerivationOutput(firstOut)}, frozenset(), "x", "/bin/sh", (), first.env), inputDrvs={}
        )
        out = outputPaths(draft, {firstPath: known}.__getitem__, STORE_DIR, {})["out"]
        second = Derivation(
            *("second", {"out": DerivationOutput(out)}, frozenset(), "x", "/bin/sh", (), {"out": str(out)}),
            inputDrvs=draft.inputDrvs,
        )
        secondPath = drvPathOf(second, STORE_DIR)
        store.add("second.drv", unparse(second), [firstPath], path=secondPath)
        asked = []

        def script(drvPath, drv):
            asked.append(drv.name)
            return self.script(drvPath, drv)

        joined = Joined(store, build=script)
        assert joined.result(joined.client.buildPaths([str(secondPath)])).status == 0
        assert asked == ["first", "second"]
        assert joined.result(joined.client.queryValidPaths([out])) == {out}

    def test_fails(self):
        """A build may fail, and a failure makes that of what needs it."""
        failed = BuildResult(BuildStatus.PERMANENT_FAILURE, "no")
        store = FakeStore()
        drvPath, drv, _ = basic("x")
        store.add("x.drv", unparse(drv), path=drvPath)
        joined = Joined(store, build=lambda drvPath, drv: Built(failed))
        assert joined.result(joined.client.buildDerivation(drvPath, drv)).status == BuildStatus.PERMANENT_FAILURE
        assert joined.result(joined.client.buildPaths([str(drvPath)])).status == 100

    def test_takesTime(self):
        """A build may take its time, and is given up with its client."""
        cancelled = []
        waiting = Deferred(cancelled.append)
        joined = Joined(build=lambda drvPath, drv: waiting)
        drvPath, drv, _ = basic("x")
        building = joined.client.buildDerivation(drvPath, drv)
        joined.flush()
        assert not building.called
        joined.cut()
        with pytest.raises(RemoteError):
            joined.result(building)
        assert cancelled == [waiting]

    def test_noBuilder(self):
        """Without a function nothing is built."""
        joined = Joined()
        drvPath, drv, _ = basic("x")
        with pytest.raises(RemoteError, match="this nixserve does not build"):
            joined.result(joined.client.buildDerivation(drvPath, drv))

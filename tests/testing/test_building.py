"""
Builds by a script.
"""

import pytest
from twisted.internet.defer import Deferred

from nixserve.codec.buildresult import BuildResult, BuildStatus
from nixserve.codec.derivation import Derivation, DerivationOutput, drvPathOf, outputPaths, unparse
from nixserve.errors import RemoteError
from nixserve.testing import Built, FakeStore, Joined, buildTrees, makeNar
from tests.derivations import STORE_DIR, derivation


def basic(name):
    """A derivation with known output, and its path."""
    drvPath, drv = derivation(name)
    return drvPath, drv, drv.outputs["out"].path


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

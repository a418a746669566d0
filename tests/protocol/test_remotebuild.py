"""What a remote build sends, asks for and fetches; client and server joined in memory, builds by a script."""

import pytest
from twisted.internet.defer import CancelledError, Deferred

from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.derivation import BasicDerivation, Derivation, DerivationOutput, drvPathOf
from nixserve.codec.messages import BuildOptions
from nixserve.codec.resolution import upstreamPlaceholder
from nixserve.errors import BuildError, FormatError, StoreError
from nixserve.protocol.copying import CopyProgress
from nixserve.protocol.remotebuild import buildRemotely, planRemoteBuild
from nixserve.testing import Built, makeInfo, makeNar
from tests.protocol.farm import STORE_DIR, Farm, addressed


def names(infos):
    """What was copied."""
    return {info.path.name for info in infos}


def test_onlyWhatTheBuilderReads():
    """Sources and the wanted outputs of dependencies travel, and no .drv; the outputs come back."""
    farm = Farm()
    source, other = farm.add(farm.local, "source"), farm.add(farm.local, "other")
    dep = farm.derivation("dep", sources=[other], outputs=("dev", "out"))
    top = farm.derivation("top", [(dep, ["out"])], [source])
    farm.output(farm.local, dep)
    build = farm.build(top)
    assert build.result.status == BuildStatus.BUILT and build.cause is None
    assert names(build.sent.infos) == {"source", "dep"} and names(build.fetched.infos) == {"top"}
    assert farm.built == [("top", {"source", "dep"})]
    assert build.outputs == {"out": farm.drvs[top].outputs["out"].path} and farm.valid(
        farm.local, *build.outputs.values()
    )
    assert not farm.remote.openSession().queryValidPaths([top, dep, other])
    build.raiseForStatus()


def test_nothingToDo():
    """Outputs that are there are fetched and nothing else happens."""
    farm = Farm()
    top = farm.derivation("top", sources=[farm.add(farm.local, "source")])
    path = farm.output(farm.remote, top)
    build = farm.build(top)
    assert (build.result.status, build.outputs) == (BuildStatus.ALREADY_VALID, {"out": path})
    assert farm.built == [] and build.sent.infos == () and names(build.fetched.infos) == {"top"}


def test_missingDependencies():
    """What is valid on neither side is built first, each once, in order, and is not fetched."""
    farm = Farm()
    low = farm.derivation("low", sources=[farm.add(farm.local, "source")])
    left, right = farm.derivation("left", [(low, ["out"])]), farm.derivation("right", [(low, ["out"])])
    there = farm.derivation("there")
    farm.output(farm.remote, there)
    top = farm.derivation("top", [(left, ["out"]), (right, ["out"]), (there, ["out"])])
    plan = farm.joined.result(planRemoteBuild(farm.client, top, farm.here))
    assert [path.name for path in plan.builds][::3] == ["low.drv", "top.drv"] and names(plan.sends.infos) == {"source"}
    assert farm.built == [] and not farm.valid(farm.remote, *(info.path for info in plan.sends.infos))
    begun = []
    build = farm.build(top, onBuild=begun.append)
    assert tuple(begun) == plan.builds
    assert farm.built[0] == ("low", {"source"}) and farm.built[3] == ("top", {"left", "right", "there"})
    assert sorted(farm.built[1:3]) == [("left", {"low"}), ("right", {"low"})]
    assert names(build.fetched.infos) == {"top"}


def test_outputsThatAreWanted():
    """Only the outputs asked for come back; one that does not exist is an error before anything happens."""
    farm = Farm()
    drv = farm.derivation("many", outputs=("dev", "doc", "out"))
    build = farm.build(drv, outputs=["dev", "out"])
    assert build.outputs.keys() == {"dev", "out"} and names(build.fetched.infos) == {"many-dev", "many"}
    with pytest.raises(FormatError, match="does not have the output 'bin'; it has dev, doc, out"):
        farm.build(drv, outputs=["bin"])


def test_withoutFetching():
    """The outputs may stay where they were built."""
    farm = Farm()
    build = farm.build(farm.derivation("top"), fetch=False)
    assert build.fetched is None and build.outputs and not farm.valid(farm.local, *build.outputs.values())


def test_derivationsThatAreInNoStore():
    """A derivation may be given as a value; a basic one brings all that is known about its inputs."""
    farm = Farm()
    source, there = farm.add(farm.local, "source"), farm.add(farm.remote, "there")
    output = DerivationOutput(makeInfo("basic", b"").path)
    basic = BasicDerivation(
        "basic", {"out": output}, frozenset([source, there]), "x86_64-linux", "/bin/sh", (), {"out": output.path}
    )
    build = farm.build(basic)
    assert build.drvPath == drvPathOf(basic, STORE_DIR) and farm.built == [("basic", {"source", "there"})]
    assert names(build.sent.infos) == {"source"}
    value = farm.drvs[farm.derivation("value", sources=[source])]
    assert farm.build(value).result.success


def test_pathsThatTheBuildTells():
    """Where the path of an output is not known before, it is what the build of it says, for whoever uses it too."""
    farm = Farm()
    floating = {"out": DerivationOutput(None, "r:sha256")}
    low = farm.write(Derivation("low", floating, frozenset(), "x86_64-linux", "/bin/sh", (), {"out": ""}, {}))
    placeholder = upstreamPlaceholder(low, "out")
    top = farm.write(
        Derivation(
            "top", floating, frozenset(), "x86_64-linux", "/bin/sh", (placeholder,), {}, {low: frozenset(["out"])}
        )
    )
    nars = {name: makeNar(name.encode()) for name in ("low", "top")}
    infos = {name: addressed(name, nar) for name, nar in nars.items()}
    for name, info in infos.items():
        success = BuildResult(BuildStatus.BUILT, builtOutputs={"out": Realisation(info.path)})
        farm.answers[name] = Built(success, [(info, nars[name])])
    begun = []
    build = farm.build(top, onBuild=begun.append)
    assert farm.built == [("low", set()), ("top", {"low"})]
    assert begun[0] == low and begun[1] != top and build.drvPath == top
    assert build.outputs == {"out": infos["top"].path} and names(build.fetched.infos) == {"top"}


def test_missingSource():
    """An input that is nowhere is an error that names it and who wants it."""
    farm = Farm()
    nowhere = makeInfo("nowhere", b"").path
    output = DerivationOutput(makeInfo("basic", b"").path)
    basic = BasicDerivation("basic", {"out": output}, frozenset([nowhere]), "x86_64-linux", "/bin/sh", (), {})
    with pytest.raises(StoreError, match=rf"'{nowhere}', an input of '.*basic.drv', is valid neither here nor"):
        farm.build(basic)


def test_missingDerivation():
    """A .drv that would have to be built and is not here is an error that names it."""
    farm = Farm()
    with pytest.raises(StoreError, match=r"derivation '.*top.drv' is not in the store here"):
        farm.build(STORE_DIR.parse(f"{makeInfo('top.drv', b'').path}"))


FAILED = Built(BuildResult(BuildStatus.TIMED_OUT, "too slow"), log=b"working\n")


def test_failure():
    """A build that fails is a result, until somebody wants it to be an exception."""
    farm = Farm()
    farm.answers["top"] = FAILED
    build = farm.build(farm.derivation("top"))
    assert (build.result, build.outputs, build.fetched) == (FAILED.result, {}, None)
    with pytest.raises(BuildError, match="failed: too slow") as caught:
        build.raiseForStatus()
    assert caught.value.status == BuildStatus.TIMED_OUT and bytes(farm.joined.said) == b"working\n"


def test_failedDependency():
    """What depends on a build that failed is not begun; how that failed can be found out."""
    farm = Farm()
    farm.answers["low"] = FAILED
    low = farm.derivation("low")
    build = farm.build(farm.derivation("top", [(low, ["out"])]))
    assert build.result.status == BuildStatus.DEPENDENCY_FAILED and f"'{low}'" in build.result.errorMsg
    assert build.cause == FAILED.result and [name for name, _ in farm.built] == ["low"]


def test_cancel():
    """Cancelled it cuts the connection, and the build there is given up."""
    farm = Farm()
    cancelled = []
    farm.answers["top"] = Deferred(cancelled.append)
    building = buildRemotely(farm.client, farm.derivation("top"), farm.here, options=BuildOptions(keepFailed=True))
    farm.joined.flush()
    assert farm.built and not cancelled
    building.cancel()
    with pytest.raises(CancelledError):
        farm.joined.result(building)
    farm.joined.flush()
    assert cancelled and farm.joined.server.ended.called


class Collector(CopyProgress):
    """Has collectors run whenever it is known what is to be copied."""

    def __init__(self, *stores):
        self.stores = stores

    def planned(self, infos, present):
        """See L{CopyProgress}."""
        self.run()

    def run(self):
        """Whatever is no root, nor something's that is, goes."""
        for store in self.stores:
            store.collectGarbage()


def test_rootsOnBothSides():
    """What is used stays on both sides until the sessions end: the inputs here, inputs and outputs there."""
    farm = Farm()
    source, there = farm.add(farm.local, "source"), farm.add(farm.local, "there")
    assert farm.add(farm.remote, "there") == there
    low = farm.derivation("low")
    farm.output(farm.local, low)
    top = farm.derivation("top", [(low, ["out"])], [source, there])
    inputs = {source, farm.drvs[low].outputs["out"].path}
    collector = Collector(farm.local, farm.remote)
    build = farm.build(top, progress=collector, onBuild=lambda drvPath: collector.run())
    assert build.result.success and {info.path for info in build.sent.infos} == inputs
    collector.run()
    outputs = build.outputs.values()
    assert farm.valid(farm.remote, there, *inputs, *outputs) and farm.valid(farm.local, *inputs, *outputs)
    farm.joined.result(farm.client.close())
    farm.joined.result(farm.here.close())
    collector.run()
    for store in (farm.local, farm.remote):
        assert not store.openSession().queryValidPaths([there, *inputs, *outputs])


def test_questionsLock():
    """Whatever the remote is asked about stays there, and may be fetched from its substituters if that is wanted."""
    farm = Farm()
    low = farm.derivation("low", sources=[farm.add(farm.local, "source")])
    top = farm.derivation("top", [(low, ["out"])])
    asked, query = [], farm.client.queryValidPaths

    def queryValidPaths(paths, lock=False, substitute=False):
        asked.append((lock, substitute))
        return query(paths, lock, substitute)

    farm.client.queryValidPaths = queryValidPaths
    farm.build(top, substitute=True)
    # The outputs, the inputs of both derivations, what is to be sent; what is fetched, which is there.
    assert asked == [(True, True)] * 4 + [(True, False)]


def test_planTakesNothing():
    """A plan makes nothing a root here: a store that is only read takes none."""
    farm = Farm()
    source = farm.add(farm.local, "source")
    farm.joined.result(planRemoteBuild(farm.client, farm.derivation("top", sources=[source]), farm.here))
    farm.local.collectGarbage()
    assert not farm.valid(farm.local, source)

"""
Builds by a script instead of a builder: for whoever calls C{buildDerivation} and C{buildPaths}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from twisted.internet.defer import Deferred
from zope.interface import implementer

from nixserve.builder.plan import BuildPlan
from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.derivation import BasicDerivation
from nixserve.codec.messages import BuildDerivation, BuildPaths, BuildPathsResult
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.protocol.building import BuildClient, IBuilds
from nixserve.testing.objects import Tree, addObject, makeInfo, makeNar

__all__ = ["Built", "Script", "ScriptedBuilds", "buildTrees"]


@dataclass(frozen=True, slots=True)
class Built:
    """
    What came of a scripted build.

    @ivar result: what the client hears.
    @ivar objects: what is in the store then: infos and NARs, references first.
    @ivar log: whole lines.
    """

    result: BuildResult
    objects: Sequence[tuple[ValidPathInfo, bytes]] = ()
    log: bytes = b""


Script = Callable[[StorePath, BasicDerivation], "Built | Deferred[Built]"]
"""Called with the path of a derivation and what it says. A Deferred is a build that takes its time; it is cancelled
when nobody waits for it any more."""


def buildTrees(drvPath: StorePath, drv: BasicDerivation, trees: Mapping[str, Tree], log: bytes = b"") -> Built:
    """
    A build that succeeds.

    @param trees: what each output is, by its name. Their paths must be known beforehand.
    """
    objects = []
    for name, tree in trees.items():
        path = drv.outputs[name].path
        assert path is not None, "the path of this output is not known before the build"
        nar = makeNar(tree)
        objects.append((makeInfo(path.name, nar, path=path, deriver=drvPath), nar))
    outputs = {name: Realisation(info.path) for name, (info, _) in zip(trees, objects, strict=True)}
    return Built(BuildResult(BuildStatus.BUILT, timesBuilt=1, builtOutputs=outputs), objects, log)


@implementer(IBuilds)
class ScriptedBuilds:
    """
    Builds that a function answers.

    @ivar asked: the derivations that it was asked for, in order.
    """

    def __init__(self, script: Script) -> None:
        self.asked: list[StorePath] = []
        self._script = script

    def build(self, request: BuildDerivation, client: BuildClient) -> Deferred[BuildResult]:
        """See L{IBuilds.build}. The script is not asked for what is valid already."""
        return Deferred.fromCoroutine(self._build(request.drvPath, request.drv, client))

    def buildPaths(self, request: BuildPaths, client: BuildClient) -> Deferred[BuildPathsResult]:
        """See L{IBuilds.buildPaths}. One after the other."""
        return Deferred.fromCoroutine(self._buildPaths(request, client))

    async def _buildPaths(self, request: BuildPaths, client: BuildClient) -> BuildPathsResult:
        plan = await client.door.call(BuildPlan, client.session, request.targets)
        while planned := await client.door.call(plan.next, 1):
            (build,) = planned
            result = await self._build(build.drvPath, build.drv, client)
            await client.door.call(plan.finished, build.drvPath, result)
        return await client.door.call(plan.result)

    async def _build(self, drvPath: StorePath, drv: BasicDerivation, client: BuildClient) -> BuildResult:
        known = drv.knownOutputPaths
        await client.keep(known.values())
        valid = await client.door.call(client.session.queryValidPaths, list(known.values()))
        if len(valid) == len(drv.outputs):
            outputs = {name: Realisation(path) for name, path in known.items()}
            return BuildResult(BuildStatus.ALREADY_VALID, builtOutputs=outputs)
        self.asked.append(drvPath)
        answer = self._script(drvPath, drv)
        built = await answer if isinstance(answer, Deferred) else answer
        if built.log:
            client.listener(built.log)
        for info, nar in built.objects:
            await client.door.call(addObject, client.session, info, nar)
        return built.result

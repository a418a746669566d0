"""
Builds on a remote store that needs no .drv files: C{buildDerivation} carries the derivation, and only what its builder
may read travels, as far as it is not there.

The derivations of a store here are read to find out what that is. An input that is valid on neither side is built
there first, in the same session, whose roots keep inputs and outputs from the collector until the caller closes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from twisted.internet.defer import Deferred

from nixserve.codec.buildresult import BuildResult, BuildStatus
from nixserve.codec.derivation import BasicDerivation, Derivation, DerivationOutput, derivationName, drvPathOf
from nixserve.codec.messages import BuildOptions
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.resolution import InputOutputs, basicDerivation, mustResolve, resolve
from nixserve.codec.serve import batches
from nixserve.codec.storepath import StorePath
from nixserve.errors import BuildError, FormatError, RemoteError, StoreError
from nixserve.protocol.buildoutputs import KnownOutputs, outputsOf, promisedOutputs
from nixserve.protocol.client import ServeClient
from nixserve.protocol.copying import Copied, CopyProgress, copyClosure
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.store.api import InvalidPath

__all__ = ["RemoteBuildResult", "RemotePlan", "buildRemotely", "planRemoteBuild"]

_SILENT: Final = CopyProgress()
_DEFAULT_OPTIONS: Final = BuildOptions()
_NOTHING: Final = Copied((), 0)

_MAX_LOADED: Final = 256
"""Derivations that are read in one turn of a worker, and not kept."""


@dataclass(frozen=True, slots=True)
class RemotePlan:
    """
    What a remote build would do.

    @ivar builds: the derivations to be built there, dependencies first; the last is the one that was asked for. Empty
        if its outputs are there.
    @ivar sends: what would be copied there first.
    """

    builds: tuple[StorePath, ...]
    sends: Copied


@dataclass(frozen=True, slots=True)
class RemoteBuildResult:
    """
    What came of a remote build.

    @ivar drvPath: what was asked for.
    @ivar result: what came of that; if a dependency failed, L{BuildStatus.DEPENDENCY_FAILED}.
    @ivar cause: if a dependency failed, what came of that.
    @ivar outputs: the outputs asked for, by name; empty on failure.
    @ivar sent: what was copied there.
    @ivar fetched: what was copied here, or C{None} if nothing was to be.
    """

    drvPath: StorePath
    result: BuildResult
    outputs: Mapping[str, StorePath] = field(default_factory=dict)
    sent: Copied = _NOTHING
    fetched: Copied | None = None
    cause: BuildResult | None = None

    def raiseForStatus(self) -> None:
        """
        @raise BuildError: it failed.
        """
        if not self.result.success:
            raise BuildError(self.result.status, f"build of '{self.drvPath}' failed: {self.result.errorMsg}")


def planRemoteBuild(
    client: ServeClient,
    drv: StorePath | BasicDerivation,
    here: DeferredSession,
    *,
    drvPath: StorePath | None = None,
    outputs: Collection[str] | None = None,
    substitute: bool = False,
) -> Deferred[RemotePlan]:
    """
    What L{buildRemotely} would do now. Parameters and failures are as there.
    """

    async def plan() -> RemotePlan:
        building = _RemoteBuilder(client, here, substitute, roots=False)
        await building.explore(await building.root(drv, drvPath, outputs))
        return RemotePlan(tuple(goal.path for goal in building.order), await building.send(_SILENT, dryRun=True))

    return Deferred.fromCoroutine(plan())


def buildRemotely(
    client: ServeClient,
    drv: StorePath | BasicDerivation,
    here: DeferredSession,
    *,
    drvPath: StorePath | None = None,
    outputs: Collection[str] | None = None,
    fetch: bool = True,
    options: BuildOptions = _DEFAULT_OPTIONS,
    substitute: bool = False,
    progress: CopyProgress = _SILENT,
    onBuild: Callable[[StorePath], None] = lambda drvPath: None,
) -> Deferred[RemoteBuildResult]:
    """
    Build a derivation on a remote store. What its builder may read is copied there, if it is not there; its outputs
    come back. Outputs that are there are not built again.

    @param drv: the path of a .drv in the store here; or a derivation, whose input derivations, if it has any, are in
        the store here; or a BasicDerivation, whose inputs are in the store here or there.
    @param drvPath: what C{drv} is called, if it is no path; else that follows from it.
    @param outputs: names of the outputs that are wanted, or C{None} for all of them.
    @param fetch: whether they are to be copied here, with what they refer to.
    @param substitute: the remote shall try to fetch inputs from its own substituters before they are copied.
    @param onBuild: called with the path of each derivation when the remote is asked to build it; what comes on standard
        error from then on is its log.
    @return: fires with what came of it; a build that fails is a result as well. Fails with L{FormatError} if there is
        no such output, L{StoreError} if an input is on neither side and cannot be built, L{RemoteError} if the outputs
        that the remote tells of or gives are not those of the derivations, or as L{copyClosure} does.
        Cancelled it cuts the connection, and the remote kills the build.
    """

    async def build() -> RemoteBuildResult:
        building = _RemoteBuilder(client, here, substitute, roots=fetch)
        root = await building.root(drv, drvPath, outputs)
        await building.explore(root)
        sent = await building.send(progress)
        result = await building.build(options, onBuild)
        if not result.success:
            return RemoteBuildResult(root.path, result, sent=sent, cause=building.cause)
        found = root.wantedPaths()
        fetched = await building.fetch(found.values(), progress) if fetch else None
        return RemoteBuildResult(root.path, result, found, sent, fetched)

    return Deferred.fromCoroutine(build())


def _namesBefore(outputName: str) -> Iterator[str]:
    """What a derivation may be called one of whose outputs has this name: see
    L{nixserve.codec.storepath.outputPathName}."""
    yield outputName
    for match in re.finditer("-", outputName):
        yield outputName[: match.start()]


class _Goal:
    """
    A derivation of which something is wanted.

    @ivar wanted: names of the outputs.
    @ivar outputs: by name, those whose paths are known.
    """

    def __init__(self, path: StorePath, drv: BasicDerivation, wanted: Iterable[str]) -> None:
        self.path = path
        self.drv = drv
        self.wanted: set[str] = set()
        self.outputs = drv.knownOutputPaths
        self.want(wanted)

    def want(self, names: Iterable[str]) -> None:
        """
        @raise FormatError: there is no such output.
        """
        for name in names:
            if name not in self.drv.outputs:
                known = ", ".join(sorted(self.drv.outputs))
                raise FormatError(f"derivation '{self.path}' does not have the output '{name}'; it has {known}")
            self.wanted.add(name)

    @property
    def inputDrvs(self) -> Mapping[StorePath, frozenset[str]]:
        """The derivations whose outputs it uses."""
        return self.drv.inputDrvs if isinstance(self.drv, Derivation) else {}

    def wantedPaths(self) -> dict[str, StorePath]:
        """Where the wanted outputs are, all of which are known."""
        return {name: self.outputs[name] for name in sorted(self.wanted)}


class _RemoteBuilder:
    """
    One call of L{buildRemotely}.

    @ivar order: what is to be built, dependencies first.
    @ivar cause: what came of the dependency that failed.
    """

    cause: BuildResult | None = None

    def __init__(self, client: ServeClient, here: DeferredSession, substitute: bool, roots: bool) -> None:
        """
        @param roots: keep here what is to be sent. A store that is only read takes no roots, but then it cannot take
            outputs either.
        """
        self._client = client
        self._here = here
        self._substitute = substitute
        self._roots = roots
        self._drvs: dict[StorePath, Derivation] = {}
        self._goals: dict[StorePath, _Goal] = {}
        # What is valid here and must go there.
        self._sends: set[StorePath] = set()
        # What all these derivations say of their outputs, as far as the paths are known.
        self._known: dict[StorePath, DerivationOutput] = {}
        # What was asked for is made from these, and from what they refer to.
        self._origins: frozenset[StorePath] = frozenset()
        self.order: list[_Goal] = []

    async def root(
        self, drv: StorePath | BasicDerivation, drvPath: StorePath | None, outputs: Collection[str] | None
    ) -> _Goal:
        """The goal of the derivation that was asked for."""
        if isinstance(drv, StorePath):
            self._origins = frozenset({drv})
            drvPath, drv = drv, (await self._read([drv]))[drv]
        else:
            self._origins = drv.inputSrcs.union(drv.inputDrvs if isinstance(drv, Derivation) else ())
        self._learn(drv)
        return _Goal(drvPath or drvPathOf(drv, self._here.storeDir), drv, drv.outputs if outputs is None else outputs)

    # --- what is to be done -------------------------------------------------------------------------------

    async def explore(self, root: _Goal) -> None:
        """
        Find out what must be built and what must be sent, one question to each side for each level of dependencies.

        @raise StoreError: something is on neither side and cannot be built.
        """
        level = [] if await self._isThere(root) else [root]
        while level:
            for goal in level:
                self._goals[goal.path] = goal
            level = await self._next(level)
        self.order = self._sorted(root) if root.path in self._goals else []

    async def _isThere(self, goal: _Goal) -> bool:
        """Are the wanted outputs valid on the remote?"""
        if goal.wanted - goal.outputs.keys():
            return False
        wanted = set(goal.wantedPaths().values())
        return wanted <= await self._client.queryValidPaths(wanted, lock=True, substitute=self._substitute)

    async def _next(self, level: list[_Goal]) -> list[_Goal]:
        """
        @return: derivations that these depend on and that must be built themselves.
        """
        wanted: dict[StorePath, set[str]] = {}
        for goal in level:
            for path, names in goal.inputDrvs.items():
                wanted.setdefault(path, set()).update(names)
        inputs = [self._goals.get(path) or _Goal(path, drv, ()) for path, drv in (await self._read(wanted)).items()]
        for goal in inputs:
            goal.want(wanted[goal.path])
        sources = set[StorePath]().union(*(goal.drv.inputSrcs for goal in level))
        known = {path for goal in inputs for path in goal.outputs.values()} | sources
        there = await self._client.queryValidPaths(known, lock=True, substitute=self._substitute)
        if self._roots:
            await self._here.addTempRoots(known - there)
        here = await self._here.queryValidPaths(known - there)
        for source in sorted(sources - there - here):
            [user, *_] = [goal.path for goal in level if source in goal.drv.inputSrcs]
            raise StoreError(f"'{source}', an input of '{user}', is valid neither here nor in the remote store")
        self._sends |= sources & here
        missing = []
        for goal in inputs:
            found = [goal.outputs.get(name) for name in goal.wanted]
            if all(path in there or path in here for path in found):
                self._sends |= {path for path in found if path in here and path is not None}
            elif goal.path not in self._goals:
                missing.append(goal)
        return missing

    async def _read(self, paths: Collection[StorePath]) -> dict[StorePath, Derivation]:
        """
        Derivations of the store here.

        @raise StoreError: one is not there.
        """
        if new := sorted(set(paths) - self._drvs.keys()):
            self._drvs |= await self._load(new)
        return {path: self._drvs[path] for path in paths}

    async def _load(self, paths: Sequence[StorePath]) -> dict[StorePath, Derivation]:
        session = self._here.session

        def read() -> dict[StorePath, Derivation]:
            for path in sorted(set(paths) - session.queryValidPaths(paths)):
                raise StoreError(f"derivation '{path}' is not in the store here")
            return {path: session.readDerivation(path) for path in paths}

        found = await self._here.call(read)
        for drv in found.values():
            self._learn(drv)
        return found

    def _learn(self, drv: BasicDerivation) -> None:
        self._known |= promisedOutputs(drv, drv.knownOutputPaths)

    def _sorted(self, root: _Goal) -> list[_Goal]:
        """Dependencies first. A derivation's path depends on those of its inputs, so there are no cycles."""
        order: list[_Goal] = []
        seen = {root.path}
        stack = [(root, iter(sorted(root.inputDrvs)))]
        while stack:
            goal, inputs = stack[-1]
            for path in inputs:
                if path in self._goals and path not in seen:
                    seen.add(path)
                    other = self._goals[path]
                    stack.append((other, iter(sorted(other.inputDrvs))))
                    break
            else:
                stack.pop()
                order.append(goal)
        return order

    # --- doing it -----------------------------------------------------------------------------------------

    async def send(self, progress: CopyProgress, dryRun: bool = False) -> Copied:
        """Copy what the builds may read, all of it at once."""
        if not self._sends:
            return _NOTHING
        return await copyClosure(
            self._here, self._client, self._sends, substitute=self._substitute, dryRun=dryRun, progress=progress
        )

    async def build(self, options: BuildOptions, onBuild: Callable[[StorePath], None]) -> BuildResult:
        """
        Build one derivation after the other: a session does one thing at a time.

        @return: what came of the last one, or why it was not begun.
        """
        result = BuildResult(BuildStatus.ALREADY_VALID)
        for goal in self.order:
            drvPath, basic = await self._basic(goal)
            onBuild(drvPath)
            result = await self._client.buildDerivation(drvPath, basic, options)
            if not result.success:
                if goal is self.order[-1]:
                    return result
                self.cause = result
                reason = f"its dependency '{goal.path}' failed to build: {result.errorMsg}"
                return BuildResult(BuildStatus.DEPENDENCY_FAILED, reason)
            made = outputsOf(self._client.name, drvPath, basic, result, goal.wanted, self._here.storeDir)
            goal.outputs |= made
            self._known |= promisedOutputs(basic, made)
        return result

    async def fetch(self, paths: Iterable[StorePath], progress: CopyProgress) -> Copied:
        """
        Copy outputs here.

        @raise RemoteError: the remote has not got one, or what it has cannot be what a derivation says.
        """
        try:
            return await copyClosure(
                self._client, self._here, frozenset(paths), progress=progress, explain=self._explain
            )
        except InvalidPath as e:
            raise RemoteError(f"{self._client.name}: '{e.path}' is not there after the build") from e

    async def _explain(self, told: Mapping[StorePath, ValidPathInfo]) -> KnownOutputs:
        """
        What derivations say of what would come here. It is outputs of the one that was asked for and of those that it
        was made from, or its path proves its contents. Any other path a remote could have made up: what it gave for it
        would be valid here, unsigned, for whoever wants that path later.

        @raise RemoteError: something is neither.
        """
        storeDir = self._here.storeDir
        open_ = {path for path in told.keys() - self._known.keys() if not told[path].isContentAddressed(storeDir)}
        # Of sources that only the remote has nobody here knows what they bring along.
        if not open_ or self._origins - await self._here.queryValidPaths(self._origins):
            return self._known
        makers = await self._here.queryClosure(self._origins)
        called = {prefix for path in open_ for prefix in _namesBefore(path.name)}
        likely = sorted(path for path in makers if path.isDerivation and derivationName(path) in called)
        for batch in batches(likely, _MAX_LOADED):
            await self._load(batch)
        for path in sorted(open_ - self._known.keys()):
            raise RemoteError(
                f"{self._client.name or 'the remote'} says that what was built needs '{path}', which no derivation "
                "behind it makes, and whose contents do not give its path"
            )
        return self._known

    async def _basic(self, goal: _Goal) -> tuple[StorePath, BasicDerivation]:
        """
        @return: the derivation as it is sent, and its path: another one if paths of inputs had to be filled in.
        """
        if not isinstance(goal.drv, Derivation):
            return goal.path, goal.drv
        inputs = await self._inputs(goal.drv)
        kinds = {path: other.drv.kind() for path, other in inputs.items()}
        outputs: InputOutputs = {path: other.wantedPaths() for path, other in inputs.items()}
        if mustResolve(goal.drv, kinds):
            resolved = resolve(goal.drv, outputs, self._here.storeDir)
            goal.outputs |= resolved.knownOutputPaths
            return drvPathOf(resolved, self._here.storeDir), resolved
        paths = {outputs[path][name] for path, names in goal.drv.inputDrvs.items() for name in names}
        return goal.path, basicDerivation(goal.drv, goal.drv.inputSrcs | paths)

    async def _inputs(self, drv: Derivation) -> dict[StorePath, _Goal]:
        """The input derivations: those that were built, and those whose outputs were there."""
        others = await self._read([path for path in drv.inputDrvs if path not in self._goals])
        goals = {path: _Goal(path, other, drv.inputDrvs[path]) for path, other in others.items()}
        return {path: self._goals.get(path) or goals[path] for path in drv.inputDrvs}

"""
What must be built so that some paths are there, and in which order.

A L{BuildPlan} is a state machine without threads or clock: it says which builds can begin, is told how they ended,
and in the end what came of the whole. It asks the store what is valid; it builds nothing.

There is a I{goal} for each derivation of which an output is wanted and missing. A goal waits for those of its input
derivations, then is ready. Whatever outputs are wanted, a build makes all. Source: Nix 2.8, src/libstore/build
(C{DerivationGoal}, C{Worker}) and entry-points.cc; substitution is left out, as C{nix-store --serve} has it switched
off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from nixserve.codec.buildresult import BuildResult, exitStatus
from nixserve.codec.derivation import BasicDerivation, Derivation, derivationName
from nixserve.codec.messages import BuildPathsResult
from nixserve.codec.peertext import peerText
from nixserve.codec.resolution import basicDerivation, mustResolve, resolve
from nixserve.codec.storepath import StorePath
from nixserve.errors import FormatError, StoreError
from nixserve.store.api import Busy, StoreSession

__all__ = ["BuildPlan", "PlannedBuild", "missingDependency"]

#: Between the path of a derivation and the names of outputs in a target.
_SEPARATOR = "!"


@dataclass(frozen=True, slots=True)
class PlannedBuild:
    """
    One build that can begin.

    @ivar drvPath: what L{BuildPlan.finished} is to be called with.
    @ivar drv: the derivation. Its C{inputSrcs} are the closure of all that it uses if it had input derivations, else
        they are as it states them.
    """

    drvPath: StorePath
    drv: BasicDerivation


class _State(Enum):
    NEW = "not looked at"
    WAITING = "for its inputs"
    READY = "to be built"
    RUNNING = "handed out"
    DONE = "its wanted outputs are valid"
    FAILED = "they never will be"


@dataclass(slots=True, eq=False)
class _Goal:
    """
    A derivation of which something is wanted.

    @ivar wanted: the names of the outputs.
    @ivar drv: C{None} until it has been read, and for a derivation that is not valid.
    @ivar outputs: by name, those whose paths are known.
    @ivar waitees: goals that it waits for.
    @ivar waiters: goals that wait for it.
    @ivar error: why it failed.
    """

    path: StorePath
    wanted: set[str] = field(default_factory=set)
    wantsAll: bool = False
    drv: Derivation | None = None
    outputs: dict[str, StorePath] = field(default_factory=dict)
    state: _State = _State.NEW
    waitees: set[StorePath] = field(default_factory=set)
    waiters: set[StorePath] = field(default_factory=set)
    failedInputs: int = 0
    error: str = ""

    @property
    def over(self) -> bool:
        return self.state in (_State.DONE, _State.FAILED)

    @property
    def known(self) -> Derivation:
        assert self.drv is not None, "this goal was never expanded"
        return self.drv

    @property
    def wantedNames(self) -> Collection[str]:
        return self.known.outputs if self.wantsAll else self.wanted


class BuildPlan:
    """
    The plan for the targets of one BuildPaths. Calls must not overlap; each may block for as long as the store does.
    """

    def __init__(self, session: StoreSession, targets: Sequence[str], keepGoing: bool = False) -> None:
        """
        @param session: of the store; what matters to the plan stays there for as long as it is open.
        @param targets: C{<drv path>}, C{<drv path>!<output>,…}, or the path of anything else that must be valid. C{*}
            is no name here, unlike on a command line.
        @param keepGoing: after a failure, still build what does not depend on it.
        @raise FormatError: a target is not in the store directory.
        """
        self._session = session
        self._keepGoing = keepGoing
        self._goals: dict[StorePath, _Goal] = {}
        self._plainTargets: set[StorePath] = set()
        self._ready: set[StorePath] = set()
        #: Goals that have not been looked at since somebody wanted more of them.
        self._unexpanded: set[StorePath] = set()
        #: By the path that the build was handed out under, the goals that it serves.
        self._builds: dict[StorePath, list[_Goal]] = {}
        self._missing: set[StorePath] | None = None
        self._messages: list[str] = []
        self._fatal = ""
        self._result: BuildPathsResult | None = None
        self._failures: list[BuildResult] = []
        for target in targets:
            self._addTarget(target)
        self._targets = frozenset(self._goals)

    def next(self, limit: int | None = None) -> list[PlannedBuild]:
        """
        Which builds can begin now. Each is handed out once; L{finished} must be called for it.

        @param limit: how many at most.
        @return: by the name of the derivation, then by path, as Nix would take them.
        @raise Busy: a collector or another writer is at work; call again.
        @raise StoreError: the store cannot be read.
        """
        self._expandAll()
        planned: list[PlannedBuild] = []
        for path in sorted(self._ready, key=lambda path: (derivationName(path), path)):
            if self.over or (limit is not None and len(planned) >= limit):
                break
            goal = self._goals[path]
            try:
                build = self._prepare(goal)
            except Busy:
                if planned:
                    break
                raise
            goal.state = _State.RUNNING
            self._ready.discard(path)
            served = self._builds.setdefault(build.drvPath, [])
            if not served:
                planned.append(build)
            served.append(goal)
        return planned

    def finished(self, drvPath: StorePath, result: BuildResult) -> None:
        """
        A build that was handed out has ended.

        @param drvPath: of the L{PlannedBuild}.
        """
        for goal in self._builds.pop(drvPath, ()):
            if goal.over:
                continue
            if result.success:
                goal.outputs.update({name: output.outPath for name, output in result.builtOutputs.items()})
                self._done(goal)
            else:
                self._failures.append(result)
                self._fail(goal, result.errorMsg)

    @property
    def over(self) -> bool:
        """
        Whether nothing is left to do. What is being built then is in vain and should be cancelled.
        """
        if self._fatal:
            return True
        if self._missing is None:
            return False
        targets = [self._goals[path] for path in self._targets]
        if not self._keepGoing and (self._missing or any(goal.state is _State.FAILED for goal in targets)):
            return True
        return all(goal.over for goal in targets)

    def takeMessages(self) -> list[str]:
        """Lines for the log that were not taken yet: errors of goals that are no targets."""
        messages, self._messages = self._messages, []
        return messages

    def result(self) -> BuildPathsResult:
        """
        What came of it, when it is L{over}: status and text of C{nix-store -r}.
        """
        if self._result is None:
            assert self.over, "the plan is not over"
            self._result = self._conclude()
        return self._result

    def _conclude(self) -> BuildPathsResult:
        if self._fatal:
            return BuildPathsResult(1, _asError(self._fatal))
        targets = [self._goals[path] for path in sorted(self._targets)]
        errors = [goal.error for goal in targets if goal.state is _State.FAILED]
        # One that was given up for the sake of another's failure counts as failed, as in Nix.
        failed = sorted({goal.path for goal in targets if goal.state is not _State.DONE} | (self._missing or set()))
        if not failed:
            return BuildPathsResult()
        # What is missing without having been built is no build's failure.
        status = exitStatus(self._failures) or 1
        if len(failed) == 1 and errors:
            return BuildPathsResult(status, _asError(errors[0]))
        self._messages += map(_asError, errors)
        return BuildPathsResult(status, _asError(f"build of {_quoted(failed)} failed"))

    # Targets and goals.

    def _addTarget(self, target: str) -> None:
        text, separator, names = target.partition(_SEPARATOR)
        path = self._session.storeDir.parse(text)
        if path.isDerivation:
            self._want(path, [name for name in names.split(",") if name] or None)
        elif separator:
            raise FormatError(f"target '{target:.4200}' names outputs of a path that is not a derivation")
        else:
            self._plainTargets.add(path)

    def _want(self, path: StorePath, names: Iterable[str] | None) -> _Goal:
        """
        @param names: of outputs; C{None} for all.
        """
        goal = self._goals.get(path)
        if goal is None:
            goal = self._goals[path] = _Goal(path)
        before = (goal.wantsAll, len(goal.wanted))
        if names is None:
            goal.wantsAll = True
        else:
            goal.wanted.update(names)
        if (goal.wantsAll, len(goal.wanted)) != before:
            self._unexpanded.add(path)
        return goal

    # From targets to all that must be built.

    def _expandAll(self) -> None:
        """
        Find out what is missing: level by level, each with a handful of questions to the store.

        What it raises L{Busy} for is asked again by the next call.
        """
        if self._missing is None:
            self._session.addTempRoots(self._plainTargets)
            self._missing = self._plainTargets - self._session.queryValidPaths(self._plainTargets)
        while self._unexpanded and not self.over:
            level = [self._goals[path] for path in sorted(self._unexpanded)]
            self._session.addTempRoots(self._unexpanded)
            valid = self._session.queryValidPaths(self._unexpanded)
            self._read([goal for goal in level if goal.path in valid])
            self._session.addTempRoots([path for goal in level if goal.drv for path in goal.drv.mentioned])
            self._unexpanded = set()
            for goal in level:
                if goal.path not in valid:
                    self._fail(goal, f"cannot build missing derivation '{goal.path}'")
            self._expand([goal for goal in level if goal.drv is not None])

    def _read(self, goals: Iterable[_Goal]) -> None:
        for goal in goals:
            if goal.drv is None:
                try:
                    drv = self._session.readDerivation(goal.path)
                    drv.kind()
                    goal.drv = drv
                except Busy:
                    raise
                except (FormatError, StoreError) as error:
                    reason = peerText(error, self._session.storeDir.path)
                    self._fatal = self._fatal or f"error parsing derivation '{goal.path}': {reason}"

    def _expand(self, goals: list[_Goal]) -> None:
        """Settle which of these have to be built, and what they need."""
        paths = {path for goal in goals for path in goal.known.mentioned}
        valid = self._session.queryValidPaths(paths)
        for goal in goals:
            drv = goal.known
            unknown = goal.wanted - drv.outputs.keys()
            if unknown:
                self._giveUp(f"derivation '{goal.path}' does not have wanted outputs {_quoted(sorted(unknown))}")
                return
            if goal.state not in (_State.NEW, _State.DONE):
                continue
            goal.outputs = drv.knownOutputPaths
            if all(goal.outputs.get(name) in valid for name in goal.wantedNames):
                goal.state = _State.DONE
                continue
            if missing := missingDependency(goal.path, drv, valid):
                self._giveUp(missing)
                return
            self._await(goal)
        # Only now: one of the level may be another's input.
        for goal in goals:
            if goal.state is _State.DONE and goal.path not in self._unexpanded:
                self._done(goal)

    def _await(self, goal: _Goal) -> None:
        """The goal must be built: want its inputs."""
        goal.state = _State.WAITING
        for path, names in goal.known.inputDrvs.items():
            needed = self._want(path, names)
            if needed.state is _State.FAILED:
                goal.failedInputs += 1
            elif needed.state is not _State.DONE or path in self._unexpanded:
                goal.waitees.add(path)
                needed.waiters.add(goal.path)
        if not goal.waitees and goal.failedInputs:
            self._fail(goal, _dependenciesFailed(goal))
        else:
            self._wake(goal)

    def _giveUp(self, message: str) -> None:
        """An error that in Nix ends the whole command, whatever else could still be done."""
        self._fatal = self._fatal or message

    # From what has ended to what can begin.

    def _done(self, goal: _Goal) -> None:
        goal.state = _State.DONE
        self._notify(goal)

    def _fail(self, goal: _Goal, message: str) -> None:
        """A goal has failed, and with it those that wait for it. As long as chains may be, no recursion."""
        failed = [(goal, message)]
        while failed:
            goal, message = failed.pop()
            goal.state = _State.FAILED
            goal.error = message
            if goal.path not in self._targets:
                self._messages.append(_asError(message))
            for waiter in self._notify(goal):
                failed.append((waiter, _dependenciesFailed(waiter)))

    def _notify(self, ended: _Goal) -> list[_Goal]:
        """
        Tell the goals that wait for one that has ended.

        @return: those that fail for it now.
        """
        failed: list[_Goal] = []
        for path in sorted(ended.waiters):
            waiter = self._goals[path]
            waiter.waitees.discard(ended.path)
            if waiter.state is not _State.WAITING:
                continue
            if ended.state is _State.FAILED:
                waiter.failedInputs += 1
                if not self._keepGoing:
                    failed.append(waiter)
                    continue
            if not waiter.waitees and waiter.failedInputs:
                failed.append(waiter)
            else:
                self._wake(waiter)
        ended.waiters.clear()
        return failed

    def _wake(self, goal: _Goal) -> None:
        if not goal.waitees:
            goal.state = _State.READY
            self._ready.add(goal.path)

    def _prepare(self, goal: _Goal) -> PlannedBuild:
        """Put together what a ready goal is built from."""
        drv = goal.known
        inputs = {path: self._goals[path].outputs for path in drv.inputDrvs}
        kinds = {path: self._goals[path].known.kind() for path in drv.inputDrvs}
        if not drv.inputDrvs:
            return PlannedBuild(goal.path, basicDerivation(drv, drv.inputSrcs))
        if mustResolve(drv, kinds):
            resolved = resolve(drv, inputs, self._session.storeDir)
            path = self._session.addDerivation(resolved)
            return PlannedBuild(path, resolved)
        used = {inputs[path][name] for path, names in drv.inputDrvs.items() for name in names}
        closure = self._session.queryClosure(drv.inputSrcs | used)
        return PlannedBuild(goal.path, basicDerivation(drv, frozenset(closure)))


def missingDependency(drvPath: StorePath, drv: BasicDerivation, valid: Collection[StorePath]) -> str:
    """
    What a build lacks that nobody can make.

    @param valid: the valid ones among its sources.
    @return: what Nix says about the first of them; empty if nothing is missing.
    """
    missing = min(drv.inputSrcs.difference(valid), default=None)
    return f"dependency '{missing}' of '{drvPath}' does not exist, and substitution is disabled" if missing else ""


def _dependenciesFailed(goal: _Goal) -> str:
    return f"{goal.failedInputs} dependencies of derivation '{goal.path}' failed to build"


def _asError(message: str) -> str:
    """As Nix shows an error: further lines are aligned with the first."""
    return "error: " + message.replace("\n", "\n" + len("error: ") * " ")


def _quoted(texts: Iterable[str]) -> str:
    return ", ".join(f"'{text}'" for text in texts)

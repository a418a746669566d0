"""
Builds on a store of this machine, from the reactor's side: which of them run, who waits for them, and where their logs
go.

There are as many running builds as C{maxJobs} says, over all clients, each with a thread of its own. The rest wait:
clients, told apart by their keys, take turns, so that one that asks for a thousand builds does not keep another
waiting for its one. Who asks for a build that is under way already gets that one, with its log from the start.

A build that runs is never stopped for another's sake, and nothing says when it ends. So that no key keeps all others
from building for ever, one more than C{maxJobs} may run: for a client none of whose builds has run for long.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred, DeferredList, DeferredQueue, gatherResults, succeed
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.python.threadpool import ThreadPool
from zope.interface import implementer

from nixserve.builder.local import LocalBuilder, PreparedBuild
from nixserve.builder.plan import BuildPlan, PlannedBuild
from nixserve.builder.process import CancelToken
from nixserve.builder.settings import EXTRA_JOBS
from nixserve.codec.buildresult import BuildResult, BuildStatus
from nixserve.codec.messages import BuildDerivation, BuildOptions, BuildPaths, BuildPathsResult
from nixserve.codec.peertext import hidePaths, peerText
from nixserve.codec.storepath import StorePath
from nixserve.errors import NixServeError
from nixserve.protocol.building import BuildClient, IBuilds
from nixserve.protocol.buildlog import BuildLog
from nixserve.protocol.interfaces import ISharedWorkers
from nixserve.protocol.logbudget import KEY, LogBudget
from nixserve.protocol.peerlog import PeerLog
from nixserve.protocol.reactors import IThreadReactor
from nixserve.protocol.workers import Door, whenFired
from nixserve.store.api import Busy
from nixserve.store.local import LocalSession, LocalStore

__all__ = ["EXTRA_SECONDS", "LocalBuilds"]

T = TypeVar("T")

EXTRA_SECONDS = 60.0
"""How long a client waits, all of whose builds wait, before one of them may be such a build."""

_WORKERS_AT_ONCE = 2
"""Threads in which the builds of one client may be prepared, or freed, at once."""

_log = Logger()


class _SharedBuild:
    """
    One build, from the first client's wish to the result.

    @ivar request: what is wished.
    @ivar client: who asked first of those that still wait.
    @ivar waiting: who waits for the result.
    @ivar session: keeps what it needs and makes from the garbage collector.
    @ivar step: what it waits for before it runs.
    @ivar turn: fires when it gets a slot. C{None} unless it stands in a queue.
    @ivar queuedAt: since when, by the reactor's clock.
    @ivar hasSlot: it counts as running.
    @ivar prepared: what is to be run. It holds the locks of the outputs.
    @ivar joinable: whoever wishes the same may still join.
    """

    def __init__(self, request: BuildDerivation, client: BuildClient, reactor: IThreadReactor) -> None:
        self.request = request
        self.client = client
        self.log = BuildLog(reactor)
        self.token = CancelToken()
        self.waiting: dict[Deferred[BuildResult], BuildClient] = {}
        self.session: LocalSession | None = None
        self.step: Deferred[Any] | None = None
        self.turn: Deferred[None] | None = None
        self.queuedAt: float = reactor.seconds()
        self.hasSlot = False
        self.prepared: PreparedBuild | None = None
        self.joinable = True
        self.ended: Deferred[None] = Deferred()

    @property
    def key(self) -> tuple[BuildDerivation, bool]:
        """What makes two wishes the same build."""
        return (self.request, self.client.mustSandbox)

    @property
    def drvPath(self) -> StorePath:
        """The derivation that is built."""
        return self.request.drvPath

    def tell(self, line: str) -> None:
        """A line of ours for everybody who waits."""
        for client in list(self.waiting.values()):
            client.listener(line.encode("utf-8", "replace") + b"\n")

    async def wait(self, step: Deferred[T]) -> T:
        """Wait for something that is given up when nobody wants the build any more."""
        if self.token.cancelled:
            step.cancel()
        self.step = step
        try:
            return await step
        finally:
            self.step = None

    def cancel(self) -> None:
        """
        Nobody wants it any more, or nobody shall have it. What it holds is freed by whoever performs it.
        """
        self.joinable = False
        self.token.cancel()
        if self.step is not None:
            self.step.cancel()


@implementer(IBuilds)
class LocalBuilds:
    """
    All builds on one store of this machine.

    @ivar maxJobs: how many may run at once.
    @ivar extraJobs: how many more, for clients that have waited for L{EXTRA_SECONDS} with nothing running.
    """

    def __init__(
        self,
        store: LocalStore,
        builder: LocalBuilder,
        workers: ISharedWorkers,
        reactor: IThreadReactor,
        maxJobs: int,
        extraJobs: int = EXTRA_JOBS,
    ) -> None:
        self.log = PeerLog(_log, LogBudget("builds", KEY))
        self.maxJobs = maxJobs
        self.extraJobs = extraJobs
        self._store = store
        self._builder = builder
        self._workers = workers
        self._reactor = reactor
        self._threads = ThreadPool(0, max(1, maxJobs + extraJobs), "nixserve-build")
        self._builds: list[_SharedBuild] = []
        self._queues: OrderedDict[str, deque[_SharedBuild]] = OrderedDict()
        self._running = 0
        self._look: IDelayedCall | None = None
        # When a build of a client had a slot last.
        self._lastRan: dict[str, float] = {}
        self._stopping = False

    def start(self) -> None:
        """Start the threads of builds."""
        self._threads.start()

    def stop(self) -> Deferred[None]:
        """
        Cancel every build, and take no more.

        @return: fires when all have ended and freed what they held. Then the threads end.
        """
        self._stopping = True
        ended = [whenFired(build.ended) for build in self._builds]
        for build in list(self._builds):
            build.cancel()
        if self._look is not None:
            self._look.cancel()
            self._look = None
        return gatherResults(ended).addCallback(lambda _: self._threads.stop())

    @property
    def counts(self) -> tuple[int, int]:
        """How many builds are running, and how many wait for their turn."""
        return self._running, sum(build.turn is not None for build in self._builds)

    def build(self, request: BuildDerivation, client: BuildClient) -> Deferred[BuildResult]:
        """
        Build, or join the same build that is under way.

        @return: what came of it. Cancelling leaves; a build that nobody waits for any more is killed.
        """
        if self._stopping:
            return succeed(_STOPPED)
        wish = _SharedBuild(request, client, self._reactor)
        build = next((running for running in self._builds if running.joinable and running.key == wish.key), wish)
        result: Deferred[BuildResult] = Deferred(lambda _: self._leave(build, result))
        build.waiting[result] = client
        build.log.listen(client.listener)
        if build is wish:
            self._builds.append(build)
            performing = Deferred.fromCoroutine(self._perform(build))
            performing.addErrback(self._failed, build)
            performing.addCallback(self._finish, build)
        elif build.turn is not None:
            # Whoever asked first may have many others before it.
            self._enqueue(build, client)
        return result

    def buildPaths(self, request: BuildPaths, client: BuildClient) -> Deferred[BuildPathsResult]:
        """
        See L{IBuilds.buildPaths}. Fails with L{nixserve.errors.FormatError} if a target is not in the store directory.
        """
        return Deferred.fromCoroutine(self._buildPaths(request, client))

    async def _buildPaths(self, request: BuildPaths, client: BuildClient) -> BuildPathsResult:
        plan = await client.door.call(BuildPlan, client.session, request.targets)
        try:
            result = await self._carryOut(plan, request.options, client)
        except (NixServeError, OSError) as error:
            self.log.warn("cannot build {targets}: {error}", targets=request.targets, error=error)
            result = BuildPathsResult(1, f"error: {peerText(error, self._store.storeDir.path)}")
        _tellMessages(plan, client)
        return result

    async def _carryOut(self, plan: BuildPlan, options: BuildOptions, client: BuildClient) -> BuildPathsResult:
        running: dict[StorePath, Deferred[None]] = {}
        ended: DeferredQueue[tuple[StorePath, BuildResult]] = DeferredQueue()

        def start(planned: PlannedBuild) -> None:
            building = self.build(BuildDerivation(planned.drvPath, planned.drv, options), client)
            running[planned.drvPath] = building.addCallbacks(
                lambda result: ended.put((planned.drvPath, result)),
                lambda failure: failure.trap(CancelledError) and None,
            )

        try:
            while True:
                # More could not run, and each holds open files.
                planned = await client.door.call(plan.next, max(1, self.maxJobs) - len(running))
                _tellMessages(plan, client)
                for build in planned:
                    start(build)
                if plan.over or not running:
                    return await client.door.call(plan.result)
                drvPath, result = await ended.get()
                del running[drvPath]
                await client.door.call(plan.finished, drvPath, result)
        finally:
            for building in running.values():
                building.cancel()

    async def _perform(self, build: _SharedBuild) -> BuildResult:
        """Carry out one build, from its locks to its result."""
        storeDir = self._store.storeDir.path
        # Beside the sessions of its client, not before them; and not behind the builds of others.
        workers = self._workers.of(f"builds for {build.client.name}", _WORKERS_AT_ONCE)
        door = Door(workers, lambda what: build.tell(f"waiting for {hidePaths(what, storeDir)}..."))
        try:
            result = await self._ready(build, door)
            if result is None:
                result = await deferToThreadPool(self._reactor, self._threads, self._run, build)
            result = self._forPeers(build, result)
            self._freeSlot(build)
            # Whoever came from here on would not be given the outputs to keep.
            build.joinable = False
            await self._handOver(build, result)
            return result
        finally:
            build.joinable = False
            self._freeSlot(build)
            # Nothing cancels this, and what came of the build stands whatever happens here.
            releasing = door.call(self._release, build)
            releasing.addErrback(lambda f: self.log.failure("freeing what {drv} held", f, drv=build.drvPath))
            await releasing

    async def _ready(self, build: _SharedBuild, door: Door) -> BuildResult | None:
        """
        Wait until the build has both the locks of its outputs and a slot. While it waits for the one it does not hold
        the other: a build that runs may need a path that one in the queue would have locked. So does Nix (2.8,
        src/libstore/build/local-derivation-goal.cc: C{tryLocalBuild}).

        @return: the result, if there is nothing to run.
        """
        told = False
        while True:
            result = await build.wait(door.call(self._prepare, build))
            if result is not None:
                return result
            if self._running < self.maxJobs:
                self._takeSlot(build)
                return None
            await build.wait(door.call(self._unprepare, build))
            await build.wait(self._turn(build, not told))
            told = True
            result = await build.wait(door.call(self._prepareNow, build))
            if result is not None or build.prepared is not None:
                return result
            self._freeSlot(build)

    def _forPeers(self, build: _SharedBuild, result: BuildResult) -> BuildResult:
        """A result without the paths of our own files, which the log has."""
        told = hidePaths(result.errorMsg, self._store.storeDir.path)
        if told == result.errorMsg:
            return result
        self.log.warn("the build of {drv} failed: {error}", drv=build.drvPath, error=result.errorMsg)
        return replace(result, errorMsg=told)

    async def _handOver(self, build: _SharedBuild, result: BuildResult) -> None:
        """
        Let everybody who waits keep what was built, before the build lets go of it, and answer each who has: one whose
        session is busy keeps nobody else waiting.
        """
        build.log.deliver()
        outputs = [realisation.outPath for realisation in result.builtOutputs.values()]
        if outputs:
            # Who cannot is gone, and hears of it elsewhere.
            waiting = list(build.waiting.items())
            answers = [
                client.keep(outputs).addCallback(partial(self._answer, build, d, result)) for d, client in waiting
            ]
            await DeferredList(answers, consumeErrors=True)

    # --- in threads -----------------------------------------------------------------------------------------

    def _prepare(self, build: _SharedBuild) -> BuildResult | None:
        """
        In a worker. What is ready to run is kept in the build: L{_release} must find it whatever happens.

        @return: the result, if there is nothing to run.
        @raise Busy: call again.
        """
        if build.session is None:
            build.session = self._store.openSession()
        prepared = self._builder.prepare(build.session, build.request, build.client.mustSandbox)
        if isinstance(prepared, BuildResult):
            return prepared
        build.prepared = prepared
        return None

    def _prepareNow(self, build: _SharedBuild) -> BuildResult | None:
        """In a worker: as L{_prepare}, but who is busy is not waited for."""
        try:
            return self._prepare(build)
        except Busy:
            return None

    def _unprepare(self, build: _SharedBuild) -> None:
        """Give back the locks of a build that will not run. Blocks: for a worker."""
        prepared, build.prepared = build.prepared, None
        if prepared is not None:
            prepared.abandon()

    def _run(self, build: _SharedBuild) -> BuildResult:
        """Carry out the build. Blocks until it ends: for a thread of its own."""
        prepared, build.prepared = build.prepared, None
        assert prepared is not None, "it has been prepared"
        return prepared.run(build.log.feed, build.token)

    def _release(self, build: _SharedBuild) -> None:
        """Close what the build kept open, after everything else. Blocks: for a worker."""
        try:
            self._unprepare(build)
        finally:
            if build.session is not None:
                build.session.close()

    # --- slots and turns ------------------------------------------------------------------------------------

    def _takeSlot(self, build: _SharedBuild) -> None:
        self._running += 1
        build.hasSlot = True
        self._noteRun(build)

    def _noteRun(self, build: _SharedBuild) -> None:
        """A build has a slot, or had it until now. What is long past makes no difference."""
        now = self._reactor.seconds()
        known = {**self._lastRan, build.client.name: now}
        self._lastRan = {name: when for name, when in known.items() if when > now - EXTRA_SECONDS}

    def _freeSlot(self, build: _SharedBuild) -> None:
        """Let another one run, if this one counts."""
        if build.hasSlot:
            build.hasSlot = False
            self._running -= 1
            self._noteRun(build)
            self._nextTurn()

    def _turn(self, build: _SharedBuild, tell: bool) -> Deferred[None]:
        """
        Queue.

        @return: fires when the build has a slot. Cancelling leaves the queue.
        """
        _, before = self.counts
        turn = build.turn = Deferred(lambda _: self._dequeue(build))
        for client in build.waiting.values():
            self._enqueue(build, client)
        self._nextTurn()
        if tell and build.turn is not None:
            build.tell(f"waiting for a free build slot: {self._running} builds are running, {before} wait before this")
        return turn

    def _enqueue(self, build: _SharedBuild, client: BuildClient) -> None:
        queue = self._queues.setdefault(client.name, deque())
        if build not in queue:
            queue.append(build)

    def _dequeue(self, build: _SharedBuild) -> None:
        build.turn = None
        for name in list(self._queues):
            self._unqueue(build, name)
        self._lookAgain()

    def _unqueue(self, build: _SharedBuild, name: str) -> None:
        """Take a build out of the queue of one client, if it is there."""
        queue = self._queues[name]
        if build in queue:
            queue.remove(build)
        if not queue:
            del self._queues[name]

    def _nextTurn(self) -> None:
        """Start what may start: of each client's queue its first, then on to the next client."""
        while (name := self._nextClient()) is not None:
            self._queues.move_to_end(name)
            build = self._queues[name][0]
            turn = build.turn
            assert turn is not None, "what is in a queue waits"
            self._dequeue(build)
            self._takeSlot(build)
            turn.callback(None)
        self._lookAgain()

    def _nextClient(self) -> str | None:
        """Whose turn it is, if anything may start."""
        if self._running < self.maxJobs:
            return next(iter(self._queues), None)
        if self._running < self.maxJobs + self.extraJobs:
            now = self._reactor.seconds()
            return next((name for name, due in self._shutOut() if due <= now), None)
        return None

    def _shutOut(self) -> Iterator[tuple[str, float]]:
        """The clients with nothing but builds that wait, and from when on one of these may be an extra one."""
        running = {build.client.name for build in self._builds if build.hasSlot}
        for name, queue in self._queues.items():
            if name not in running:
                yield name, max(queue[0].queuedAt, self._lastRan.get(name, -math.inf)) + EXTRA_SECONDS

    def _lookAgain(self) -> None:
        """Come back when somebody will have waited for long enough."""
        first = min((due for _, due in self._shutOut()), default=None)
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if (
            first is not None
            and self.extraJobs
            and self._running < self.maxJobs + self.extraJobs
            and not self._stopping
        ):
            self._look = self._reactor.callLater(max(0.0, first - self._reactor.seconds()), self._looked)

    def _looked(self) -> None:
        self._look = None
        self._nextTurn()

    # --- the end --------------------------------------------------------------------------------------------

    def _leave(self, build: _SharedBuild, result: Deferred[BuildResult]) -> None:
        left = build.waiting.pop(result)
        build.log.leave(left.listener)
        if not build.waiting:
            build.cancel()
            return
        if left is build.client:
            # From now on it runs for somebody else, and must not keep this one from having one of its own.
            build.client = next(iter(build.waiting.values()))
        if build.turn is not None and left.name not in {client.name for client in build.waiting.values()}:
            self._unqueue(build, left.name)
        self._lookAgain()

    def _failed(self, failure: Failure, build: _SharedBuild) -> BuildResult:
        """What went wrong around a build rather than in it."""
        error = failure.value
        if build.token.cancelled and isinstance(error, CancelledError):
            self.log.info("the build of {drv} was cancelled", drv=build.drvPath)
            return _STOPPED
        if isinstance(error, NixServeError | OSError):
            self.log.warn("cannot build {drv}: {error}", drv=build.drvPath, error=error)
            return BuildResult(BuildStatus.MISC_FAILURE, peerText(error, self._store.storeDir.path))
        self.log.failure("a bug in the build of {drv}", failure, drv=build.drvPath)
        return BuildResult(BuildStatus.MISC_FAILURE, "internal error; the log of the server has more")

    def _finish(self, result: BuildResult, build: _SharedBuild) -> None:
        build.log.deliver()
        self._builds.remove(build)
        # Whoever hears of it may make others leave.
        while build.waiting:
            self._answer(build, next(iter(build.waiting)), result)
        build.ended.callback(None)

    def _answer(self, build: _SharedBuild, waiting: Deferred[BuildResult], result: BuildResult, _: None = None) -> None:
        """Give one of those who wait the result, unless it has left."""
        client = build.waiting.pop(waiting, None)
        if client is not None:
            build.log.leave(client.listener)
            waiting.callback(result)


_STOPPED = BuildResult(BuildStatus.MISC_FAILURE, "the server is being stopped; try again later")


def _tellMessages(plan: BuildPlan, client: BuildClient) -> None:
    if messages := plan.takeMessages():
        client.listener("".join(f"{message}\n" for message in messages).encode("utf-8", "replace"))

"""
Doubles for what L{nixserve.protocol.builds.LocalBuilds} stands on: a store, a builder, threads and a reactor, each of
which does one thing when the test says so.
"""

from collections import Counter, deque

from twisted.internet.task import Clock
from twisted.python.failure import Failure

from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.derivation import BasicDerivation, DerivationOutput
from nixserve.codec.messages import BuildDerivation, BuildOptions
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.protocol.building import BuildClient
from nixserve.protocol.builds import LocalBuilds
from nixserve.protocol.workers import Door
from nixserve.store.api import Busy
from nixserve.testing import ManualWorkers
from tests.vectors.serve.messages import path

OPTIONS = BuildOptions()


def outputOf(name):
    """The path of what L{derivation} builds."""
    return path(f"{name}-out")


def derivation(name):
    """A derivation, and the path of its .drv."""
    out = outputOf(name)
    drv = BasicDerivation(name, {"out": DerivationOutput(out)}, frozenset(), "x", "/bin/sh", (), {"out": str(out)})
    return path(f"{name}.drv"), drv


def built(name):
    """The result of L{derivation}, if all goes well."""
    return BuildResult(BuildStatus.BUILT, "", 1, False, 5, 6, {"out": Realisation(outputOf(name))})


class Session:
    """
    A session of the store.

    @ivar roots: what it keeps; after its end, nothing.
    """

    def __init__(self, store):
        self.store = store
        self.roots = set()
        self.closed = 0
        store.sessions.append(self)

    def addTempRoots(self, paths):
        """See L{nixserve.store.api.StoreSession}."""
        assert not self.closed
        if self.store.refusals:
            raise self.store.refusals.pop(0)
        self.roots |= set(paths)

    def close(self):
        """See L{nixserve.store.api.StoreSession}."""
        self.closed += 1
        for root in self.roots:
            if root not in self.store.kept():
                self.store.lost.append(root)
        self.roots = set()


class Store:
    """
    @ivar sessions: all that were opened.
    @ivar lost: what was nobody's root any more when the last session that kept it ended.
    @ivar refusals: what the next calls of C{addTempRoots} raise.
    """

    storeDir = StoreDir()

    def __init__(self):
        self.sessions = []
        self.lost = []
        self.refusals = []

    def kept(self):
        """What is a root."""
        return set().union(*(session.roots for session in self.sessions if not session.closed))

    def openSession(self):
        """See L{nixserve.store.api.Store}."""
        return Session(self)


class Prepared:
    """A build that can begin; holds the lock of its output."""

    def __init__(self, builder, drvPath, session):
        self.builder = builder
        self.drvPath = drvPath
        self.session = session
        self.over = False
        assert drvPath not in builder.locks, "locked twice"
        builder.locks.add(drvPath)

    def abandon(self):
        """See L{nixserve.builder.local.PreparedBuild}."""
        assert not self.over, "given back twice"
        self.over = True
        self.builder.locks.discard(self.drvPath)

    def run(self, log, cancel):
        """See L{nixserve.builder.local.PreparedBuild}."""
        assert not self.session.closed
        self.builder.ran.append(self.drvPath)
        try:
            outcome = self.builder.outcomes.get(self.drvPath)
            if cancel.cancelled:
                return BuildResult(BuildStatus.MISC_FAILURE, "interrupted by the user")
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is None:
                outcome = built(self.drvPath.name.removesuffix(".drv"))
            self.session.addTempRoots([output.outPath for output in outcome.builtOutputs.values()])
            return outcome
        finally:
            self.abandon()


class Builder:
    """
    @ivar early: by derivation, what C{prepare} answers at once.
    @ivar busy: whose locks somebody else holds: how often C{prepare} finds them so.
    @ivar outcomes: by derivation, what C{run} answers or raises, unless it succeeds.
    @ivar locks: what is locked by ours.
    @ivar ran: in order.
    @ivar mustSandbox: by derivation, what was asked for.
    """

    def __init__(self):
        self.early = {}
        self.busy = Counter()
        self.outcomes = {}
        self.locks = set()
        self.ran = []
        self.mustSandbox = {}

    def prepare(self, session, request, mustSandbox=False):
        """See L{nixserve.builder.local.LocalBuilder}."""
        drvPath = request.drvPath
        assert not session.closed
        self.mustSandbox[drvPath] = mustSandbox
        if drvPath in self.locks or self.busy[drvPath] > 0:
            self.busy[drvPath] -= 1
            raise Busy("the lock on it")
        early = self.early.get(drvPath)
        if isinstance(early, Exception):
            raise early
        return early or Prepared(self, drvPath, session)


class Threads:
    """A pool of threads, in which nothing happens by itself."""

    def __init__(self, most):
        self.most = most
        self.waiting = deque()
        self.started = self.stopped = False

    def start(self):
        """Begin."""
        self.started = True

    def stop(self):
        """End."""
        assert not self.waiting
        self.stopped = True

    def callInThreadWithCallback(self, onResult, function, *args):
        """As a L{twisted.python.threadpool.ThreadPool}."""
        assert self.started and not self.stopped
        self.waiting.append((onResult, function, args))
        assert len(self.waiting) <= self.most, "more than may run"

    @property
    def running(self):
        """The builds in them."""
        return [args[0] for _, _, args in self.waiting]

    def finish(self, name=None):
        """Let one build end, the oldest or the named one."""
        found = [entry for entry in self.waiting if name in (None, entry[2][0].drvPath.name.removesuffix(".drv"))]
        assert found, f"{name} does not run"
        wanted = found[0]
        self.waiting.remove(wanted)
        onResult, function, args = wanted
        try:
            value = function(*args)
        except Exception:
            onResult(False, Failure())
        else:
            onResult(True, value)


class Reactor(Clock):
    """Its thread takes a turn when the test says so."""

    def __init__(self):
        super().__init__()
        self.turns = deque()

    def callFromThread(self, function, *args):
        """As L{twisted.internet.interfaces.IReactorFromThreads}."""
        self.turns.append((function, args))

    def turn(self):
        """Call the oldest."""
        function, args = self.turns.popleft()
        function(*args)


class Client:
    """
    Somebody who builds.

    @ivar session: theirs.
    @ivar results: of what they asked for, by name; a failure if they left.
    """

    def __init__(self, world, name, mustSandbox=False):
        self.world = world
        self.log = b""
        self.session = Session(world.store)
        self.door = Door(world.workers)
        self.client = BuildClient(name, self.listen, self.door, self.session, mustSandbox)
        self.waiting = {}
        self.results = {}

    def listen(self, text):
        """Takes lines."""
        assert text.endswith(b"\n")
        self.log += text

    def build(self, *names, options=OPTIONS):
        """Ask for builds."""
        for name in names:
            building = self.world.builds.build(BuildDerivation(*derivation(name), options), self.client)
            self.waiting[name] = building
            building.addBoth(lambda result, name=name: self.results.__setitem__(name, result))
        return self

    def leave(self, *names):
        """Wait no more for these, or for anything."""
        for name in names or list(self.waiting):
            self.waiting[name].cancel()
        if not names:
            self.door.abandon()


class World:
    """
    L{LocalBuilds} with everything around it. Nothing happens unless a method here makes it.
    """

    def __init__(self, maxJobs=1, workers=None, extraJobs=0):
        self.reactor = Reactor()
        self.workers = workers or ManualWorkers()
        self.store = Store()
        self.builder = Builder()
        self.builds = LocalBuilds(self.store, self.builder, self.workers, self.reactor, maxJobs, extraJobs)
        self.threads = self.builds._threads = Threads(maxJobs + extraJobs)
        self.builds.start()
        self._deliveries = deque()

    def client(self, name, mustSandbox=False):
        """Somebody."""
        return Client(self, name, mustSandbox)

    @property
    def running(self):
        """The names of what runs."""
        return [build.drvPath.name.removesuffix(".drv") for build in self.threads.running]

    def step(self, builds=True):
        """
        One thing happens: something begins in a worker, ends there, or in a build's thread, or in the reactor.

        @param builds: may a build end?
        @return: whether there was anything.
        """
        if self._deliveries:
            self._deliveries.popleft()()
        elif getattr(self.workers, "waiting", None):
            self._deliveries.append(self.workers.run())
        elif self.reactor.turns:
            self.reactor.turn()
        elif builds and self.threads.waiting:
            self.threads.finish()
        elif self.workers.reactor.getDelayedCalls():
            self.workers.reactor.advance(1)
        else:
            return False
        running, _ = self.builds.counts
        assert len(self.threads.waiting) <= running <= self.builds.maxJobs + self.builds.extraJobs
        return True

    def settle(self, builds=False):
        """Let happen what can; builds that run go on, unless C{builds}."""
        steps = 0
        while self.step(builds):
            steps += 1
            assert steps < 10_000
        return self

    def finish(self, *names):
        """Let builds end, and what follows."""
        for name in names:
            self.threads.finish(name)
            self.settle()
        return self

    def clean(self):
        """Everything is over, and nothing is left."""
        assert self.builds.counts == (0, 0)
        assert not self.builds._builds and not self.builds._queues
        assert not self.builder.locks and not self.threads.waiting
        assert not self.workers.reactor.getDelayedCalls() and not self.reactor.getDelayedCalls()
        # What clients opened is theirs.
        own = {client for client in self.store.sessions if client.closed}
        assert all(session.closed == 1 for session in own)


def pathOf(name):
    """Of a .drv."""
    return StorePath(derivation(name)[0])


def feed(world, text, build=0):
    """A builder writes, and the reactor hears of it."""
    world.threads.running[build].log.feed(text)
    world.settle()

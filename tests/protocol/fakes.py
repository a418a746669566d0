"""
Doubles for the seams of the Twisted side: transports that record, workers that obey, stores that fail when told.
"""

from collections import deque
from functools import partial

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.protocol.interfaces import IServeTransport, ISharedWorkers
from nixserve.store.api import InvalidPath
from nixserve.store.memory import MemoryStore
from nixserve.testing import Pair
from tests.vectors.serve.messages import CONTENTS, nar

__all__ = [
    "ManualWorkers",
    "Pair",
    "RecordingStore",
    "RecordingTransport",
    "SyncWorkers",
    "fired",
    "result",
]


@implementer(IServeTransport)
class RecordingTransport:
    """
    Keeps what is written.

    @ivar late: what was written after the exit, which a real transport drops.
    @ivar capacity: bytes after which the producer is paused; what is taken with L{take} makes room.
    @ivar mostUnread: the most bytes that waited at any time.
    """

    def __init__(self, capacity=1 << 60):
        self.written = bytearray()
        self.errors = bytearray()
        self.late = bytearray()
        self.status = None
        self.exits = 0
        self.aborted = False
        self.paused = False
        self.pauses = 0
        self.producer = None
        self.producerPaused = False
        self.capacity = capacity
        self.unread = 0
        self.window = None
        self.mostUnread = 0

    @property
    def unsent(self):
        """See L{IServeTransport}."""
        return self.unread

    def allowUnread(self, size):
        """See L{IServeTransport}."""
        self.window = size
        return size

    @property
    def sent(self):
        """See L{IServeTransport}."""
        return len(self.written) - self.unread

    def write(self, data):
        """See L{IServeTransport}."""
        if self.status is not None:
            self.late += data
            return
        self.written += data
        self.unread += len(data)
        self.mostUnread = max(self.mostUnread, self.unread)
        if self.producer is not None and self.unread > self.capacity and not self.producerPaused:
            self.producerPaused = True
            self.producer.pauseProducing()

    def writeSequence(self, data):
        """See L{IServeTransport}."""
        self.write(b"".join(data))

    def writeError(self, data):
        """See L{IServeTransport}."""
        (self.errors if self.status is None else self.late).extend(data)

    def take(self, size=1 << 60):
        """The peer reads."""
        self.unread = max(0, self.unread - size)
        if self.producer is not None and self.producerPaused and self.unread <= self.capacity:
            self.producerPaused = False
            self.producer.resumeProducing()

    def registerProducer(self, producer, streaming):
        """See L{IServeTransport}."""
        assert streaming and self.producer is None
        self.producer = producer
        if self.unread > self.capacity:
            self.producerPaused = True
            producer.pauseProducing()

    def unregisterProducer(self):
        """See L{IServeTransport}."""
        self.producer = None
        self.producerPaused = False

    def pauseProducing(self):
        """See L{IServeTransport}."""
        assert not self.paused, "paused twice"
        self.paused = True
        self.pauses += 1

    def resumeProducing(self):
        """See L{IServeTransport}."""
        self.paused = False

    def stopProducing(self):
        """See L{IServeTransport}."""
        self.abortConnection()

    def exit(self, status):
        """See L{IServeTransport}."""
        self.exits += 1
        if self.status is None:
            self.status = status

    def loseConnection(self):
        """See L{IServeTransport}."""
        self.exit(1)

    def abortConnection(self):
        """See L{IServeTransport}."""
        self.aborted = True

    def getPeer(self):
        """See L{IServeTransport}."""

    def getHost(self):
        """See L{IServeTransport}."""


@implementer(ISharedWorkers)
class SyncWorkers:
    """Runs everything at once."""

    def __init__(self):
        self.reactor = Clock()
        self.calls = 0

    def of(self, client, atOnce):
        """See L{ISharedWorkers}."""
        return self

    def call(self, function, *args, **kwargs):
        """See L{IWorkers}."""
        self.calls += 1
        return maybeDeferred(function, *args, **kwargs)


@implementer(ISharedWorkers)
class ManualWorkers:
    """
    Runs what the test says, when it says so: a call first runs, as in a thread, and then its result arrives.
    """

    def __init__(self):
        self.reactor = Clock()
        self.waiting = deque()

    def of(self, client, atOnce):
        """See L{ISharedWorkers}."""
        return self

    def call(self, function, *args, **kwargs):
        """See L{IWorkers}."""
        result = Deferred()
        self.waiting.append((partial(function, *args, **kwargs), result))
        return result

    def run(self):
        """
        Run the oldest call in its thread.

        @return: what makes its result arrive.
        """
        function, result = self.waiting.popleft()
        try:
            value = function()
        except Exception:
            failure = Failure()
            return lambda: result.errback(failure)
        return lambda: result.callback(value)

    def step(self):
        """Run the oldest call to its end."""
        self.run()()

    def drain(self):
        """Run everything, also what follows from it."""
        while self.waiting:
            self.step()


class RecordingSession:
    """
    A session that records its calls and fails as its store was told.
    """

    def __init__(self, store, inner):
        self._store = store
        self._inner = inner
        self.writers = []

    def __getattr__(self, name):
        method = getattr(self._inner, name)
        if not callable(method):
            return method
        return lambda *args: self._store.perform(name, lambda: method(*args), args)

    def addToStore(self, info):
        """See L{nixserve.store.api.StoreSession}."""
        return self._store.perform("addToStore", lambda: self._writer(self._inner.addToStore(info)), (info,))

    def importPath(self):
        """See L{nixserve.store.api.StoreSession}."""
        return self._store.perform("importPath", lambda: self._writer(self._inner.importPath()), ())

    def narFromPath(self, path):
        """See L{nixserve.store.api.StoreSession}."""
        return self._store.perform("narFromPath", lambda: self._chunks([path]), (path,))

    def narsFromPaths(self, paths):
        """See L{nixserve.store.api.StoreSession}. A big path stands alone."""
        return self._store.perform("narsFromPaths", lambda: self._chunks(paths), (paths,))

    def _chunks(self, paths):
        if paths[0] not in self._store.big:
            return self._inner.narsFromPaths(paths)
        return self._store.counted(paths[0])

    def _writer(self, inner):
        writer = RecordingWriter(self._store, inner)
        self.writers.append(writer)
        return writer


class RecordingWriter:
    """A writer likewise."""

    def __init__(self, store, inner):
        self._store = store
        self._inner = inner
        self.pieces = []

    @property
    def alreadyValid(self):
        """See L{nixserve.store.api.PathWriter}."""
        return self._inner.alreadyValid

    def feed(self, data):
        """See L{nixserve.store.api.PathWriter}."""
        self.pieces.append(len(data))
        self._store.perform("feed", lambda: self._inner.feed(data), ())

    def finish(self, *args):
        """See L{nixserve.store.api.PathWriter}."""
        return self._store.perform("finish", lambda: self._inner.finish(*args), args)

    def abort(self):
        """See L{nixserve.store.api.PathWriter}."""
        self._inner.abort()


class RecordingStore:
    """
    A L{MemoryStore} that records what is called and fails when told.

    @ivar calls: names and arguments.
    @ivar failures: by name of a call, what its next calls raise; C{None} for none.
    @ivar sessions: all that were ever opened.
    @ivar big: paths whose NAR is made up, with its chunks; an exception among them is raised.
    @ivar chunksRead: how many chunks of those have been asked for.
    """

    def __init__(self, *infos):
        self.inner = MemoryStore()
        self.calls = []
        self.failures = {}
        self.sessions = []
        self.big = {}
        self.chunksRead = 0
        self.storeDir = self.inner.storeDir
        self.add(*infos)

    def add(self, *infos):
        """Make paths valid, in order."""
        session = self.inner.openSession()
        for info in infos:
            writer = session.addToStore(info)
            writer.feed(nar(CONTENTS[info.path]))
            writer.finish()
        session.close()

    def valid(self, *infos):
        """Which of them are valid."""
        return [info for info in infos if self.inner.lookUp([info.path])]

    def names(self):
        """What has been called."""
        return [name for name, _ in self.calls]

    def perform(self, name, function, args):
        """Record a call, and fail or do it."""
        self.calls.append((name, args))
        failures = self.failures.get(name)
        failure = failures.pop(0) if failures else None
        if failure is not None:
            raise failure
        return function()

    def counted(self, path):
        """The chunks of a big path."""
        if not self.big[path]:
            raise InvalidPath(path)
        for chunk in self.big[path]:
            self.chunksRead += 1
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def openSession(self):
        """See L{nixserve.store.api.Store}."""
        session = self.perform("openSession", lambda: RecordingSession(self, self.inner.openSession()), ())
        self.sessions.append(session)
        return session

    def close(self):
        """See L{nixserve.store.api.Store}."""
        self.inner.close()


def result(deferred):
    """The result that a Deferred has, raised if it is a failure."""
    seen = []
    deferred.addBoth(seen.append)
    assert seen, "no result yet"
    if isinstance(seen[0], Failure):
        seen[0].raiseException()
    return seen[0]


def fired(deferred):
    """Whether it has a result."""
    return deferred.called

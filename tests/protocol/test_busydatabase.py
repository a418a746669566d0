"""Sessions that wait for the database of a store, while another process writes to it."""

import sqlite3
import subprocess
import tempfile
import threading
import time

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults

from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.workers import DEFAULT_THREADS, Workers
from nixserve.store import database
from nixserve.store.local import LocalStore
from nixserve.testing import makeInfo, makeNar

HELLO = makeNar(b"hello\n")
INFOS = [makeInfo(f"hello-{number}", HELLO) for number in range(2 * DEFAULT_THREADS)]


@pytest.fixture
def store():
    root = tempfile.mkdtemp(prefix="nixserve-test-")
    store = LocalStore(root, reservedSize=0)
    yield store
    store.close()
    subprocess.run(["chmod", "-R", "u+w", root], check=True)
    subprocess.run(["rm", "-r", root], check=True)


@pytest.fixture
def foreign(store):
    """A connection of another process."""
    connection = sqlite3.connect(store.layout.dbPath, isolation_level=None, check_same_thread=False)
    yield connection
    connection.close()


@pytest.fixture
def workers():
    workers = Workers(reactor)
    workers.start()
    yield workers
    workers.stop()


async def _import(store, workers, info):
    session = await DeferredSession.open(store, workers)
    assert await session.call(session.session.addSmallPaths, [(info, HELLO)]) == 1
    await session.close()


def startImports(store, workers):
    """Sessions that add an object each, twice as many as there are workers."""
    return [Deferred.fromCoroutine(_import(store, workers, info)) for info in INFOS]


@pytest_twisted.ensureDeferred
async def test_importersHoldNoWorker(store, foreign, workers, monkeypatch):
    """However many wait for another process to end its transaction, somebody else's question is answered at once."""
    # Whoever waits in a worker does so for long.
    monkeypatch.setattr(database, "PATIENCE", 20.0)
    foreign.execute("begin immediate")
    imports = startImports(store, workers)
    asking = await DeferredSession.open(store, workers)
    began = time.monotonic()
    for _ in range(5):
        assert await asking.queryValidPaths([INFOS[0].path]) == set()
    assert time.monotonic() - began < 10
    assert not any(one.called for one in imports)
    foreign.execute("rollback")
    await gatherResults(imports)
    assert await asking.queryValidPaths([info.path for info in INFOS]) == {info.path for info in INFOS}
    await asking.close()


@pytest_twisted.ensureDeferred
async def test_importersAreNotStarved(store, foreign, workers):
    """Another process that writes again and again, with pauses of milliseconds, does not keep an importer out."""
    ended = threading.Event()
    count = 0

    def write():
        nonlocal count
        while not ended.is_set():
            try:
                foreign.execute("begin immediate")
            except sqlite3.OperationalError:
                continue
            time.sleep(0.02)
            foreign.execute("commit")
            count += 1
            time.sleep(0.01)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        await gatherResults(startImports(store, workers)).addTimeout(60, reactor)
    finally:
        ended.set()
        thread.join(30)
    assert count

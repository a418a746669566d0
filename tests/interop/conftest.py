"""
The suite against real Nix and real SSH: what all of its tests share.

Everything lives below one temporary directory; the machine's own store, the user's configuration and the user's SSH
agent are never touched.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from twisted.internet import reactor

from nixserve.protocol.workers import Workers
from tests.interop.endpoint import Endpoint, Keys, Sshd
from tests.interop.nix import Nix, requireProgram, unavailable
from tests.interop.oddstore import makeOddStore

HERE = Path(__file__).parent

#: The largest tests hold a few GiB at a time.
NEEDED = 8 * 1024**3


def pytest_collection_modifyitems(items):
    """Everything here is an interop test, whatever it forgot to say."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.interop)


def pytest_runtest_setup(item):
    """No test here makes sense without the real programs."""
    if HERE in item.path.parents:
        for program in ("nix-store", "ssh", "ssh-keygen"):
            requireProgram(program)


def remove(directory):
    """Remove a directory with stores in it: they are read-only, and may be deeper than Python can climb."""
    subprocess.run(["chmod", "-R", "u+rwX", str(directory)], check=True, timeout=120)
    subprocess.run(["rm", "-rf", str(directory)], check=True, timeout=120)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A directory for everything, in memory if there is room."""
    memory = Path("/dev/shm")
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > NEEDED:
        directory = Path(tempfile.mkdtemp(prefix="nixserve-interop-", dir=memory))
    else:
        directory = tmp_path_factory.mktemp("interop")
    yield directory
    remove(directory)


@pytest.fixture(scope="session")
def nix(scratch):
    """Real Nix."""
    home = scratch / "home"
    home.mkdir()
    return Nix(home)


@pytest.fixture
def directory(scratch, request):
    """A directory of the test's own, gone afterwards. Its name is short: sockets lie below it."""
    made = Path(tempfile.mkdtemp(prefix=f"{request.node.originalname[5:17]}-", dir=scratch))
    yield made
    remove(made)


@pytest.fixture(scope="session")
def keys(scratch):
    """Host and user keys."""
    return Keys(scratch / "keys")


@pytest.fixture(scope="session")
def endpoint(scratch, nix, keys):
    """A running service with a store that tests share: each brings objects of its own."""
    running = Endpoint(scratch / "endpoint", nix, keys)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def sshd(scratch, nix, keys):
    """OpenSSH's server on loopback; C{sshd.force} sets the forced command."""
    if os.geteuid() != 0:
        unavailable("sshd has to be started by root")
    running = Sshd(requireProgram("sshd"), scratch / "sshd", keys)
    if not running.start():
        unavailable(f"sshd does not start: {running.log.read_text()[-500:]}")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def oddStore(scratch, nix):
    """A store made by real Nix, not to be changed."""
    place = scratch / "odd"
    place.mkdir()
    return makeOddStore(nix, place)


@pytest.fixture
def makeEndpoint(directory, nix, keys):
    """Starts services for one test: called with the root of the store to serve."""
    running = []

    def make(root, **options):
        running.append(Endpoint(directory / f"endpoint-{len(running)}", nix, keys, root, **options))
        return running[-1]

    yield make
    for server in running:
        server.stop()


@pytest.fixture
def workers():
    """Where stores on this side block."""
    workers = Workers(reactor)
    workers.start()
    yield workers
    workers.stop()

"""
Stores to test on, each in a directory of its own, and the real C{nix-store}.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nixserve.store.database import Database
from nixserve.store.files import deletePath
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.store.opening import prepareDirectories
from nixserve.store.validpaths import ValidPaths
from tests.realcollector import collecting


@pytest.fixture
def root():
    """The root of a chroot store, in memory where that is possible; removed afterwards."""
    path = tempfile.mkdtemp(prefix="nixserve-test-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield path
    subprocess.run(["chmod", "-R", "u+w", path], check=False)
    shutil.rmtree(path)


@pytest.fixture
def layout(root):
    """Where the store in C{root} lies."""
    return StoreLayout.underRoot(root)


@pytest.fixture
def store(layout):
    """An open store in C{root}."""
    store = LocalStore(layout, reservedSize=0)
    yield store
    store.close()


@pytest.fixture
def nix(root):
    """Runs the real C{nix-store} on the store in C{root}: takes arguments, gives the output."""
    program = shutil.which("nix-store")
    if program is None:
        pytest.skip("no nix-store on PATH")

    def run(*arguments):
        command = [program, "--store", root, *arguments]
        done = collecting(lambda: subprocess.run(command, capture_output=True, timeout=60))
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return run


@pytest.fixture
def asNobody():
    """Runs Python code with C{nixserve} imported, as a user without any rights; only root can."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")

    def run(code):
        # Imports come first, and what imports late: the other user may not be able to read them.
        prologue = (
            "import importlib.resources, os\n"
            "importlib.resources.files('nixserve.store').joinpath('schema.sql').read_text()\n"
            "from nixserve.codec.storepath import StorePath\n"
            "from nixserve.store.layout import StoreDefaults, StoreLayout, parseStoreURI\n"
            "from nixserve.store.local import LocalStore\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", prologue + code],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def database(layout):
    """That of the store in C{root}, open."""
    prepareDirectories(layout, 0)
    database = Database(layout)
    yield database
    database.close()


@pytest.fixture
def valid(database, layout):
    """What is registered in it."""
    return ValidPaths(database, layout.storeDir)


@pytest.fixture
def foreign(database, layout):
    """A connection of another program."""
    connection = sqlite3.connect(layout.dbPath, isolation_level=None)
    yield connection
    connection.close()


@pytest.fixture
def place(tmp_path):
    """A directory, as text."""
    yield str(tmp_path)
    deletePath(str(tmp_path))

"""
Somebody sets the clock back by an hour while our processes run.
"""

import subprocess
import sys
import threading

import pytest

from nixserve.codec.messages import Command, ImportItem
from nixserve.codec.serve import writeExportMarker, writeImportItem
from nixserve.store.pathlocks import PathLocks
from nixserve.testing import makeInfo, makeNar
from tests.app.box import HELLO, TIMEOUT, number

#: Loaded by every Python before anything else: the clock of the process is set back as soon as a file is there.
_CUSTOM = """
import os, time
_real, _file = time.time, os.environ["SET_BACK"]
time.time = lambda: _real() - 3600 * os.path.exists(_file)
"""

_COMMAND = """
from twisted.internet.task import deferLater
from nixserve.app.react import runReactor

async def main(reactor):
    due = deferLater(reactor, 0.01)
    open(os.environ["SET_BACK"], "x").close()
    await due

runReactor(main)
"""

_SERVICE = """
from twisted.internet import reactor
from nixserve.app.service import Options, makeService

def setBack():
    reactor.callLater(0.01, reactor.stop)
    open(os.environ["SET_BACK"], "x").close()

options = Options()
options.parseOptions([])
makeService(options)
reactor.callWhenRunning(setBack)
reactor.run()
"""


@pytest.fixture
def environment(box):
    """For a process whose clock is set back."""
    (box.path / "custom").mkdir()
    (box.path / "custom/sitecustomize.py").write_text(_CUSTOM)
    return {**box.environ, "PYTHONPATH": f"{box.path}/custom", "SET_BACK": f"{box.path}/back"}


@pytest.mark.parametrize("program", [_COMMAND, _SERVICE], ids=["command", "service"])
def test_timersGoOn(box, environment, program):
    """What is due in a moment comes then, in commands as in the service."""
    command = [sys.executable, "-c", f"import os\n{program}"]
    subprocess.run(command, env=environment, check=True, timeout=TIMEOUT, cwd=box.path)
    assert (box.path / "back").exists()


def test_lockWaitsGoOn(box, environment):
    """A session of its own process that waits for a lock gets it when it is free."""
    root, store = box.store()
    info = makeInfo("x", makeNar(b"hello"))
    item = writeImportItem(ImportItem(info.path, frozenset(), None))
    request = writeExportMarker(True) + makeNar(b"hello") + item + writeExportMarker(False)
    lock = PathLocks([store.layout.realPath(info.path)])
    process = box.spawn(
        *("nixserve-store", "--serve", "--write", "--store", root),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.start()
    try:
        process.stdin.write(HELLO + number(Command.IMPORT_PATHS) + request)
        process.stdin.flush()
        assert process.stderr.readline().startswith(b"waiting for the lock on ")
        (box.path / "back").touch()
        lock.unlock()
        assert process.stdout.read(24) == number(0x5452EECB) + number(0x208) + number(1)
        process.stdin.close()
        assert process.wait() == 0
    finally:
        watchdog.cancel()
    session = store.openSession()
    assert session.queryValidPaths([info.path]) == {info.path}
    session.close()

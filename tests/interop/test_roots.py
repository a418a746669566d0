"""
Real Nix's garbage collector at work on a store that is being served.

What a session has asked about stays until the session ends, although the protocol's lock flag is not set: no client of
Nix 2.x sets it. What no session holds goes.
"""

import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nixserve.testing import makeInfo, makeNar
from tests.interop.conversations import Session, dumpStorePath, queryClosure
from tests.interop.nix import ourProgram
from tests.interop.remotes import ROOTLESS
from tests.interop.stores import add, addChain, assertVerified, infos, isLocked, opened, physical, temporaryRoots
from tests.interop.watching import until

COPIES = 200
#: Of these, real C{nix copy} makes so many.
REAL_COPIES = 16
CLIENTS = 8


class Collecting:
    """
    Real C{nix-store --gc} again and again, until the block ends or for a minute at most.

    @ivar runs: how many have ended, successfully.
    @ivar failures: what those said that did not.
    """

    def __init__(self, nix, root):
        self._nix, self._root = nix, root
        self.runs = 0
        self.failures = []
        self._begun = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)

    def _collect(self):
        deadline = time.monotonic() + 60
        while not self._end.is_set() and time.monotonic() < deadline:
            self._begun += 1
            done = self._nix.run("nix-store", "--gc", store=self._root, check=False)
            if done.returncode:
                self.failures.append(done.stderr.decode())
            self.runs += 1

    def awaitWholeRun(self):
        """Until a collection has ended that began after this was called."""
        wanted = self._begun + 1
        until(lambda: self.runs >= wanted, 30, "the collector has not come round")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join(60)


class TinyClosure:
    """Three objects, each of which refers to the one before."""

    def __init__(self, tag):
        self.nars = [makeNar(f"{tag} {number}".encode()) for number in range(3)]
        self.infos = []
        for number, nar in enumerate(self.nars):
            references = [info.path for info in self.infos[-1:]]
            self.infos.append(makeInfo(f"{tag}-{number}", nar, references))

    @property
    def paths(self):
        return [info.path for info in self.infos]

    def add(self, session, number):
        session.add(self.infos[number], self.nars[number])

    def check(self, session):
        """Everything is there, and is what it should be."""
        assert session.askValid(self.paths) == sorted(self.paths)
        session.write(queryClosure(self.paths[-1:]))
        assert session.readStrings() == sorted(self.paths)
        for path, nar in zip(self.paths, self.nars, strict=True):
            session.write(dumpStorePath(path))
            assert session.read(len(nar)) == nar


def copyWithoutLoss(endpoint, collecting, tag):
    """
    The conversation of a copy, slow enough for a whole collection between question and use: the first object is
    garbage, kept by no one but the session that has been told that it is there.
    """
    closure = TinyClosure(tag)
    with Session.ofSocket(endpoint.socket) as session:
        session.greet()
        with Session.ofSocket(endpoint.socket) as earlier:
            earlier.greet()
            closure.add(earlier, 0)
            assert session.askValid(closure.paths) == closure.paths[:1]
        collecting.awaitWholeRun()
        closure.add(session, 1)
        closure.add(session, 2)
        collecting.awaitWholeRun()
        closure.check(session)


def realCopy(nix, endpoint, root, path):
    """A closure that real Nix copies."""
    nix.run("nix", "copy", "--to", endpoint.url, path, store=root, environment=endpoint.environment())


def test_nothingLost(nix, directory, makeEndpoint):
    """200 copies while the collector never rests: none loses anything, and nothing stays that nobody holds."""
    endpoint = makeEndpoint(directory / "served")
    source = directory / "source"
    tops = [addChain(source, 3, f"real-{number}")[-1] for number in range(REAL_COPIES)]
    numbers = itertools.count()
    with Collecting(nix, endpoint.root) as collecting, ThreadPoolExecutor(CLIENTS + 2) as clients:
        copies = [
            clients.submit(copyWithoutLoss, endpoint, collecting, f"copy-{next(numbers)}")
            for _ in range(COPIES - REAL_COPIES)
        ]
        copies[:0] = [clients.submit(realCopy, nix, endpoint, source, top) for top in tops]
        for copy in copies:
            copy.result(120)
        print(f"{len(copies)} copies during {collecting.runs} collections")
        assert collecting.failures == []
        assert collecting.runs > 20
    until(lambda: temporaryRoots(endpoint.root) == [])
    nix.run("nix-store", "--gc", store=endpoint.root)
    assert infos(nix, endpoint.root) == {}
    assert [name.name for name in physical(endpoint.root, "/nix/store").iterdir()] == [".links"]
    assertVerified(nix, endpoint.root)


def startServer(nix, kind, root):
    """The kinds of server that can be asked whether they keep what they said to be valid."""
    arguments = {
        "ours": [ourProgram("nixserve-store"), "--serve", "--write", "--store", root],
        "ours, without roots": [sys.executable, ROOTLESS, "--serve", "--write", "--store", root],
        "real": ["nix-store", "--serve", "--write", "--store", root],
    }[kind]
    return nix.start(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("lock", [False, True])
@pytest.mark.parametrize("kind", ["ours", "ours, without roots", "real"])
def test_between(nix, directory, kind, lock):
    """
    A collection exactly between question and use. Ours keeps what it said to be valid. Without roots it loses it, so
    this very test would notice if they did nothing; and so does real Nix unless the client sets the flag, as no
    client of Nix 2.x does.
    """
    root = directory / "root"
    closure = TinyClosure("between")
    with opened(root) as session:
        add(session, "between-0", closure.nars[0])
        keep = add(session, "unasked", makeNar(b"unasked"))
    process = startServer(nix, kind, root)
    with Session.ofProcess(process) as session:
        session.greet(0x207)
        assert session.askValid(closure.paths, lock) == closure.paths[:1]
        nix.run("nix-store", "--gc", store=root)
        kept = kind == "ours" or (kind == "real" and lock)
        assert physical(root, closure.paths[0]).exists() is kept
        assert not physical(root, keep).exists()
        if kept:
            closure.add(session, 1)
            closure.add(session, 2)
            closure.check(session)
        else:
            with pytest.raises((EOFError, BrokenPipeError)):
                closure.add(session, 1)
    with process.stderr:
        errors = process.stderr.read().decode()
    assert process.returncode == (0 if kept else 1)
    assert ("is not valid" in errors) is not kept


def test_readerKeepsNothing(nix, directory):
    """A session that may only read takes no roots: whoever may not write cannot fill the disk with garbage."""
    root = directory / "root"
    with opened(root) as session:
        path = add(session, "garbage", makeNar(b"garbage"))
    process = nix.start(
        *(ourProgram("nixserve-store"), "--serve", "--store", root), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with Session.ofProcess(process) as session:
        session.greet()
        assert session.askValid([path], lock=True) == [path]
        nix.run("nix-store", "--gc", store=root)
        assert session.askValid([path], lock=True) == []


def test_rootsOfDeadServer(nix, directory):
    """Roots of a server that was killed are void: the next collection removes them and what they kept."""
    root = directory / "root"
    with opened(root) as session:
        path = add(session, "garbage", makeNar(b"garbage"))
    process = startServer(nix, "ours", root)
    session = Session.ofProcess(process)
    session.greet()
    assert session.askValid([path]) == [path]
    nix.run("nix-store", "--gc", store=root)
    assert physical(root, path).exists()
    process.kill()
    session.close()
    process.stderr.close()
    nix.run("nix-store", "--gc", store=root)
    assert not physical(root, path).exists() and temporaryRoots(root) == []


def test_questionDuringCollection(nix, directory, makeEndpoint):
    """
    A question that arrives while a collector holds its lock is answered by what is left when it has ended, never by
    something that it goes on to delete.
    """
    endpoint = makeEndpoint(directory / "served")
    gcLock = endpoint.root / "nix/var/nix/gc.lock"
    collect = ["nix-store", "--gc"]
    during = 0
    for number in range(8):
        chain = addChain(endpoint.root, 300, f"round-{number}")
        with Session.ofSocket(endpoint.socket) as session:
            session.greet()
            collector = nix.start(*collect, store=endpoint.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            until(lambda: isLocked(gcLock), message="the collector has not begun")
            time.sleep(0.005 * number)
            during += isLocked(gcLock)
            valid = session.askValid(chain)
            assert collector.wait(30) == 0
            assert session.askValid(chain) == valid
            assert all(physical(endpoint.root, path).exists() for path in valid)
        assertVerified(nix, endpoint.root)
    assert during >= 2

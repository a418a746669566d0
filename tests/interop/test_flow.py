"""
Clients that stop, stall or die in the middle of 3 GiB, over the service's SSH server: its memory stays small, and what
the client held is free within seconds.
"""

import contextlib
import signal
import subprocess
import time
from dataclasses import replace

import pytest

from nixserve.testing import makeInfo, makeNar
from tests.interop.conversations import Session, addHeader, addToStoreNar, dumpStorePath, string, u64, zeros
from tests.interop.endpoint import Endpoint
from tests.interop.stores import addSparse, assertVerified, isLocked, isSent, named, opened, physical, temporaryRoots
from tests.interop.watching import MIB, Peak, residentSize, until

SIZE = 3 * 1024 * MIB
ALLOWED = 100 * MIB
#: How soon everything must be free after a client's death.
FREE = 5.0

HEAD = b"".join(map(string, ("nix-archive-1", "(", "type", "regular", "contents"))) + u64(SIZE)
TAIL = string(")")
NAR_SIZE = len(HEAD) + SIZE + len(TAIL)


@pytest.fixture(scope="module")
def service(scratch, nix, keys):
    """A service with a file of 3 GiB, which has seen clients before."""
    place = scratch / "flow"
    place.mkdir()
    path = addSparse(nix, place / "root", "three-gib", SIZE)[0]
    server = Endpoint(place / "endpoint", nix, keys, place / "root")
    server.big = path
    for _ in range(3):
        with connected(nix, server) as (session, _):
            session.askValid([path])
    server.idle = residentSize(server.process.pid)
    yield server
    server.stop()


@contextlib.contextmanager
def connected(nix, server):
    """A session through OpenSSH's client, whose process comes with it."""
    process = nix.start(*server.ssh(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    session = Session.ofProcess(process)
    try:
        session.greet()
        yield session, process
    finally:
        process.kill()
        process.wait(20)
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def assertFree(server, path, seconds=FREE):
    """Soon nobody holds anything."""
    begun = time.monotonic()
    until(lambda: temporaryRoots(server.root) == [], seconds, "temporary roots are not gone")
    until(lambda: not isSent(server.root, path), seconds, "the lock is still held")
    print(f"free after {time.monotonic() - begun:.2f} s")


def assertWorks(server):
    """Other clients are served, at once."""
    begun = time.monotonic()
    with Session.ofSocket(server.socket, timeout=5) as session:
        session.greet()
        assert session.askValid([server.big]) == [server.big]
    assert time.monotonic() - begun < 2


def assertAddable(server, path):
    """The path is anybody's: what was left behind is in nobody's way."""
    nar = makeNar(b"something smaller")
    with Session.ofSocket(server.socket) as session:
        session.greet()
        session.add(replace(makeInfo("other", nar), path=path), nar)
    assert not physical(server.root, f"{path}.lock").exists()


def beginUpload(session, path, size):
    """Send the beginning of a NAR of zeros."""
    session.write(addHeader(path, "0" * 64, NAR_SIZE) + HEAD)
    for piece in zeros(size):
        session.write(piece)


def beginDownload(session, path, size):
    """Read the beginning of a NAR."""
    session.write(dumpStorePath(path))
    while size > 0:
        size -= len(session.read(min(size, MIB)))


def test_readerStops(nix, service):
    """A reader that takes nothing more stops the reading of the file, not the service."""
    with connected(nix, service) as (session, process), Peak(service.process.pid) as peak:
        beginDownload(session, service.big, MIB)
        time.sleep(2)
        assertWorks(service)
        until(lambda: len(temporaryRoots(service.root)) == 1)
        process.kill()
        assertFree(service, service.big)
    print(f"{(peak.size - service.idle) / MIB:.1f} MiB")
    assert peak.size < service.idle + ALLOWED


def test_readerGoesOn(nix, service):
    """A reader that rests now and then gets everything."""
    with connected(nix, service) as (session, _), Peak(service.process.pid) as peak:
        session.write(dumpStorePath(service.big))
        assert session.read(len(HEAD)) == HEAD
        for _ in range(3):
            for _ in range(64):
                assert not any(session.read(MIB)[::4096])
            time.sleep(0.5)
    assert peak.size < service.idle + ALLOWED
    assertFree(service, service.big)


def test_writerStalls(nix, service):
    """A writer that says nothing more keeps no thread, and the lock of no path but the one where his object lies."""
    path = named("stalled")
    lock = f"{physical(service.root, path)}.lock"
    with contextlib.ExitStack() as stack, Peak(service.process.pid) as peak:
        # More than there are worker threads.
        stalled = [stack.enter_context(connected(nix, service)) for _ in range(10)]
        for number, (session, _) in enumerate(stalled[1:]):
            beginUpload(session, named(f"stalled-{number}"), MIB)
        session, process = stalled[0]
        beginUpload(session, path, 64 * MIB)
        time.sleep(2)
        assertWorks(service)
        assert isSent(service.root, path) and not isLocked(lock)
        until(lambda: len(temporaryRoots(service.root)) == len(stalled))
        for _, process in stalled:
            process.kill()
        assertFree(service, path)
    print(f"{(peak.size - service.idle) / MIB:.1f} MiB")
    assert peak.size < service.idle + ALLOWED
    assertAddable(service, path)


@pytest.mark.parametrize("sent", [0, 40_000, 10 * MIB, 700 * MIB])
def test_uploaderDies(nix, service, sent):
    """Killed anywhere, it holds nothing afterwards, and nothing is registered."""
    path = named(f"upload-{sent}")
    with connected(nix, service) as (session, process), Peak(service.process.pid) as peak:
        beginUpload(session, path, sent)
        until(lambda: isSent(service.root, path))
        process.send_signal(signal.SIGKILL)
        assertFree(service, path)
        assertWorks(service)
    assert peak.size < service.idle + ALLOWED
    with Session.ofSocket(service.socket) as session:
        session.greet()
        assert session.askValid([path]) == []
    assertAddable(service, path)


@pytest.mark.parametrize("taken", [0, 40_000, 10 * MIB, 700 * MIB])
def test_downloaderDies(nix, service, taken):
    """Killed anywhere, it holds nothing afterwards."""
    with connected(nix, service) as (session, process), Peak(service.process.pid) as peak:
        beginDownload(session, service.big, taken)
        process.send_signal(signal.SIGKILL)
        assertFree(service, service.big)
        assertWorks(service)
    assert peak.size < service.idle + ALLOWED


def test_uploadingCopyDies(nix, service, directory):
    """The same for real C{nix copy}; its ssh goes with it."""
    path = addSparse(nix, directory / "source", "copied", SIZE)[0]
    interrupt(
        nix.start(
            *("nix", "copy", "--to", service.url, path),
            store=directory / "source",
            environment=service.environment(),
            stderr=subprocess.DEVNULL,
        ),
        service.root,
        path,
    )
    assertFree(service, path)
    assertWorks(service)


def test_slowReaderDies(nix, service):
    """
    Whoever reads from ssh stops and then dies; its ssh does not. The window is used up, and ssh never opens it again,
    nor does it close the channel: it says EOF, and to a server that looks like OpenSSH that nobody reads any more.
    """
    with connected(nix, service) as (session, process):
        beginDownload(session, service.big, MIB)
        time.sleep(1)
        process.stdin.close()
        process.stdout.close()
        assertFree(service, service.big)


def test_downloadingCopyDies(nix, service, directory):
    """
    Real C{nix copy} is killed while it reads, its ssh is not. That says so, as in L{test_slowReaderDies}; if it did
    not, it would take the rest and throw it away, for as long as that may last.
    """
    interrupt(
        nix.start(
            *("nix", "copy", "--no-check-sigs", "--from", service.url, service.big),
            store=directory / "target",
            environment=service.environment(),
            stderr=subprocess.DEVNULL,
        ),
        directory / "target",
        service.big,
    )
    assertFree(service, service.big)
    assertWorks(service)


def interrupt(copy, root, path):
    """Kill a copy when some of it has arrived, where real Nix puts it or where our program does."""

    def proceeds():
        places = [physical(root, path), *physical(root, "/nix/store").glob("*-nixserve-import-*[0-9]")]
        return any(place.exists() and place.stat().st_size > 100 * MIB for place in places)

    until(proceeds, 30, "the copy does not proceed")
    copy.kill()
    copy.wait(20)


def test_afterAll(nix, service):
    """Real Nix finds the store in order, and its collector clears up."""
    with opened(service.root) as session:
        session.addTempRoots([service.big])
        nix.run("nix-store", "--gc", store=service.root)
    assert {place.name for place in physical(service.root, "/nix/store").iterdir()} == {
        ".links",
        service.big.rpartition("/")[2],
    }
    assertVerified(nix, service.root)
    assert residentSize(service.process.pid) < service.idle + ALLOWED


def test_manySmallUploads(nix, service):
    """Five thousand objects in one session: memory does not grow with their number."""
    nar = makeNar(b"x" * 200)
    with Session.ofSocket(service.socket) as session, Peak(service.process.pid) as peak:
        session.greet()
        for batch in range(50):
            infos = [replace(makeInfo("small", nar), path=named(f"small-{batch}-{number}")) for number in range(100)]
            session.write(b"".join(addToStoreNar(info, nar) for info in infos))
            assert [session.readU64() for _ in infos] == [1] * 100
    print(f"{(peak.size - service.idle) / MIB:.1f} MiB")
    assert peak.size < service.idle + ALLOWED

"""
Whether those who are logged in still may be.
"""

import errno
import os
from datetime import UTC, datetime

import pytest
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from nixserve.ssh.keys import AuthorizedKeysChecker, AuthorizedKeysFile
from nixserve.ssh.keywatch import LOOK_SECONDS, KeyWatch
from tests.ssh.userkeys import BLOB, LINE, write


class Connection:
    def __init__(self, checker, host="10.0.0.1"):
        self.host = host
        self.entry = checker.choose(checker.keys.find(BLOB), host)
        self.reasons = []

    def expel(self, reason):
        self.reasons.append(reason)


class World:
    """A file, a wall clock, the reactor's clock, and a connection that is logged in."""

    def __init__(self, directory, line=LINE):
        self.path = str(directory / "authorized_keys")
        self.time = datetime(2026, 6, 1, tzinfo=UTC).timestamp()
        self.clock = Clock()
        self.write(line)
        self.checker = AuthorizedKeysChecker(AuthorizedKeysFile(self.path), lambda: self.time)
        self.watch = KeyWatch(self.checker, self.clock)
        self.connection = Connection(self.checker)
        self.watch.add(self.connection)

    def write(self, content):
        write(self.path, content)

    def look(self, times=1):
        self.clock.pump([LOOK_SECONDS] * times)
        return self.connection.reasons


@pytest.fixture
def makeWorld(tmp_path):
    return lambda *arguments: World(tmp_path, *arguments)


def test_oneMoreLook(makeWorld):
    """A file that an editor empties for a moment disconnects nobody; one that stays so does, once."""
    world = makeWorld()
    world.write("")
    assert world.look() == []
    world.write(LINE)
    assert world.look(3) == []
    world.write("")
    assert world.look() == []
    assert world.look() == ["the key is no longer let in here"]
    assert world.look(3) == ["the key is no longer let in here"]


def test_withinSeconds(makeWorld):
    """A key that was removed is gone in 3 s."""
    assert 2 * LOOK_SECONDS <= 3


def test_expires(makeWorld):
    """An expiry counts when it comes, though the file does not change."""
    world = makeWorld(f'expiry-time="20260601000100Z" {LINE}')
    assert world.look(5) == []
    world.time += 61
    assert world.look(2) == ["the key has expired"]


def test_otherLineOfTheSameKey(makeWorld):
    """As at a login, the first line that lets the key in counts."""
    world = makeWorld(f'from="10.0.0.1" {LINE}\ncommand="nix-store --serve" {LINE}')
    world.write(f'command="nix-store --serve" {LINE}\nfrom="10.0.0.1" {LINE}')
    assert world.look(2) == ["what the key may do has changed; log in again"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE])
def test_faultsSayNothing(makeWorld, monkeypatch, number):
    """A disk that fails, or a process without descriptors, disconnects nobody, lets nobody in, and is said once."""
    world = makeWorld()
    stat = os.stat

    def fail(path, *arguments, **options):
        if path == world.path:
            raise OSError(number, os.strerror(number))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", fail)
    with capturedLogs() as events:
        assert world.look(5) == []
        assert world.checker.keys.find(BLOB) == []
    assert [event["reason"] for event in events] == [os.strerror(number)]
    monkeypatch.undo()
    assert world.look(5) == []
    assert len(world.checker.keys.find(BLOB)) == 1


def test_noDescriptors(makeWorld, monkeypatch):
    """A file that could not be opened once is read again the next time, although it has not changed since."""
    world = makeWorld()
    world.write(f"# another line\n{LINE}")
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
    assert world.checker.keys.find(BLOB) == []
    monkeypatch.undo()
    assert len(world.checker.keys.find(BLOB)) == 1


def test_pipe(tmp_path):
    """What is no file is not opened: a pipe would hold up everybody."""
    os.mkfifo(tmp_path / "authorized_keys", 0o600)
    assert AuthorizedKeysFile(str(tmp_path / "authorized_keys")).find(BLOB) == []


def test_nobodyIsWatched(makeWorld):
    """When all are gone nothing is looked at any more."""
    world = makeWorld()
    world.watch.discard(world.connection)
    world.watch.discard(world.connection)
    assert world.clock.getDelayedCalls() == []

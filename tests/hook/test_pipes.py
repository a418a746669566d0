"""
L{nixserve.hook.pipes}: all that Nix is to read gets through, and nobody waits for a reader that is gone.
"""

import fcntl
import os

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from nixserve.hook import pipes
from nixserve.hook.pipes import PipeToNix, whenReadable


async def readAll(descriptor):
    """Everything up to the end."""
    got = b""
    while True:
        await whenReadable(reactor, descriptor).addTimeout(10, reactor)
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return got
        got += chunk


@pytest_twisted.ensureDeferred
async def test_pipe():
    """Everything gets through, whatever its bytes, also to a reader that is slow; then the pipe is closed."""
    reading, writing = os.pipe()
    data = bytes(range(256)) * 8192
    pipe = PipeToNix(reactor, writing, lambda: pytest.fail("nobody is gone"))
    pipe.write(data)
    ended = pipe.finish()
    got = await readAll(reading)
    await ended
    assert got == data
    os.close(reading)


@pytest_twisted.ensureDeferred
async def test_pipeOverflows(monkeypatch):
    """What a reader that has stopped does not take is dropped, and it is told how much."""
    monkeypatch.setattr(pipes, "MAX_PENDING", 4 << 20)
    reading, writing = os.pipe()
    pipe = PipeToNix(reactor, writing, lambda: None)
    for _ in range(10):
        pipe.write(b"x" * (1 << 20))
    ended = pipe.finish()
    got = await readAll(reading)
    await ended
    assert b"bytes were dropped here" in got
    assert got.count(b"x") < 6 << 20
    os.close(reading)


@pytest_twisted.ensureDeferred
async def test_readerGone():
    """Who reads the pipe being gone is told once, without anything being written; and writing does no harm then."""
    reading, writing = os.pipe()
    gone = Deferred()
    pipe = PipeToNix(reactor, writing, lambda: gone.callback(None))
    os.close(reading)
    await gone.addTimeout(5, reactor)
    pipe.write(b"x")
    await pipe.finish()
    with pytest.raises(OSError, match="Bad file descriptor"):
        fcntl.fcntl(writing, fcntl.F_GETFD)


@pytest_twisted.ensureDeferred
async def test_endsOnce():
    """A reactor that stops ends what has ended already: by then the descriptor may be somebody else's."""
    reading, writing = os.pipe()
    pipe = PipeToNix(reactor, writing, lambda: None)
    await pipe.finish()
    os.dup2(reading, writing)
    pipe._stream.connectionLost(Failure(ConnectionDone()))
    os.close(writing)
    os.close(reading)


@pytest_twisted.ensureDeferred
async def test_notAPipe(tmp_path):
    """A file takes everything at once."""
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    pipe = PipeToNix(reactor, descriptor, lambda: pytest.fail("nobody is gone"))
    pipe.write(b"some")
    pipe.write(b"thing")
    await pipe.finish()
    assert (tmp_path / "file").read_bytes() == b"something"


@pytest_twisted.ensureDeferred
async def test_whenReadable():
    """Data, and the end, can be waited for; giving up leaves nothing behind."""
    reading, writing = os.pipe()
    waiting = whenReadable(reactor, reading)
    await deferLater(reactor, 0.01)
    assert not waiting.called
    os.write(writing, b"x")
    await waiting.addTimeout(5, reactor)
    os.read(reading, 1)
    given = whenReadable(reactor, reading)
    given.addErrback(lambda _: None)
    given.cancel()
    os.close(writing)
    await whenReadable(reactor, reading).addTimeout(5, reactor)
    os.close(reading)

"""A child process as a transport: real children, small ones."""

import os
import sys

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone, ProcessDone, ProcessTerminated
from twisted.internet.interfaces import IReactorProcess
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.errors import RemoteError
from nixserve.protocol import childprocess, stdio
from nixserve.protocol.childprocess import ProcessTransport
from nixserve.protocol.client import ServeClient
from nixserve.protocol.interfaces import IErrorReceiver
from tests.vectors.serve.messages import STORE_DIR


@implementer(IErrorReceiver)
class Recorder(Protocol):
    """Keeps what happens."""

    def __init__(self):
        self.received = bytearray()
        self.errors = bytearray()
        self.lost = Deferred()
        self.ends = 0

    def dataReceived(self, data):
        """Keep it."""
        self.received += data

    def errorReceived(self, data):
        """Keep it."""
        self.errors += data

    def connectionLost(self, reason):
        """Keep that."""
        self.ends += 1
        self.lost.callback(reason.value)


def spawn(script, protocol=None):
    """
    A child that runs C{script}.

    @return: its protocol and its transport.
    """
    protocol = protocol or Recorder()
    argv = [sys.executable, "-S", "-c", "import sys, os, time\n" + script]
    return protocol, ProcessTransport.spawn(protocol, reactor, argv, {})


@pytest.fixture(autouse=True)
def leaks():
    """Every test leaves descriptors and reactor as they were, with nothing to be done about a child that is gone."""
    before = len(os.listdir("/proc/self/fd"))
    calls = set(reactor.getDelayedCalls())
    yield
    assert set(reactor.getDelayedCalls()) <= calls
    assert not [d for d in [*reactor.getReaders(), *reactor.getWriters()] if isinstance(d, stdio.Stream)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


CAT = "while data := os.read(0, 65536): os.write(1, data)"


@pytest_twisted.inlineCallbacks
def test_cat():
    """What is written comes back; the end of its input ends the child."""
    protocol, transport = spawn(CAT)
    transport.write(b"hello ")
    transport.writeSequence([b"wor", b"ld"])
    transport.loseConnection()
    reason = yield protocol.lost
    assert isinstance(reason, ProcessDone) and protocol.received == b"hello world" and protocol.ends == 1


@pytest_twisted.inlineCallbacks
def test_throughput():
    """Many MiB go through whole."""
    protocol, transport = spawn(CAT)
    transport.write(bytes(range(256)) * 4096 * 16)
    transport.loseConnection()
    yield protocol.lost
    assert protocol.received == bytes(range(256)) * 4096 * 16


@pytest_twisted.inlineCallbacks
def test_lastBytes():
    """All that a child wrote before it ended arrives before the end, also what fills the pipe."""
    protocol, _ = spawn("sys.stdout.buffer.write(b'x' * 1_000_000)")
    reason = yield protocol.lost
    assert isinstance(reason, ProcessDone) and len(protocol.received) == 1_000_000


@pytest_twisted.inlineCallbacks
def test_lastBytesWhilePaused():
    """They wait as long as the protocol wants nothing, and so does the end."""
    protocol, transport = spawn("sys.stdout.buffer.write(b'x' * 900_000)")
    transport.pauseProducing()
    yield deferLater(reactor, 0.3, lambda: None)
    assert protocol.received == b"" and protocol.ends == 0
    transport.resumeProducing()
    yield protocol.lost
    assert len(protocol.received) == 900_000


@pytest_twisted.inlineCallbacks
def test_abortWhilePaused():
    """Aborting does not wait for what nobody wants."""
    protocol, transport = spawn("sys.stdout.buffer.write(b'x' * 900_000)")
    transport.pauseProducing()
    yield deferLater(reactor, 0.3, lambda: None)
    transport.abortConnection()
    yield protocol.lost
    assert protocol.received == b"" and protocol.ends == 1
    transport.abortConnection()


@pytest_twisted.inlineCallbacks
def test_exitStatus():
    """How the child ended is the reason of the end."""
    protocol, _ = spawn("os._exit(42)")
    reason = yield protocol.lost
    assert isinstance(reason, ProcessTerminated) and reason.exitCode == 42


@pytest_twisted.inlineCallbacks
def test_errorText():
    """Standard error arrives whole before the end."""
    protocol, _ = spawn("os.write(2, b'e' * 300_000); os._exit(1)")
    yield protocol.lost
    assert protocol.errors == b"e" * 300_000


@pytest_twisted.inlineCallbacks
def test_childThatReadsNothing():
    """A child that is gone takes nothing, which is no trouble; a producer is told to stop."""
    stopped = []

    class Producer:
        def pauseProducing(self):
            pass

        def stopProducing(self):
            stopped.append(1)

    protocol, transport = spawn("os._exit(1)")
    transport.registerProducer(Producer(), True)
    transport.write(b"x" * 5_000_000)
    yield protocol.lost
    assert stopped == [1]
    transport.write(b"late")
    transport.registerProducer(Producer(), True)
    transport.unregisterProducer()
    transport.loseConnection()
    assert stopped == [1, 1]


@pytest_twisted.inlineCallbacks
def test_abort():
    """Aborting ends a child that does not end by itself."""
    protocol, transport = spawn("os.write(1, b'up'); time.sleep(60)")
    while not protocol.received:
        yield deferLater(reactor, 0.01, lambda: None)
    transport.abortConnection()
    reason = yield protocol.lost
    assert isinstance(reason, ProcessTerminated) and reason.signal == 15


@pytest_twisted.inlineCallbacks
def test_abortByForce(monkeypatch):
    """A child that does not want to end is killed after a while; aborting again and again does not put that off."""
    monkeypatch.setattr(childprocess, "KILL_SECONDS", 0.2)
    protocol, transport = spawn("import signal; signal.signal(15, signal.SIG_IGN); os.write(1, b'up'); time.sleep(60)")
    while not protocol.received:
        yield deferLater(reactor, 0.01, lambda: None)
    for _ in range(100):
        transport.abortConnection()
        yield deferLater(reactor, 0.05, lambda: None)
        if protocol.ends:
            break
    assert protocol.ends == 1
    reason = yield protocol.lost
    assert isinstance(reason, ProcessTerminated) and reason.signal == 9
    transport.abortConnection()


#: Leaves a process behind that holds all streams open, and says its number.
HEIR = """
pid = os.fork()
if not pid:
    time.sleep(60)
    os._exit(0)
os.write(2, b'%d' % pid)
"""


@pytest_twisted.inlineCallbacks
def test_heirs(monkeypatch):
    """
    A process that the child leaves behind, with the child's streams, does not keep the end back; what the child wrote
    arrives whole.
    """
    monkeypatch.setattr(childprocess, "ERROR_SECONDS", 0.2)
    protocol, _ = spawn(HEIR + "sys.stdout.buffer.write(b'x' * 900_000); sys.stdout.flush(); os._exit(7)")
    reason = yield protocol.lost
    os.kill(int(protocol.errors), 9)
    assert isinstance(reason, ProcessTerminated) and reason.exitCode == 7
    assert len(protocol.received) == 900_000 and protocol.ends == 1


@pytest_twisted.inlineCallbacks
def test_heirsWhilePaused(monkeypatch):
    """The same if the protocol takes its time."""
    monkeypatch.setattr(childprocess, "ERROR_SECONDS", 0.2)
    protocol, transport = spawn(HEIR + "sys.stdout.buffer.write(b'x' * 900_000); sys.stdout.flush(); os._exit(7)")
    transport.pauseProducing()
    yield deferLater(reactor, 0.6, lambda: None)
    assert protocol.received == b"" and protocol.ends == 0
    transport.resumeProducing()
    reason = yield protocol.lost
    os.kill(int(protocol.errors), 9)
    assert reason.exitCode == 7 and len(protocol.received) == 900_000


@pytest_twisted.inlineCallbacks
def test_abortWithHeirs(monkeypatch):
    """Aborting does not wait for them either."""
    monkeypatch.setattr(childprocess, "ERROR_SECONDS", 30.0)
    protocol, transport = spawn(HEIR + "time.sleep(60)")
    while not protocol.errors:
        yield deferLater(reactor, 0.01, lambda: None)
    transport.abortConnection()
    patience = deferLater(reactor, 10, os.kill, int(protocol.errors), 9)
    reason = yield protocol.lost
    assert not patience.called
    patience.addErrback(lambda failure: failure.trap(CancelledError))
    patience.cancel()
    os.kill(int(protocol.errors), 9)
    assert reason.signal == 15 and protocol.ends == 1


@pytest_twisted.inlineCallbacks
def test_reactorStops():
    """A reactor that stops ends every stream that it knows, in any order and each once."""
    protocol, transport = spawn("os._exit(0)")
    streams = [transport._output, transport._input]
    yield protocol.lost
    for stream in streams:
        stream.connectionLost(Failure(ConnectionDone()))
    assert protocol.ends == 1


@pytest_twisted.inlineCallbacks
def test_backPressure():
    """A producer is paused by a child that does not read."""
    calls = []

    class Producer:
        def pauseProducing(self):
            calls.append("pause")

        def resumeProducing(self):
            calls.append("resume")

        def stopProducing(self):
            calls.append("stop")

    protocol, transport = spawn("sys.stdin.buffer.read(1); time.sleep(0.1); sys.stdin.buffer.read()")
    transport.registerProducer(Producer(), True)
    for _ in range(20):
        transport.write(bytes(256 * 1024))
    assert set(calls) == {"pause"}
    while calls[-1] != "resume":
        yield deferLater(reactor, 0.01, lambda: None)
    transport.unregisterProducer()
    transport.loseConnection()
    assert isinstance((yield protocol.lost), ProcessDone)


@pytest_twisted.inlineCallbacks
def test_noSuchProgram():
    """A program that is not there is an error at once, or ends like one that fails: that is up to Twisted."""
    protocol = Recorder()
    try:
        ProcessTransport.spawn(protocol, reactor, ["/nonexistent/nix-store"], {})
    except FileNotFoundError:
        assert protocol.ends == 0
    else:
        assert isinstance((yield protocol.lost), ProcessTerminated)


@implementer(IReactorProcess)
class NoMoreProcesses:
    """A reactor that can start none."""

    def spawnProcess(self, *args, **kwargs):
        """See L{IReactorProcess}."""
        raise BlockingIOError(11, "Resource temporarily unavailable")


def test_notStarted():
    """A child that cannot be started leaves nothing open."""
    before = sorted(os.listdir("/proc/self/fd"))
    protocol = Recorder()
    with pytest.raises(BlockingIOError):
        ProcessTransport.spawn(protocol, NoMoreProcesses(), ["nix-store"], {})
    assert sorted(os.listdir("/proc/self/fd")) == before and not protocol.connected


@pytest_twisted.inlineCallbacks
def test_environment():
    """The child sees the environment that it is given, and nothing else."""
    protocol = Recorder()
    script = "import os; print(sorted(set(os.environ) - {'LC_CTYPE'}))"
    ProcessTransport.spawn(protocol, reactor, [sys.executable, "-S", "-c", script], {"ONLY": "this"})
    yield protocol.lost
    assert protocol.received == b"['ONLY']\n"


@pytest_twisted.inlineCallbacks
def test_clientSeesWhyTheChildFailed():
    """A client's error is what the child said on standard error."""
    client, _ = spawn("os.write(2, b'Permission denied (publickey).\\n'); os._exit(255)", ServeClient(STORE_DIR))
    with pytest.raises(RemoteError, match=r"the remote said: Permission denied \(publickey\)"):
        yield client.ready
    yield client.ended

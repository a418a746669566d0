"""
Everything that can go wrong between a client and a server: what is cut, killed, stopped and filled up; and what must be
true of stores afterwards.
"""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.protocol import ClientFactory, Factory, Protocol

from nixserve.protocol.copying import CopyProgress
from tests.interop.nix import unavailable
from tests.interop.remotes import locks
from tests.interop.stores import assertVerified, infos, physical, temporaryRoots
from tests.interop.watching import MIB

#: How much of a transfer has passed when something happens to it.
MIDDLE = 4 * MIB


class AtMiddle(CopyProgress):
    """
    Has something happen in the middle of a copy.

    @ivar planned: what was going to be copied.
    @ivar copied: what arrived.
    """

    def __init__(self, happen):
        self._happen, self._size = happen, 0
        self.infos, self.arrived = [], []

    def planned(self, infos, present):
        """See L{CopyProgress}."""
        self.infos = list(infos)

    def moved(self, size):
        """See L{CopyProgress}. Called in any thread."""
        before, self._size = self._size, self._size + size
        if before < MIDDLE <= self._size:
            reactor.callFromThread(self._happen)

    def copied(self, info):
        """See L{CopyProgress}."""
        self.arrived.append(info.path)


class _Half(Protocol):
    """One side of a connection through a L{Proxy}; bytes pass to the other side as fast as that takes them."""

    other = None

    def connectionMade(self):
        """Ours or the one to the server."""
        self.factory.proxy.halves.append(self)
        if self.other is None:
            self.transport.pauseProducing()
            factory = ClientFactory()
            factory.noisy = False
            factory.proxy, factory.buildProtocol = self.factory.proxy, lambda _: self._back(factory)
            reactor.connectTCP("127.0.0.1", self.factory.proxy.target, factory)
        else:
            self.transport.registerProducer(self.other.transport, True)
            self.other.transport.registerProducer(self.transport, True)
            self.other.transport.resumeProducing()

    def _back(self, factory):
        back = _Half()
        back.factory, back.other, self.other = factory, self, back
        return back

    def dataReceived(self, data):
        """Pass it on."""
        if not self.factory.proxy.frozen:
            self.other.transport.write(data)

    def connectionLost(self, reason):
        """End the other side as well."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.loseConnection()


class Proxy:
    """
    A network between a client and a server on loopback, to be cut.

    @ivar port: where it listens.
    @ivar target: the port of the server.
    """

    def __init__(self, target):
        self.target, self.halves, self.frozen = target, [], False
        factory = Factory.forProtocol(_Half)
        factory.noisy, factory.proxy = False, self
        self._listening = reactor.listenTCP(0, factory, interface="127.0.0.1")
        self.port = self._listening.getHost().port

    def cut(self):
        """Drop all connections."""
        for half in self.halves:
            half.transport.abortConnection()

    def freeze(self):
        """From now on nothing arrives anywhere, and nobody is told."""
        self.frozen = True

    def stop(self):
        """The end of it."""
        self.cut()
        return self._listening.stopListening()


def kill(pids, number=signal.SIGKILL):
    """Send a signal to processes that exist."""
    assert pids, "there is no such process"
    for pid in pids:
        os.kill(pid, number)


@contextlib.contextmanager
def smallDisk(place, size):
    """
    A file system of its own for a store.

    @param size: bytes. Calling what this gives with another size changes it.
    """
    if os.geteuid() != 0:
        unavailable("only root mounts file systems")

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(place)]
        subprocess.run(command, check=True, timeout=20, capture_output=True)

    place.mkdir()
    mount(size)
    try:
        yield lambda size: mount(size, "remount")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=20)


def assertClean(nix, root, partial=(), *, killed=False):
    """
    After a failure: nothing of a store is locked, real Nix finds nothing wrong with it, and nothing half-done
    lies about.

    @param partial: what may be there in part, as with real Nix: the next one who adds it, or a collector, removes that.
    @param killed: its user had no chance to tidy up: then what is left must be void.
    """
    assert locks(root) == []
    if not killed:
        assert temporaryRoots(root) == []
        valid = {Path(path).name for path in infos(nix, root)}
        left = {name for name in os.listdir(physical(root, "/nix/store")) if not name.endswith(".lock")}
        assert left - {".links", *(Path(path).name for path in partial)} <= valid
    assertVerified(nix, root)

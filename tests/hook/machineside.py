"""
A store here and a machine, between which paths travel.
"""

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from nixserve.hook.claims import Claims
from nixserve.hook.inputs import sendInputs
from nixserve.protocol.copying import CopyProgress
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.store.memory import MemoryStore
from nixserve.testing import ImmediateWorkers, Joined, addObject, makeInfo, makeNar
from tests.hook.machinelist import machine


class Recorder(CopyProgress):
    """
    Keeps the names of what was sent.

    @ivar meanwhile: called when it is known what is to be sent.
    """

    def __init__(self, meanwhile=lambda: None):
        self.names = []
        self.meanwhile = meanwhile

    def planned(self, infos, present):
        """See L{CopyProgress}."""
        self.meanwhile()

    def copied(self, info):
        """See L{CopyProgress}."""
        self.names.append(info.path.name)


class Side:
    """
    A store here with a chain of paths, each of which refers to the one before it, and machines.

    @ivar paths: of the chain, the first first.
    @ivar infos: theirs.
    """

    def __init__(self, directory, names="abcd"):
        self.clock = Clock()
        self.directory = str(directory)
        self.store = MemoryStore()
        self.there = MemoryStore()
        self.infos, self.nars = [], {}
        with_ = self.store.openSession()
        for name in names:
            nar = makeNar(name.encode())
            info = makeInfo(name, nar, [info.path for info in self.infos[-1:]])
            addObject(with_, info, nar)
            self.infos.append(info)
            self.nars[info.path] = nar
        self.session = with_
        self.paths = [info.path for info in self.infos]

    def joined(self, **options):
        """A session on the machine."""
        joined = Joined(self.there, workers=ImmediateWorkers(self.clock), **options)
        joined.flush()
        return joined

    def here(self):
        """A session here."""
        fired = []
        DeferredSession.open(self.store, ImmediateWorkers(self.clock)).addCallback(fired.append)
        return fired[0]

    def claims(self):
        """Those of one process."""
        return Claims(self.directory, machine())

    @property
    def unclaimed(self):
        """Whether nobody claims anything of the chain."""
        with self.claims() as other:
            return other.claim(self.infos) == self.infos

    def send(self, joined, claims, progress, **options):
        """Begin to send the chain."""
        options = {"substitute": False, "progress": progress} | options
        return Deferred.fromCoroutine(sendInputs(self.clock, self.here(), joined.client, self.paths, claims, **options))

    @property
    def arrived(self):
        """What the machine has."""
        return self.there.openSession().queryValidPaths(self.paths)


def questions(joined, monkeypatch):
    """
    What the machine is asked about valid paths from now on: how many, whether it is to keep them, whether it is to try
    its own substituters.
    """
    asked, original = [], joined.client.queryValidPaths

    def query(paths, lock=False, substitute=False):
        asked.append((len(paths), lock, substitute))
        return original(paths, lock, substitute)

    monkeypatch.setattr(joined.client, "queryValidPaths", query)
    return asked

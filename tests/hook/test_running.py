"""
L{nixserve.hook.running}: one hook process between Nix, whose ends of the pipes a test has, and machines behind sockets,
whose builds are scripts. The same with real Nix and real builders is in tests/interop.
"""

import contextlib
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.protocol import Factory, Protocol

from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import BasicDerivation, DerivationOutput, drvPathOf, unparse
from nixserve.codec.hashes import hashBytes
from nixserve.codec.messages import BuildOptions
from nixserve.codec.wire import Writer
from nixserve.errors import StoreError
from nixserve.hook import running
from nixserve.hook.claims import Claims
from nixserve.hook.lastseen import LastSeen
from nixserve.hook.negotiation import HookPlaces, NixPipes, Taken
from nixserve.hook.running import HookRun
from nixserve.hook.slots import Slots
from nixserve.protocol.policy import READ_ONLY
from nixserve.protocol.relay import RelayFactory
from nixserve.protocol.sessions import ServeSessions
from nixserve.protocol.workers import Workers
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.store.pathlocks import PathLocks
from nixserve.testing import Built, FakeStore, ScriptedBuilds, addObject, buildTrees, makeInfo, makeNar
from tests.derivations import derivation
from tests.hook.chooserbench import QUESTION, Bench, asks
from tests.hook.machinelist import machine
from tests.remote.children import HELLO, child
from tests.store.realisationtables import REALISATION_ROWS, REALISATIONS
from tests.waiting import sleep, until

#: What builds say: not all of it is text.
LOG = b"\x1b[31mb\xfcilding\x00 it\xff\xfe\n"


def succeed(drvPath, drv):
    """A build."""
    return buildTrees(drvPath, drv, {"out": b"made"}, LOG)


class Builds(ScriptedBuilds):
    """
    Builds that remember how they were asked for.

    @ivar options: for each.
    """

    def __init__(self, script):
        super().__init__(script)
        self.options = []

    def build(self, request, client):
        """See L{ScriptedBuilds}."""
        self.options.append(request.options)
        return super().build(request, client)


class Machine(RelayFactory):
    """
    A machine, within this process.

    @ivar uri: its name.
    @ivar store: what it has.
    @ivar builds: what it was asked to build.
    @ivar sessions: those on it.
    @ivar cancelled: builds that nobody waited for any more.
    """

    def __init__(self, address, workers, script):
        self.address = str(address)
        self.uri = f"unix://{address}"
        self.store = FakeStore()
        self.builds = Builds(self._never if script is None else script)
        self.sessions = ServeSessions(self.store, workers, reactor, builds=self.builds)
        self.cancelled = []
        self._protocols = []
        super().__init__(self.sessions, READ_ONLY)

    def buildProtocol(self, addr):
        """Somebody connects."""
        self._protocols.append(super().buildProtocol(addr))
        return self._protocols[-1]

    def die(self):
        """All connections break."""
        for protocol in self._protocols:
            protocol.transport.abortConnection()

    def _never(self, drvPath, drv):
        return Deferred(self.cancelled.append)


class Silent(Protocol):
    """
    A connection on which nothing is ever said.

    @ivar lost: it is gone.
    """

    lost = False

    def connectionLost(self, reason):
        """See L{Protocol}."""
        self.lost = True


class Nix(Bench):
    """
    A Nix that has one hook process, and what it would have built.

    @ivar source: what the build needs.
    @ivar drvPath: the derivation, in the store here.
    @ivar out: its output, whose lock Nix holds.
    @ivar taken: the machines that were chosen, one after the other.
    """

    def __init__(self, directory):
        super().__init__(directory)
        self.directory = directory
        self.taken, self._machines, self._ports = [], [], []
        self.workers = Workers(reactor)
        self.workers.start()
        self.layout = StoreLayout.underRoot(str(directory / "here"))
        self.real = Path(self.layout.realStoreDir)
        self.store = LocalStore(self.layout, reservedSize=0)
        self._fill()
        self._lock = PathLocks([str(self.real / self.out.baseName)])
        requests, self.toHook = os.pipe()
        replies, log = os.pipe(), os.pipe()
        self.pipes = NixPipes(3, os.getpid(), requests, replies[1], log[1], os.dup(log[0]))
        self.reading, self.heard = (replies[0], log[0]), [b"", b""]
        for descriptor in self.reading:
            os.set_blocking(descriptor, False)

    def _fill(self):
        session = self.store.openSession()
        nar = makeNar({"file": b"a source"})
        info = makeInfo("source", nar)
        addObject(session, info, nar)
        self.source = info.path
        session.close()
        drv = derivation("it", frozenset({self.source}))[1]
        self.ask(drv)
        self.out = drv.outputs["out"].path

    def ask(self, drv):
        """This is to be built."""
        self.drvPath = drvPathOf(drv, self.store.storeDir)
        nar = makeNar(unparse(drv))
        with contextlib.closing(self.store.openSession()) as session:
            addObject(session, makeInfo(self.drvPath.name, nar, drv.inputSrcs, path=self.drvPath), nar)
        self.question = replace(QUESTION, drvPath=str(self.drvPath))

    async def machine(self, script=succeed):
        """A machine that works; without a script its builds never end."""
        made = Machine(self.directory / f"m{len(self._machines)}", self.workers, script)
        self._machines.append(made)
        self._ports.append(await UNIXServerEndpoint(reactor, made.address).listen(made))
        return made

    async def silent(self):
        """
        A machine that never says anything.

        @return: the connections to it, and its name.
        """
        address, connections = f"{self.directory}/silent", []

        def build():
            connections.append(Silent())
            return connections[-1]

        self._ports.append(await UNIXServerEndpoint(reactor, address).listen(Factory.forProtocol(build)))
        return connections, f"unix://{address}"

    def start(self, lines, accepted=False, task=True, **settings):
        """
        Ask a hook.

        @param lines: of the machines file.
        @param accepted: it has the build before it connects.
        @param task: say at once what the build needs.
        @return: fires with its exit status.
        """
        chooser = self.chooser("\n".join(lines), **settings)
        choose = chooser.choose

        def choosing(*arguments):
            decision = choose(*arguments)
            self.taken += [decision] if isinstance(decision, Taken) else []
            return decision

        chooser.choose = choosing
        self.write(bytes(Writer().u64(0)) + asks(self.question) + (self.task if task else b""))
        self.pipes.readSettings()
        question = self.pipes.readEvent()
        taken = chooser.choose(question)
        if accepted:
            self.pipes.accept(taken.machine)
        places = HookPlaces(self.layout, f"{self.directory}/claims", "", 0, {"PATH": os.environ["PATH"]})
        run = HookRun(reactor, self.pipes, chooser, places).run(question, taken, accepted)
        return Deferred.fromCoroutine(run).addTimeout(15, reactor)

    @property
    def task(self):
        """What Nix says of a build that was accepted."""
        return bytes(Writer().textSet([str(self.source)]).textSet(["out"]))

    def write(self, data):
        """Say something to the hook."""
        os.write(self.toHook, data)

    def read(self):
        """
        @return: what has come on descriptor 2, and on 4.
        """
        for number, descriptor in enumerate(self.reading):
            with contextlib.suppress(BlockingIOError):
                while chunk := os.read(descriptor, 65536):
                    self.heard[number] += chunk
        return self.heard

    @property
    def log(self):
        """Of the build."""
        return self.read()[1]

    @property
    def messages(self):
        """What the hook has told the user."""
        lines = [json.loads(line[5:]) for line in self.read()[0].splitlines() if line.startswith(b"@nix ")]
        return [line["msg"] for line in lines if line["action"] == "msg"]

    @property
    def unended(self):
        """Activities that were begun and not ended."""
        lines = [json.loads(line[5:]) for line in self.read()[0].splitlines() if line.startswith(b"@nix ")]
        begun, ended = ([line["id"] for line in lines if line["action"] == action] for action in ("start", "stop"))
        return set(begun) - set(ended)

    @property
    def answers(self):
        """What it has answered."""
        return [line for line in self.read()[0].decode().splitlines() if not line.startswith("@nix ")]

    @property
    def load(self):
        """How many slots are busy on each machine, in the order in which they were taken."""
        return [Slots(str(self.directory)).load(taken.machine) for taken in self.taken]

    @property
    def seen(self):
        """When machines have worked."""
        return LastSeen(f"{self.directory}/seen", lambda: self.now)

    @property
    def built(self):
        """What Nix finds when it looks for the output."""
        if not self.store.openSession().queryValidPaths([self.out]):
            return None
        return (self.real / self.out.baseName).read_bytes()

    @property
    def roots(self):
        """What sessions here keep from collectors."""
        return b"".join(path.read_bytes() for path in Path(self.layout.stateDir, "temproots").iterdir())

    def leave(self):
        """Nix is gone."""
        for descriptor in (self.toHook, *self.reading):
            os.close(descriptor)
        self.toHook, self.reading = None, ()

    async def stop(self):
        """End it all. No machine has a session any more."""
        if self.toHook is not None:
            self.leave()
        os.close(self.pipes.requests)
        for taken in self.taken:
            taken.leave()
        self._lock.abandon()
        self.store.close()
        for port in self._ports:
            await port.stopListening()
        await until(reactor, lambda: not any(len(machine.sessions) for machine in self._machines))
        self.workers.stop()


@pytest.fixture
def nix(tmp_path):
    """A Nix."""
    nix = Nix(tmp_path)
    yield nix
    pytest_twisted.blockon(Deferred.fromCoroutine(nix.stop()))


def best(uri):
    """The line of a machine that is chosen before others."""
    return f"{uri} - - 1 2"


# --- a build ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accepted", [False, True])
@pytest_twisted.ensureDeferred
async def test_succeeds(nix, accepted):
    """A build that succeeds: its input goes there, its output comes back, its log is passed on byte by byte."""
    m = await nix.machine()
    status = await nix.start([m.uri], accepted)
    assert (status, nix.built) == (0, b"made")
    assert nix.answers == ["# accept", m.uri] and nix.messages == [] and not nix.unended
    assert nix.log == LOG
    assert m.builds.asked == [nix.drvPath] and m.store.inner.lookUp([nix.source])
    assert nix.load == [1], "it is busy until the process ends"
    assert nix.seen.isSince(nix.taken[0].machine, nix.now)


@pytest_twisted.ensureDeferred
async def test_descriptors(nix):
    """At the end Nix sees the end of everything that it reads."""
    m = await nix.machine()
    await nix.start([m.uri])
    nix.read()
    assert [os.read(descriptor, 1) for descriptor in nix.reading] == [b"", b""]


@pytest_twisted.ensureDeferred
async def test_fails(nix):
    """A build that fails: exit status 1, the reason, and the log. The machine is not to blame."""
    failed = BuildResult(BuildStatus.PERMANENT_FAILURE, "builder failed with exit code 3")
    m = await nix.machine(lambda drvPath, drv: Built(failed, log=LOG))
    status = await nix.start([m.uri])
    assert (status, nix.built) == (1, None)
    assert nix.messages == [f"error: build of '{nix.drvPath}' on '{m.uri}' failed: builder failed with exit code 3"]
    assert nix.log == LOG
    assert list(nix.chooser(m.uri, run="2").news()) == []


@pytest_twisted.ensureDeferred
async def test_options(nix):
    """What Nix's settings say about builds holds there as well."""
    m = await nix.machine()
    await nix.start([m.uri], max_silent_time="7", timeout="8", max_build_log_size="9", keep_failed="true")
    assert m.builds.options == [BuildOptions(maxSilentTime=7, buildTimeout=8, maxLogSize=9, keepFailed=True)]


@pytest_twisted.ensureDeferred
async def test_kept(nix):
    """While it is built, nothing that belongs to it is a collector's, here or there; afterwards all is."""
    m = await nix.machine(None)
    hook = nix.start([m.uri])
    await until(reactor, lambda: m.builds.asked)
    assert all(str(path).encode() in nix.roots for path in (nix.source, nix.drvPath, nix.out))
    m.store.inner.collectGarbage()
    assert m.store.inner.lookUp([nix.source])
    m.die()
    await hook
    await until(reactor, lambda: m.store.inner.collectGarbage())
    assert nix.roots == b""


@pytest_twisted.ensureDeferred
async def test_noTask(nix):
    """A Nix that asks and does not say then what the build needs is an error, and the machine is left alone."""
    m = await nix.machine()
    hook = nix.start([m.uri], task=False)
    await until(reactor, lambda: nix.answers)
    os.close(nix.toHook)
    nix.toHook = os.open(os.devnull, os.O_WRONLY)
    assert await hook == 1
    assert nix.messages == ["error: Nix closed the conversation with its build hook amid the inputs of the build"]
    assert m.builds.asked == []


@pytest.mark.parametrize("hasTable", [True, False])
@pytest_twisted.ensureDeferred
async def test_unknownOutput(nix, hasTable):
    """An output whose path only the machine knows comes back, and is recorded, if the store has room for that."""
    nar = makeNar(b"made")
    info = makeInfo("it", nar)
    info = replace(info, ca=ContentAddress(ContentAddressMethod.NAR, info.narHash))
    built = BuildResult(BuildStatus.BUILT, builtOutputs={"out": Realisation(info.path)})
    m = await nix.machine(lambda drvPath, drv: Built(built, [(info, nar)]))
    floating = DerivationOutput(None, "r:sha256")
    drv = BasicDerivation("it", {"out": floating}, frozenset({nix.source}), "x", "/bin/sh", (), {"out": ""})
    nix.ask(drv)
    if hasTable:
        with nix.store.database.writing() as connection:
            connection.execute(REALISATIONS)
    nix.out = info.path
    assert await nix.start([m.uri]) == (0 if hasTable else 1)
    assert nix.built == b"made"
    if not hasTable:
        assert nix.messages[0].startswith("error: the store here has no table of realisations; have Nix make it")
        return
    with nix.store.database.writing() as connection:
        (row,) = connection.execute(REALISATION_ROWS).fetchall()
    assert row[1:] == ("out", str(info.path)) and row[0].startswith("sha256:")


@pytest_twisted.ensureDeferred
async def test_machineAnswersAnotherPath(nix):
    """A machine that answers another output than the derivation's is put aside, and the next one has the build."""
    nar = makeNar(b"evil")
    evil = makeInfo("it", nar)
    answer = Built(BuildResult(BuildStatus.BUILT, builtOutputs={"out": Realisation(evil.path)}), [(evil, nar)])
    liar, m = await nix.machine(lambda drvPath, drv: answer), await nix.machine()
    assert (await nix.start([best(liar.uri), m.uri]), nix.built) == (0, b"made")
    reason = f"says that it has built '{evil.path}' as its output 'out'; asked for was '{nix.out}'"
    assert nix.messages[0].startswith(f"warning: build machine {liar.uri} is put aside: {liar.uri}, asked to build")
    assert reason in nix.messages[0] and not (nix.real / evil.path.baseName).exists()


@pytest_twisted.ensureDeferred
async def test_machineGivesOtherContents(nix):
    """What a machine gives for a fixed output is compared with the hash of the derivation."""
    nar, ca = makeNar(b"evil"), ContentAddress(ContentAddressMethod.FLAT, hashBytes("sha256", b"good"))
    path = nix.store.storeDir.makeContentAddressedPath(ca, "it")
    info = makeInfo("it", nar, path=path)
    answer = Built(BuildResult(BuildStatus.BUILT, builtOutputs={"out": Realisation(path)}), [(info, nar)])
    liar = await nix.machine(lambda drvPath, drv: answer)
    output = DerivationOutput(path, "sha256", ca.hash.hex)
    nix.ask(BasicDerivation("it", {"out": output}, frozenset({nix.source}), "x", "/bin/sh", (), {"out": path}))
    nix.out = path
    assert await nix.start([liar.uri]) == 1
    assert f"hash mismatch importing path '{path}'" in nix.messages[-1] and nix.built is None


# --- machines that cannot be reached, or are lost ---------------------------------------------------------


@pytest.mark.parametrize("accepted", [False, True])
@pytest_twisted.ensureDeferred
async def test_unreachable(nix, accepted):
    """A machine that cannot be reached is put aside, and has no slot; the next one takes the build."""
    m, dead = await nix.machine(), f"unix://{nix.directory}/none"
    status = await nix.start([best(dead), m.uri], accepted)
    assert (status, nix.built) == (0, b"made")
    assert nix.answers == ["# accept", dead if accepted else m.uri]
    (warning,) = nix.messages
    assert warning.startswith(f"warning: build machine {dead} is put aside: {dead}: cannot connect to the socket")
    assert nix.load == [0, 1]


@pytest_twisted.ensureDeferred
async def test_declines(nix):
    """Without a machine that can be reached Nix hears so, each time that it asks, until it asks no more."""
    dead = f"unix://{nix.directory}/none"
    hook = nix.start([dead], task=False)
    await until(reactor, lambda: nix.answers == ["# decline"])
    nix.write(asks(nix.question))
    await until(reactor, lambda: nix.answers == ["# decline"] * 2)
    nix.write(bytes(Writer().text("enough")))
    assert await hook == 0
    warning, *refusals = nix.messages
    assert "is put aside" in warning and all("no machine of the setting" in text for text in refusals)
    assert nix.load == [0] and nix.log == b""


@pytest.mark.parametrize("seen", [False, True])
@pytest_twisted.ensureDeferred
async def test_noneLeft(nix, seen):
    """A build that was accepted for the only machine fails if that cannot be reached, even if it has just worked."""
    dead = f"unix://{nix.directory}/none"
    if seen:
        nix.seen.worked(machine(dead))
    status = await nix.start([dead], accepted=True)
    assert status == 1
    assert nix.messages[-1] == f"error: no machine can be reached that could build '{nix.drvPath}'"
    assert nix.load == [0]


@pytest.mark.parametrize("settings", [{"connect_timeout": "1"}, {}])
@pytest_twisted.ensureDeferred
async def test_silent(nix, monkeypatch, settings):
    """A machine that says nothing is waited for as long as Nix's settings say, or we do."""
    monkeypatch.setattr(running, "CONNECT_SECONDS", 0.3)
    _, uri = await nix.silent()
    assert await nix.start([uri], accepted=True, **settings) == 1
    assert f"no answer within {'1' if settings else '0.3'} s" in nix.messages[0]
    assert nix.load == [0]


@pytest_twisted.ensureDeferred
async def test_lost(nix):
    """A build whose machine is lost is begun again on the next one, and its log says why."""
    lost, m = await nix.machine(None), await nix.machine()
    hook = nix.start([best(lost.uri), m.uri])
    await until(reactor, lambda: lost.builds.asked)
    assert nix.load == [1]
    lost.die()
    assert (await hook, nix.built) == (0, b"made")
    reason = f"{lost.uri}: the session was lost: "
    assert nix.log.startswith(f"\n{reason}".encode()) and nix.log.endswith(b"\n" + LOG)
    assert nix.messages[0].startswith(f"warning: build machine {lost.uri} is put aside: {reason}")
    assert nix.answers == ["# accept", lost.uri]
    assert nix.load == [0, 1] and len(lost.cancelled) == 1


@pytest_twisted.ensureDeferred
async def test_lostWhileSending(nix):
    """A machine that does not take the input is lost as well, and others may send the path there."""
    lost, m = await nix.machine(), await nix.machine()
    lost.store.fail("addSmallPaths", StoreError(f"the disk for '{nix.source}' is full"))
    assert await nix.start([best(lost.uri), m.uri]) == 0
    reason = f"{lost.uri}: the session was lost: error: the disk for a path is full"
    assert reason.encode() in nix.log and lost.builds.asked == []
    assert f"warning: build machine {lost.uri} is put aside: {reason}" in nix.messages
    with Claims(f"{nix.directory}/claims", machine(lost.uri)) as claims:
        claims.check(nix.source)
    assert nix.load == [0, 1] and not nix.unended


@pytest_twisted.ensureDeferred
async def test_bug(nix, monkeypatch):
    """What nobody has foreseen ends the build, with a line for the user and the rest in its log."""
    m = await nix.machine()

    def odd(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(running, "Claims", odd)
    assert await nix.start([m.uri]) == 1
    assert nix.messages == ["error: build hook: internal error: OSError: [Errno 24] Too many open files"]
    assert b"Traceback" in nix.log and nix.built is None


@pytest_twisted.ensureDeferred
async def test_lostTheOnlyOne(nix):
    """A build that has lost the only machine fails."""
    lost = await nix.machine(None)
    hook = nix.start([lost.uri])
    await until(reactor, lambda: lost.builds.asked)
    lost.die()
    assert await hook == 1
    assert f"error: {lost.uri}: building" in nix.messages[-1]
    assert nix.load == [0] and nix.built is None


@pytest_twisted.ensureDeferred
async def test_lostWhileOthersAreBusy(nix, monkeypatch):
    """A build that has lost its machine waits for a slot on another one: Nix can build it no more, if it ever could."""
    monkeypatch.setattr(running, "POLL_SECONDS", 0.05)
    nix.question = replace(nix.question, amWilling=True)
    lost, m = await nix.machine(None), await nix.machine()
    busy = nix.chooser(m.uri).choose(nix.question)
    hook = nix.start([best(lost.uri), m.uri], system="x86_64-linux", max_jobs="1")
    await until(reactor, lambda: lost.builds.asked)
    lost.die()
    await sleep(reactor, 0.3)
    assert not hook.called and m.builds.asked == []
    busy.leave()
    assert (await hook, nix.built) == (0, b"made")


@pytest.mark.parametrize(("most", "expected"), [(6, b"hello\n"), (100, b"why, hello\n")])
@pytest_twisted.ensureDeferred
async def test_wordsBeforeTheBuild(nix, monkeypatch, most, expected):
    """
    What a machine says while it is connected to belongs to the log of the build that it gets, or the end of that if it
    is too much; what one says that gets none does not.
    """
    monkeypatch.setattr(running, "MAX_EARLY", most)
    refusing = child("os.write(2, b'go away'); os._exit(1)")
    greeting = child(
        f"os.write(2, b'why, hello\\n'); os.write(1, {HELLO!r})\nheard = 0\n"
        "while heard <= 16: heard += len(os.read(0, 65536))\nos._exit(3)"
    )
    m = await nix.machine()
    status = await nix.start([f"{refusing} - - 1 3", best(greeting), m.uri])
    assert status == 0 and nix.load == [0, 0, 1]
    assert nix.log.startswith(expected + b"\nssh://localhost: ") and nix.log.endswith(LOG)
    assert b"go away" not in nix.log


# --- Nix is gone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accepted", [False, True])
@pytest_twisted.ensureDeferred
async def test_nixGone(nix, accepted):
    """A build ends with the Nix that wanted it, there as well."""
    m = await nix.machine(None)
    hook = nix.start([m.uri], accepted)
    await until(reactor, lambda: m.builds.asked)
    nix.leave()
    assert await hook == 1
    await until(reactor, lambda: m.cancelled and not len(m.sessions))
    assert nix.roots == b""


@pytest_twisted.ensureDeferred
async def test_hookProcessGone(nix):
    """So does one whose hook process waits for this one and is gone: its Nix has no locks any more."""
    m = await nix.machine(None)
    waiting, theirs = socket.socketpair()
    with waiting, theirs:
        nix.pipes.waiting = waiting.fileno()
        hook = nix.start([m.uri])
        await until(reactor, lambda: m.builds.asked)
        theirs.close()
        assert await hook == 1
    await until(reactor, lambda: m.cancelled and not len(m.sessions))
    assert nix.roots == b""


@pytest_twisted.ensureDeferred
async def test_hookProcessStays(nix):
    """Otherwise it is of no matter."""
    m = await nix.machine()
    waiting, theirs = socket.socketpair()
    with waiting, theirs:
        nix.pipes.waiting = waiting.fileno()
        assert await nix.start([m.uri]) == 0
        assert waiting.fileno() not in [getattr(reader, "fileno", int)() for reader in reactor.getReaders()]


@pytest_twisted.ensureDeferred
async def test_nixGoneWhileConnecting(nix):
    """So does a connection that is only being made; the machine's slot is free, and it is not blamed."""
    connections, uri = await nix.silent()
    hook = nix.start([uri])
    await until(reactor, lambda: connections)
    nix.leave()
    assert await hook == 1
    await until(reactor, lambda: connections[0].lost)
    assert nix.load == [0]
    assert list(nix.chooser(uri).news()) == []


@pytest_twisted.ensureDeferred
async def test_cancelled(nix):
    """A hook that is interrupted ends its build as well, and says nothing of its own."""
    m = await nix.machine(None)
    hook = nix.start([m.uri])
    await until(reactor, lambda: m.builds.asked)
    hook.cancel()
    with pytest.raises(CancelledError):
        await hook
    await until(reactor, lambda: m.cancelled)
    assert nix.messages == [] and nix.roots == b""

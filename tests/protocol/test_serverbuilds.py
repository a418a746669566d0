"""Sessions of the server that build: what they answer byte for byte, what they refuse, and what ends them."""

import dataclasses
from pathlib import Path

import pytest
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.derivation import BasicDerivation, Derivation, DerivationOutput, drvPathOf, outputPaths, unparse
from nixserve.codec.hashes import hashBytes
from nixserve.protocol.conversation import STALL_SECONDS
from nixserve.protocol.policy import EVERYTHING, READ_ONLY, Peer, Policy, Right
from nixserve.protocol.server import ServeServer
from nixserve.testing import FakeStore, ImmediateWorkers, RecordingTransport
from tests.builder.stores import add, divertedStore, temporaryRoot
from tests.protocol.buildworld import World, built, derivation, outputOf, pathOf
from tests.vectors.serve.messages import CLIENT_MAGIC, MINORS, OPTIONS_AT, SERVER_MAGIC, STORE_DIR, path, wire

ANSWER = SERVER_MAGIC + wire(0x208)
DRV_HASH = "sha256:" + "a1" * 32
INTERRUPTED = "error: interrupted by the user\n"
BUILDER = Policy(frozenset({Right.READ, Right.BUILD}))


@pytest.fixture
def diverted():
    """An open store whose objects lie elsewhere than their paths say."""
    with temporaryRoot() as root:
        store = divertedStore(root)
        yield store
        store.close()


class Server:
    """
    One server with any number of sessions, whose workers do everything at once. Builds have a store of their own.

    @ivar world: how its builds go.
    """

    def __init__(self, maxJobs=1, store=None, builds=True):
        self.store = store or FakeStore()
        self.world = World(maxJobs, ImmediateWorkers())
        self.builds = self.world.builds if builds else None

    def session(self, minor=8, policy=EVERYTHING, key="key"):
        """A session behind its greeting."""
        session = Session(self, policy, key)
        return session.send(CLIENT_MAGIC + wire(0x200 | minor))


class Session:
    """One of them."""

    def __init__(self, server, policy, key):
        self.world = server.world
        # Not that of the world, in which time passes as fast as it can.
        self.clock = Clock()
        self.transport = RecordingTransport()
        peer = Peer("here", key, 7)
        self.server = ServeServer(server.store, server.world.workers, policy, peer, self.clock, builds=server.builds)
        self.server.makeConnection(self.transport)

    def send(self, *pieces):
        """The client writes."""
        for piece in pieces:
            self.server.dataReceived(piece)
        return self

    def build(self, name, minor=8, **options):
        """Ask for a build, as a client would."""
        return self.send(request(name, minor, **options))

    def eof(self):
        """The client ends its side."""
        self.server.readConnectionLost()
        return self

    def finish(self, *names):
        """Builds end."""
        self.world.settle().finish(*names)
        return self

    @property
    def replies(self):
        """What was written behind the hello."""
        assert self.transport.written.startswith(ANSWER)
        return bytes(self.transport.written[len(ANSWER) :])

    @property
    def errors(self):
        """Standard error."""
        return self.transport.errors.decode()

    def ended(self, status, errors=""):
        """It is over, and everything is free."""
        assert (self.transport.status, self.errors) == (status, errors)
        assert self.server.ended.called and self.transport.late == b""
        assert self.clock.getDelayedCalls() == []
        self.world.settle(builds=True).clean()
        return self


def drvWire(drv):
    """A BasicDerivation as it travels."""
    outputs = [(name, one.path or "", one.hashAlgo, one.hash) for name, one in sorted(drv.outputs.items())]
    return wire(outputs, sorted(drv.inputSrcs), drv.platform, drv.builder, list(drv.args), sorted(drv.env.items()))


def optionsWire(minor, nrRepeats=0, **fields):
    """BuildOptions."""
    values = [fields.get("maxSilentTime", 0), 0, 0, nrRepeats, 0, 0]
    return wire(*values[: len(OPTIONS_AT[minor])])


def request(name, minor=8, drv=None, **options):
    """BuildDerivation."""
    drvPath, plain = derivation(name)
    return wire(8, drvPath) + drvWire(drv or plain) + optionsWire(minor, **options)


def resultWire(result, minor):
    """BuildResult, written as the table of the protocol has it."""
    data = wire(int(result.status), result.errorMsg)
    if minor >= 3:
        data += wire(result.timesBuilt, int(result.isNonDeterministic), result.startTime, result.stopTime)
    if minor >= 8:
        data += wire([(name, one.outPath, []) for name, one in sorted(result.builtOutputs.items())])
    elif minor >= 6:
        pairs = []
        for name, one in sorted(result.builtOutputs.items()):
            key = f"{one.drvHash}!{name}"
            form = '{{"dependentRealisations":{{}},"id":"{}","outPath":"{}","signatures":[]}}'
            pairs.append((key, form.format(key, one.outPath.baseName)))
        data += wire(pairs)
    return data


# --- replies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minor", MINORS[1:])
@pytest.mark.parametrize("size", [1 << 20, 1])
def test_buildDerivation(minor, size):
    """The result of a build and that of a failure, at each version and in any cut."""
    server = Server(2)
    outputs = {"out": Realisation(outputOf("x"), DRV_HASH)}
    success = dataclasses.replace(built("x"), builtOutputs=outputs)
    failure = BuildResult(BuildStatus.PERMANENT_FAILURE, "builder failed", 1, False, 7, 8)
    server.world.builder.outcomes = {pathOf("x"): success, pathOf("y"): failure}
    session = server.session(minor)
    data = request("x", minor) + request("y", minor)
    session.send(*(data[start : start + size] for start in range(0, len(data), size)))
    session.finish("x").finish("y")
    assert session.replies == resultWire(success, minor) + resultWire(failure, minor)
    session.eof().ended(0)


def test_log():
    """What the builder says is on standard error, before the reply."""
    server = Server()
    session = server.session().build("x")
    session.world.settle()
    session.world.threads.running[0].log.feed(b"hello\n")
    session.world.settle()
    assert session.errors == "hello\n" and session.replies == b""
    session.finish("x").eof().ended(0, "hello\n")


def test_pipelined():
    """What is asked behind a build is answered after it, in order."""
    session = Server(store=None).session()
    session.send(request("x") + wire(1, 0, 0, [path("nothing")]) + request("y") + wire(1, 0, 0, []))
    session.finish("x")
    assert session.replies == resultWire(built("x"), 8) + wire([])
    session.finish("y")
    assert session.replies == resultWire(built("x"), 8) + wire([]) + resultWire(built("y"), 8) + wire([])
    session.eof().ended(0)


def test_outputsAreRoots():
    """As long as the session lasts, what it asked to build is kept."""
    server = Server()
    session = server.session().build("x").finish("x")
    roots = [paths for name, (paths,) in (call for call in server.store.calls if call[0] == "addTempRoots")]
    assert {outputOf("x"), pathOf("x")} <= set().union(*roots)
    session.eof().ended(0)


def test_sharedByTwoSessions():
    """Two clients who want the same get the same; one who goes does not take it from the other."""
    server = Server(3)
    first, second, third = (server.session(key=key).build("x") for key in "abc")
    server.world.settle()
    assert server.world.running == ["x"]
    first.eof()
    assert first.transport.status == 1
    first.world.settle().finish("x")
    assert second.replies == third.replies == resultWire(built("x"), 8)
    for session in (second, third):
        session.eof().ended(0)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [6, 8])
def test_right(command):
    """Without the right the number of the command is enough for a refusal, in Nix's words."""
    session = Server().session(policy=READ_ONLY).send(wire(command))
    session.ended(1, "error: building paths is not allowed\n")


@pytest.mark.parametrize("body", [request("x"), wire(6, [pathOf("x")]) + optionsWire(8)])
def test_noBuilds(body):
    """A server that does not build says so in one line."""
    session = Server(builds=False).session().send(body)
    session.ended(1, "error: this nixserve does not build: take it out of the builders, or use it for copying only\n")


@pytest.mark.parametrize("body", [request("x", nrRepeats=1), wire(6, [pathOf("x")]) + optionsWire(8, nrRepeats=2)])
def test_nrRepeats(body):
    """Repetition is refused, in Nix's words."""
    session = Server().session().send(body)
    session.ended(1, "error: client requested repeating builds, but this is not currently implemented\n")


def leaf(**changes):
    """A derivation whose output follows from itself."""
    drv = BasicDerivation("x", {"out": DerivationOutput(outputOf("x"))}, frozenset(), "x", "/bin/sh", (), {"out": ""})
    out = STORE_DIR.makeOutputPath("out", hashBytes("sha256", unparse(drv, maskOutputs=True)), "x")
    return dataclasses.replace(drv, outputs={"out": DerivationOutput(out)}, env={"out": str(out)}, **changes)


def test_unverifiable():
    """Without trust, a derivation whose output could be anybody's is refused: which, why and what would help."""
    session = Server().session(policy=BUILDER).build("x")
    line = session.errors
    assert str(outputOf("x")) in line and "'trust'" in line and line.count("\n") == 1
    assert session.world.builder.mustSandbox == {}
    session.ended(1, line)


@pytest.mark.parametrize(
    "drv",
    [
        leaf(),
        dataclasses.replace(leaf(), outputs={"out": DerivationOutput(None, "r:sha256")}, env={"out": "/placeholder"}),
    ],
    ids=["inputAddressed", "floating"],
)
def test_verifiable(drv):
    """
    Without trust, what verifies is built, in a sandbox or not at all, and under its true name: what the client calls it
    would be recorded as the deriver.
    """
    session = Server().session(policy=BUILDER).build("x", drv=drv).finish("x")
    assert session.replies == resultWire(built("x"), 8)
    drvPath = drvPathOf(drv, STORE_DIR)
    assert drvPath != pathOf("x") and session.world.builder.mustSandbox == {drvPath: True}
    session.eof().ended(0)


def test_trusted():
    """With trust, the operator alone decides about the sandbox."""
    session = Server().session().build("x").finish("x")
    assert session.world.builder.mustSandbox == {pathOf("x"): False}
    session.eof().ended(0)


# --- the end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "queued", "busy"])
def test_eof(state):
    """A client whose input ends is gone: the build is cancelled, whatever it waits for."""
    server = Server()
    if state == "queued":
        other = server.session(key="other").build("other")
    if state == "busy":
        server.world.builder.busy[pathOf("x")] = 1 << 60
    session = server.session().build("x")
    waited = "waiting for a free build slot: 1 builds are running, 0 wait before this\n" if state == "queued" else ""
    session.eof()
    assert (session.transport.status, session.errors) == (1, waited + INTERRUPTED)
    assert session.replies == b"" and session.server.ended.called
    if state == "queued":
        other.finish("other").eof().ended(0)
    if state == "running":
        assert server.world.threads.running[0].token.cancelled
    session.ended(1, waited + INTERRUPTED)


@pytest.mark.parametrize("body", [request("x"), request("x") + wire(1, 0, 0, []), wire(6, []) + optionsWire(8)])
def test_eofBefore(body):
    """The same if it had ended before the request was read."""
    session = Server().session()
    session.server._connection.receiveEOF()
    session.server._conversation._eof = True
    session.send(body).ended(1, INTERRUPTED)
    assert session.world.builder.ran in ([], [pathOf("x")])
    assert all(build.token.cancelled for build in session.world.threads.running)


def test_connectionLost():
    """The connection is gone: nobody to tell, the build ends."""
    session = Server().session().build("x")
    session.server.connectionLost(Failure(ConnectionDone()))
    assert session.world.threads.running[0].token.cancelled
    session.ended(1, "")


def test_serverStops():
    """The client is told why, the build ends."""
    session = Server().session().build("x")
    session.server.stop()
    assert session.world.threads.running[0].token.cancelled
    session.ended(1, "error: the server is being stopped; try again later\n")


def test_silentBuild():
    """A build may be silent for longer than a peer may be."""
    session = Server().session().build("x")
    for _ in range(12):
        session.clock.advance(STALL_SECONDS)
    assert session.transport.status is None
    session.finish("x").eof().ended(0)


def test_stallAfterBuild():
    """Behind a build the usual patience holds."""
    session = Server().session().build("x").finish("x").send(wire(1, 0))
    for _ in range(3):
        session.clock.advance(STALL_SECONDS)
    assert "nothing has moved" in session.errors
    session.ended(1, session.errors)


# --- buildPaths ---------------------------------------------------------------------------------------------


def addDrv(store, name, *inputs):
    """Write a .drv to a store, with inputs that were written before; its path."""
    session = store.openSession()
    wanted = {one: frozenset({"out"}) for one in inputs}
    output = {"out": DerivationOutput(outputOf(name))}
    drv = Derivation(name, output, frozenset(), "x", "/bin/sh", (), {"out": ""}, inputDrvs=wanted)
    out = outputPaths(drv, session.readDerivation, store.storeDir, {})["out"]
    drv = dataclasses.replace(drv, outputs={"out": DerivationOutput(out)}, env={"out": str(out)})
    written = session.addDerivation(drv)
    session.close()
    return written


class Graph:
    """
    "top" needs "left" and "right", which need "base".

    @ivar drvs: by name.
    @ivar outputs: what comes of them.
    """

    def __init__(self, store, maxJobs=4):
        self.drvs = {"base": addDrv(store, "base")}
        for name in ("left", "right"):
            self.drvs[name] = addDrv(store, name, self.drvs["base"])
        self.drvs["top"] = addDrv(store, "top", self.drvs["left"], self.drvs["right"])
        self.server = Server(maxJobs, store)
        # As if they were floating: these are valid, those that the derivations name are not.
        self.outputs = {name: add(store, f"{name}-built") for name in self.drvs}
        for name, drvPath in self.drvs.items():
            outputs = {"out": Realisation(self.outputs[name])}
            self.server.world.builder.outcomes[drvPath] = dataclasses.replace(built(name), builtOutputs=outputs)
        self.session = self.server.session()

    def build(self, *targets):
        """BuildPaths."""
        self.session.send(wire(6, [self.drvs.get(target, target) for target in targets]) + optionsWire(8))
        self.server.world.settle()
        return self

    def fail(self, name, status=BuildStatus.PERMANENT_FAILURE, message="no"):
        """This one will."""
        self.server.world.builder.outcomes[self.drvs[name]] = BuildResult(status, message)
        return self

    @property
    def running(self):
        """Names of builds."""
        return sorted(self.server.world.running)

    def finish(self, *names):
        """These end."""
        self.server.world.finish(*names)
        return self

    def ended(self, *reply, errors=""):
        """The reply is this, and the session can go on to its end."""
        assert self.session.replies == wire(*reply)
        self.session.eof().ended(0, errors)


def test_graph(diverted):
    """What is needed is built first, what can at once."""
    graph = Graph(diverted).build("top")
    assert graph.running == ["base"]
    assert graph.finish("base").running == ["left", "right"]
    assert graph.finish("left").running == ["right"]
    assert graph.finish("right").running == ["top"]
    graph.finish("top").ended(0)


def test_graphOneAtATime(diverted):
    """No more of one request are under way than can run, so that a large graph holds few files open."""
    graph = Graph(diverted, 1).build("left", "right")
    assert graph.finish("base").running == ["left"]
    assert len(graph.server.world.builds._builds) == 1
    graph.finish("left", "right").ended(0)


def test_graphKeepsOutputs(diverted):
    """What was built stays a root of the client's session after the reply."""
    graph = Graph(diverted).build("base").finish("base")
    assert graph.session.replies == wire(0)
    assert graph.outputs["base"] in rootsOf(diverted)
    graph.ended(0)
    assert rootsOf(diverted) == set()


def rootsOf(store):
    """Every temporary root of every session."""
    files = Path(store.layout.tempRootsDir).iterdir()
    return {root.decode() for file in files for root in file.read_bytes().split(b"\0")}


def test_graphFails(diverted):
    """A failure below the target: its own message on standard error, and for the target what Nix says."""
    graph = Graph(diverted).fail("left").build("top").finish("base", "left")
    text = f"1 dependencies of derivation '{graph.drvs['top']}' failed to build"
    assert graph.server.world.threads.running[0].token.cancelled
    graph.ended(100, f"error: {text}", errors="error: no\n")


@pytest.mark.parametrize(
    ("status", "code"),
    [(BuildStatus.TIMED_OUT, 101), (BuildStatus.MISC_FAILURE, 1), (BuildStatus.TRANSIENT_FAILURE, 1)],
)
def test_codes(diverted, status, code):
    """The exit status of nix-store -r, and the message of the only target that failed."""
    Graph(diverted).fail("base", status).build("base").finish("base").ended(code, "error: no")


def test_twoFail(diverted):
    """With more than one failure the reply names the targets, and the messages are on standard error."""
    graph = Graph(diverted).fail("base").build("left", "right").finish("base")
    names = ", ".join(f"'{drv}'" for drv in sorted([graph.drvs["left"], graph.drvs["right"]]))
    errors = ["error: no\n"] + [
        f"error: 1 dependencies of derivation '{drv}' failed to build\n"
        for drv in sorted([graph.drvs["left"], graph.drvs["right"]])
    ]
    assert graph.session.replies == wire(100, f"error: build of {names} failed")
    assert sorted(graph.session.errors.splitlines(True)) == sorted(errors)
    graph.session.eof().ended(0, graph.session.errors)


def test_missingTarget(diverted):
    """Of a path that is not there nothing can be built; the conversation goes on."""
    missing = path("missing.drv")
    Graph(diverted).build(missing).ended(1, f"error: cannot build missing derivation '{missing}'")


def test_foreignTarget(diverted):
    """What is no store path ends the conversation, as in Nix."""
    graph = Graph(diverted).build("/tmp/x.drv")
    assert "/tmp/x.drv" in graph.session.errors
    graph.session.ended(1, graph.session.errors)


def test_nothingToDo(diverted):
    """No targets."""
    Graph(diverted).build().ended(0)


@pytest.mark.parametrize("done", [[], ["base"], ["base", "left"]])
def test_graphInterrupted(diverted, done):
    """Wherever it is, all that runs for it ends with the client."""
    graph = Graph(diverted).build("top").finish(*done)
    graph.session.eof()
    assert all(build.token.cancelled for build in graph.server.world.threads.running)
    graph.session.ended(1, INTERRUPTED)
    assert diverted._sessions.all() == []


def test_storeFails(diverted):
    """Trouble with the store in the middle is a failure with a text, not the end of the conversation."""
    graph = Graph(diverted).build("top")
    session = graph.session.server._commands._session
    session.queryClosure = lambda paths: (_ for _ in ()).throw(OSError(28, "No space left on device", "/secret"))
    graph.finish("base").ended(1, "error: No space left on device")

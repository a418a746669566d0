"""
L{nixserve.remote.builds}: a server of ours in front of another one that builds.
"""

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.derivation import BasicDerivation, DerivationOutput, unparse
from nixserve.codec.storepath import StoreDir
from nixserve.codec.terminal import MAX_LINE
from nixserve.errors import RemoteError
from nixserve.protocol.policy import Policy, Right
from nixserve.protocol.workers import Workers
from nixserve.remote.builds import RemoteBuilds, _Lines
from nixserve.remote.store import RemoteStore
from nixserve.testing import Built, FakeStore, Joined, buildTrees, makeInfo
from tests.derivations import derivation

STORE_DIR = StoreDir()


class Chain:
    """
    A client, a server on a remote store, and the server of that.

    @ivar far: the store that everything happens on.
    @ivar remotes: the sessions between the servers.
    @ivar said: what the client was told.
    """

    def __init__(self, script, policy=None):
        self.far = FakeStore()
        self.remotes = []
        self.said = bytearray()
        self.script = script
        self.store = RemoteStore(reactor, self.open)
        self.workers = Workers(reactor)
        self.workers.start()
        options = {} if policy is None else {"policy": policy}
        self.near = Joined(
            self.store,
            workers=self.workers,
            builds=RemoteBuilds(),
            reactor=reactor,
            onError=self.said.extend,
            **options,
        )
        self.client = self.near.client

    def open(self, onError):
        """Opens a session on the far store."""
        joined = Joined(self.far, build=self.script, reactor=reactor, onError=onError, name="there")
        self.remotes.append(joined)
        return joined.client.ready.addCallback(lambda _: joined.client)

    async def close(self):
        """End it all."""
        await self.client.close()
        if not self.near.server.ended.called:
            await self.near.server.ended
        assert all(remote.pair.over for remote in self.remotes)
        self.workers.stop()


def succeed(drvPath, drv):
    """A builder that writes its name."""
    return buildTrees(drvPath, drv, {"out": drv.name.encode()}, b"building " + drv.name.encode() + b"\n")


@pytest_twisted.ensureDeferred
async def test_buildDerivation():
    """The remote builds, what it says is heard here, and what it made stays there for the session."""
    chain = Chain(succeed)
    source = chain.far.add("source", b"")
    drvPath, drv = derivation("x", [source.path])
    result = await chain.client.buildDerivation(drvPath, drv)
    assert result.status == BuildStatus.BUILT and result.builtOutputs["out"].outPath == drv.outputs["out"].path
    assert chain.said == b"building x\n"
    chain.far.inner.collectGarbage()
    assert chain.far.valid([source]) == [source]
    assert (await chain.client.queryValidPaths([drv.outputs["out"].path])) == {drv.outputs["out"].path}
    again = await chain.client.buildDerivation(drvPath, drv)
    assert again.status == BuildStatus.ALREADY_VALID
    await chain.close()
    assert chain.far.inner.collectGarbage()


@pytest_twisted.ensureDeferred
async def test_unknownOutput():
    """An output whose path was not known before the build stays as well."""
    made = FakeStore().add("x", b"made")

    def script(drvPath, drv):
        result = BuildResult(BuildStatus.BUILT, builtOutputs={"out": Realisation(made.path)})
        return Built(result, [])

    chain = Chain(script)
    chain.far.add("x", b"made")
    drv = BasicDerivation("x", {"out": DerivationOutput(None, "r:sha256")}, frozenset(), "x", "/bin/sh", (), {})
    await chain.client.buildDerivation(makeInfo("x.drv", b"").path, drv)
    chain.far.inner.collectGarbage()
    assert chain.far.valid([made]) == [made]
    await chain.close()


@pytest_twisted.ensureDeferred
async def test_buildPaths():
    """Derivations in the remote store are built there, with what they need."""
    chain = Chain(succeed)
    drvPath, drv = derivation("x")
    chain.far.add("x.drv", unparse(drv), path=drvPath)
    result = await chain.client.buildPaths([str(drvPath)])
    assert (result.status, result.errorMsg) == (0, "")
    assert (await chain.client.queryValidPaths([drv.outputs["out"].path])) == {drv.outputs["out"].path}
    missing = makeInfo("missing.drv", b"").path
    result = await chain.client.buildPaths([str(missing)])
    assert result.status == 1 and "cannot build missing derivation" in result.errorMsg
    await chain.close()


@pytest_twisted.ensureDeferred
async def test_failure():
    """A build that fails is a result."""
    failed = BuildResult(BuildStatus.PERMANENT_FAILURE, "builder failed")
    chain = Chain(lambda drvPath, drv: Built(failed))
    result = await chain.client.buildDerivation(*derivation("x"))
    assert (result.status, result.errorMsg) == (BuildStatus.PERMANENT_FAILURE, "builder failed")
    await chain.close()


@pytest_twisted.ensureDeferred
async def test_anotherOutput():
    """What a remote says about outputs of others is not passed on."""
    evil = Realisation(makeInfo("evil", b"").path)
    chain = Chain(lambda drvPath, drv: Built(BuildResult(BuildStatus.BUILT, builtOutputs={"out": evil})))
    with pytest.raises(RemoteError, match=f"says that it has built '{evil.outPath}' as its output 'out'"):
        await chain.client.buildDerivation(*derivation("x"))
    await chain.close()


@pytest_twisted.ensureDeferred
async def test_clientGone():
    """A build ends with the client that wanted it, at the far end too."""
    cancelled = []
    chain = Chain(lambda drvPath, drv: Deferred(cancelled.append))
    building = chain.client.buildDerivation(*derivation("x"))
    await deferLater(reactor, 0.2)
    chain.client.cut()
    with pytest.raises(RemoteError):
        await building
    await deferLater(reactor, 0.2)
    assert len(cancelled) == 1
    await chain.close()


@pytest_twisted.ensureDeferred
async def test_remoteDies():
    """A remote that dies while it builds fails the session that wanted it, with the reason."""
    chain = Chain(lambda drvPath, drv: Deferred())
    building = chain.client.buildDerivation(*derivation("x"))
    await deferLater(reactor, 0.2)
    chain.remotes[0].cut()
    with pytest.raises(RemoteError, match="there: building"):
        await building
    await chain.close()


@pytest_twisted.ensureDeferred
async def test_notTrusted():
    """Whether the remote confines its builds is not known: who is not trusted does not build there."""
    chain = Chain(succeed, Policy(frozenset({Right.READ, Right.WRITE, Right.BUILD})))
    with pytest.raises(RemoteError, match="whether there confines its builds is not known here"):
        await chain.client.buildDerivation(*derivation("x"))
    assert all("build" not in name for name in chain.far.names)
    await chain.close()


@pytest_twisted.ensureDeferred
async def test_interrupted():
    """A session whose call waits for a remote that says nothing ends with its client, not when the remote does."""
    chain = Chain(succeed)
    await chain.client.queryValidPaths([makeInfo("x", b"").path])
    chain.remotes[0].pair.serverSide.paused = True
    waiting = chain.client.queryValidPaths([makeInfo("y", b"").path])
    await deferLater(reactor, 0.1)
    chain.client.cut()
    with pytest.raises(RemoteError):
        await waiting
    await chain.close()


def test_lines():
    """Logs arrive in whole lines, however they were cut; what is no line in the end becomes one."""
    heard = []
    lines = _Lines(heard.append)
    for piece in (b"a", b"b\nc", b"d\n", b"e\nf\ng"):
        lines.feed(piece)
    assert heard == [b"ab\n", b"cd\n", b"e\nf\n"]
    lines.flush()
    lines.flush()
    assert heard[3:] == [b"g\n"]
    lines.feed(b"x" * (MAX_LINE + 1))
    assert len(heard[4]) == MAX_LINE + 2

"""
The old race: a client asks which paths are there, a collector deletes some of them, and the client copies the rest.

First with real C{nix-store --gc} exactly between question and copy, where every client loses that asks without the lock
flag; then at random, with collections that never rest.
"""

import random
import sys

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred, DeferredList, gatherResults
from twisted.internet.threads import deferToThread

from nixserve.codec.hashes import hashBytes
from nixserve.codec.pathinfo import topoSort
from nixserve.errors import RemoteError
from nixserve.protocol.copying import copyClosure
from nixserve.store.api import InvalidPath
from nixserve.testing import makeNar
from tests.interop.building import requireSandbox, withoutEscapes
from tests.interop.collecting import Between, Collector
from tests.interop.remotes import ROOTLESS, Remote, basic, here, instantiate, outputsOf, readDerivation, wayName
from tests.interop.stores import add, addChain, assertSame, assertVerified, infos, opened, physical, temporaryRoots

#: Enough for a normal run, and what L{test_soak} does.
ROUNDS, SOAK = 50, 1000

#: Rounds that run at the same time, so that one finds what another has left.
LANES = 3


@pytest.fixture(params=["real", "ours"])
def remote(request, directory):
    """Both servers, on an empty store."""
    return Remote(request, request.param, "child", directory / "remote", requireSandbox()["NIX_CONFIG"])


def collect(nix, root):
    """Delete all garbage of a store."""
    nix.run("nix-store", "--gc", store=root)


async def copyTheOldWay(session, client, path, moment):
    """What clients of Nix 2.x do: ask, without the flag; then send what was not there."""
    closure = await session.queryClosure([path])
    infos = await session.queryPathInfos(closure)
    present = await client.queryValidPaths(closure)
    moment()
    for one in topoSort({path: info.references for path, info in infos.items()}):
        if one not in present:
            await client.addToStoreNar(infos[one], session.door, lambda one=one: session.session.narFromPath(one))


# --- exactly between ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["old", "ours"])
@pytest.mark.parametrize("who", ["real", "rootless", "ours"])
@pytest_twisted.ensureDeferred
async def test_upload(nix, request, directory, workers, who, how):
    """
    Half of a closure is garbage there when it is asked about, and a collector runs before the rest is sent. The old way
    loses at servers that make nothing a root unasked, as real Nix and one of ours that has been crippled; our way never
    loses, and at our server neither way does.
    """
    remote = Remote(request, "real" if who == "real" else "ours", "child", directory / "remote")
    source = directory / "source"
    chain = addChain(source, 6, "upload")
    nix.run("nix", "copy", "--no-check-sigs", "--to", remote.root, chain[2], store=source)
    unasked = addChain(remote.root, 1, "unasked")
    command = [sys.executable, str(ROOTLESS), *remote.command[1:]] if who == "rootless" else None
    loses = who == "rootless" or (who == "real" and how == "old")
    client, _ = remote.attach(command=command)

    def moment():
        collect(nix, remote.root)
        assert not physical(remote.root, unasked[0]).exists(), "the collector did nothing"

    async with here(workers, source) as session:
        if how == "ours":
            copying = copyClosure(session, client, chain[-1:], progress=Between(moment))
        else:
            copying = copyTheOldWay(session, client, chain[-1], moment)
        if loses:
            with pytest.raises(RemoteError, match=f"adding '{chain[3]}': .*'{chain[2]}' is not valid"):
                await copying
        else:
            await copying
            assert await client.queryClosure(chain[-1:]) == set(chain)
            collect(nix, remote.root)
            assert await client.queryValidPaths(chain) == set(chain)
    await client.close()
    assertVerified(nix, remote.root)
    if not loses:
        assertSame(nix, source, remote.root, chain)


@pytest.mark.parametrize("how", ["old", "ours"])
@pytest_twisted.ensureDeferred
async def test_download(nix, directory, remote, workers, how):
    """
    What is fetched is garbage there, and a collector runs between the question for the closure and the first NAR. A
    client that has not asked for roots gets nothing from real Nix, ours gets everything.
    """
    chain = addChain(remote.root, 6, "download")
    kept = infos(nix, remote.root)
    client = await remote.connect()
    async with here(workers, directory / "back") as back:
        if how == "old" and remote.who == "real":
            assert await client.queryClosure(chain[-1:]) == set(chain)
            collect(nix, remote.root)
            # It does not say that the path is not valid: it remembers that it was.
            with pytest.raises(RemoteError, match=f"fetching '{chain[0]}': .*{chain[0]}': No such file"):
                await client.dumpStorePath(chain[0], lambda data: None)
            return
        copied = await copyClosure(
            client, back, chain[-1:], progress=Between(lambda: collect(nix, remote.root)), dryRun=False
        )
        assert [info.path for info in copied.infos] == chain
        # Until both sessions end it stays on both sides.
        for root in (remote.root, directory / "back"):
            collect(nix, root)
            assert infos(nix, root) == kept
    await client.close()
    assertVerified(nix, directory / "back")


@pytest_twisted.ensureDeferred
async def test_presentHere(nix, directory, remote, workers):
    """What is garbage here when a download finds it present is still there when the rest arrives."""
    chain = addChain(remote.root, 6, "here")
    back = directory / "back"
    nix.run("nix", "copy", "--no-check-sigs", "--to", back, chain[2], store=remote.root)
    client = await remote.connect()
    async with here(workers, back) as session:
        between = Between(lambda: collect(nix, back))
        assert (await copyClosure(client, session, chain[-1:], progress=between)).present == 3
        assert infos(nix, back).keys() == set(chain)
    await client.close()
    assertVerified(nix, back)


@pytest_twisted.ensureDeferred
async def test_source(nix, directory, remote, workers):
    """
    What is to be sent is garbage here: whoever makes it a root of his session sends it whatever collector runs;
    else the error names what has vanished, and what had arrived is whole.
    """
    source = directory / "source"
    chain = addChain(source, 6, "source")
    async with here(workers, source) as session:
        client = await remote.connect()
        await session.addTempRoots(chain)
        await copyClosure(session, client, chain[2:3], progress=Between(lambda: collect(nix, source)))
        assert infos(nix, source).keys() == set(chain)
        await client.close()
    async with here(workers, source) as session:
        client = await remote.connect()
        with pytest.raises(InvalidPath, match=f"'{chain[3]}' is not valid"):
            await copyClosure(session, client, chain[-1:], progress=Between(lambda: collect(nix, source)))
        await client.close()
    assertVerified(nix, remote.root)


@pytest.mark.parametrize("how", ["two sessions", "one session"])
@pytest_twisted.ensureDeferred
async def test_build(nix, directory, remote, workers, how):
    """
    A collector runs between the copy of inputs and the build, and between the build and the copy of its outputs. In one
    session neither matters; a build in another session than the copy has lost its inputs.
    """
    source = directory / "source"
    drvs = instantiate(nix, directory, source)
    nix.run("nix-store", "--realise", drvs["multi"], store=source, environment=requireSandbox())
    multi, user = readDerivation(source, drvs["multi"]), readDerivation(source, drvs["user"])
    needed = outputsOf(multi)["dev"]
    client = await remote.connect()
    async with here(workers, source) as session:
        await copyClosure(session, client, [needed])
    if how == "two sessions":
        await client.close()
        client = await remote.connect()
    collect(nix, remote.root)
    result = await client.buildDerivation(drvs["user"], basic(user, [needed]))
    if how == "two sessions":
        assert result.status == 9 and f"'{needed}' of" in withoutEscapes(result.errorMsg)
    else:
        assert result.status == 0
        collect(nix, remote.root)
        outputs = list(outputsOf(user).values())
        async with here(workers, directory / "back") as back:
            between = Between(lambda: collect(nix, remote.root))
            await copyClosure(client, back, outputs, progress=between)
            assert await back.queryClosure(outputs) == {*outputs, needed}
    await client.close()
    assertVerified(nix, remote.root)


@pytest_twisted.ensureDeferred
async def test_twoAtOnce(nix, directory, remote, workers):
    """Two copies of the same closures up at once, and two down: neither waits for the other for ever."""
    source, back = directory / "source", directory / "back"
    closures = Closures(source, random.Random(2))
    everything = closures.paths
    first, second = await remote.connect(), await remote.connect()
    async with here(workers, source) as one, here(workers, source) as two:
        await gatherResults([copyClosure(one, first, everything), copyClosure(two, second, everything)])
    async with here(workers, back) as one, here(workers, back) as two:
        await gatherResults([copyClosure(first, one, everything), copyClosure(second, two, everything)])
        assert await one.queryClosure(everything) == set(everything)
    await first.close()
    await second.close()
    for root in (remote.root, back):
        assertVerified(nix, root)
        assertSame(nix, source, root, everything)


# --- at random ------------------------------------------------------------------------------------------------


class Closures:
    """
    Objects that refer to each other in all ways, of which closures share much.

    @ivar paths: all of them.
    @ivar closures: by top.
    """

    WIDTH, DEPTH = 12, 5

    def __init__(self, root, chance):
        self.closures = {}
        with opened(root) as session:
            for depth in range(self.DEPTH):
                below = list(self.closures)
                for number in range(self.WIDTH):
                    nar = makeNar({"it": b"%d %d" % (depth, number), "more": bytes(chance.choice([0, 100, 90_000]))})
                    references = chance.sample(below, min(len(below), chance.randrange(1, 5)))
                    path = add(session, f"object-{depth}-{number}", nar, references)
                    self.closures[path] = {path}.union(*(self.closures[one] for one in references))

    @property
    def paths(self):
        return list(self.closures)


class Rounds:
    """
    Copies up and down, each in sessions of its own, checked while the sessions live.

    @ivar copied: how many paths have been moved, up and down.
    @ivar present: how many had been left by others and were not.
    """

    def __init__(self, remote, workers, directory, count):
        self.remote, self.workers = remote, workers
        self.source, self.back = directory / "source", directory / "back"
        self.chance = random.Random(1)
        self.closures = Closures(self.source, self.chance)
        self.left = count
        self.copied = self.present = 0

    async def lane(self):
        """Round after round."""
        try:
            while self.left:
                self.left -= 1
                await self.round()
        finally:
            # One that fails ends all.
            self.left = 0

    async def round(self):
        """One closure goes up, another one that is there comes down."""
        tops = self.chance.sample(self.closures.paths, self.chance.randrange(1, 4))
        wanted = set().union(*(self.closures.closures[top] for top in tops))
        client = await self.remote.connect()
        async with here(self.workers, self.source) as source, here(self.workers, self.back) as back:
            self.count(await copyClosure(source, client, tops))
            assert await client.queryValidPaths(wanted) == wanted
            assert await client.queryClosure(tops) == wanted
            down = [self.chance.choice(sorted(wanted))]
            expected = self.closures.closures[down[0]]
            self.count(await copyClosure(client, back, down))
            assert await back.queryClosure(down) == expected
            # Still, and with what belongs there.
            assert await client.queryValidPaths(wanted) == wanted
            infos = await client.queryPathInfos(wanted)
            path = self.chance.choice(sorted(wanted))
            nar = []
            await client.dumpStorePath(path, nar.append)
            assert hashBytes("sha256", b"".join(nar)) == infos[path].narHash
        await client.close()

    def count(self, copied):
        """What a copy did."""
        self.copied += len(copied.infos)
        self.present += copied.present


async def race(nix, remote, workers, directory, count):
    """C{count} rounds while both receiving stores are collected without pause."""
    rounds = Rounds(remote, workers, directory, count)
    with opened(rounds.back), opened(remote.root):
        pass
    with Collector(nix, remote.root) as there, Collector(nix, rounds.back) as onThisSide:
        lanes = [Deferred.fromCoroutine(rounds.lane()) for _ in range(LANES)]
        for succeeded, result in await DeferredList(lanes, consumeErrors=True):
            if not succeeded:
                result.raiseException()
        await deferToThread(there.awaitWholeRun)
    print(
        f"{remote.name}: {count} rounds, {rounds.copied} paths copied, {rounds.present} present, "
        f"{there.runs} collections there and {onThisSide.runs} here"
    )
    assert there.failures == onThisSide.failures == []
    assert there.runs > count / 20
    assert rounds.present > 0 and rounds.copied > count
    for root in (remote.root, rounds.back):
        assertVerified(nix, root)
        collect(nix, root)
        assert infos(nix, root) == {} and temporaryRoots(root) == []


#: Real Nix as a child, ours as the service that it is.
SERVERS = [("real", "child"), ("ours", "conch")]


@pytest.mark.parametrize("way", SERVERS, ids=wayName)
@pytest_twisted.ensureDeferred
async def test_random(nix, request, directory, workers, way):
    """Whatever is collected when, what a session has asked about is there, whole, until the session ends."""
    await race(nix, Remote(request, *way, directory / "remote"), workers, directory, ROUNDS)


@pytest.mark.soak
@pytest.mark.parametrize("way", SERVERS, ids=wayName)
@pytest_twisted.ensureDeferred
async def test_soak(nix, request, directory, workers, way):
    """The same a thousand times."""
    await race(nix, Remote(request, *way, directory / "remote"), workers, directory, SOAK)

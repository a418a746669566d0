"""
Our client against real C{nix-store --serve --write} and against our own servers: as a child, through ssh, and
in-process. Every command, and closures in both directions; what comes of it, real Nix finds to be the same.
"""

import hashlib

import pytest
import pytest_twisted

from nixserve.codec.hashes import hashBytes
from nixserve.codec.messages import BuildOptions
from nixserve.codec.pathinfo import topoSort
from nixserve.errors import RemoteError
from nixserve.protocol.copying import copyClosure
from nixserve.testing import makeInfo, makeNar
from tests.interop.building import requireSandbox, withoutEscapes
from tests.interop.nix import NIX_CONFIG
from tests.interop.remotes import (
    STORE_DIR,
    WAYS,
    Remote,
    basic,
    here,
    instantiate,
    outputsOf,
    readDerivation,
    speaking,
    wayName,
)
from tests.interop.stores import (
    add,
    addChain,
    addSmallFiles,
    assertSame,
    assertVerified,
    exportDigest,
    infos,
    named,
    opened,
    temporaryRoots,
)

MISSING = STORE_DIR.parse(named("missing"))


@pytest.fixture(params=WAYS, ids=wayName)
def remote(request, directory):
    """Every server in every way, on an empty store."""
    return Remote(request, *request.param, directory / "remote")


@pytest.fixture(params=["real", "ours"])
def child(request, directory):
    """Both servers as a child process, on an empty store."""
    return Remote(request, request.param, "child", directory / "remote")


def parsed(paths):
    """Store paths."""
    return [STORE_DIR.parse(path) for path in paths]


def imported(nix, oddStore, root):
    """What real Nix makes of an export stream, which knows less than an info."""
    closure = nix.lines("nix-store", "--query", "--requisites", oddStore.top, store=oddStore.root)
    stream = nix.run("nix-store", "--export", *closure, store=oddStore.root).stdout
    nix.run("nix-store", "--import", store=root, stdin=stream)


class Stream:
    """
    Takes an export stream apart.

    @ivar items: what followed each NAR, and the hash of that.
    """

    def __init__(self):
        self.items = []
        self._nar = hashlib.sha256()

    def nar(self, data):
        """Bytes of a NAR."""
        self._nar.update(data)

    def item(self, item):
        """What it was."""
        self.items.append((item, self._nar.hexdigest()))
        self._nar = hashlib.sha256()


# --- copies ---------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_closures(nix, directory, child, workers):
    """A closure goes there and comes back in one session, and real Nix finds the same in all three stores."""
    source, back = directory / "source", directory / "back"
    files = addSmallFiles(source, 500, "files")
    with opened(source) as session:
        chain = [files]
        for number in range(30):
            chain.append(add(session, f"chain-{number}", makeNar({"number": b"%d" % number}), chain[-1:]))
    client = await child.connect()
    async with here(workers, source) as session:
        copied = await copyClosure(session, client, [chain[-1]])
        assert len(copied.infos) == len(chain)
        again = await copyClosure(session, client, [chain[-1]])
        assert (again.infos, again.present) == ((), len(chain))
    async with here(workers, back) as session:
        assert len((await copyClosure(client, session, [chain[-1]])).infos) == len(chain)
        assert (await copyClosure(client, session, [chain[-1]])).present == len(chain)
    await client.close()
    for store in (child.root, back):
        assertVerified(nix, store)
        assertSame(nix, source, store, chain, one=chain[:1])


@pytest_twisted.ensureDeferred
async def test_oddClosure(nix, directory, remote, workers, oddStore):
    """
    A closure with everything that could go wrong, made by real Nix, arrives as it was, comes back as it was, and goes
    on to a third store from what only we have written.
    """
    back = directory / "back"
    client = await remote.connect()
    async with here(workers, oddStore.root) as session:
        copied = await copyClosure(session, client, parsed([oddStore.top]))
    assert sorted(info.path for info in copied.infos) == oddStore.paths
    async with here(workers, back) as session:
        assert len((await copyClosure(client, session, parsed([oddStore.top]))).infos) == len(oddStore.paths)
    await client.close()
    for store in (remote.root, back):
        assertVerified(nix, store)
        assertSame(nix, oddStore.root, store, oddStore.paths, one=[oddStore.top])


@pytest_twisted.ensureDeferred
async def test_withoutClosure(nix, directory, child, workers):
    """Single paths are copied both ways only where what they refer to is; if not, the error names it and its side."""
    chain = addChain(directory / "source", 3, "single")
    async with here(workers, directory / "source") as session, here(workers, directory / "back") as back:
        client = await child.connect()
        with pytest.raises(Exception, match=f"{chain[0]}.*{child.name} lacks"):
            await copyClosure(session, client, chain[1:2], closure=False)
        client = await child.connect()
        for path in chain:
            assert len((await copyClosure(session, client, [path], closure=False)).infos) == 1
        with pytest.raises(Exception, match=f"{chain[0]}.*here lacks"):
            await copyClosure(client, back, chain[1:2], closure=False)
        client = await child.connect()
        for path in chain:
            assert len((await copyClosure(client, back, [path], closure=False)).infos) == 1
        await client.close()
    for store in (child.root, directory / "back"):
        assertSame(nix, directory / "source", store, chain, one=chain)
        assertVerified(nix, store)


@pytest.mark.parametrize("way", [("real", "ssh"), ("ours", "child"), ("ours", "conch")], ids=wayName)
@pytest_twisted.ensureDeferred
async def test_severalSessions(nix, request, directory, workers, way):
    """A closure that is broad and deep goes over four sessions at once, and back."""
    remote = Remote(request, *way, directory / "remote")
    source, back = directory / "source", directory / "back"
    with opened(source) as session:
        rows = [[add(session, f"leaf-{n}", makeNar(b"%d" % n * (40_000 * (n % 3) + 1))) for n in range(24)]]
        for depth in range(4):
            rows.append(
                [
                    add(session, f"d{depth}-{n}", makeNar(b"%d %d" % (depth, n)), {rows[-1][n], rows[-1][n * 7 % 24]})
                    for n in range(24)
                ]
            )
        top = add(session, "top", makeNar(b"top"), rows[-1])
    paths = sorted([top, *(path for row in rows for path in row)])
    clients = [await remote.connect() for _ in range(4)]
    async with here(workers, source) as one, here(workers, source) as two:
        copied = await copyClosure([one, two], clients, [top])
    assert sorted(info.path for info in copied.infos) == paths
    async with here(workers, back) as one, here(workers, back) as two:
        copied = await copyClosure(clients, [one, two], [top])
    assert sorted(info.path for info in copied.infos) == paths
    for client in clients:
        await client.close()
    for store in (remote.root, back):
        assertVerified(nix, store)
        assertSame(nix, source, store, paths, one=[top])


@pytest_twisted.ensureDeferred
async def test_dryRun(nix, directory, child, workers):
    """Only asking copies nothing, in either direction, and leaves no roots."""
    chain = addChain(directory / "source", 3, "dry")
    async with here(workers, directory / "source") as session, here(workers, directory / "back") as back:
        client = await child.connect()
        copied = await copyClosure(session, client, chain[-1:], dryRun=True)
        assert [info.path for info in copied.infos] == chain and infos(nix, child.root) == {}
        await copyClosure(session, client, chain[:1])
        copied = await copyClosure(session, client, chain[-1:], dryRun=True)
        assert [info.path for info in copied.infos] == chain[1:] and copied.present == 1
        copied = await copyClosure(client, back, chain[:1], dryRun=True)
        assert [info.path for info in copied.infos] == chain[:1]
        await client.close()
    assert infos(nix, directory / "back") == {}


# --- the commands, one by one ---------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_queries(nix, remote, workers, oddStore):
    """What is valid, what is known of it and its closures are what real Nix says; unknown paths are left out."""
    paths, top = parsed(oddStore.paths), STORE_DIR.parse(oddStore.top)
    client = await remote.connect()
    async with here(workers, oddStore.root) as session:
        expected = await session.queryPathInfos(paths)
        drvs = [path for path in paths if path.isDerivation]
        deep = {drv: await session.queryClosure([drv], True) for drv in drvs}
        assert await client.queryValidPaths([*paths, MISSING]) == set()
        assert await client.queryPathInfos(paths) == {}
        await copyClosure(session, client, [top])
    assert await client.queryValidPaths([*paths, MISSING]) == set(paths)
    assert await client.queryValidPaths([]) == set()
    found = await client.queryPathInfos([*paths, MISSING])
    assert found.keys() == set(paths)
    for path, info in found.items():
        told = ("narHash", "narSize", "references", "deriver", "sigs", "ca")
        assert [getattr(info, name) for name in told] == [getattr(expected[path], name) for name in told]
    assert await client.queryClosure([top]) == set(paths)
    for drv in drvs:
        assert await client.queryClosure([drv]) == set(
            parsed(nix.lines("nix-store", "--query", "--requisites", drv, store=remote.root))
        )
        assert await client.queryClosure([drv], includeOutputs=True) == deep[drv] > await client.queryClosure([drv])
    await client.close()


@pytest_twisted.ensureDeferred
async def test_lock(nix, directory, child):
    """With the flag everything asked about is a root there, valid or not, until the session ends."""
    chain = addChain(child.root, 2, "locked")
    client = await child.connect()
    assert await client.queryValidPaths([*chain, MISSING], lock=True) == set(chain)
    roots = b"".join((child.root / "nix/var/nix/temproots" / name).read_bytes() for name in temporaryRoots(child.root))
    assert {path.encode() for path in (*chain, MISSING)} <= set(roots.split(b"\0"))
    nix.run("nix-store", "--gc", store=child.root)
    assert await client.queryValidPaths(chain) == set(chain)
    await client.close()
    nix.run("nix-store", "--gc", store=child.root)
    assert infos(nix, child.root) == {} and temporaryRoots(child.root) == []


@pytest_twisted.ensureDeferred
async def test_substitute(request, nix, directory, workers):
    """With the flag real Nix fetches what it can from its own substituters, and only the rest is copied."""
    chain = addChain(directory / "source", 3, "substituted")
    config = NIX_CONFIG.replace("substituters =", f"substituters = {directory / 'cache'}?trusted=true")
    remote = Remote(request, "real", "child", directory / "remote", config)
    async with here(workers, directory / "source") as session:
        nix.run("nix", "copy", "--no-check-sigs", "--to", directory / "cache", chain[1], store=directory / "source")
        client = await remote.connect()
        assert await client.queryValidPaths(chain) == set()
        copied = await copyClosure(session, client, chain[-1:], substitute=True)
        await client.close()
    assert ([info.path for info in copied.infos], copied.present) == (chain[-1:], 2)
    assertVerified(nix, remote.root)


@pytest_twisted.ensureDeferred
async def test_dump(remote, workers, oddStore):
    """Every NAR comes as it was registered, all asked for at once; so does one that is asked for alone."""
    client = await remote.connect()
    async with here(workers, oddStore.root) as session:
        await copyClosure(session, client, parsed([oddStore.top]))
        expected = await session.queryPathInfos(parsed(oddStore.paths))
    nars = {path: [] for path in expected}
    dumps = [client.dumpStorePath(path, nar.append) for path, nar in nars.items()]
    for dump in dumps:
        await dump
    for path, info in expected.items():
        assert hashBytes("sha256", b"".join(nars[path])) == info.narHash
    with pytest.raises(RemoteError, match=f"{remote.name}: fetching '{MISSING}'.*{MISSING}' is not"):
        await client.dumpStorePath(MISSING, nars.clear)
    await client.close()


@pytest_twisted.ensureDeferred
async def test_addToStoreNar(nix, directory, remote, workers):
    """Objects are added one at a time and several at once; each is acknowledged in its turn."""
    nars = [makeNar({"f": b"%d" % number * 1000}) for number in range(5)]
    added = []
    for number, nar in enumerate(nars):
        added.append(makeInfo(f"added-{number}", nar, [info.path for info in added]))
    acknowledged = []
    client = await remote.connect()
    async with here(workers, directory / "source") as session:
        await client.addToStoreNar(added[0], session.door, lambda: iter([nars[0][:100], nars[0][100:]]))
        joined = b"".join(nars[1:])
        pieces = [joined[at : at + 777] for at in range(0, len(joined), 777)]
        await client.addToStoreNars(added[1:], session.door, lambda: iter(pieces), acknowledged.append)
    assert acknowledged == added[1:]
    # Once more: it is read and dropped.
    async with here(workers, directory / "source") as session:
        await client.addToStoreNar(added[0], session.door, lambda: iter([nars[0]]))
    found = await client.queryPathInfos([info.path for info in added])
    assert [found[info.path].references for info in added] == [info.references for info in added]
    await client.close()
    assertVerified(nix, remote.root)


@pytest_twisted.ensureDeferred
async def test_refusedObject(nix, directory, child, workers):
    """An object that is not what its info says is refused; the error names remote and path, and nothing is there."""
    nar = makeNar(b"right")
    info = makeInfo("wrong", makeNar(b"wrong"))
    client = await child.connect()
    async with here(workers, directory / "source") as session:
        with pytest.raises(RemoteError, match=f"{child.name}: adding '{info.path}': .*hash mismatch") as raised:
            await client.addToStoreNar(info, session.door, lambda: iter([nar]))
    assert raised.value.path == info.path
    with pytest.raises(RemoteError, match="hash mismatch"):
        await client.queryValidPaths([])
    await client.close()
    assert infos(nix, child.root) == {}
    assertVerified(nix, child.root)


@pytest_twisted.ensureDeferred
async def test_exportAndImport(nix, directory, remote, workers, oddStore):
    """
    An export stream brings what real C{nix-store --import} makes of it, and comes back with the same objects.
    """
    paths = parsed(oddStore.paths)
    client = await remote.connect()
    async with here(workers, oddStore.root) as session:
        expected = await session.queryPathInfos(paths)
        await client.importPaths(session.door, lambda: session.session.exportPaths(paths))
    stream = Stream()
    order = topoSort({path: expected[path].references for path in paths})
    await client.exportPaths(order, stream.nar, stream.item)
    await client.close()
    assert len(stream.items) == len(paths)
    for item, narHash in stream.items:
        info = expected[item.path]
        assert (item.references, item.deriver, narHash) == (info.references, info.deriver, info.narHash.hex)
    imported(nix, oddStore, directory / "imported")
    assertSame(nix, directory / "imported", remote.root, oddStore.paths, one=[oddStore.top])
    assertVerified(nix, remote.root)


@pytest_twisted.ensureDeferred
async def test_refusal(remote):
    """What the remote says on its standard error is what the error says, and the session is dead."""
    heard = []
    client = await remote.connect(heard.append)
    with pytest.raises(RemoteError, match=f"{remote.name}.*'{MISSING}' is not valid"):
        await client.queryClosure([MISSING])
    with pytest.raises(RemoteError, match="is not valid"):
        await client.queryValidPaths([])
    await client.close()
    assert b"is not valid" in b"".join(heard)


@pytest_twisted.ensureDeferred
async def test_oneAfterTheOther(child):
    """
    A session that begins as soon as another has ended, in the very turn of the reactor in which that is known, is not
    taken for it, although it has its file descriptors.
    """
    for _ in range(6):
        client = await child.connect()
        assert await client.queryValidPaths([]) == set()
        await client.close()


# --- builds ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=WAYS, ids=wayName)
def builder(request, directory):
    """Every server in every way, able to build."""
    return Remote(request, *request.param, directory / "remote", requireSandbox()["NIX_CONFIG"])


@pytest_twisted.ensureDeferred
async def test_builds(nix, directory, builder, workers):
    """
    Derivations are built from what was copied in the same session, with and without their files; outputs, statuses and
    log are those of real Nix building alone; a build that fails leaves the session as it was.
    """
    source = directory / "source"
    drvs = instantiate(nix, directory, source)
    heard = []
    client = await builder.connect(heard.append)
    async with here(workers, source) as session:
        await copyClosure(session, client, drvs.values())
        multi = readDerivation(source, drvs["multi"])
    result = await client.buildDerivation(drvs["multi"], basic(multi))
    assert (result.status, result.errorMsg, result.timesBuilt) == (0, "", 1)
    assert {name: built.outPath for name, built in result.builtOutputs.items()} == outputsOf(multi)
    assert (await client.buildDerivation(drvs["multi"], basic(multi))).status == 2
    built = await client.buildPaths([drvs["user"]])
    assert (built.status, built.errorMsg) == (0, "")
    failed = await client.buildPaths([drvs["failing"]])
    assert failed.status == 100 and "failed with exit code 3" in withoutEscapes(failed.errorMsg)
    failing = readDerivation(source, drvs["failing"])
    result = await client.buildDerivation(drvs["failing"], basic(failing))
    assert result.status == 3 and not result.success and "exit code 3" in withoutEscapes(result.errorMsg)
    slow = readDerivation(source, drvs["slow"])
    result = await client.buildDerivation(drvs["slow"], basic(slow), BuildOptions(buildTimeout=1))
    assert result.status == 8 and "timed out after 1 seconds" in withoutEscapes(result.errorMsg)
    user = readDerivation(source, drvs["user"])
    outputs = [*outputsOf(multi).values(), *outputsOf(user).values()]
    assert await client.queryValidPaths(outputs, lock=True) == set(outputs)
    async with here(workers, directory / "back") as session:
        await copyClosure(client, session, outputs)
    await client.close()
    assert b"said\n" in b"".join(heard) and b"on standard error\n" in b"".join(heard)
    nix.run("nix-store", "--realise", drvs["user"], store=source, environment=requireSandbox())
    for store in (builder.root, directory / "back"):
        assertVerified(nix, store)
        assert exportDigest(nix, store, outputs) == exportDigest(nix, source, outputs)


@pytest.mark.parametrize("who", ["real", "ours"])
@pytest_twisted.ensureDeferred
async def test_missingInput(nix, request, directory, workers, who):
    """A build whose inputs are not there is a result that names them; the session goes on."""
    builder = Remote(request, who, "child", directory / "remote", requireSandbox()["NIX_CONFIG"])
    drvs = instantiate(nix, directory, directory / "source")
    user = readDerivation(directory / "source", drvs["user"])
    client = await builder.connect()
    result = await client.buildDerivation(drvs["user"], basic(user, [MISSING]))
    assert result.status == 9 and f"{MISSING}' of '{drvs['user']}' does not exist" in withoutEscapes(result.errorMsg)
    assert await client.queryValidPaths([MISSING]) == set()
    await client.close()


# --- old servers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minor", [4, 3, 0])
@pytest_twisted.ensureDeferred
async def test_oldServer(nix, directory, child, workers, oddStore, minor):
    """
    A server that does not know AddToStoreNar gets everything in one ImportPaths. One that does not know hashes either
    cannot be downloaded from, and the error says so.
    """
    version = 0x200 | minor
    top = parsed([oddStore.top])
    heard = []
    client, _ = child.attach(heard.append, command=speaking(version, child.command))
    assert await client.ready == version
    async with here(workers, oddStore.root) as session:
        copied = await copyClosure(session, client, top)
        assert len(copied.infos) == len(oddStore.paths)
        assert (await copyClosure(session, client, top)).present == len(oddStore.paths)
    found = await client.queryPathInfos(parsed(oddStore.paths))
    assert found.keys() == set(parsed(oddStore.paths))
    assert await client.queryClosure(top) == set(parsed(oddStore.paths))
    async with here(workers, directory / "back") as session:
        if minor >= 4:
            assert len((await copyClosure(client, session, top)).infos) == len(oddStore.paths)
            await client.close()
        else:
            with pytest.raises(RemoteError, match=f"{child.name} speaks a protocol without hashes"):
                await copyClosure(client, session, top)
    assertVerified(nix, child.root)
    imported(nix, oddStore, directory / "imported")
    assertSame(nix, directory / "imported", child.root, oddStore.paths, one=[oddStore.top])
    if minor >= 4:
        assertVerified(nix, directory / "back")
        assertSame(nix, directory / "imported", directory / "back", oddStore.paths, one=[oddStore.top])
    assert heard == []


@pytest.mark.parametrize("minor", [6, 3, 2, 1])
@pytest_twisted.ensureDeferred
async def test_oldBuilder(nix, request, directory, workers, minor):
    """Derivations are built by servers of each version that brought other fields, and results have what they had."""
    builder = Remote(request, "ours", "child", directory / "remote")
    requireSandbox()
    drvs = instantiate(nix, directory, directory / "source")
    multi = readDerivation(directory / "source", drvs["multi"])
    client, _ = builder.attach(command=speaking(0x200 | minor, builder.command))
    result = await client.buildDerivation(drvs["multi"], basic(multi))
    assert (result.status, result.errorMsg, result.timesBuilt) == (0, "", 1 if minor >= 3 else 0)
    assert set(result.builtOutputs) == ({"out", "dev"} if minor >= 6 else set())
    outputs = list(outputsOf(multi).values())
    assert await client.queryValidPaths(outputs) == set(outputs)
    await client.close()

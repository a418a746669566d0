"""
Builds on another store without .drv files: at real C{nix-store --serve --write} and at our servers, with real Nix
building alone to compare with.
"""

from types import SimpleNamespace

import pytest
import pytest_twisted
from twisted.internet.threads import deferToThread

from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.derivation import drvPathOf
from nixserve.codec.messages import BuildOptions
from nixserve.errors import BuildError, FormatError, RemoteError, StoreError
from nixserve.protocol.remotebuild import buildRemotely, planRemoteBuild
from tests.interop.building import DERIVATIONS, FEATURE, TREE, requireSandbox, withoutEscapes
from tests.interop.collecting import Collector
from tests.interop.remotes import STORE_DIR, Remote, basic, here, outputsOf, readDerivation, wayName
from tests.interop.stores import assertVerified, exportDigest, infos, named

EXPRESSION = DERIVATIONS / "remote.nix"

NAMES = ["multi", "user", "fixed", "bottom", "left", "right", "top", "failing", "afterFailing", "slow"]
#: What has to be built for C{top}.
BELOW_TOP = ["bottom", "fixed", "multi", "left", "right", "top"]
FLOATING = ["floatingBottom", "floatingTop", "afterFloating"]

#: Real Nix as a child, ours as the service that it is.
WAYS = [("real", "child"), ("ours", "conch")]

MISSING = STORE_DIR.parse(named("missing"))


@pytest.fixture(scope="module")
def sandbox():
    """What gives real Nix our sandbox, and floating outputs."""
    return {"NIX_CONFIG": requireSandbox()["NIX_CONFIG"].replace("nix-command", "nix-command ca-derivations")}


@pytest.fixture(params=WAYS, ids=wayName)
def remote(request, directory, sandbox):
    """Servers that build, each on an empty store."""
    return Remote(request, *request.param, directory / "remote", sandbox["NIX_CONFIG"])


@pytest.fixture(params=["real", "ours"])
def child(request, directory, sandbox):
    """Both as child processes."""
    features = f"{FEATURE} ca-derivations"
    return Remote(request, request.param, "child", directory / "remote", sandbox["NIX_CONFIG"], features)


def instantiate(nix, sandbox, root, file=EXPRESSION, names=NAMES):
    """Have real Nix make derivations; their paths by name."""
    words = [word for name in names for word in ("-A", name)]
    paths = nix.lines("nix-instantiate", file, *words, store=root, environment=sandbox)
    return dict(zip(names, (STORE_DIR.parse(path.split("!")[0]) for path in paths), strict=True))


@pytest.fixture
def source(nix, directory, sandbox):
    """A store with derivations and nothing built."""
    root = directory / "source"
    drvs = instantiate(nix, sandbox, root)
    read = {name: readDerivation(root, path) for name, path in drvs.items()}
    return SimpleNamespace(root=root, drvs=drvs, read=read, outs={name: outputsOf(drv) for name, drv in read.items()})


@pytest.fixture(scope="module")
def alone(scratch, nix, sandbox):
    """A store in which real Nix has built everything that can be."""
    root = scratch / "remote-alone"
    for file, names in ((TREE, ["all"]), (EXPRESSION, ["user", "top"])):
        words = [word for name in names for word in ("-A", name)]
        nix.run("nix-build", file, *words, "--no-out-link", store=root, environment=sandbox, timeout=120)
    return root


def assertAsAlone(nix, alone, root, paths):
    """Real Nix knows the same of these outputs in both stores, and they hold the same bytes."""
    found, expected = infos(nix, root), infos(nix, alone)
    for path in paths:
        assert found.get(path) == expected[path]
    assert exportDigest(nix, root, paths) == exportDigest(nix, alone, paths)
    assertVerified(nix, root)


def assertNoDerivations(nix, root, read=()):
    """Nothing of what tells how to build has come here but C{read}, what builders read."""
    assert {path for path in infos(nix, root) if path.endswith(".drv")} <= set(read)


# --- what is built --------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_tree(nix, directory, remote, workers, alone, sandbox):
    """
    More than fifty derivations of every kind, of which nothing is built on either side, come out as when real Nix
    builds them alone; here arrive the outputs of the last.
    """
    root = directory / "source"
    (top,) = instantiate(nix, sandbox, root, TREE, ["all"]).values()
    begun = []
    client = await remote.connect()
    async with here(workers, root) as session:
        plan = await planRemoteBuild(client, top, session)
        built = await buildRemotely(client, top, session, onBuild=begun.append)
    await client.close()
    assert (built.result.status, built.result.errorMsg) == (BuildStatus.BUILT, "")
    assert tuple(begun) == plan.builds and len(begun) > 50 and begun[-1] == top
    assert built.sent.infos == plan.sends.infos
    drvs = [readDerivation(root, drv) for drv in begun]
    assert built.outputs == outputsOf(drvs[-1])
    # One of them has its builder read a derivation.
    assertNoDerivations(nix, remote.root, set().union(*(drv.inputSrcs for drv in drvs)))
    assertAsAlone(nix, alone, remote.root, [path for drv in drvs for path in outputsOf(drv).values()])
    assertAsAlone(nix, alone, root, [info.path for info in built.fetched.infos])
    assert set(built.outputs.values()) <= infos(nix, root).keys()


@pytest_twisted.ensureDeferred
async def test_collected(nix, child, workers, source, alone):
    """Collectors that never rest, on either side, take away neither inputs nor outputs before the sessions end."""
    root = source.root.parent / "receiving"
    nix.run("nix", "copy", "--no-check-sigs", "--to", root, "--derivation", source.drvs["top"], store=source.root)
    client = await child.connect()
    async with here(workers, root) as session:
        await session.addTempRoots([*source.drvs.values()])
        with Collector(nix, child.root) as there, Collector(nix, root) as onThisSide:
            built = await buildRemotely(client, source.drvs["top"], session)
            assert built.result.success
            await deferToThread(there.awaitWholeRun)
            made = [path for name in BELOW_TOP for path in source.outs[name].values()]
            assert await client.queryValidPaths(made) == set(made)
            assert await session.queryValidPaths(built.outputs.values()) == set(built.outputs.values())
        assertAsAlone(nix, alone, root, [info.path for info in built.fetched.infos])
    assert there.failures == onThisSide.failures == [] and there.runs > 1
    await client.close()


@pytest.mark.parametrize("form", ["path", "derivation", "basic", "basic, unnamed"])
@pytest_twisted.ensureDeferred
async def test_forms(nix, child, workers, source, alone, sandbox, form):
    """A derivation is given by its path, as it was read, or with its inputs as paths; only inputs are copied."""
    nix.run("nix-store", "--realise", source.drvs["multi"], store=source.root, environment=sandbox)
    needed = source.outs["multi"]["dev"]
    user = basic(source.read["user"], [needed])
    drv, drvPath = {
        "path": (source.drvs["user"], None),
        "derivation": (source.read["user"], None),
        "basic": (user, source.drvs["user"]),
        "basic, unnamed": (user, None),
    }[form]
    client = await child.connect()
    async with here(workers, source.root) as session:
        built = await buildRemotely(client, drv, session, drvPath=drvPath)
    await client.close()
    assert built.result.status == BuildStatus.BUILT and built.outputs == source.outs["user"]
    assert built.drvPath == (source.drvs["user"] if form != "basic, unnamed" else drvPathOf(user, STORE_DIR))
    assert needed in [info.path for info in built.sent.infos]
    assert [info.path for info in built.fetched.infos] == list(built.outputs.values())
    assertNoDerivations(nix, child.root)
    if form != "basic, unnamed":
        assertAsAlone(nix, alone, child.root, list(built.outputs.values()))
        assertAsAlone(nix, alone, source.root, list(built.outputs.values()))


@pytest_twisted.ensureDeferred
async def test_outputs(nix, child, workers, source, alone):
    """Only the outputs asked for come back; there all are; a second time nothing is built or moved."""
    client = await child.connect()
    heard, outs = [], source.outs["multi"]
    async with here(workers, source.root) as session:
        with pytest.raises(FormatError, match=r"multi\.drv' does not have the output 'nope'; it has dev, out"):
            await buildRemotely(client, source.drvs["multi"], session, outputs=["nope"])
        left = await buildRemotely(client, source.drvs["multi"], session, fetch=False)
        assert (left.fetched, left.outputs) == (None, outs)
        assert not await session.queryValidPaths(outs.values())
        some = await buildRemotely(client, source.drvs["multi"], session, outputs=["dev"], onBuild=heard.append)
        assert some.outputs == {"dev": outs["dev"]} and some.result.success
        assert await session.queryValidPaths(outs.values()) == {outs["dev"]}
        await buildRemotely(client, source.drvs["multi"], session, onBuild=heard.append)
        again = await buildRemotely(client, source.drvs["multi"], session, onBuild=heard.append)
        assert (again.result.status, again.sent.infos, again.fetched.infos) == (BuildStatus.ALREADY_VALID, (), ())
    assert heard == []
    await client.close()
    for root in (child.root, source.root):
        assertAsAlone(nix, alone, root, list(outs.values()))


@pytest_twisted.ensureDeferred
async def test_dependencies(nix, child, workers, source, alone):
    """What is valid on neither side is built first, each derivation once, before those that need it."""
    begun = []
    client = await child.connect()
    async with here(workers, source.root) as session:
        built = await buildRemotely(client, source.drvs["top"], session, onBuild=begun.append)
    await client.close()
    drvs = source.drvs
    assert sorted(begun) == sorted(drvs[name] for name in BELOW_TOP)
    order = {name: begun.index(drvs[name]) for name in BELOW_TOP}
    assert order["top"] == 5 and order["bottom"] < order["left"] and order["fixed"] < order["left"]
    assert order["bottom"] < order["right"] and order["multi"] < order["right"]
    # Two files of text: nothing else can have come from here.
    assert sorted(info.path.name for info in built.sent.infos) == ["other", "text"]
    outputs = [path for name in order for path in source.outs[name].values()]
    assertNoDerivations(nix, child.root)
    assertAsAlone(nix, alone, child.root, outputs)
    fetched = {info.path for info in built.fetched.infos}
    assert set(built.outputs.values()) < fetched <= {*outputs}
    assertAsAlone(nix, alone, source.root, sorted(fetched))


@pytest_twisted.ensureDeferred
async def test_inputsThere(nix, child, workers, source, alone):
    """Inputs that only the remote has are not copied and not built."""
    needed = [source.outs[name]["out"] for name in ("left", "right")]
    nix.run("nix", "copy", "--no-check-sigs", "--to", child.root, *needed, store=alone)
    begun = []
    client = await child.connect()
    async with here(workers, source.root) as session:
        built = await buildRemotely(client, source.drvs["top"], session, onBuild=begun.append)
        assert begun == [source.drvs["top"]] and built.sent.infos == ()
        assert {*needed, source.outs["top"]["out"]} <= {info.path for info in built.fetched.infos}
    await client.close()
    assertAsAlone(nix, alone, source.root, [source.outs["top"]["out"], *needed])
    assertNoDerivations(nix, child.root)


@pytest_twisted.ensureDeferred
async def test_fixed(nix, child, workers, source, alone):
    """A fixed output comes with its content address."""
    client = await child.connect()
    async with here(workers, source.root) as session:
        built = await buildRemotely(client, source.drvs["fixed"], session)
    await client.close()
    outputs = list(built.outputs.values())
    assert infos(nix, source.root)[outputs[0]]["ca"].startswith("fixed:sha256:")
    for root in (child.root, source.root):
        assertAsAlone(nix, alone, root, outputs)


@pytest_twisted.ensureDeferred
async def test_floating(nix, directory, child, workers, sandbox):
    """Outputs whose paths follow from their contents, and what depends on them, are what real Nix makes alone."""
    root, by = directory / "floating", directory / "by-itself"
    drvs = instantiate(nix, sandbox, root, names=FLOATING)
    client = await child.connect()
    async with here(workers, root) as session:
        built = await buildRemotely(client, drvs["afterFloating"], session)
        assert (built.result.status, built.result.errorMsg) == (BuildStatus.BUILT, "")
        top = await buildRemotely(client, drvs["floatingTop"], session)
    await client.close()
    nix.run("nix-build", EXPRESSION, "-A", "afterFloating", "--no-out-link", store=by, environment=sandbox)
    wanted = [*built.outputs.values(), *top.outputs.values()]
    expected = infos(nix, by)
    assert set(wanted) <= expected.keys()
    for store in (child.root, root):
        assert exportHashes(nix, store, wanted) == exportHashes(nix, by, wanted)
        assertVerified(nix, store)
    assertNoDerivations(nix, child.root)


def exportHashes(nix, root, paths):
    """What of content-addressed outputs is the same wherever they were built: their derivers are not."""
    known = infos(nix, root)
    return {path: [known[path].get(key) for key in ("narHash", "narSize", "references", "ca")] for path in paths}


# --- what is not ----------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_failing(nix, remote, workers, source):
    """A build that fails, and one whose dependency does, are results; the log has come; the session goes on."""
    heard = []
    client = await remote.connect(heard.append)
    async with here(workers, source.root) as session:
        failed = await buildRemotely(client, source.drvs["failing"], session)
        assert (failed.result.status, failed.outputs, failed.fetched) == (BuildStatus.PERMANENT_FAILURE, {}, None)
        assert "exit code 3" in withoutEscapes(failed.result.errorMsg)
        with pytest.raises(BuildError, match=f"build of '{source.drvs['failing']}' failed: ") as raised:
            failed.raiseForStatus()
        assert raised.value.status == BuildStatus.PERMANENT_FAILURE
        after = await buildRemotely(client, source.drvs["afterFailing"], session)
        assert (after.result.status, after.outputs) == (BuildStatus.DEPENDENCY_FAILED, {})
        assert f"dependency '{source.drvs['failing']}' failed" in withoutEscapes(after.result.errorMsg)
        assert (await buildRemotely(client, source.drvs["fixed"], session)).result.success
    await client.close()
    assert b"it fails\n" in b"".join(heard)
    assertVerified(nix, remote.root)


@pytest_twisted.ensureDeferred
async def test_timeout(child, workers, source):
    """Limits are the remote's to keep."""
    client = await child.connect()
    async with here(workers, source.root) as session:
        built = await buildRemotely(client, source.drvs["slow"], session, options=BuildOptions(buildTimeout=1))
        assert built.result.status == BuildStatus.TIMED_OUT
        built = await buildRemotely(client, source.drvs["slow"], session, options=BuildOptions(maxSilentTime=1))
        assert built.result.status == BuildStatus.TIMED_OUT and "silence" in built.result.errorMsg
    await client.close()


@pytest_twisted.ensureDeferred
async def test_missing(nix, child, workers, source):
    """An input, or a derivation, that nobody has: the error names it, who needs it and both sides."""
    client = await child.connect()
    async with here(workers, source.root) as session:
        drv = basic(source.read["fixed"], [MISSING])
        needs = f"'{MISSING}', an input of '{source.drvs['fixed']}', is valid neither here nor in the remote store"
        with pytest.raises(StoreError, match=needs):
            await buildRemotely(client, drv, session, drvPath=source.drvs["fixed"])
        unknown = STORE_DIR.parse(named("unknown.drv"))
        with pytest.raises(StoreError, match=f"derivation '{unknown}' is not in the store here"):
            await buildRemotely(client, unknown, session)
        # Nothing of that has hurt the session.
        assert (await buildRemotely(client, source.drvs["fixed"], session)).result.success
    await client.close()


@pytest_twisted.ensureDeferred
async def test_gone(child, workers, source):
    """A remote that goes away while it builds, or before, is an error that names both."""
    client = await child.connect(lambda data: client.cut() if b"begun" in data else None)
    async with here(workers, source.root) as session:
        for text in (f"building '{source.drvs['slow']}'", ""):
            with pytest.raises(RemoteError, match=f"^{child.name}: {text}"):
                await buildRemotely(client, source.drvs["slow"], session)
    await client.ended

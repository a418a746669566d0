"""
Nix as the client and us as the builder: what comes out is, bit for bit, what real Nix makes of it alone.
"""

import contextlib
import json
import re
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.interop.building import DERIVATIONS, FEATURE, TREE, builders, requireSandbox, stdioURL, withoutEscapes
from tests.interop.endpoint import Endpoint
from tests.interop.stores import assertSame, assertVerified, exportDigest, infos, physical, temporaryRoots
from tests.interop.watching import until

#: Names of L{TREE} that show most of what can go wrong; where all of it would take too long.
SOME = ["structured", "view", "files", "graph", "environment", "recursiveSha512"]


@pytest.fixture(scope="module")
def sandbox():
    """Environment for real Nix."""
    return requireSandbox()


@pytest.fixture(scope="module")
def alone(scratch, nix, sandbox):
    """A store in which real Nix has built everything, and what it knows about it."""
    root = scratch / "alone"
    top = nix.run("nix-build", TREE, "-A", "all", "--no-out-link", store=root, environment=sandbox, timeout=120)
    drv = nix.lines("nix-store", "--query", "--deriver", top.stdout.decode().strip(), store=root)[0]
    needed = nix.lines("nix-store", "--query", "--requisites", "--include-outputs", drv, store=root)
    known = infos(nix, root)
    return SimpleNamespace(
        root=root,
        outputs=[path for path in needed if known[path].get("deriver")],
        drvs=[path for path in needed if path.endswith(".drv")],
        infos=known,
        rows=rows(root),
    )


@pytest.fixture(scope="module")
def server(scratch, nix, keys, sandbox):
    """A service that builds."""
    place = scratch / "builder"
    place.mkdir()
    running = Endpoint(place / "endpoint", nix, keys, place / "root", options=["--system-features", FEATURE])
    yield running
    running.stop()


def rows(root):
    """All that the database has about objects, but for its own numbers and when they came."""
    with contextlib.closing(sqlite3.connect(f"file:{root}/nix/var/nix/db/db.sqlite?mode=ro", uri=True)) as database:
        return {
            path: row
            for path, *row in database.execute(
                "select path, hash, narSize, deriver, ultimate, coalesce(sigs, ''), ca, (select json_group_array(name)"
                " from (select target.path as name from Refs join ValidPaths target on target.id = reference"
                "  where referrer = ValidPaths.id order by name)) from ValidPaths"
            )
        }


def realLog(nix, root, drv):
    """The log of a derivation as real Nix finds it."""
    return nix.run("nix-store", "--read-log", drv, store=root).stdout


def test_sameAsAlone(nix, server, sandbox, alone, directory):
    """
    A tree of more than fifty derivations comes out as when real Nix builds it alone: contents, hashes, references,
    derivers, content addresses, and the logs.
    """
    client = directory / "client"
    begun = time.monotonic()
    nix.run(
        *("nix-build", *builders(server.url), TREE, "-A", "all", "--no-out-link"),
        store=client,
        environment=sandbox | server.environment(),
        timeout=120,
    )
    print(f"{len(alone.drvs)} derivations in {time.monotonic() - begun:.1f} s")
    assert len(alone.drvs) > 50
    served = rows(server.root)
    assert {path: served.get(path) for path in alone.outputs} == {path: alone.rows[path] for path in alone.outputs}
    known = infos(nix, server.root)
    assert {path: known.get(path) for path in alone.outputs} == {path: alone.infos[path] for path in alone.outputs}
    assert exportDigest(nix, server.root, alone.outputs) == exportDigest(nix, alone.root, alone.outputs)
    assertSame(nix, alone.root, client, alone.outputs)
    assertVerified(nix, server.root)
    for drv in alone.drvs:
        # How often a download tells of its progress is not the same twice.
        if not drv.endswith("-fetched.drv"):
            assert realLog(nix, server.root, drv) == realLog(nix, alone.root, drv), drv
    output = alone.outputs[0]
    assert (
        nix.run("nix", "log", "--store", server.root, output).stdout
        == nix.run("nix", "log", "--store", alone.root, output).stdout
    )
    until(lambda: temporaryRoots(server.root) == [], message="temporary roots are not gone")
    assertNothingLeft(server.root)


def assertNothingLeft(root):
    """No locks, no sandboxes, no build directories."""
    store = physical(root, "/nix/store")
    assert [name.name for name in store.iterdir() if name.name.endswith((".lock", "-nixserve-build"))] == []
    assert list(Path(f"{root}/nix/var/nix/builds").iterdir()) == []


def test_withoutSSH(nix, sandbox, alone, directory):
    """C{nixserve-store} as the C{remote-program} builds the same."""
    root, client = directory / "served", directory / "client"
    chosen = [word for name in SOME for word in ("-A", name)]
    arguments = [*builders(stdioURL("ours", root)), TREE, *chosen, "--no-out-link"]
    nix.run("nix-build", *arguments, store=client, environment=sandbox)
    outputs = [path for path in rows(root) if path in alone.outputs]
    assert len(outputs) > len(SOME)
    assert {path: row for path, row in rows(root).items() if path in outputs} == {
        path: alone.rows[path] for path in outputs
    }
    assertSame(nix, alone.root, client, outputs)
    assertNothingLeft(root)


#: The names in L{TREE} of what fails, and of one that does not.
FAILING = ["failing", "afterFailing", "slow", "mismatch", "multi"]


class Attempt:
    """
    An attempt to build parts of L{TREE}.

    @ivar client: the store of the client.
    @ivar status: how Nix exited.
    @ivar said: what it had to say.
    @ivar causes: of that, what says that something is wrong, without where it was built.
    """

    def __init__(self, nix, client, names, *options, environment):
        self.client = client
        chosen = [word for name in names for word in ("-A", name)]
        done = nix.run(
            *("nix-build", TREE, *chosen, "--no-out-link", *options),
            store=client,
            environment=environment,
            check=False,
        )
        self.status, self.said = done.returncode, withoutEscapes(done.stderr.decode())
        self.causes = sorted(
            re.sub(r"(build of '\S*') on '\S*'", r"\1 elsewhere", line)
            for line in self.said.splitlines()
            if line.startswith(("error: ", "         specified", "            got"))
        )


def test_keepGoing(nix, server, sandbox, directory):
    """
    What fails, fails alike, whether real Nix is the builder or we are: the same messages and exit status. With
    C{--keep-going} the rest is built all the same, and C{--keep-failed} keeps directories on the builder.
    """
    options = ["--keep-going", "--keep-failed", "--timeout", "2"]
    url = stdioURL("real", directory / "served")
    real = Attempt(nix, directory / "real", FAILING, *options, *builders(url), environment=sandbox)
    environment = sandbox | server.environment()
    ours = Attempt(nix, directory / "ours", FAILING, *options, *builders(server.url), environment=environment)
    print(real.said, ours.said, sep="\n=====\n")
    assert (ours.status, ours.causes) == (real.status, real.causes)
    known = infos(nix, ours.client)
    assert known == infos(nix, real.client)
    assert any(path.endswith("-multi-dev") for path in known)
    assert "something is wrong" in ours.said and "going to sleep" in ours.said
    kept = re.findall(r"note: keeping build directory '([^']*)'", ours.said)
    assert len(kept) == real.said.count("note: keeping build directory") == 3
    assert any((Path(path) / "half-done").exists() for path in kept)
    assertVerified(nix, server.root)


def test_stopsAtFirst(nix, server, sandbox, directory):
    """Without C{--keep-going} the first failure ends everything, on the builder too."""
    environment = sandbox | server.environment()
    done = Attempt(nix, directory, ["failing", "slow"], *builders(server.url), environment=environment)
    assert done.status == 1
    assert re.search(r"builder for '.*-failing.drv' failed with exit code 3", done.said)
    until(lambda: temporaryRoots(server.root) == [], message="the other build goes on")


def test_contentAddressed(nix, sandbox, directory):
    """Outputs whose paths follow from their contents come out where real Nix puts them, and are known to the client."""
    features = "experimental-features = nix-command ca-derivations\nsystem-features = foo ca-derivations\n"
    environment = {"NIX_CONFIG": sandbox["NIX_CONFIG"] + features}
    clients = {}
    for name, url in {
        "alone": None,
        "real": stdioURL("real", directory / "served-real"),
        "ours": stdioURL("ours", directory / "served-ours") + "%20ca-derivations",
    }.items():
        clients[name] = directory / name
        elsewhere = [] if url is None else builders(url, features=f"{FEATURE},ca-derivations")
        arguments = [*elsewhere, DERIVATIONS / "floating.nix", "--no-out-link"]
        nix.run("nix-build", *arguments, store=clients[name], environment=environment)
    known = {name: (infos(nix, root), realisations(root)) for name, root in clients.items()}
    assert len(known["alone"][1]) >= 3
    assert known["ours"] == known["real"]
    assert known["ours"][0] == known["alone"][0]
    assertVerified(nix, clients["ours"])
    assertVerified(nix, directory / "served-ours")
    assert infos(nix, directory / "served-ours") == infos(nix, directory / "served-real")


def realisations(root):
    """What a database has about outputs whose paths were not known before."""
    with contextlib.closing(sqlite3.connect(f"file:{root}/nix/var/nix/db/db.sqlite?mode=ro", uri=True)) as database:
        return sorted(
            database.execute(
                "select drvPath, outputName, path from Realisations join ValidPaths on ValidPaths.id = outputPath"
            )
        )


def test_collector(nix, server, sandbox, directory):
    """While real Nix's collector runs over and over on the builder's store, nothing that a build needs is lost."""
    client = directory / "client"
    stop = threading.Event()
    collections = []

    def collect():
        while not stop.wait(0.1):
            collections.append(nix.run("nix-store", "--gc", store=server.root, check=False))

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        done = nix.run(
            *("nix-build", *builders(server.url), TREE, "--argstr", "salt", "gc", "-A", "all"),
            *("--no-out-link", "-Q"),
            store=client,
            environment=sandbox | server.environment(),
            timeout=120,
        )
    finally:
        stop.set()
        thread.join()
    (top,) = done.stdout.decode().split()
    assert len(collections) > 10 and all(each.returncode == 0 for each in collections)
    deleted = sum(each.stderr.count(b"deleting '/nix/store/") for each in collections)
    print(f"{len(collections)} collections deleted {deleted} objects")
    assert deleted > 50
    assert physical(client, top).exists()
    assertVerified(nix, client)
    assertVerified(nix, server.root)
    known = json.loads(nix.run("nix", "path-info", "--json", top, "--store", client).stdout)
    assert len(known[0]["references"]) > 25

"""
The same derivations built by real Nix and by ours, each in a store of its own: what comes of it is the same to the
last byte, and what goes wrong is said in the same words.
"""

import contextlib
import json
import os
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nixserve.builder.local import LocalBuilder
from nixserve.builder.plan import BuildPlan
from nixserve.builder.process import CancelToken
from nixserve.builder.sandbox import findShell, sandboxProblem
from nixserve.builder.settings import BuildSettings
from nixserve.codec.buildresult import BuildResult
from nixserve.codec.derivation import BasicDerivation
from nixserve.codec.messages import BuildDerivation, BuildOptions
from nixserve.codec.storepath import StoreDir
from nixserve.store.api import Busy
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from tests.interop.conversations import hello, string, strings, u64
from tests.interop.nix import unavailable
from tests.interop.stores import assertVerified, infos

RECIPES = Path(__file__).with_name("recipes.nix")

GOOD = [
    *("leaf", "multi", "tree", "link", "environment", "machine", "sources", "asFile", "graph", "structured"),
    *("structuredGraph", "fixedFlat", "fixedRecursive", "fixedSha1", "floatingSelf", "floatingPlain", "floatingMulti"),
    *("floatingFlat", "carriageReturns"),
]

BAD = [
    *("exitCode", "missing", "writable", "groupWritable", "cycle", "longCycle", "references", "requisites"),
    *("disallowed", "disallowedOutput", "illegal", "tooLarge", "wrongFlat", "wrongRecursive", "flatDirectory"),
    *("flatExecutable", "fixedFailing", "fixedEnvironment", "platform", "features", "silence", "timeout", "logLimit"),
]

OPTIONS = {
    "silence": BuildOptions(maxSilentTime=1),
    "timeout": BuildOptions(buildTimeout=1),
    "logLimit": BuildOptions(maxLogSize=1000),
}

#: As Nix 2.8 has them with the experimental feature on and without a usable /dev/kvm.
FEATURES = {"benchmark", "big-parallel", "ca-derivations", "nixos-test"}

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


#: Where Nix 2.8 names the place of an output in its sandbox, ours has the logical path.
_PLACE = re.compile(r"'[^' ]+(?:\.chroot|-nixserve-build/root)(/nix/store/)")


def stripped(message):
    """Without colours, places, and the prefix of errors that Nix caught on their way."""
    return _PLACE.sub(r"'\1", _ANSI.sub("", message).removeprefix("error: "))


class Theirs:
    """Real Nix's server, on a store, for one request at a time."""

    def __init__(self, nix, root, shell):
        self.nix = nix
        self.root = root
        lines = [
            "substituters =",
            "extra-experimental-features = nix-command ca-derivations",
            "sandbox = true",
            "sandbox-fallback = false",
            "build-users-group =",
            f"sandbox-paths = /bin/sh={shell}",
            f"system-features = {' '.join(sorted(FEATURES))}",
            "extra-platforms = i686-linux",
            "",
        ]
        self.environment = {"NIX_CONFIG": "\n".join(lines)}

    def run(self, *arguments, **options):
        return self.nix.run(*arguments, store=self.root, environment=self.environment, **options)

    @contextlib.contextmanager
    def ask(self, request):
        """Send a request; read the reply from what this gives, then the log from C{self.log}."""
        command = ["nix-store", "--serve", "--write"]
        options = {"store": self.root, "environment": self.environment}
        server = self.nix.start(*command, **options, stdin=-1, stdout=-1, stderr=subprocess.PIPE)
        server.stdin.write(hello(0x207) + request)
        server.stdin.flush()
        reply = Reply(server.stdout)
        reply.take(16)
        yield reply
        self.log = server.communicate(timeout=60)[1]
        assert server.returncode == 0, self.log

    def build(self, drvPath, drv, options):
        """BuildDerivation: status, message, outputs."""
        request = u64(8) + string(drvPath) + writeBasic(drv) + writeOptions(options)
        with self.ask(request) as reply:
            status, message = reply.u64(), reply.string()
            reply.take(32)
            built = {reply.string(): json.loads(reply.string()) for _ in range(reply.u64())}
        outputs = {key.partition("!")[2]: (key.partition("!")[0], value["outPath"]) for key, value in built.items()}
        return status, stripped(message), outputs

    def buildPaths(self, targets):
        """BuildPaths: status and message."""
        with self.ask(u64(6) + strings(targets) + bytes(48)) as reply:
            status = reply.u64()
            return status, stripped(reply.string()) if status else ""


class Reply:
    """Reads fields from a pipe."""

    def __init__(self, stream):
        self.stream = stream

    def take(self, size):
        data = self.stream.read(size)
        assert len(data) == size, "the server ended early"
        return data

    def u64(self):
        return int.from_bytes(self.take(8), "little")

    def string(self):
        size = self.u64()
        return self.take(size + -size % 8)[:size].decode()


def writeBasic(drv):
    """A derivation without its inputs' recipes."""
    outputs = b"".join(
        string(name) + string(output.path or "") + string(output.hashAlgo) + string(output.hash)
        for name, output in sorted(drv.outputs.items())
    )
    env = b"".join(string(name) + string(value) for name, value in sorted(drv.env.items()))
    recipe = strings(sorted(drv.inputSrcs)) + string(drv.platform) + string(drv.builder) + strings(drv.args)
    return u64(len(drv.outputs)) + outputs + recipe + u64(len(drv.env)) + env


def writeOptions(options):
    return b"".join(
        map(u64, (options.maxSilentTime, options.buildTimeout, options.maxLogSize, 0, 0, options.keepFailed))
    )


class Ours:
    """Our builder, on a store."""

    def __init__(self, store):
        self.store = store
        self.session = store.openSession()
        self.builder = LocalBuilder(store, BuildSettings(systemFeatures=frozenset(FEATURES), caBundle=""))
        self.log = b""

    def hear(self, lines):
        self.log += lines

    def run(self, drvPath, drv, options):
        session = self.store.openSession()
        try:
            prepared = self.builder.prepare(session, BuildDerivation(drvPath, drv, options))
            if isinstance(prepared, BuildResult):
                return prepared
            return prepared.run(self.hear, CancelToken())
        finally:
            session.close()

    def build(self, drvPath, drv, options):
        """As L{Theirs.build}."""
        self.log = b""
        result = self.run(drvPath, drv, options)
        outputs = {name: (made.drvHash, made.outPath.baseName) for name, made in result.builtOutputs.items()}
        return int(result.status), result.errorMsg, outputs

    def buildPaths(self, targets):
        """As L{Theirs.buildPaths}."""
        self.log = b""
        plan = BuildPlan(self.session, targets)
        while not plan.over:
            for build in plan.next(limit=1):
                plan.finished(build.drvPath, self.run(build.drvPath, build.drv, BuildOptions()))
        result = plan.result()
        return result.status, stripped(result.errorMsg)


class Pair:
    """
    Two stores with the same derivations.

    @ivar paths: those of the derivations, by attribute.
    """

    def __init__(self, nix, directory, attributes, shell):
        self.nix = nix
        self.roots = directory / "theirs", directory / "ours"
        self.theirs = Theirs(nix, self.roots[0], shell)
        options = [word for attribute in attributes for word in ("-A", attribute)]
        for root in self.roots:
            made = Theirs(nix, root, shell).run("nix-instantiate", RECIPES, *options)
        self.paths = dict(zip(attributes, map(StoreDir().parse, made.stdout.decode().split()), strict=True))

    @contextlib.contextmanager
    def ours(self):
        store = LocalStore(StoreLayout.underRoot(str(self.roots[1])))
        try:
            yield Ours(store)
        finally:
            store.close()

    def assertSame(self):
        """Both stores hold the same objects and say the same about them."""
        theirs, ours = (infos(self.nix, root) for root in self.roots)
        assert ours == theirs
        assertVerified(self.nix, self.roots[1])


@pytest.fixture(scope="module")
def shell():
    """A shell that needs no other file, for both."""
    if problem := sandboxProblem():
        unavailable(f"no sandbox: {problem}")
    found = findShell()
    return found.source if found else unavailable("there is no static busybox")


@pytest.fixture
def pair(nix, directory, shell):
    """Makes pairs of stores with some of the recipes."""
    if os.geteuid() != 0:
        unavailable("real Nix without build users needs root for its sandbox")
    return lambda *attributes: Pair(nix, directory, attributes, shell)


def basic(drv):
    return BasicDerivation(drv.name, drv.outputs, drv.inputSrcs, drv.platform, drv.builder, drv.args, drv.env)


@pytest.mark.parametrize("attribute", GOOD)
def test_sameOutputs(pair, attribute):
    """Hash, size, references, deriver, content address, realisations, log: and again when it is there already."""
    stores = pair(attribute)
    drvPath = stores.paths[attribute]
    with stores.ours() as ours:
        drv = basic(ours.session.readDerivation(drvPath))
        for _ in range(2):
            expected = stores.theirs.build(drvPath, drv, BuildOptions())
            found = ours.build(drvPath, drv, BuildOptions())
            if attribute.startswith("floating") and expected[0] == 2:
                # Nix remembers realisations, we build again.
                found = (2, *found[1:])
                assert ours.log == b"" or stores.theirs.log == b""
            else:
                assert ours.log == stores.theirs.log
            assert found == expected
            assert expected[0] in (0, 2)
    stores.assertSame()


@pytest.mark.parametrize("attribute", BAD)
def test_sameFailures(pair, attribute):
    """Status and message; and if something became valid all the same, that too."""
    stores = pair(attribute)
    drvPath = stores.paths[attribute]
    options = OPTIONS.get(attribute, BuildOptions())
    with stores.ours() as ours:
        drv = basic(ours.session.readDerivation(drvPath))
        status, message, outputs = stores.theirs.build(drvPath, drv, options)
        if message.startswith("cycle detected"):
            # Later versions reject the output, as ours.
            assert status == 9
            status = 5
        assert ours.build(drvPath, drv, options) == (status, message, outputs)
        assert status not in (0, 2)
    stores.assertSame()


def test_partlyValid(pair):
    """One of two outputs is gone: both make it again, to the same result."""
    stores = pair("multi")
    drvPath = stores.paths["multi"]
    with stores.ours() as ours:
        drv = basic(ours.session.readDerivation(drvPath))
        for builder in (stores.theirs, ours):
            assert builder.build(drvPath, drv, BuildOptions())[0] == 0
    for root in stores.roots:
        stores.nix.run("nix-store", "--delete", drv.outputs["out"].path, store=root)
    with stores.ours() as ours:
        expected = stores.theirs.build(drvPath, drv, BuildOptions())
        status, message, outputs = ours.build(drvPath, drv, BuildOptions())
        # Nix 2.8 forgets those that were there before.
        assert outputs.keys() == {"out", "two"}
        assert (status, message, {"out": outputs["out"]}) == expected
    stores.assertSame()


@pytest.mark.parametrize(
    "attributes",
    [
        ["top"],
        ["usesFloating"],
        ["usesFloatingToo", "usesFloating"],
        ["fixedFromFloating"],
        ["exitCode"],
        ["onFailing"],
        ["onMismatch"],
        ["wrongFlat", "leaf"],
        ["leaf", "missing"],
        ["fixedFailing"],
        ["platform"],
    ],
    ids="+".join,
)
def test_samePlans(pair, attributes):
    """What BuildPaths makes of derivations with inputs: objects, exit status, message."""
    stores = pair(*attributes)
    targets = [stores.paths[attribute] for attribute in attributes]
    expected = stores.theirs.buildPaths(targets)
    with stores.ours() as ours:
        assert ours.buildPaths(targets) == expected
    if expected[0] == 0:
        stores.assertSame()


@pytest.mark.parametrize("suffix", ["", "!out", "!dev", "!out,dev", "!nope", "!*", "!nope,out", "!"])
def test_sameWantedOutputs(pair, suffix):
    """Names of outputs behind a derivation's path."""
    stores = pair("base")
    target = stores.paths["base"] + suffix
    expected = stores.theirs.buildPaths([target])
    with stores.ours() as ours:
        assert ours.buildPaths([target]) == expected
    stores.assertSame()


def test_sameMissingPaths(pair):
    """Paths and derivations that are not there."""
    stores = pair("leaf")
    missing = "/nix/store/00000000000000000000000000000000-missing"
    with stores.ours() as ours:
        for target in (missing, missing + ".drv"):
            assert ours.buildPaths([target]) == stores.theirs.buildPaths([target])


# Both in one store.


def untilNotBusy(builder, session, drvPath, drv):
    """Prepare a build, as often as it takes; also how often it was busy."""
    busy = 0
    while True:
        try:
            return builder.prepare(session, BuildDerivation(drvPath, drv)), busy
        except Busy as error:
            busy += 1
            time.sleep(error.retryAfter)


def test_weWaitForThem(pair):
    """As long as real Nix builds something, ours waits; then it is there."""
    stores = pair("slow")
    drvPath = stores.paths["slow"]
    options = {"store": stores.roots[1], "environment": stores.theirs.environment}
    building = stores.nix.start("nix-store", "--realise", drvPath, **options, stdout=-1, stderr=subprocess.PIPE)
    for line in building.stderr:
        if line == b"started\n":
            break
    with stores.ours() as ours:
        drv = basic(ours.session.readDerivation(drvPath))
        result, busy = untilNotBusy(ours.builder, ours.session, drvPath, drv)
        assert busy > 10
        assert result.status == 2
    building.communicate(timeout=60)
    assert building.returncode == 0


def test_theyWaitForUs(pair):
    """As long as ours builds something, real Nix waits; then it is there."""
    stores = pair("slow")
    drvPath = stores.paths["slow"]
    with stores.ours() as ours:
        drv = basic(ours.session.readDerivation(drvPath))
        prepared, _ = untilNotBusy(ours.builder, ours.session, drvPath, drv)
        environment = {"NIX_CONFIG": stores.theirs.environment["NIX_CONFIG"] + "build-poll-interval = 1\n"}
        options = {"store": stores.roots[1], "environment": environment}
        building = stores.nix.start("nix-store", "--realise", drvPath, **options, stdout=-1, stderr=subprocess.PIPE)
        assert any(b"waiting for lock on" in line for line in building.stderr)
        assert prepared.run(ours.hear, CancelToken()).status == 0
    _, log = building.communicate(timeout=60)
    assert building.returncode == 0
    assert b"started" not in log
    assertVerified(stores.nix, stores.roots[1])


def test_collectorMeanwhile(pair):
    """While real Nix collects garbage again and again, nothing that a build needs or makes is lost."""
    stores = pair("sources", "floatingMulti", "multi")
    stop = threading.Event()

    def collect():
        while not stop.is_set():
            stores.nix.run("nix-store", "--gc", store=stores.roots[1])

    with stores.ours() as ours:
        drvs = {path: basic(ours.session.readDerivation(path)) for path in stores.paths.values()}
        ours.session.addTempRoots([*drvs, *ours.session.queryClosure(list(drvs))])
        collector = threading.Thread(target=collect)
        collector.start()
        try:
            for _ in range(3):
                for drvPath, drv in drvs.items():
                    session = ours.store.openSession()
                    prepared, _ = untilNotBusy(ours.builder, session, drvPath, drv)
                    result = prepared
                    if not isinstance(prepared, BuildResult):
                        result = prepared.run(ours.hear, CancelToken())
                    assert result.success, result
                    paths = {made.outPath for made in result.builtOutputs.values()}
                    assert session.queryValidPaths(paths) == paths
                    assert all(os.path.lexists(f"{stores.roots[1]}{path}") for path in paths)
                    session.close()
        finally:
            stop.set()
            collector.join()
    assertVerified(stores.nix, stores.roots[1])

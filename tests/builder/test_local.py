"""Builds on this machine, each with a real builder: in a sandbox on a store of its own, some without."""

import bz2
import dataclasses
import fcntl
import json
import os
import resource
import shutil
import stat
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nixserve.builder import execution, openfiles
from nixserve.builder.local import LocalBuilder, removeAbandoned
from nixserve.builder.process import CancelToken
from nixserve.builder.sandbox import SandboxPath, findShell, sandboxProblem
from nixserve.builder.settings import BuildSettings, SandboxMode
from nixserve.codec.buildresult import UNKNOWN_DRV_HASH, BuildResult, BuildStatus, saysHashMismatch
from nixserve.codec.derivation import (
    BasicDerivation,
    DerivationOutput,
    drvPathOf,
    unparse,
    verifyBasicDerivation,
)
from nixserve.codec.hashes import hashBytes
from nixserve.codec.messages import BuildDerivation, BuildOptions
from nixserve.codec.storepath import StorePath
from nixserve.store.api import Busy
from nixserve.store.files import hashPath
from nixserve.store.logs import buildLogPath
from nixserve.store.pathlocks import PathLocks
from nixserve.testing import addObject, makeInfo, makeNar
from tests.builder.stores import add, info

FLOATING = DerivationOutput(None, "r:sha256", "")
SYSTEM = BuildSettings().system


@pytest.fixture(autouse=True)
def shell():
    """Every recipe here is one for a shell that needs no other file."""
    found = findShell()
    if found is None:
        pytest.skip("there is no static busybox")
    return found


@pytest.fixture
def sandbox():
    """Tests that ask for this need one."""
    if problem := sandboxProblem():
        pytest.skip(f"no sandbox here: {problem}")


def derivation(store, script, name="x", outputs=("out",), output=None, srcs=(), env=None, **fields):
    """
    A leaf: a shell script and the outputs that follow.

    @param output: all outputs, if they are not input-addressed.
    """
    env = {"name": name, **(env or {})}
    if output is None:
        env |= dict.fromkeys(outputs, "")
    defaults = {
        "name": name,
        "outputs": dict.fromkeys(outputs, output or FLOATING),
        "inputSrcs": frozenset(srcs),
        "platform": SYSTEM,
        # The commands of a busybox are there without any PATH.
        "builder": findShell().source if store.storeDir.path != "/nix/store" else "/bin/sh",
        "args": ("sh", "-c", script) if store.storeDir.path != "/nix/store" else ("-c", script),
        "env": env,
    }
    drv = BasicDerivation(**(defaults | fields))
    if output is None:
        masked = hashBytes("sha256", unparse(drv, maskOutputs=True))
        paths = {o: store.storeDir.makeOutputPath(o, masked, name) for o in outputs}
    else:
        paths = {o: output.path or placeholder(o) for o in outputs}
    return dataclasses.replace(
        drv,
        env={**env, **paths},
        outputs=drv.outputs if output else {o: DerivationOutput(path) for o, path in paths.items()},
    )


def placeholder(name):
    """What stands for an output whose path is not known."""
    return "/" + hashBytes("sha256", f"nix-output:{name}".encode()).nix32


def fixed(store, contents, name="x", hashAlgo="sha256"):
    """A fixed output that is a file."""
    digest = hashBytes("sha256", contents)
    some = store.storeDir.makeStorePath("test", digest, name)
    output = DerivationOutput(some, hashAlgo, digest.hex)
    return DerivationOutput(store.storeDir.makeContentAddressedPath(output.contentAddress, name), hashAlgo, digest.hex)


class Building:
    """
    Builds in one store.

    @ivar log: what the builders have said.
    """

    def __init__(self, store, **settings):
        self.store = store
        settings.setdefault("cores", 2)
        self.builder = LocalBuilder(store, BuildSettings(**settings))
        self.log = b""

    def prepare(self, drv, mustSandbox=False, drvPath=None, session=None, **options):
        self.session = session or self.store.openSession()
        drvPath = drvPath or drvPathOf(drv, self.store.storeDir)
        return self.builder.prepare(self.session, BuildDerivation(drvPath, drv, BuildOptions(**options)), mustSandbox)

    def build(self, drv, cancel=None, **arguments):
        """Build; the result."""
        self.log = b""
        prepared = self.prepare(drv, **arguments)
        if isinstance(prepared, BuildResult):
            return prepared
        try:
            return prepared.run(self.hear, cancel or CancelToken())
        finally:
            self.session.close()

    def hear(self, lines):
        self.log += lines

    def script(self, script, **fields):
        """Build a derivation; the result."""
        self.drv = derivation(self.store, script, **fields)
        self.drvPath = drvPathOf(self.drv, self.store.storeDir)
        return self.build(self.drv)

    def read(self, path):
        """The contents of an object that is a file."""
        with open(self.store.layout.realPath(path), "rb") as stream:
            return stream.read()


@pytest.fixture
def confined(diverted, sandbox):
    """Builds in sandboxes."""
    return Building(diverted)


@pytest.fixture
def free(plain):
    """Builds without sandboxes, in a store whose paths are real."""
    return Building(plain, sandbox=SandboxMode.OFF)


@pytest.fixture(params=["confined", "free"])
def building(request):
    """Builds either way."""
    return request.getfixturevalue(request.param)


def leftovers(store):
    """What lies in the store directory without being valid, locks included."""
    valid = {path.baseName for path in store.validPaths.queryAllValidPaths()}
    return sorted(set(os.listdir(store.layout.realStoreDir)) - valid - {".links"})


def test_builds(building):
    """The result has times and outputs, the store the object, and nothing else is left anywhere."""
    before = int(time.time())
    result = building.script("echo hi > $out; echo said")
    assert result.status == BuildStatus.BUILT and result.errorMsg == ""
    assert result.timesBuilt == 1 and before <= result.startTime <= result.stopTime <= before + 20
    out = building.drv.outputs["out"].path
    masked = hashBytes("sha256", unparse(building.drv, maskOutputs=True))
    assert {name: (made.outPath, made.drvHash) for name, made in result.builtOutputs.items()} == {
        "out": (out, masked.hexText)
    }
    assert building.read(out) == b"hi\n" and building.log == b"said\n"
    registered = info(building.store, out)
    assert registered.deriver == building.drvPath and registered.ultimate
    assert (registered.narHash, registered.narSize) == hashPath(building.store.layout.realPath(out))
    status = os.lstat(building.store.layout.realPath(out))
    assert (status.st_uid, stat.S_IMODE(status.st_mode), status.st_mtime) == (os.geteuid(), 0o444, 1)
    assert leftovers(building.store) == []
    assert os.listdir(f"{building.store.layout.stateDir}/builds") == []
    assert os.listdir(building.store.layout.tempRootsDir) == []


def test_manyOutputs(building):
    """Each output is a lock, an open file: a derivation with more than any has is refused before there is one."""
    drv = derivation(building.store, "true", outputs=["out", *(f"o{number}" for number in range(64))])
    before = len(os.listdir("/proc/self/fd"))
    result = building.prepare(drv)
    try:
        assert len(os.listdir("/proc/self/fd")) < before + 32
        assert result.status == BuildStatus.MISC_FAILURE and "more than 64 outputs" in result.errorMsg
    finally:
        building.session.close()
    assert leftovers(building.store) == []


def deepTree(directory):
    """A tree that real Nix cannot delete, since its paths are too long."""
    before = os.getcwd()
    os.makedirs(directory)
    try:
        os.chdir(directory)
        for _ in range(30):
            os.mkdir(200 * "d")
            os.chdir(200 * "d")
    finally:
        os.chdir(before)


def test_abandoned(diverted):
    """
    What a build worked in whose process was killed is removed when the next one begins to serve; not what a running one
    works in, nor an object that is called so.
    """
    store, real = diverted.storeDir.path, diverted.layout.realStoreDir
    valid = add(diverted, "nixserve-build")
    left, used = (32 * digit + "-nixserve-build" for digit in "ab")
    for name in (left, used):
        deepTree(f"{real}/{name}/root")
    session = diverted.openSession()
    locks = session.lockScratch([StorePath(f"{store}/{used}")])
    removeAbandoned(diverted)
    assert leftovers(diverted) == [used, f"{used}.lock"]
    assert os.path.exists(diverted.layout.realPath(valid))
    locks.unlock()
    session.close()
    removeAbandoned(diverted)
    assert leftovers(diverted) == []
    assert os.listdir(diverted.layout.tempRootsDir) == []


def test_deepLeftover(building):
    """A build that fails leaves nothing in the store directory that real Nix's collector would fail at."""
    name = 200 * "d"
    result = building.script(f"mkdir $out; cd $out; for i in 1 2 3 4 5 6; do mkdir {name}; cd {name}; done; exit 1")
    assert result.status == BuildStatus.PERMANENT_FAILURE
    assert leftovers(building.store) == [f"{building.drv.outputs['out'].path.baseName}.lock"]


def test_longTimes(building):
    """Limits of time that nobody lives to see are like none."""
    building.log = b""
    drv = derivation(building.store, "echo hi > $out")
    assert building.build(drv, buildTimeout=2**32 - 1, maxSilentTime=2**32 - 1).status == BuildStatus.BUILT


def test_alreadyValid(building):
    """What is there is not built again, and the result has no times; the outputs are named all the same."""
    first = building.script("echo hi > $out")
    second = building.build(building.drv)
    assert second == BuildResult(BuildStatus.ALREADY_VALID, builtOutputs=first.builtOutputs)
    assert leftovers(building.store) == []


def test_severalOutputs(building):
    """Outputs may refer to each other; all become valid at once."""
    result = building.script("echo $out $two > $out; echo $two > $two", outputs=("out", "two"))
    assert result.status == BuildStatus.BUILT
    out, two = (building.drv.outputs[name].path for name in ("out", "two"))
    assert info(building.store, out).references == {out, two}
    assert info(building.store, two).references == {two}


def test_inputs(building):
    """The closure of the sources can be read and referred to."""
    deep = add(building.store, "deep", b"deep")
    source = add(building.store, "source", {"link": deep}, [deep])
    result = building.script(f"read x < {source}/link; echo $x {deep} > $out", srcs=[source])
    assert result.status == BuildStatus.BUILT, result
    out = building.drv.outputs["out"].path
    assert building.read(out) == f"deep {deep}\n".encode()
    assert info(building.store, out).references == {deep}


def test_partlyValid(building):
    """A missing output is made again, beside those that are valid: they stay what they are."""
    building.script("echo two at $two > $out; echo $two > $two", outputs=("out", "two"))
    out, two = (building.drv.outputs[name].path for name in ("out", "two"))
    before = info(building.store, out).narHash
    inode = os.lstat(building.store.layout.realPath(two)).st_ino
    building.store.validPaths.invalidatePath(out)
    result = building.build(building.drv)
    assert result.status == BuildStatus.BUILT
    assert info(building.store, out).narHash == before
    assert info(building.store, out).references == {two}
    assert os.lstat(building.store.layout.realPath(two)).st_ino == inode
    assert {name: made.outPath for name, made in result.builtOutputs.items()} == {"out": out, "two": two}
    assert leftovers(building.store) == []


def test_leftoversGiveWay(building):
    """What lies at the place of an output without being valid is deleted before the build."""
    drv = derivation(building.store, "test ! -e $out && mkdir $out && echo > $out/new")
    real = building.store.layout.realPath(drv.outputs["out"].path)
    os.makedirs(f"{real}/old/deep")
    os.chmod(f"{real}/old", 0o555)
    assert building.build(drv).status == BuildStatus.BUILT
    assert os.listdir(real) == ["new"]


# Who may build what, where.


def test_impossiblePlatform(building):
    """In the words of Nix 2.8."""
    result = building.script("", platform="z80-cpm", env={"requiredSystemFeatures": "magic kvm"})
    features = ", ".join(sorted(building.builder.settings.systemFeatures))
    assert (result.status, result.errorMsg) == (
        BuildStatus.MISC_FAILURE,
        f"a 'z80-cpm' with features {{kvm, magic}} is required to build '{building.drvPath}', "
        f"but I am a '{SYSTEM}' with features {{{features}}}",
    )


def test_features(diverted, sandbox):
    """A store's own features replace those of the machine."""
    building = Building(diverted, systemFeatures=frozenset({"magic"}))
    drv = derivation(diverted, "echo > $out", env={"requiredSystemFeatures": "magic"})
    assert building.build(drv).status == BuildStatus.BUILT
    diverted.layout = dataclasses.replace(diverted.layout, systemFeatures=frozenset())
    drv = derivation(diverted, "echo > $out", env={"requiredSystemFeatures": "magic", "again": ""})
    assert building.build(drv).status == BuildStatus.MISC_FAILURE


def test_extraPlatforms(diverted, sandbox):
    """A machine may run what is made for others."""
    building = Building(diverted, extraPlatforms=frozenset({"z80-cpm"}))
    assert building.script("echo > $out", platform="z80-cpm").status == BuildStatus.BUILT


def test_missingInput(building):
    """A source that is not valid, though it lies there."""
    source = add(building.store, "source")
    building.store.validPaths.invalidatePath(source)
    result = building.script("echo > $out", srcs=[source])
    assert (result.status, result.errorMsg) == (
        BuildStatus.MISC_FAILURE,
        f"dependency '{source}' of '{building.drvPath}' does not exist, and substitution is disabled",
    )


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (DerivationOutput(None), "its outputs are deferred"),
        (DerivationOutput(None, "r:sha256", "impure"), "its outputs are impure"),
    ],
)
def test_unbuildable(building, output, message):
    """Outputs that have no path, before or after."""
    result = building.script("echo > $out", output=output)
    assert result.status == BuildStatus.MISC_FAILURE and result.errorMsg.endswith(message)


def test_noOutputs(building):
    """A derivation without any."""
    result = building.script("", outputs=())
    assert (result.status, result.errorMsg) == (BuildStatus.MISC_FAILURE, "must have at least one output")


@pytest.mark.parametrize("name", ["../../etc/x", "", "a/b", ".."])
def test_namesThatLeadElsewhere(diverted, name):
    """Directories and locks are named after the derivation and its outputs: nothing that is no name gets that far."""
    building = Building(diverted)
    drv = derivation(diverted, "echo > $out", output=FLOATING)
    drvPath = drvPathOf(drv, diverted.storeDir)
    for bad in (
        dataclasses.replace(drv, name=name),
        dataclasses.replace(drv, outputs={name: FLOATING}),
    ):
        result = building.build(bad, drvPath=drvPath)
        assert result.status == BuildStatus.MISC_FAILURE and "name" in result.errorMsg
    assert leftovers(diverted) == []
    result = building.build(drv, drvPath=add(diverted, "no-derivation"))
    assert result.status == BuildStatus.MISC_FAILURE


def test_repeats(building):
    """As Nix from 2.13 on, though that ends the conversation."""
    result = building.build(derivation(building.store, "echo > $out"), nrRepeats=1)
    assert (result.status, result.errorMsg) == (
        BuildStatus.MISC_FAILURE,
        "client requested repeating builds, but this is not currently implemented",
    )


def test_noChroot(diverted, plain, sandbox):
    """A derivation cannot talk its way out of the sandbox; without one there is nothing to talk out of."""
    result = Building(diverted).script("echo > $out", env={"__noChroot": "1"})
    assert result.status == BuildStatus.MISC_FAILURE
    assert result.errorMsg.endswith("has '__noChroot' set, but that's not allowed when 'sandbox' is 'true'")
    building = Building(plain, sandbox=SandboxMode.OFF)
    assert building.script("echo > $out", env={"__noChroot": "1"}).status == BuildStatus.BUILT
    drv = derivation(plain, "echo >> $out", env={"__noChroot": "1"})
    assert building.build(drv, mustSandbox=True).status == BuildStatus.MISC_FAILURE


@pytest.mark.parametrize(
    ("mode", "mustSandbox", "confined"),
    [
        (SandboxMode.ON, False, True),
        (SandboxMode.AUTO, False, True),
        (SandboxMode.OFF, False, False),
        (SandboxMode.OFF, True, True),
    ],
)
def test_sandboxModes(plain, sandbox, shell, mode, mustSandbox, confined):
    """Who decides whether there is a sandbox; a client that is not trusted always gets one."""
    building = Building(plain, sandbox=mode, sandboxPaths=(SandboxPath(shell.source, shell.source),))
    drv = derivation(plain, "if test -e /etc/os-release; then echo free; else echo confined; fi > $out")
    assert building.build(drv, mustSandbox=mustSandbox).status == BuildStatus.BUILT
    assert building.read(drv.outputs["out"].path) == (b"confined\n" if confined else b"free\n")


def test_noSandboxAvailable(plain, diverted, monkeypatch):
    """Where the machine has none, a build that must have one fails and says why; others do without."""
    monkeypatch.setattr("nixserve.builder.local.sandboxProblem", lambda: "no such luck")
    drv = derivation(plain, "echo > $out")
    for building, mustSandbox in (
        (Building(plain, sandbox=SandboxMode.ON), False),
        (Building(plain), True),
        (Building(diverted, sandbox=SandboxMode.OFF), False),
    ):
        drv = derivation(building.store, "echo > $out")
        result = building.build(drv, mustSandbox=mustSandbox)
        assert result.status == BuildStatus.MISC_FAILURE
        assert "namespaces that are required for sandboxing: no such luck" in result.errorMsg
    assert Building(plain).build(derivation(plain, "echo > $out")).status == BuildStatus.BUILT


def test_homelessShelter(free, monkeypatch, tmp_path):
    """Without a sandbox, a directory that every HOME names would be found by all builds."""
    monkeypatch.setattr("nixserve.builder.local._HOMELESS", str(tmp_path))
    result = free.script("echo > $out")
    assert result.status == BuildStatus.MISC_FAILURE
    assert result.errorMsg.startswith(f"home directory '{tmp_path}' exists; please remove it")


def test_storeDirectoryOfRootAlone(plain, free):
    """Without a sandbox, builders of root's may create outputs although the store directory let nobody do so."""
    if os.geteuid() != 0:
        pytest.skip("only root has users for builders")
    directory = plain.layout.realStoreDir
    os.chown(directory, 0, 0)
    os.chmod(directory, 0o755)
    assert free.script("id -u; echo > $out").status == BuildStatus.BUILT
    assert int(free.log) >= 872415232
    status = os.stat(directory)
    assert status.st_gid >= 872415232 and stat.S_IMODE(status.st_mode) == 0o1775
    assert free.script("id -u; echo >> $out").status == BuildStatus.BUILT


# What builders see.


def test_environment(confined):
    """The files and variables of the sheet arrive; more is tested where they are made."""
    result = confined.script(
        'echo "$PATH|$HOME|$NIX_STORE|$NIX_BUILD_TOP|$NIX_BUILD_CORES|$PWD|$big|$(cat $bigPath)" > $out\n'
        "ls -al >> $out",
        env={"passAsFile": "big", "big": "contents"},
    )
    assert result.status == BuildStatus.BUILT, confined.log
    first, *files = confined.read(confined.drv.outputs["out"].path).decode().splitlines()
    assert first == "/path-not-set|/homeless-shelter|/nix/store|/build|2|/build||contents"
    assert next(line for line in files if ".attr-" in line).split()[0] == "-rw-r--r--"


def test_structuredAttrs(building):
    """The builder learns where they are; there too the paths of the outputs are."""
    attrs = json.dumps({"name": "x", "outputs": ["out"], "text": "it's \u00e9"})
    script = 'test ! -n "$out" && x=$(cat "$NIX_ATTRS_JSON_FILE"); y=${x#*\'{"out":"\'}; cp .attrs.sh ${y%%\\"*}'
    drv = derivation(building.store, script, env={"__json": attrs})
    assert building.build(drv).status == BuildStatus.BUILT, building.log
    out = drv.outputs["out"].path
    assert building.read(out).decode().splitlines() == [
        "declare name='x'",
        f"declare -A outputs=(['out']='{out}' )",
        "declare text='it'\\''s \u00e9'",
    ]


def test_exportReferencesGraph(building):
    """A description of a closure, as a file."""
    low = add(building.store, "low")
    high = add(building.store, "high", low.encode(), [low])
    result = building.script("cat graph > $out", srcs=[high], env={"exportReferencesGraph": f"graph {high}"})
    assert result.status == BuildStatus.BUILT, building.log
    lines = building.read(building.drv.outputs["out"].path).decode().splitlines()
    assert sorted(lines) == sorted([low, "", "0", high, "", "1", low])
    outside = add(building.store, "outside")
    result = building.script("", srcs=[high], env={"exportReferencesGraph": f"graph {outside}"})
    assert (result.status, result.errorMsg) == (
        BuildStatus.INPUT_REJECTED,
        f"cannot export references of path '{outside}' because it is not in the input closure of the derivation",
    )


def test_sandboxPaths(confined, shell, tmp_path):
    """What the operator shows to all; of a path in the store the closure comes along, but it is no input."""
    (tmp_path / "file").write_text("shown")
    low = add(confined.store, "low", b"low")
    high = add(confined.store, "high", {"link": low}, [low])
    paths = (shell, SandboxPath("/shown", str(tmp_path / "file")), SandboxPath("/high", str(high)))
    building = Building(confined.store, sandboxPaths=paths)
    result = building.script(f"cat /shown /high/link {low} > $out; echo {low} >> $out")
    assert result.status == BuildStatus.BUILT, building.log
    out = building.drv.outputs["out"].path
    assert building.read(out) == b"shownlowlow" + low.encode() + b"\n"
    assert info(confined.store, out).references == set()


# Failures.


def test_exitCode(building):
    """The builder says no."""
    result = building.script("echo some > $out; echo bye; exit 3")
    assert (result.status, result.errorMsg) == (
        BuildStatus.PERMANENT_FAILURE,
        f"builder for '{building.drvPath}' failed with exit code 3",
    )
    assert result.timesBuilt == 1 and 0 < result.startTime <= result.stopTime and result.builtOutputs == {}
    assert building.log == b"bye\n"
    assert not building.store.validPaths.isAnyValid([building.drv.outputs["out"].path])
    locks = [name for name in leftovers(building.store) if name.endswith(".lock")]
    assert locks and set(leftovers(building.store)) - set(locks) <= {building.drv.outputs["out"].path.baseName}


def test_killedBySignal(free):
    """As Nix says it."""
    result = free.script("kill -9 $$")
    assert (result.status, result.errorMsg) == (
        BuildStatus.PERMANENT_FAILURE,
        f"builder for '{free.drvPath}' failed due to signal 9 (Killed)",
    )


def test_noSuchBuilder(building):
    """It is for the log to say what could not be run."""
    result = building.script("", builder="/nope")
    assert (result.status, result.errorMsg) == (
        BuildStatus.PERMANENT_FAILURE,
        f"builder for '{building.drvPath}' failed with exit code 1",
    )
    assert building.log == b"error: executing '/nope': No such file or directory\n"


def test_fixedOutputFailure(building):
    """A builder that may use the network may fail for reasons that pass."""
    result = building.script("exit 1", output=fixed(building.store, b"hello"))
    assert (result.status, result.errorMsg) == (
        BuildStatus.TRANSIENT_FAILURE,
        f"builder for '{building.drvPath}' failed with exit code 1",
    )


def test_ownNetwork(diverted, sandbox):
    """Only builds that may use the network have one, and their own where the settings say so."""
    helper = shutil.which("slirp4netns")
    if not helper or sandboxProblem(helper):
        pytest.skip("needs slirp4netns")
    building = Building(diverted, networkHelper=helper)
    script = "cut -sd: -f1 /proc/net/dev; printf hello > $out"
    assert building.script(script, output=fixed(diverted, b"hello")).status == BuildStatus.BUILT
    assert sorted(building.log.split()) == [b"lo", b"tap0"]
    assert building.script(script).status == BuildStatus.BUILT
    assert building.log.split() == [b"lo"]


def test_copyIsOutOfReach(free, monkeypatch):
    """Without a sandbox too, outputs are copied to where no builder could put anything, and nothing stays there."""
    drv = derivation(free.store, "echo hello > $out")
    build, register = execution.runBuilder, execution.registerOutputs
    seen = []

    def buildAndPlant(*arguments):
        outcome = build(*arguments)
        # Builders without a sandbox can read the store directory.
        (lock,) = Path(free.store.layout.realStoreDir).glob("*-nixserve-build.lock")
        place = str(lock).removesuffix(".lock")
        os.mkdir(place)
        os.chmod(place, 0o777)
        os.symlink("/etc/passwd", f"{place}/{drv.outputs['out'].path.baseName}")
        return outcome

    def lookAndRegister(*arguments):
        place = arguments[3].workDir
        status = os.lstat(place)
        seen.append((os.listdir(place), stat.S_IMODE(status.st_mode), status.st_uid))
        return register(*arguments)

    monkeypatch.setattr(execution, "runBuilder", buildAndPlant)
    monkeypatch.setattr(execution, "registerOutputs", lookAndRegister)
    assert free.build(drv).status == BuildStatus.BUILT
    assert seen == [([], 0o700, os.geteuid())]
    assert free.read(drv.outputs["out"].path) == b"hello\n"
    assert leftovers(free.store) == []


def test_fullDisk(building, monkeypatch):
    """With nearly nothing free, the disk may be to blame."""
    free = os.statvfs("/")
    monkeypatch.setattr(execution.os, "statvfs", lambda path: os.statvfs_result([*free[:4], 1, *free[5:]]))
    result = building.script("exit 1")
    assert (result.status, result.errorMsg) == (
        BuildStatus.TRANSIENT_FAILURE,
        f"builder for '{building.drvPath}' failed with exit code 1\n"
        "note: build failure may have been caused by lack of free disk space",
    )


def test_limits(building):
    """Silence, time and log: each says which it was, and of what."""
    drv = derivation(
        building.store,
        "echo a; echo b > $out; echo > $dev; while :; do sleep 0.2; echo more; done",
        outputs=("out", "dev"),
    )
    title = f"building of '{drvPathOf(drv, building.store.storeDir)}!dev,out' from in-memory derivation"
    timed = building.build(drv, buildTimeout=1)
    assert (timed.status, timed.errorMsg) == (BuildStatus.TIMED_OUT, f"{title} timed out after 1 seconds")
    assert timed.timesBuilt == 0 and timed.startTime > 0
    limited = building.build(drv, maxLogSize=10)
    assert (limited.status, limited.errorMsg) == (
        BuildStatus.LOG_LIMIT_EXCEEDED,
        f"{title} killed after writing more than 10 bytes of log output",
    )


@pytest.mark.parametrize("output", ["flat", "nar"])
@pytest.mark.parametrize("ends", ["timeout", "cancel"])
def test_timeWhileOutputsAreRead(diverted, sandbox, output, ends):
    """
    The time of a build goes on while what it left is read and hashed, and whoever leaves ends that too: a file of
    nothing, 8 TiB large, is made in a moment.
    """
    building = Building(diverted)
    hole = "dd if=/dev/null of=$out bs=1M seek=8388608 count=0; echo made"
    contents = fixed(diverted, b"x") if output == "flat" else None
    drv = derivation(diverted, hole, output=contents)
    cancel, heard, results = CancelToken(), threading.Event(), []
    building.hear = lambda lines: heard.set() if b"made" in lines else None
    options = {"buildTimeout": 2} if ends == "timeout" else {}
    thread = threading.Thread(target=lambda: results.append(building.build(drv, cancel, **options)))
    thread.start()
    assert heard.wait(30)
    if ends == "cancel":
        cancel.cancel()
    thread.join(30)
    cancel.cancel()
    thread.join(30)
    [result] = results
    title = f"building of '{drvPathOf(drv, diverted.storeDir)}!out' from in-memory derivation"
    expected = {
        "timeout": (BuildStatus.TIMED_OUT, f"{title} timed out after 2 seconds"),
        "cancel": (BuildStatus.MISC_FAILURE, "interrupted by the user"),
    }
    assert (result.status, result.errorMsg) == expected[ends]
    assert [name for name in leftovers(diverted) if not name.endswith(".lock")] == []


def test_limitsOfTheServer(diverted, sandbox):
    """
    What the operator allows counts where a client asks for more or for no limit, and what it asks for where that is
    less. An output may be only so large.
    """
    # Not quite, so that the test ends where the limits are not kept.
    endless = derivation(diverted, "n=0; while [ $n -lt 200 ]; do n=$((n+1)); echo more; sleep 0.1; done")
    settings = BuildSettings(timeout=2, maxSilentTime=1, maxBuildLogSize=10)
    for limits, asked, message in (
        ({"timeout": 1}, {}, "timed out after 1 seconds"),
        ({"timeout": 1}, {"buildTimeout": 1000}, "timed out after 1 seconds"),
        ({"timeout": 1000}, {"buildTimeout": 1}, "timed out after 1 seconds"),
        ({"maxBuildLogSize": 10}, {"maxLogSize": 1000}, "more than 10 bytes of log output"),
    ):
        result = Building(diverted, **limits).build(endless, **asked)
        assert result.errorMsg.endswith(message), result
    silent = Building(diverted, maxSilentTime=1).build(derivation(diverted, "sleep 20"))
    assert silent.errorMsg.endswith("timed out after 1 seconds of silence")
    assert settings.limit(BuildOptions(nrRepeats=3)) == BuildOptions(1, 2, 10, 3)
    limited = Building(diverted, maxOutputSize=1000)
    large = limited.script("head -c 1001 /dev/zero > $out")
    assert (large.status, large.errorMsg) == (
        BuildStatus.OUTPUT_REJECTED,
        f"output 'out' of '{limited.drvPath}' has more than 1000 bytes, the most that an output may have here",
    )
    assert limited.script("head -c 800 /dev/zero > $out").status == BuildStatus.BUILT


def test_openFilesOfABuilder(building, monkeypatch):
    """The server raises its limit on descriptors to the hard one; a builder has what the server was started with."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = before[1]
    monkeypatch.setattr(openfiles, "_inherited", None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (700, hard))
    try:
        assert openfiles.raiseOpenFiles() == openfiles.raiseOpenFiles() == hard > 700
        result = building.script("echo $(ulimit -n) $(ulimit -Hn) > $out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    text = Path(building.store.layout.realPath(result.builtOutputs["out"].outPath)).read_text()
    assert text == f"700 {hard}\n"


def test_silence(building):
    """No output for too long."""
    drv = derivation(building.store, "echo a; sleep 60")
    started = time.monotonic()
    result = building.build(drv, maxSilentTime=1)
    assert (result.status, result.errorMsg) == (
        BuildStatus.TIMED_OUT,
        f"building of '{drvPathOf(drv, building.store.storeDir)}!out' from in-memory derivation "
        "timed out after 1 seconds of silence",
    )
    assert time.monotonic() - started < 10


def test_cancel(building):
    """A cancelled build ends at once, with all of its processes, and frees what it held."""
    cancel = CancelToken()
    drv = derivation(building.store, "sleep 77 & echo started; sleep 77")
    heard = threading.Event()
    building.hear = lambda lines: heard.set()
    results = []
    thread = threading.Thread(target=lambda: results.append(building.build(drv, cancel)))
    thread.start()
    assert heard.wait(20)
    cancel.cancel()
    thread.join(20)
    [result] = results
    assert (result.status, result.errorMsg) == (BuildStatus.MISC_FAILURE, "interrupted by the user")
    assert os.listdir(f"{building.store.layout.stateDir}/builds") == []
    assert [name for name in leftovers(building.store) if not name.endswith(".lock")] == []
    assert subprocess.run(["pgrep", "-xf", "sleep 77"], capture_output=True).stdout == b""


def test_cancelledBefore(building):
    """A build that was cancelled before it began does not begin."""
    cancel = CancelToken()
    cancel.cancel()
    drv = derivation(building.store, "echo > $out")
    assert building.build(drv, cancel).errorMsg == "interrupted by the user"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("true", "builder for 'DRV' failed to produce output path for output 'out' at 'OUT'"),
        (
            "echo > $out; chmod 666 $out",
            "suspicious ownership or permission on 'OUT' for output 'out'; rejecting this build output",
        ),
    ],
)
def test_badOutputs(building, script, message):
    """Each fault in Nix's words."""
    result = building.script(script)
    out = building.drv.outputs["out"].path
    assert (result.status, result.errorMsg) == (
        BuildStatus.OUTPUT_REJECTED,
        message.replace("DRV", building.drvPath).replace("OUT", out),
    )
    assert result.timesBuilt == 1 and result.builtOutputs == {}
    assert not building.store.validPaths.isAnyValid([out])


def test_unsupportedType(building):
    """A FIFO cannot be stored."""
    result = building.script("mkdir $out; mkfifo $out/fifo")
    assert result.status == BuildStatus.MISC_FAILURE and "has an unsupported type" in result.errorMsg


def test_cycle(building):
    """Outputs that refer to each other in a circle."""
    result = building.script("echo $two > $out; echo $out > $two", outputs=("out", "two"))
    assert (result.status, result.errorMsg) == (
        BuildStatus.OUTPUT_REJECTED,
        f"cycle detected in build of '{building.drvPath}' in the references of output 'out' from output 'two'",
    )


def test_outputChecks(building):
    """A derivation may forbid its outputs to refer to something."""
    source = add(building.store, "source")
    result = building.script(f"echo {source} > $out", srcs=[source], env={"allowedReferences": ""})
    assert (result.status, result.errorMsg) == (
        BuildStatus.OUTPUT_REJECTED,
        f"output '{building.drv.outputs['out'].path}' is not allowed to refer to the following paths:\n  {source}",
    )


def test_keepFailed(building):
    """On request, the directory of a build that failed stays, and the log says where."""
    drv = derivation(building.store, "echo clue > clue; exit 1", name="failing")
    assert building.build(drv, keepFailed=True).status == BuildStatus.PERMANENT_FAILURE
    note, _, rest = building.log.decode().partition("'")
    assert note == "note: keeping build directory "
    path = rest.rstrip("'\n")
    assert "/nix-build-failing.drv-0" in path
    assert Path(path, "clue").read_text() == "clue\n"
    assert stat.S_IMODE(os.lstat(path).st_mode) == 0o755
    # The next one finds another name, and a success leaves nothing.
    drv = derivation(building.store, "echo > $out", name="failing")
    assert building.build(drv, keepFailed=True).status == BuildStatus.BUILT
    assert os.listdir(f"{building.store.layout.stateDir}/builds") == ["nix-build-failing.drv-0"]


# Fixed and floating outputs.


@pytest.mark.parametrize("hashAlgo", ["sha256", "sha1"])
def test_fixedOutput(building, hashAlgo):
    """The drvHash is that of the fixed output, whatever the recipe."""
    out = fixed(building.store, b"hello") if hashAlgo == "sha256" else None
    if out is None:
        digest = hashBytes("sha1", b"hello")
        some = DerivationOutput(
            building.store.storeDir.makeStorePath("test", hashBytes("sha256", b""), "x"), "sha1", digest.hex
        )
        out = DerivationOutput(
            building.store.storeDir.makeContentAddressedPath(some.contentAddress, "x"), "sha1", digest.hex
        )
    result = building.script("echo $NIX_OUTPUT_CHECKED; printf hello > $out", output=out)
    assert result.status == BuildStatus.BUILT, result
    text = f"fixed:out:{hashAlgo}:{hashBytes(hashAlgo, b'hello').hex}:{out.path}"
    assert result.builtOutputs["out"].drvHash == hashBytes("sha256", text.encode()).hexText
    assert result.builtOutputs["out"].outPath == out.path
    assert building.log == b"1\n"


def test_fixedOutputStatedElsewhere(building):
    """Of a fixed output the hash counts, not the path that comes with it, be it valid or not."""
    actual = fixed(building.store, b"hello")
    wrong = dataclasses.replace(actual, path=add(building.store, "x"))
    result = building.script("printf hello > $out", output=wrong)
    assert result.status == BuildStatus.BUILT, result
    assert result.builtOutputs["out"].outPath == actual.path
    assert building.build(building.drv).status == BuildStatus.ALREADY_VALID


def test_hashMismatch(building):
    """The wrong contents: in Nix's words, and they stay valid under the path that they deserve."""
    result = building.script("printf hello > $out", output=fixed(building.store, b"wanted"))
    assert (result.status, result.errorMsg) == (
        BuildStatus.OUTPUT_REJECTED,
        f"hash mismatch in fixed-output derivation '{building.drvPath}':\n"
        f"  specified: {hashBytes('sha256', b'wanted').sri}\n"
        f"     got:    {hashBytes('sha256', b'hello').sri}",
    )
    # Whoever hears of it at the other end of a session knows it from the message.
    assert result.hashMismatch and saysHashMismatch(result.status, result.errorMsg)
    assert info(building.store, fixed(building.store, b"hello").path).deriver == building.drvPath


def test_floating(building):
    """The path follows from the contents, its own path in them included."""
    result = building.script("echo $out > $out", output=FLOATING)
    assert result.status == BuildStatus.BUILT, result
    made = result.builtOutputs["out"]
    registered = info(building.store, made.outPath)
    assert registered.isContentAddressed(building.store.storeDir) and registered.hasSelfReference
    assert building.read(made.outPath) == made.outPath.encode() + b"\n"
    # There is no path to be masked, but for the placeholder in the environment.
    masked = dataclasses.replace(building.drv, env={**building.drv.env, "out": ""})
    assert made.drvHash == hashBytes("sha256", unparse(masked)).hexText
    assert leftovers(building.store) == []
    assert building.build(building.drv).builtOutputs == result.builtOutputs


def test_unknownDerivationHash(building):
    """What had input derivations cannot be hashed without them: its outputs are not where the hash would have them."""
    drv = derivation(building.store, "echo > $out")
    other = building.store.storeDir.makeStorePath("test", hashBytes("sha256", b"other"), "x")
    drv = dataclasses.replace(drv, outputs={"out": DerivationOutput(other)}, env={**drv.env, "out": other})
    result = building.build(drv)
    assert result.builtOutputs["out"].outPath == other
    assert result.builtOutputs["out"].drvHash == UNKNOWN_DRV_HASH


def test_derivationsHereVerify(diverted):
    """The derivations of these tests are as an untrusted client would have to send them."""
    drv = derivation(diverted, "echo > $out", outputs=("out", "dev"))
    verifyBasicDerivation(drvPathOf(drv, diverted.storeDir), drv, diverted.storeDir)


# Locks and roots.


def test_busyWhileSomebodyBuilds(building):
    """As long as somebody holds the lock of an output, the build cannot begin; then what they built counts."""
    drv = derivation(building.store, "echo > $out", outputs=("out",))
    out = building.store.layout.realPath(drv.outputs["out"].path)
    with open(out + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Busy, match="waiting for the lock on"):
            building.build(drv)
    other = Building(building.store, sandbox=building.builder.settings.sandbox)
    first, waiting = building.prepare(drv), None
    with pytest.raises(Busy):
        waiting = other.prepare(drv)
    assert first.run(building.hear, CancelToken()).status == BuildStatus.BUILT
    assert other.prepare(drv).status == BuildStatus.ALREADY_VALID and waiting is None


def test_lockOfAFloatingOutput(building):
    """It is named after the derivation, as real Nix names it."""
    drv = derivation(building.store, "echo > $out", output=FLOATING)
    prepared = building.prepare(drv)
    assert f"{drvPathOf(drv, building.store.storeDir).baseName}.out.lock" in leftovers(building.store)
    with pytest.raises(Busy):
        building.prepare(drv)
    prepared.abandon()
    again = building.prepare(drv)
    again.abandon()
    again.abandon()


def test_sameNameForDifferentThings(building):
    """
    What a client calls a derivation excludes nobody: another one under its name, built for ever, holds nothing of it,
    whether or not its outputs are known before, and the two do not meet in one sandbox.
    """
    for first, output in ((10, None), (20, FLOATING)):
        drv = derivation(building.store, f"echo {first} > $out", output=output)
        drvPath = drvPathOf(drv, building.store.storeDir)
        sleeping = [
            building.prepare(derivation(building.store, f"echo {number} > $out", output=kind), drvPath=drvPath)
            for number, kind in enumerate((None, FLOATING), first + 1)
        ]
        result = building.build(drv)
        assert result.status == BuildStatus.BUILT
        assert Path(building.store.layout.realPath(result.builtOutputs["out"].outPath)).read_text() == f"{first}\n"
        for other in sleeping:
            assert other.run(building.hear, CancelToken()).status == BuildStatus.BUILT
    assert [name for name in leftovers(building.store) if "nixserve-build" in name] == []


def test_workDirIsLocked(diverted, sandbox):
    """
    Who can read the store directory sees the name of the place that a build works in. Adding an object of that name
    waits until the build is over, and touches nothing there.
    """
    building = Building(diverted)
    prepared = building.prepare(derivation(diverted, "echo > $out"))
    (name,) = [name for name in leftovers(diverted) if name.endswith("-nixserve-build.lock")]
    nar = makeNar(b"")
    path = StorePath(f"{diverted.storeDir.path}/{name.removesuffix('.lock')}")
    intruding = makeInfo("x", nar, path=path, storeDir=diverted.storeDir)
    with pytest.raises(Busy):
        diverted.openSession().addSmallPaths([(intruding, nar)])
    assert prepared.run(building.hear, CancelToken()).status == BuildStatus.BUILT
    assert [name for name in leftovers(diverted) if "nixserve-build" in name] == []


def test_builtDerivation(building):
    """
    A build whose output is called .drv, and claims another's path as its own output, fails as with real Nix: nothing
    becomes valid that a later build would obey.
    """
    victim = add(building.store, "victim")
    text = (
        f'Derive([("out","{victim}","","")],[],[],"{SYSTEM}","/bin/sh",[],'
        f'[("builder","/bin/sh"),("name","victim"),("out","{victim}"),("system","{SYSTEM}")])'
    )
    drv = derivation(building.store, 'printf %s "$text" > $out', name="victim.drv", env={"text": text})
    result = building.build(drv)
    assert (
        result.status == BuildStatus.MISC_FAILURE and f"has incorrect output '{victim}', should be" in result.errorMsg
    )
    assert not building.store.validPaths.queryValidPaths([drv.outputs["out"].path])


def outputsOf(store, drv, **paths):
    """The derivation with its outputs at other paths, as a client may say it."""
    outputs = {name: DerivationOutput(StorePath(path)) for name, path in paths.items()}
    return replace(drv, outputs=outputs, env={**drv.env, **paths})


def test_validPathsInPlaceOfOurFiles(building):
    """
    A valid path may be called like any file that a build makes in the store directory: the build is refused or goes on,
    and the path stays as it is.
    """
    store = building.store
    drv = derivation(store, "echo > $out")
    drvPath, out = drvPathOf(drv, store.storeDir), drv.outputs["out"].path
    for suffix in (".chroot", ".chroot.lock", ".out.lock"):
        addAt(store, drvPath + suffix)
    for suffix in (".rewritten", ".check", ".chroot"):
        addAt(store, out + suffix)
    assert building.build(drv).status == BuildStatus.BUILT
    drv = derivation(store, "echo 2 > $out")
    lock = addAt(store, drv.outputs["out"].path + ".lock")
    refused = building.build(drv)
    assert refused.status == BuildStatus.MISC_FAILURE and "is no lock file" in refused.errorMsg
    assert "\n" not in refused.errorMsg
    floating = derivation(store, "echo 3 > $out", output=DerivationOutput(None, "r:sha256", ""))
    addAt(store, f"{drvPathOf(floating, store.storeDir)}.out.lock")
    assert "is no lock file" in building.build(floating).errorMsg
    session = store.openSession()
    for path in store.validPaths.queryAllValidPaths() - {out}:
        assert b"".join(session.narFromPath(path)) == makeNar(b"contents"), path
    assert lock in store.validPaths.queryAllValidPaths()
    session.close()


def addAt(store, path):
    """Make a path of any name valid."""
    session = store.openSession()
    nar = makeNar(b"contents")
    addObject(session, makeInfo("x", nar, storeDir=store.storeDir, path=StorePath(path)), nar)
    session.close()
    return path


def test_validPathInPlaceOfAScratchPath(free):
    """Without a sandbox an output is made in the store under a path that is lent to it: not under one that is valid."""
    drv = derivation(free.store, "echo 3 > $out", output=DerivationOutput(None, "r:sha256", ""))
    prepared = free.prepare(drv)
    scratch = prepared._execution._build.places["out"].scratch
    prepared.abandon()
    addAt(free.store, scratch)
    result = free.build(drv)
    assert result.status == BuildStatus.MISC_FAILURE and "is a valid path" in result.errorMsg
    assert free.read(scratch) == b"contents"


def test_outputsCalledLikeLockFiles(building):
    """An output may be called so; it is made under the lock that this is, and cannot be together with what it locks."""
    store = building.store
    plain = derivation(store, "echo > $out").outputs["out"].path
    drv = outputsOf(store, derivation(store, "echo > $out"), out=f"{plain}.lock")
    held = PathLocks([store.layout.realPath(plain)])
    done = []
    prepared = building.prepare(drv)
    thread = threading.Thread(target=lambda: done.append(prepared.run(building.hear, CancelToken())))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and os.path.getsize(store.layout.realPath(plain) + ".lock") == 0
    held.unlock()
    thread.join(30)
    assert [result.status for result in done] == [BuildStatus.BUILT]
    both = outputsOf(store, derivation(store, "echo > $a; echo > $b", outputs=("a", "b")), a=plain, b=f"{plain}.lock")
    assert "is called like the lock file of" in building.build(both).errorMsg


def test_roots(building):
    """Derivation, inputs and outputs are kept from the collector while the session lasts."""
    source = add(building.store, "source")
    drv = derivation(building.store, "echo > $out", srcs=[source])
    prepared = building.prepare(drv)
    [name] = os.listdir(building.store.layout.tempRootsDir)
    with open(f"{building.store.layout.tempRootsDir}/{name}") as stream:
        roots = set(stream.read().split("\0"))
    assert {drvPathOf(drv, building.store.storeDir), source, drv.outputs["out"].path} <= roots
    prepared.abandon()


# The log.


def test_logOnDisk(building):
    """Everything that the builder wrote, where real Nix looks for it."""
    result = building.script("printf 'a\\rb\\n@nix {}\\nend'; echo > $out")
    assert result.status == BuildStatus.BUILT
    with bz2.open(buildLogPath(building.store.layout, building.drvPath)) as stream:
        assert stream.read() == b"a\rb\n@nix {}\nend"


def test_noLogOnDisk(diverted, sandbox):
    """Not where the operator does not want it."""
    building = Building(diverted, keepLogs=False)
    building.script("echo said; echo > $out")
    assert building.log == b"said\n"
    assert not os.path.exists(buildLogPath(diverted.layout, building.drvPath))


# Builders of our own.


def test_unknownBuiltin(building):
    """As Nix says it, in the log."""
    result = building.script("", builder="builtin:nope", platform="builtin")
    assert (result.status, result.errorMsg) == (
        BuildStatus.PERMANENT_FAILURE,
        f"builder for '{building.drvPath}' failed with exit code 1",
    )
    assert building.log == b"error: unsupported builtin builder 'nope'\n"


def test_buildenv(building):
    """A tree of links to inputs."""
    package = add(building.store, "package", {"bin": {"tool": b"x"}})
    manifest = add(building.store, "manifest", b"[]")
    env = {"derivations": f"true 5 1 {package}", "manifest": manifest}
    drv = derivation(
        building.store, "", builder="builtin:buildenv", platform="builtin", env=env, srcs=[package, manifest]
    )
    assert building.build(drv).status == BuildStatus.BUILT, building.log
    out = building.store.layout.realPath(drv.outputs["out"].path)
    assert os.readlink(f"{out}/bin") == f"{package}/bin" and os.readlink(f"{out}/manifest.nix") == manifest
    assert info(building.store, drv.outputs["out"].path).references == {package, manifest}


def fetch(store, url, contents):
    """What <nix/fetchurl.nix> makes, nearly."""
    env = {"url": url, "executable": "", "unpack": "", "outputHashMode": "flat"}
    return derivation(store, "", builder="builtin:fetchurl", platform="builtin", env=env, output=fixed(store, contents))


def test_fetchurl(building):
    """A file that is an input; without a sandbox any file that the builder may read."""
    source = add(building.store, "source", b"hello")
    drv = dataclasses.replace(fetch(building.store, f"file://{source}", b"hello"), inputSrcs=frozenset({source}))
    assert building.build(drv).status == BuildStatus.BUILT, building.log
    assert building.read(drv.outputs["out"].path) == b"hello"


def test_fetchurlStaysInTheSandbox(confined):
    """A recipe cannot have files of the host copied into the store."""
    with open("/etc/passwd", "rb") as stream:
        contents = stream.read()
    result = confined.build(fetch(confined.store, "file:///etc/passwd", contents))
    assert result.status in (BuildStatus.TRANSIENT_FAILURE, BuildStatus.OUTPUT_REJECTED)
    assert contents not in [confined.read(path) for path in confined.store.validPaths.queryAllValidPaths()]


# Another user than root.

AS_NOBODY = """
import os, sys, tempfile
os.setgroups([]); os.setgid(65534); os.setuid(65534)
from nixserve.builder.local import BuildSettings, LocalBuilder, SandboxMode, removeAbandoned
from nixserve.builder.process import CancelToken
from nixserve.codec.derivation import BasicDerivation, DerivationOutput
from nixserve.codec.serve import BuildDerivation
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
with tempfile.TemporaryDirectory(dir="/var/tmp") as root:
    store = LocalStore(StoreLayout.underRoot(root), reservedSize=0)
    session = store.openSession()
    floating = DerivationOutput(None, "r:sha256", "")
    drv = BasicDerivation("x", {"out": floating}, frozenset(), BuildSettings().system, "/bin/sh", ("-c", sys.argv[1]), {
        "out": "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"})
    drvPath = store.storeDir.parse("/nix/store/" + 32 * "0" + "-x.drv")
    builder = LocalBuilder(store, BuildSettings(sandbox=SandboxMode.ON))
    prepared = builder.prepare(session, BuildDerivation(drvPath, drv))
    result = prepared.run(lambda lines: sys.stderr.buffer.write(lines), CancelToken())
    print(int(result.status), result.errorMsg)
    for made in result.builtOutputs.values():
        real = store.layout.realPath(made.outPath)
        print(sorted(os.listdir(real)), os.lstat(real).st_uid, oct(os.lstat(real).st_mode))
    print(os.listdir(store.layout.stateDir + "/builds"))
    store.close()
    os.system(f"chmod -R u+w {root}")
"""


def test_unprivileged(sandbox):
    """A user without privileges builds as itself, in a sandbox all the same; a directory can be moved out of it."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("only root can become another user, who then needs a Python")
    command = [python, "-B", "-c", AS_NOBODY, "id -u; mkdir -p $out/a/b; echo x > $out/a/b/c"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 ", "['a'] 65534 0o40555", "[]"]
    assert done.stderr == "1000\n"

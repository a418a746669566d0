"""What is built, in which order, and what comes of the whole. The store is a double; no build takes place."""

import pytest

from nixserve.builder.plan import BuildPlan
from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.derivation import Derivation, DerivationOutput, drvPathOf, verifyBasicDerivation
from nixserve.codec.hashes import hashBytes
from nixserve.codec.resolution import upstreamPlaceholder
from nixserve.codec.storepath import StoreDir
from nixserve.errors import FormatError, StoreError
from nixserve.store.api import Busy

STORE = StoreDir()
BUILT = BuildStatus.BUILT


def path(name):
    """A store path that nothing in particular led to."""
    return STORE.makeStorePath("test", hashBytes("sha256", name.encode()), name)


class Derivations:
    """Derivations and valid paths; what refers to what is nobody's concern, so a closure is what was asked for."""

    storeDir = STORE

    def __init__(self):
        self.drvs = {}
        self.valid = set()
        self.roots = set()
        self.busy = 0
        self.added = []

    def addTempRoots(self, paths):
        if self.busy:
            self.busy -= 1
            raise Busy("a test")
        self.roots |= set(paths)

    def queryValidPaths(self, paths):
        assert set(paths) <= self.roots, "asked before it was kept from the collector"
        return set(paths) & self.valid

    def queryClosure(self, paths):
        return set(paths)

    def readDerivation(self, drvPath):
        if self.drvs[drvPath] is None:
            raise StoreError("it is broken")
        return self.drvs[drvPath]

    def addDerivation(self, drv):
        self.added.append(drv)
        return drvPathOf(drv, STORE)

    def add(self, name, inputs=None, outputs=("out",), output=None, srcs=(), env=None):
        """
        Add a derivation.

        @param inputs: by path, the names of outputs.
        @param output: all outputs, if they are not input-addressed.
        """
        drv = Derivation(
            name=name,
            outputs={o: output or DerivationOutput(path(f"{name}-built-{o}")) for o in outputs},
            inputSrcs=frozenset(srcs),
            platform="x86_64-linux",
            builder="/bin/sh",
            args=(),
            env=env or {},
            inputDrvs={drv: frozenset(names) for drv, names in (inputs or {}).items()},
        )
        drvPath = path(f"{name}.drv")
        self.drvs[drvPath] = drv
        self.valid |= {drvPath, *srcs}
        return drvPath

    def out(self, drvPath, name="out"):
        """The known path of an output."""
        return self.drvs[drvPath].outputs[name].path


@pytest.fixture
def store():
    return Derivations()


def names(builds):
    """What is being built."""
    return [build.drv.name for build in builds]


def carryOut(plan, fail=None, limit=1):
    """
    Build everything, one after the other.

    @param fail: results of builds that fail, by name.
    @return: the names of what was built, in order.
    """
    order = []
    while not plan.over:
        builds = plan.next(limit)
        if not builds:
            assert plan.over, "nothing to do, and not over"
        for build in builds:
            order.append(build.drv.name)
            outputs = {name: Realisation(output.path) for name, output in build.drv.outputs.items()}
            plan.finished(build.drvPath, (fail or {}).get(build.drv.name, BuildResult(BUILT, builtOutputs=outputs)))
    return order


def failure(status=BuildStatus.PERMANENT_FAILURE, message="it broke"):
    return BuildResult(status, message)


MISMATCH = BuildResult(BuildStatus.OUTPUT_REJECTED, "another hash", hashMismatch=True)


def test_inputsComeFirst(store):
    """A derivation is handed out when all of its input derivations have been built, and not before."""
    a = store.add("a")
    b = store.add("b")
    c = store.add("c", {a: ["out"], b: ["out"]})
    plan = BuildPlan(store, [c])
    first = plan.next()
    assert names(first) == ["a", "b"]
    assert plan.next() == []
    for build in first:
        assert not plan.over
        plan.finished(build.drvPath, BuildResult(BUILT))
    assert names(plan.next()) == ["c"]
    plan.finished(c, BuildResult(BUILT))
    assert plan.over
    assert plan.result().status == 0 and plan.result().errorMsg == ""


def test_inputSourcesAreTheClosureOfAllThatIsUsed(store):
    """Of the input derivations only the wanted outputs are inputs; a leaf keeps its own sources, so it verifies."""
    source = path("source")
    a = store.add("a", outputs=("out", "dev"), srcs=[source])
    b = store.add("b", {a: ["dev"]}, srcs=[source])
    plan = BuildPlan(store, [b])
    [leaf] = plan.next()
    assert leaf.drv.inputSrcs == {source}
    plan.finished(a, BuildResult(BUILT))
    [build] = plan.next()
    assert build.drv.inputSrcs == {source, store.out(a, "dev")}
    assert not isinstance(build.drv, Derivation)


def test_orderIsByName(store):
    """With one job at a time, independent builds run in the order of their names, as in Nix."""
    targets = [store.add(name) for name in ("zoo", "fail2", "fail", "abc")]
    assert carryOut(BuildPlan(store, targets)) == ["abc", "fail", "fail2", "zoo"]


def test_validOutputsAreNotBuilt(store):
    """A derivation whose wanted outputs are valid is not built, and its inputs are not even read."""
    broken = path("broken.drv")
    store.drvs[broken] = None
    store.valid.add(broken)
    a = store.add("a", {broken: ["out"]})
    store.valid.add(store.out(a))
    plan = BuildPlan(store, [a])
    assert plan.next() == [] and plan.over
    assert plan.result().status == 0


def test_onlyWantedOutputsCount(store):
    """A missing output that nobody wants is no reason to build; one that somebody wants is."""
    a = store.add("a", outputs=("out", "dev"))
    store.valid.add(store.out(a))
    assert carryOut(BuildPlan(store, [f"{a}!out"])) == []
    assert carryOut(BuildPlan(store, [f"{a}!out,,dev"])) == ["a"]
    assert carryOut(BuildPlan(store, [a])) == ["a"]


def test_wantedByTwo(store):
    """What one finds valid another may want more of: then it is built before both."""
    a = store.add("a", outputs=("out", "dev"))
    store.valid.add(store.out(a))
    b = store.add("b", {a: ["out"]})
    c = store.add("c", {b: ["out"], a: ["dev"]})
    for targets in ([b, c], [c, b], [f"{a}!out", c]):
        assert carryOut(BuildPlan(store, targets)) == ["a", "b", "c"]


def test_diamond(store):
    """What several need is built once."""
    a = store.add("a")
    b, c = store.add("b", {a: ["out"]}), store.add("c", {a: ["out"]})
    d = store.add("d", {b: ["out"], c: ["out"]})
    assert carryOut(BuildPlan(store, [d, a])) == ["a", "b", "c", "d"]


def test_longChain(store):
    """Chains may be longer than Python's stack is deep, built or failed."""
    drvPath = store.add("0")
    for number in range(1, 3000):
        drvPath = store.add(str(number), {drvPath: ["out"]})
    assert len(carryOut(BuildPlan(store, [drvPath]))) == 3000
    plan = BuildPlan(store, [drvPath])
    assert carryOut(plan, {"0": failure()}) == ["0"]
    assert plan.result().status == 100


def test_everythingIsRooted(store):
    """Targets, sources and outputs are kept from the collector before they are looked at."""
    source = path("source")
    a = store.add("a", srcs=[source])
    b = store.add("b", {a: ["out"]})
    BuildPlan(store, [b]).next()
    assert {a, b, source, store.out(a), store.out(b)} <= store.roots


@pytest.mark.parametrize("times", [1, 2, 3, 4])
def test_busyStore(store, times):
    """A plan that a collector held up goes on where it was."""
    a = store.add("a")
    b = store.add("b", {a: ["out"]})
    plan = BuildPlan(store, [b])
    store.busy = times
    for _ in range(times):
        with pytest.raises(Busy):
            plan.next()
    assert carryOut(plan) == ["a", "b"]


# Failures.


def test_failureEndsTheRest(store):
    """A failure ends the plan; what was running is to be cancelled, and its end does not matter."""
    a, b = store.add("a"), store.add("b")
    plan = BuildPlan(store, [a, b])
    assert len(plan.next()) == 2
    plan.finished(a, failure(message="builder for 'a' failed with exit code 3"))
    assert plan.over and plan.next() == []
    before = plan.result()
    plan.finished(b, BuildResult(BUILT))
    assert plan.over and plan.next() == [] and plan.result() == before
    assert before.status == 100


def test_ownErrorOfASingleTarget(store):
    """One failed target speaks for itself."""
    a, b = store.add("a"), store.add("b")
    plan = BuildPlan(store, [a, b])
    carryOut(plan, {"b": failure(message="builder for 'b' failed with exit code 3")})
    assert plan.result().status == 100
    assert plan.result().errorMsg == "error: builder for 'b' failed with exit code 3"
    assert plan.takeMessages() == []


def test_severalFailedTargets(store):
    """Those that were given up for another's failure count as failed too; the errors go to the log."""
    a, b = store.add("a"), store.add("b")
    plan = BuildPlan(store, [b, a])
    carryOut(plan, {"a": failure(message="it broke")})
    first, second = sorted([a, b])
    assert plan.result().errorMsg == f"error: build of '{first}', '{second}' failed"
    assert plan.result() == plan.result()
    assert plan.takeMessages() == ["error: it broke"]
    assert plan.takeMessages() == []


def test_keepGoing(store):
    """With it, everything is built that does not depend on what failed."""
    a, b = store.add("a"), store.add("b")
    c = store.add("c", {a: ["out"], b: ["out"]})
    d = store.add("d")
    plan = BuildPlan(store, [c, d], keepGoing=True)
    assert carryOut(plan, {"a": failure(message="a broke"), "b": failure(message="b broke")}) == ["a", "b", "d"]
    assert plan.result().errorMsg == f"error: 2 dependencies of derivation '{c}' failed to build"
    assert plan.takeMessages() == ["error: a broke", "error: b broke"]


def test_keepGoingWithAMissingDerivation(store):
    """An input found missing on another's behalf fails those that come to it later."""
    missing = path("missing.drv")
    a = store.add("a", {missing: ["out"]})
    b = store.add("b", {a: ["out"], missing: ["out"]})
    c = store.add("c", {b: ["out"], missing: ["out"]})
    plan = BuildPlan(store, [a, c], keepGoing=True)
    assert carryOut(plan) == []
    assert plan.result().status == 1


def test_dependencyFailed(store):
    """The error of an input goes to the log, that of the target says how many there were."""
    a = store.add("a")
    b = store.add("b", {a: ["out"]})
    c = store.add("c", {b: ["out"]})
    plan = BuildPlan(store, [c])
    carryOut(plan, {"a": failure(message="a broke")})
    assert plan.result().status == 100
    assert plan.result().errorMsg == f"error: 1 dependencies of derivation '{c}' failed to build"
    assert plan.takeMessages() == [
        "error: a broke",
        f"error: 1 dependencies of derivation '{b}' failed to build",
    ]


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([failure()], 100),
        ([failure(BuildStatus.TIMED_OUT)], 101),
        ([MISMATCH], 102),
        ([failure(), MISMATCH], 102),
        (
            [
                failure(BuildStatus.TIMED_OUT),
                MISMATCH,
            ],
            103,
        ),
        ([failure(BuildStatus.NOT_DETERMINISTIC)], 104),
        ([failure(BuildStatus.OUTPUT_REJECTED, "no output")], 1),
        ([failure(BuildStatus.TRANSIENT_FAILURE)], 1),
        ([failure(BuildStatus.LOG_LIMIT_EXCEEDED)], 1),
        ([failure(BuildStatus.MISC_FAILURE)], 1),
    ],
)
def test_exitStatus(store, results, status):
    """The exit status of C{nix-store -r}."""
    targets = {str(number): result for number, result in enumerate(results)}
    plan = BuildPlan(store, [store.add(name) for name in targets], keepGoing=True)
    carryOut(plan, targets)
    assert plan.result().status == status


def test_unknownOutput(store):
    """An output that the derivation has not; C{*} is a name like any other here."""
    a = store.add("a")
    for wanted, quoted in (("nope", "'nope'"), ("*", "'*'"), ("y,out,x", "'x', 'y'")):
        plan = BuildPlan(store, [f"{a}!{wanted}"])
        assert plan.next() == [] and plan.over
        assert plan.result().status == 1
        assert plan.result().errorMsg == f"error: derivation '{a}' does not have wanted outputs {quoted}"


def test_unknownOutputOfAnInput(store):
    """It is noticed before anything is built, also if the input must be built anyway."""
    a = store.add("a")
    b = store.add("b", {a: ["nope"]})
    plan = BuildPlan(store, [a, b])
    assert plan.next() == [] and plan.over
    assert plan.result().errorMsg == f"error: derivation '{a}' does not have wanted outputs 'nope'"


def test_missingDerivation(store):
    """A .drv that is not valid cannot be built."""
    missing = path("missing.drv")
    plan = BuildPlan(store, [missing])
    assert plan.next() == [] and plan.over
    assert (plan.result().status, plan.result().errorMsg) == (
        1,
        f"error: cannot build missing derivation '{missing}'",
    )


def test_brokenDerivation(store):
    """A .drv that cannot be read is an error that says which."""
    broken = path("broken.drv")
    store.drvs[broken] = None
    store.valid.add(broken)
    plan = BuildPlan(store, [broken])
    assert plan.next() == []
    assert plan.result().errorMsg == f"error: error parsing derivation '{broken}': it is broken"


def test_missingSource(store):
    """A source that is not valid cannot be fetched from anywhere."""
    source = path("source")
    a = store.add("a", srcs=[source])
    store.valid.remove(source)
    plan = BuildPlan(store, [a])
    assert plan.next() == []
    assert plan.result().errorMsg == (
        f"error: dependency '{source}' of '{a}' does not exist, and substitution is disabled"
    )


def test_plainTargets(store):
    """A path that is no derivation has to be valid."""
    there, missing = path("there"), path("missing")
    store.valid.add(there)
    plan = BuildPlan(store, [there])
    assert plan.next() == [] and plan.over and plan.result().status == 0
    plan = BuildPlan(store, [there, missing])
    assert plan.next() == [] and plan.over
    assert (plan.result().status, plan.result().errorMsg) == (1, f"error: build of '{missing}' failed")


def test_noTargets(store):
    """Nothing to do is done."""
    plan = BuildPlan(store, [])
    assert plan.next() == [] and plan.over and plan.result().status == 0


@pytest.mark.parametrize("target", ["/tmp/x", "", "!", f"{path('x')}!out", f"{path('x.drv')}^out"])
def test_badTargets(store, target):
    """What is no target is refused at once."""
    with pytest.raises(FormatError):
        BuildPlan(store, [target])


# Inputs whose paths are not known before they are built.

FLOATING = DerivationOutput(None, "r:sha256", "")
DEFERRED = DerivationOutput(None)


def test_resolution(store):
    """What came of a floating input is written into the derivation that uses it, whose own paths then follow."""
    ca = store.add("ca", output=FLOATING)
    placeholder = upstreamPlaceholder(ca, "out")
    user = store.add("user", {ca: ["out"]}, output=DEFERRED, env={"out": "", "x": f"<{placeholder}>", placeholder: ""})
    plan = BuildPlan(store, [user])
    [first] = plan.next()
    assert first.drvPath == ca
    made = path("made")
    plan.finished(ca, BuildResult(BUILT, builtOutputs={"out": Realisation(made)}))
    [second] = plan.next()
    assert store.added == [second.drv]
    assert second.drvPath == drvPathOf(second.drv, STORE)
    assert second.drv.inputSrcs == {made}
    assert second.drv.env["x"] == f"<{made}>" and made in second.drv.env
    # Its outputs are those that follow from the recipe, variables included.
    verifyBasicDerivation(path("user.drv"), second.drv, STORE)
    assert second.drv.env["out"] == second.drv.outputs["out"].path
    assert plan.takeMessages() == []
    plan.finished(second.drvPath, BuildResult(BuildStatus.ALREADY_VALID))
    assert plan.over and plan.result().status == 0


def test_resolvedToTheSame(store):
    """Inputs that turn out the same make their users the same: one build serves both."""
    one, two = store.add("ca-1", output=FLOATING), store.add("ca-2", output=FLOATING)
    users = []
    for ca in (one, two):
        env = {"x": upstreamPlaceholder(ca, "out")}
        users.append(store.add("user", {ca: ["out"]}, output=FLOATING, env=env))
        store.drvs[path(f"user{len(users)}.drv")] = store.drvs[users[-1]]
    targets = [path("user1.drv"), path("user2.drv")]
    store.valid |= set(targets)
    plan = BuildPlan(store, targets)
    made = BuildResult(BUILT, builtOutputs={"out": Realisation(path("made"))})
    for build in plan.next():
        plan.finished(build.drvPath, made)
    [build] = plan.next()
    plan.finished(build.drvPath, made)
    assert plan.over and plan.result().status == 0


def test_fixedOutputWithAFloatingInput(store):
    """It has placeholders as well, though its path does not depend on them."""
    ca = store.add("ca", output=FLOATING)
    fixed = DerivationOutput(path("fixed"), "sha256", "00" * 32)
    user = store.add("user", {ca: ["out"]}, output=fixed, env={"x": upstreamPlaceholder(ca, "out")})
    plan = BuildPlan(store, [user])
    plan.next()
    plan.finished(ca, BuildResult(BUILT, builtOutputs={"out": Realisation(path("made"))}))
    [build] = plan.next()
    assert build.drv.env["x"] == path("made")
    assert build.drv.outputs == {"out": fixed}

"""
Every result that BuildDerivation can have, at every version that knows the command, beside real Nix 2.8: statuses,
texts and layouts.

Of the statuses 1 and 14 need substituters, 7 is given by nobody any more, 10 only appears within BuildPaths, 12 needs
check mode, and 13 is what resolving on the builder would give, for which BuildDerivation sends too little.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.interop.building import (
    FEATURE,
    Talk,
    flatRecipe,
    recipe,
    requireSandbox,
    serverCommand,
)
from tests.interop.stores import named

MINORS = range(1, 9)
GREETING = b"hello\n"


@dataclass(frozen=True)
class Case:
    """
    A build and what comes of it.

    @ivar make: from Nix and a name, a L{Recipe}.
    @ivar text: of the message, with C{DRV} and C{OUT} for the paths.
    @ivar options: for the build.
    @ivar seconds: that it takes, at least.
    """

    make: Callable
    status: int
    text: str = ""
    options: dict = field(default_factory=dict)
    seconds: float = 0


def plain(script, **fields):
    """What makes an ordinary recipe."""
    return lambda nix, name: recipe(name, script, **fields)


def flat(script):
    """What makes a fixed-output recipe."""
    return lambda nix, name: flatRecipe(nix, name, script, GREETING + name.encode(), env={"name": name})


CASES = {
    "built": Case(plain("echo hello > $out"), 0),
    "built, several": Case(plain("echo a > $out; echo $out > $dev; mkdir $lib", outputs=("out", "dev", "lib")), 0),
    "built, fixed": Case(flat("echo hello > $out; printf %s $name >> $out"), 0),
    "exit code": Case(plain("exit 3"), 3, "builder for 'DRV' failed with exit code 3"),
    "killed": Case(plain("exec >&- 2>&-; sleep 100"), 3, "builder for 'DRV' failed due to signal 9 (Killed)"),
    "no builder": Case(plain("", builder="/nope"), 3, "builder for 'DRV' failed with exit code 1"),
    "no output": Case(plain(":"), 5, "builder for 'DRV' failed to produce output path for output 'out' at 'OUT'"),
    "writable output": Case(
        plain("mkdir $out; chmod 777 $out"),
        5,
        "suspicious ownership or permission on 'OUT' for output 'out'; rejecting this build output",
    ),
    "cycle": Case(
        plain("echo $dev > $out; echo $out > $dev", outputs=("out", "dev")),
        5,
        "cycle detected in build of 'DRV' in the references of output 'dev' from output 'out'",
    ),
    "reference": Case(
        plain("echo $out > $out", env={"allowedReferences": ""}),
        5,
        "output 'OUT' is not allowed to refer to the following paths:\n  OUT",
    ),
    "hash mismatch": Case(
        flat("echo something else > $out"),
        5,
        "hash mismatch in fixed-output derivation 'DRV':\n  specified: sha256-SRI\n     got:    sha256-SRI",
    ),
    "not flat": Case(
        flat("mkdir $out"),
        5,
        "output path 'OUT' should be a non-executable regular file since recursive hashing is not enabled "
        "(outputHashMode=flat)",
    ),
    "download failed": Case(flat("exit 7"), 6, "builder for 'DRV' failed with exit code 7"),
    "silence": Case(
        plain("echo begun; sleep 100"),
        8,
        "building of 'DRV!out' from in-memory derivation timed out after 1 seconds of silence",
        {"silence": 1},
        1,
    ),
    "timeout": Case(
        plain("while :; do echo alive; sleep 0.3; done"),
        8,
        "building of 'DRV!out' from in-memory derivation timed out after 1 seconds",
        {"timeout": 1, "silence": 50},
        1,
    ),
    "missing input": Case(
        plain(":", inputs=(named("missing"),)),
        9,
        f"dependency '{named('missing')}' of 'DRV' does not exist, and substitution is disabled",
    ),
    "platform": Case(
        plain(":", platform="sparc-plan9"),
        9,
        f"a 'sparc-plan9' with features {{}} is required to build 'DRV', but I am a 'x86_64-linux' with features "
        f"{{{FEATURE}}}",
    ),
    "features": Case(
        plain(":", env={"requiredSystemFeatures": f"baz {FEATURE} bar"}),
        9,
        f"a 'x86_64-linux' with features {{bar, baz, {FEATURE}}} is required to build 'DRV', but I am a 'x86_64-linux' "
        f"with features {{{FEATURE}}}",
    ),
    "unsandboxed": Case(
        plain(":", env={"__noChroot": "1"}),
        9,
        "derivation 'DRV' has '__noChroot' set, but that's not allowed when 'sandbox' is 'true'",
    ),
    "fifo": Case(
        plain("mkdir $out; mkfifo $out/fifo"),
        9,
        "file 'OUT/fifo' has an unsupported type: a store holds only files, directories and symbolic links",
    ),
    "graph": Case(
        plain(":", env={"exportReferencesGraph": f"graph {named('missing')}"}),
        4,
        f"cannot export references of path '{named('missing')}' because it is not in the input closure of the "
        "derivation",
    ),
    "odd graph": Case(
        plain(":", env={"exportReferencesGraph": "graph"}),
        4,
        "odd number of tokens in 'exportReferencesGraph': 'graph'",
    ),
    "log limit": Case(
        plain("while :; do echo 0123456789; done"),
        11,
        "building of 'DRV!out' from in-memory derivation killed after writing more than 1000 bytes of log output",
        {"logSize": 1000},
    ),
}


@pytest.fixture(scope="module")
def sandbox():
    """Environment for real Nix."""
    return requireSandbox()


@pytest.fixture(scope="module")
def root(scratch, request):
    """A store for every server."""
    place = scratch / "results"
    place.mkdir()
    return place


def fill(text, made):
    """The text of a case with the paths of its recipe."""
    return text.replace("DRV", made.drvPath).replace("OUT", made.paths[0])


def generalise(text):
    """A text without what differs with contents and places."""
    text = re.sub(r"sha256-[A-Za-z0-9+/]{43}=", "sha256-SRI", text)
    text = re.sub(r"'/[^']*(?:\.chroot|-nixserve-build)(?:/root)?(/nix/store/[^']*)'", r"'\1'", text)
    return text.removeprefix("error: ")


def makeAll(nix, minor):
    """The recipes of all cases, new for each minor version. Those that take their time only at some."""
    return {
        name: case.make(nix, f"{re.sub('[^a-z]', '-', name)}-{minor}")
        for name, case in CASES.items()
        if (not case.seconds or minor in (1, 7, 8)) and (minor >= 2 or "logSize" not in case.options)
    }


def buildAll(nix, who, root, minor, environment):
    """Have everything built in one session; results by name, and at last that of what has been built before."""
    recipes = makeAll(nix, minor)
    results = {}
    with Talk.withServer(nix, serverCommand(who, root / who), minor, environment) as talk:
        talk.surplus = who == "real" and minor < 6
        for name, made in recipes.items():
            results[name] = talk.build(made, **CASES[name].options)
        results["again"] = talk.build(recipes["built"])
        built = [path for name, made in recipes.items() if CASES[name].status == 0 for path in made.paths]
        every = [path for made in recipes.values() for path in made.paths]
        assert talk.askValid(every) == sorted(set(built)), "what has been built is valid, nothing else"
    assert talk.process.returncode == 0, talk.stderr()
    return recipes, results


@pytest.fixture(scope="module", params=MINORS, ids=lambda minor: f"2.{minor}")
def conversation(nix, root, sandbox, request):
    """All cases in a conversation of one version: the version, the time it began, the recipes, the results."""
    begun = int(time.time())
    return (request.param, begun, *buildAll(nix, "ours", root, request.param, sandbox))


def test_statuses(conversation):
    """Each status arises, with its text."""
    minor, _, recipes, results = conversation
    for name, made in recipes.items():
        case, result = CASES[name], results[name]
        print(name, result)
        assert (result.status, generalise(result.text)) == (case.status, fill(case.text, made)), name
    assert (results["again"].status, results["again"].message) == (2, "")
    if minor >= 7:
        assert {result.status for result in results.values()} == {0, 2, 3, 4, 5, 6, 8, 9, 11}


def test_times(conversation):
    """From 2.3 on a result says when the builder ran; that of a build which did not take place is all zeros."""
    minor, begun, _, results = conversation
    for name, (count, different, start, stop) in (
        (name, result.times) for name, result in results.items() if minor >= 3
    ):
        assert different == 0
        if results[name].status in (2, 4, 9) and name != "fifo":
            assert (count, start, stop) == (0, 0, 0), name
        else:
            assert begun <= start <= stop <= time.time(), name
            assert count == (0 if results[name].status in (8, 11) else 1), name


def test_outputs(conversation):
    """From 2.6 on a result says where the outputs are: as JSON, from 2.8 on as fields."""
    minor, _, recipes, results = conversation
    for name, result in results.items():
        made = recipes.get(name) or recipes["built"]
        if result.status not in (0, 2) or minor < 6:
            assert result.outputs == {}, name
        elif minor == 8:
            assert result.outputs == {output: (path, []) for output, (path, _, _) in made.outputs.items()}
        else:
            assert sorted(key.partition("!")[2] for key in result.outputs) == sorted(made.outputs)
            for key, text in result.outputs.items():
                path = made.outputs[key.partition("!")[2]][0].removeprefix("/nix/store/")
                assert re.fullmatch("sha256:[0-9a-f]{64}![a-z]+", key)
                assert text == f'{{"dependentRealisations":{{}},"id":"{key}","outPath":"{path}","signatures":[]}}'


#: Where a status differs from Nix 2.8, and why.
STATUSES = {"cycle": "2.8 gives 9, for everything of which it has not thought; newer ones 5, for a rejected output"}
#: Where a text does.
TEXTS = {"fifo": "ours says what a store may hold"}
#: Where times do.
TIMES = {
    **dict.fromkeys(("cycle", "fifo"), "2.8 forgets that the builder ran when something else is wrong afterwards"),
    **dict.fromkeys(("silence", "timeout", "log limit"), "2.8 does not say when it killed the builder"),
}


@pytest.mark.parametrize("conversation", MINORS[:-1], ids=lambda minor: f"2.{minor}", indirect=True)
def test_besideReal(nix, root, sandbox, conversation):
    """Real Nix 2.8, which speaks 2.7, gives the same results to the same client."""
    minor, _, _, results = conversation
    _, real = buildAll(nix, "real", root, minor, sandbox)
    for name, expected in real.items():
        result = results[name]
        print(name, expected, result, sep="\n ")
        assert (result.status != expected.status) == (name in STATUSES), name
        assert (generalise(result.text) != generalise(expected.text)) == (name in TEXTS), name
        # To clients that are too old for it 2.8 sends them all the same.
        assert result.outputs == (expected.outputs if minor >= 6 else {}), name
        moments = [[bool(moment) for moment in times] for times in (result.times, expected.times)]
        assert (moments[0] != moments[1]) == (name in TIMES and minor >= 3), name

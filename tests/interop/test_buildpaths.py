"""
BuildPaths of derivations that have been copied to the store: exit codes, messages, log and what is valid afterwards,
beside real Nix 2.8.
"""

import re
import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from tests.interop.building import DERIVATIONS, Talk, requireSandbox, serverCommand, stdioURL
from tests.interop.stores import infos, named

MISSING = named("missing.drv")


@dataclass(frozen=True)
class Case:
    """
    A request and what comes of it.

    @ivar targets: names in C{targets.nix}, with what follows the path.
    @ivar status: the answer's first word.
    @ivar text: its message, with names in place of paths.
    @ivar built: names of the outputs that are valid afterwards.
    @ivar options: of the build.
    @ivar sameLog: whether the log is the same each time; not where builds are killed.
    """

    targets: list
    status: int = 0
    text: str = ""
    built: tuple = ()
    options: dict = field(default_factory=dict)
    sameLog: bool = True


TREE = ("deep", "deeper", "left", "right", "tree")
MULTI = ("multi", "multi-dev", "multi-doc")

CASES = {
    "nothing": Case([]),
    "all outputs": Case(["multi"], built=MULTI),
    "one output": Case(["multi!dev"], built=MULTI),
    "two outputs, with gaps": Case(["multi!out,,doc,"], built=MULTI),
    "a tree": Case(["tree"], built=TREE),
    "only the needed output": Case(["onDev"], built=(*MULTI, "on-dev")),
    "several": Case(["tree", "simple!out", "multi!out", "simple"], built=(*TREE, *MULTI, "simple")),
    "unknown output": Case(["multi!nope"], 1, "derivation 'multi.drv' does not have wanted outputs 'nope'"),
    "star": Case(["simple!*"], 1, "derivation 'simple.drv' does not have wanted outputs '*'"),
    "missing derivation": Case(["MISSING"], 1, "cannot build missing derivation 'missing.drv'"),
    "missing path": Case(["PLAIN"], 1, "build of 'plain' failed"),
    "failing": Case(["failing"], 100, "builder for 'failing.drv' failed with exit code 3"),
    "input failing": Case(["afterFailing"], 100, "1 dependencies of derivation 'after-failing.drv' failed to build"),
    "input of an input failing": Case(
        ["afterAfter"], 100, "1 dependencies of derivation 'after-after.drv' failed to build"
    ),
    "two inputs failing": Case(
        ["afterBoth"], 100, "1 dependencies of derivation 'after-both.drv' failed to build", sameLog=False
    ),
    # In the order of their paths.
    "several, one failing": Case(
        ["silent", "failing"], 100, "build of 'silent.drv', 'failing.drv' failed", sameLog=False
    ),
    "hash mismatch": Case(
        ["mismatch"],
        102,
        "hash mismatch in fixed-output derivation 'mismatch.drv':\n         specified: SRI\n            got:    SRI",
        built=("mismatch",),
    ),
    "input with the wrong hash": Case(
        ["afterMismatch"], 102, "1 dependencies of derivation 'after-mismatch.drv' failed to build", ("mismatch",)
    ),
    "download failed": Case(["fetch"], 1, "builder for 'fetch.drv' failed with exit code 7"),
    "silence": Case(
        ["silent"],
        101,
        "building of 'silent.drv!out' from in-memory derivation timed out after 1 seconds of silence",
        options={"silence": 1},
    ),
    "timeout": Case(
        ["endless!out"],
        101,
        "building of 'endless.drv!out' from in-memory derivation timed out after 1 seconds",
        options={"timeout": 1},
        sameLog=False,
    ),
    "log limit": Case(
        ["chatty"],
        1,
        "building of 'chatty.drv!out' from in-memory derivation killed after writing more than 1000 bytes of log "
        "output",
        options={"logSize": 1000},
        sameLog=False,
    ),
    "platform": Case(
        ["foreign"],
        1,
        "a 'sparc-plan9' with features {} is required to build 'foreign.drv', but I am a 'x86_64-linux' with features "
        "{foo}",
    ),
    "features": Case(
        ["demanding"],
        1,
        "a 'x86_64-linux' with features {bar} is required to build 'demanding.drv', but I am a 'x86_64-linux' with "
        "features {foo}",
    ),
    "no output": Case(
        ["noOutput"], 1, "builder for 'no-output.drv' failed to produce output path for output 'out' at 'no-output'"
    ),
    "reference": Case(
        ["checked"], 1, "output 'checked' is not allowed to refer to the following paths:\n         checked"
    ),
}


@pytest.fixture(scope="module")
def sandbox():
    """Environment for real Nix."""
    return requireSandbox()


@pytest.fixture(scope="module")
def copied(scratch, nix, sandbox):
    """
    Two stores that hold nothing but derivations: for real Nix, by C{nix-store --import}, and for us, by C{nix copy}
    through us.
    """
    place = scratch / "targets"
    place.mkdir()
    source, roots = place / "source", {who: place / who for who in ("real", "ours")}
    arguments = ["nix-instantiate", DERIVATIONS / "targets.nix"]
    names = nix.lines(
        "nix-instantiate",
        "--eval",
        "--json",
        "-E",
        f"builtins.attrNames (import {DERIVATIONS}/targets.nix)",
        store=source,
    )
    names = re.findall("[A-Za-z]+", names[0])
    drvs = {}
    for name in names:
        (drvs[name],) = nix.lines(*arguments, "-A", name, store=source)
    needed = nix.lines("nix-store", "--query", "--requisites", *drvs.values(), store=source)
    exported = nix.run("nix-store", "--export", *needed, store=source).stdout
    nix.run("nix-store", "--import", store=roots["real"], stdin=exported)
    nix.run("nix", "copy", "--derivation", "--to", stdioURL("ours", roots["ours"]), *drvs.values(), store=source)
    assert infos(nix, roots["ours"]).keys() == set(needed)
    return SimpleNamespace(roots=roots, drvs={**drvs, "MISSING": MISSING, "PLAIN": named("plain")})


def generalise(text):
    """A text without what differs with contents and places."""
    text = re.sub(r"'/[^']*(?:\.chroot|-nixserve-build)(?:/root)?(/nix/store/[^']*)'", r"'\1'", text)
    text = re.sub(r"sha256-[A-Za-z0-9+/]{43}=", "SRI", text)
    return re.sub("/nix/store/[0-9a-z]{32}-", "", text).removeprefix("error: ")


def names(nix, root):
    """The names of all valid paths but derivations."""
    paths = [path for path in infos(nix, root) if not path.endswith(".drv")]
    return sorted(path.partition("-")[2] for path in paths)


#: Where what ours says differs from real Nix 2.8, and why. The status never does.
DIFFERENCES = dict.fromkeys(
    ("silence", "timeout", "log limit"),
    "2.8 says 'from .drv file', and which outputs were asked for; ours shares one build between all who ask for it",
)


def ask(nix, who, root, environment, case, drvs):
    """Have one request answered: status and message; the log; what is valid afterwards."""
    targets = [re.sub("^[A-Za-z]+", lambda found: drvs[found[0]], target) for target in case.targets]
    with Talk.withServer(nix, serverCommand(who, root), 7, environment) as talk:
        status, text = talk.buildPaths(targets, **case.options)
        # Still in step.
        assert talk.askValid([MISSING]) == []
    assert talk.process.returncode == 0
    return status, generalise(text), generalise(talk.stderr()), names(nix, root)


@pytest.mark.parametrize("name", CASES)
def test_buildPaths(nix, copied, sandbox, directory, name):
    """Each request is answered as real Nix answers it."""
    case = CASES[name]
    answers = {}
    for who, root in copied.roots.items():
        shutil.copytree(root, directory / who, symlinks=True)
        answers[who] = ask(nix, who, directory / who, sandbox, case, copied.drvs)
    (status, text, log, built), real = answers["ours"], answers["real"]
    print(*real, "-----", *answers["ours"], sep="\n")
    assert (status, text, built) == (case.status, case.text, sorted(case.built))
    assert (status, built) == (real[0], real[3])
    assert (text != real[1]) == (name in DIFFERENCES)
    assert sorted(log.splitlines()) == sorted(real[2].splitlines()) or not case.sameLog

"""
C{nixserve build}, on C{nixserve-store} as a child process: every option, every end.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from nixserve.app.cmd_build import build
from nixserve.codec import base32
from nixserve.codec.buildresult import BuildResult, BuildStatus, exitStatus
from nixserve.codec.hashes import hashBytes
from nixserve.testing import addObject, makeInfo, makeNar
from tests.app.box import TIMEOUT, number, refused, waitUntil
from tests.app.otherstore import addDerivation, facts, onTerminal, opened, program, roots, url
from tests.builder.workplace import needsSandbox

pytestmark = needsSandbox


class Place:
    """
    A store here with derivations, and where there is none yet.

    @ivar drvs: paths of .drv files by name.
    @ivar outputs: paths of their outputs, by name and name.
    """

    def __init__(self, box):
        self.box = box
        self.here = box.path / "here"
        self.there = box.path / "there"
        self.drvs, self.outputs = {}, {}

    def add(self, name, script, inputs=(), **fields):
        """Add a derivation; C{inputs} are names of others."""
        store = opened(self.here)
        made = [(self.drvs[other], self.outputs[other]) for other in inputs]
        self.drvs[name], self.outputs[name] = addDerivation(store.openSession(), name, script, inputs=made, **fields)
        store.close()

    def words(self, *arguments, program=None):
        """The command line; names of derivations stand for them."""
        there = url(self.there, program) if program else url(self.there)
        arguments = [re.sub(r"^\w+", lambda m: self.drvs.get(m[0], m[0]), str(word)) for word in arguments]
        return ["build", "--store", self.here, "--on", there, *arguments]

    def run(self, *arguments, **options):
        """Run it."""
        return self.box.run("nixserve", *self.words(*arguments, **options))


@pytest.fixture
def place(box):
    """A L{Place} with something that builds, something that needs that, and something that fails."""
    place = Place(box)
    place.add("thing", 'echo making it; echo "made $out" >$out; echo $out >$dev', outputs=("out", "dev"))
    place.add("next", 'echo going on; set -- $inputs; read a <$1; echo "$a" >$out', ["thing"])
    place.add("failing", "echo trouble ahead; exit 3")
    return place


def lines(done):
    """The facts printed."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def auto(root):
    """Where the indirect roots of a store lead, by their names."""
    directory = f"{root}/nix/var/nix/gcroots/auto"
    return (
        {name: os.readlink(f"{directory}/{name}") for name in os.listdir(directory)} if os.path.isdir(directory) else {}
    )


class TestBuilding:
    """What comes of it."""

    def test_outputs(self, place):
        """The outputs come here, their paths to standard output, the log to standard error; no .drv goes there."""
        done = place.run("thing")
        outputs = place.outputs["thing"]
        assert (done.returncode, done.stdout) == (0, f"{outputs['dev']}\n{outputs['out']}\n")
        assert done.stderr == "making it\n"
        assert {outputs["out"], outputs["dev"]} <= facts(place.here).keys()
        assert facts(place.there).keys() == {outputs["out"], outputs["dev"]}
        assert roots(place.here) == []

    def test_dependencies(self, place):
        """What it depends on is built too; then lines of the log say which build they are of."""
        done = place.run("next")
        assert (done.returncode, done.stdout) == (0, f"{place.outputs['next']['out']}\n")
        assert done.stderr == "thing> making it\nnext> going on\n"

    @pytest.mark.parametrize("suffix", ["!dev", "^dev"])
    def test_oneOutput(self, place, suffix):
        """One output is fetched, linked and printed."""
        done = place.run(f"thing{suffix}")
        assert (done.returncode, done.stdout) == (0, f"{place.outputs['thing']['dev']}\n")
        assert os.readlink(place.box.path / "result-dev") == place.outputs["thing"]["dev"]
        assert not os.path.lexists(place.box.path / "result")

    def test_allOutputs(self, place):
        """A star, or their names, stand for all of them."""
        assert place.run("thing!*").stdout == place.run("thing^dev,out").stdout == place.run("thing").stdout

    def test_link(self, place):
        """A symbolic link to a .drv stands for it."""
        (place.box.path / "recipe").symlink_to(place.drvs["thing"])
        assert place.run("recipe!out").stdout == f"{place.outputs['thing']['out']}\n"

    def test_again(self, place):
        """What is there already is not built again."""
        place.run("thing")
        assert place.run("thing").stderr == ""


class TestLinks:
    """Links to the outputs, which are roots of the collector."""

    def test_result(self, place):
        """They are called as with C{nix-build}, and known to the store."""
        assert place.run("thing", "next").returncode == 0
        expected = {
            "result": place.outputs["thing"]["out"],
            "result-dev": place.outputs["thing"]["dev"],
            "result-2": place.outputs["next"]["out"],
        }
        for name, path in expected.items():
            assert os.readlink(place.box.path / name) == path
        places = [str(place.box.path / name) for name in expected]
        assert auto(place.here) == {base32.encode(hashBytes("sha1", p.encode()).digest): p for p in places}

    def test_outLink(self, place):
        """C{--out-link} chooses the place; what leads into the store there is replaced."""
        (place.box.path / "links").mkdir()
        (place.box.path / "links/it").symlink_to(place.drvs["thing"])
        assert place.run("-o", "links/it", "thing!out").returncode == 0
        assert os.readlink(place.box.path / "links/it") == place.outputs["thing"]["out"]
        assert os.listdir(place.box.path / "links") == ["it"]

    @pytest.mark.parametrize("option", ["--no-out-link", "--no-fetch"])
    def test_none(self, place, option):
        """None are made if they are not wanted, or the outputs stay there."""
        assert place.run(option, "thing").returncode == 0
        assert auto(place.here) == {}
        assert not os.path.lexists(place.box.path / "result")

    def test_inTheWay(self, place):
        """What is no such link is not replaced, and that is said before the build."""
        (place.box.path / "result").write_text("mine")
        done = place.run("thing")
        assert "'" + str(place.box.path / "result") + "' is there already and is no link to a store path" in refused(
            done
        )
        assert "making it" not in done.stderr
        assert (place.box.path / "result").read_text() == "mine"

    def test_inTheStore(self, place):
        """Nothing is put into the store."""
        assert "would be in the Nix store" in refused(place.run("-o", "/nix/store/link", "thing"))

    @pytest.mark.parametrize("option", ["--no-out-link", "--no-fetch"])
    def test_contradiction(self, place, option):
        """A link cannot be both wanted and not."""
        done = place.run("-o", "x", option, "thing")
        assert done.returncode == 2 and "contradict each other" in done.stderr


class TestOptions:
    """The others, each with its effect."""

    def test_noFetch(self, place):
        """With C{--no-fetch} the outputs stay there; that needs no store here that can be written."""
        done = place.box.run(
            "nixserve", "build", "--store", f"{place.here}?read-only=true", "--on", url(place.there), "--no-fetch",
            place.drvs["thing"],
        )  # fmt: skip
        outputs = place.outputs["thing"]
        assert (done.returncode, done.stdout) == (0, f"{outputs['dev']}\n{outputs['out']}\n")
        assert outputs["out"] in facts(place.there)
        assert outputs["out"] not in facts(place.here)

    def test_readOnly(self, place):
        """Otherwise it does, which is said before anything else."""
        done = place.box.run(
            "nixserve", "build", "--store", f"{place.here}?read-only=true", "--on", "ssh://localhost",
            place.drvs["thing"],
        )  # fmt: skip
        assert "this user may not write to it; leave the outputs there with --no-fetch" in refused(done)

    def test_options(self, place):
        """Limits and C{--keep-failed} reach the builder there; inputs are asked for with the flag to substitute."""
        spy = program(place.box, 'tee -a sent | "$SERVER" "$@"')
        limits = ["--timeout", "111", "--max-silent-time", "222", "--max-log-size", "333"]
        assert place.run(*limits, "-K", "-s", "thing", program=spy).returncode == 0
        sent = (place.box.path / "sent").read_bytes()
        assert number(222) + number(111) + number(333) + number(0) + number(0) + number(1) in sent
        assert sent[16:].startswith(number(1) + number(1) + number(1))

    @pytest.mark.parametrize(
        ("option", "script"),
        [("--timeout=1", "while :; do :; done"), ("--max-silent-time=1", "while :; do :; done")],
    )
    def test_timeout(self, place, option, script):
        """A build that takes too long, or says nothing for too long, ends with 101."""
        place.add("slow", script)
        done = place.run(option, "slow")
        assert done.returncode == 101
        assert "timed out after 1 seconds" in done.stderr

    def test_maxLogSize(self, place):
        """So does one that says too much, with 1."""
        place.add("loud", "while :; do echo and so on; done")
        done = place.run("--max-log-size", "1000", "loud")
        assert done.returncode == 1
        assert "killed after writing more than 1000 bytes of log output" in done.stderr

    def test_keepGoing(self, place):
        """With C{--keep-going} the others are built, and the status is still that of the failure."""
        done = place.run("failing", "thing!out")
        assert (done.returncode, done.stdout) == (100, "")
        done = place.run("-k", "failing", "thing!out")
        assert (done.returncode, done.stdout) == (100, f"{place.outputs['thing']['out']}\n")
        assert "failing> trouble ahead\nthing> making it\n" in done.stderr

    def test_dryRun(self, place):
        """With C{--dry-run} nothing is built or copied; what would be is said."""
        nar = makeNar(b"source")
        info = makeInfo("source", nar)
        store = opened(place.here)
        addObject(store.openSession(), info, nar)
        store.close()
        place.add("last", "true", ["next"], sources=[info.path])
        before = facts(place.here)
        done = place.run("--dry-run", "last")
        builds = [f"build\t{place.drvs[name]}\n" for name in ("thing", "next", "last")]
        assert done.stdout == f"copy\t{info.path}\t{len(nar)}\n" + "".join(builds)
        assert done.returncode == 0
        [fact] = lines(place.run("--dry-run", "--json", "last"))
        assert fact == {
            "event": "plan",
            "drvPath": place.drvs["last"],
            "builds": [place.drvs[name] for name in ("thing", "next", "last")],
            "sends": [{"path": info.path, "narSize": len(nar)}],
            "narBytes": len(nar),
        }
        assert facts(place.here) == before and facts(place.there) == {}

    def test_json(self, place):
        """With C{--json} what was built is a fact, and what failed."""
        [*_, built] = lines(place.run("--json", "thing!out"))
        assert built.pop("startTime") <= built.pop("stopTime")
        assert built == {
            "event": "built",
            "drvPath": place.drvs["thing"],
            "outputs": {"out": place.outputs["thing"]["out"]},
            "links": {"out": str(place.box.path / "result")},
            "sent": {"paths": 0, "narBytes": 0},
            "fetched": {"paths": 1, "narBytes": facts(place.here)[place.outputs["thing"]["out"]].narSize},
            "status": 0,
            "statusName": "BUILT",
        }
        done = place.run("--json", "failing")
        [failed] = lines(done)
        assert (failed["event"], failed["statusName"], done.returncode) == ("failed", "PERMANENT_FAILURE", 100)
        assert failed["message"] == f"builder for '{place.drvs['failing']}' failed with exit code 3"
        [fact] = lines(place.run("--json", "thing", program="/nonexistent"))
        assert (fact["event"], fact["side"], fact["exitStatus"]) == ("error", "there", 1)


class TestFailures:
    """Builds that fail, and what keeps one from beginning."""

    def test_failed(self, place):
        """The log comes first, then one line that says which build failed where and how."""
        done = place.run("failing")
        drvPath = place.drvs["failing"]
        assert done.stderr == (
            "trouble ahead\n"
            f"error: build of '{drvPath}' on 'ssh://localhost' failed: builder for '{drvPath}' failed with exit code 3"
            "\n"
        )
        assert (done.returncode, done.stdout) == (100, "")

    def test_dependencyFailed(self, place):
        """A dependency that failed counts as much."""
        place.add("after", "true", ["failing"])
        done = place.run("after")
        assert done.returncode == 100
        assert f"its dependency '{place.drvs['failing']}' failed to build: builder for" in done.stderr

    @pytest.mark.parametrize(
        ("words", "status", "complaint"),
        [
            ([], 2, "Missing argument"),
            (["/nix/store/00000000000000000000000000000000-x"], 2, "is no derivation; give a .drv file"),
            (["x"], 2, "path 'x' is not in the Nix store; give a .drv file"),
            (["/nix/store/00000000000000000000000000000000-x.drv!"], 2, "write DRV!OUTPUT"),
            (["--timeout", "-1", "x"], 2, "Invalid value for '--timeout'"),
            (["/nix/store/00000000000000000000000000000000-x.drv"], 1, "is not in the store here"),
            (["thing!nope"], 1, "does not have the output 'nope'; it has dev, out"),
        ],
    )
    def test_mistakes(self, place, words, status, complaint):
        """What cannot be is said."""
        done = place.run(*words)
        assert complaint in refused(done)
        assert done.returncode == status

    def test_colours(self, place):
        """Colours of a log reach a terminal, and nothing else does; a terminal's other commands never do."""
        place.add("colourful", "printf 'a \\033[31mred\\033[0m line\\033[2J\\n'; exit 1")
        assert "a red line\n" in place.run("colourful").stderr
        process, shown = onTerminal(place.box, *place.words("colourful"))
        assert process.returncode == 100
        assert "a \x1b[31mred\x1b[0m line\r\n" in shown

    def test_interrupted(self, place):
        """Ctrl-C ends it, and the build there."""
        place.add("endless", "echo begun; while :; do :; done")
        with open(place.box.path / "err", "wb") as err:
            process = place.box.spawn("nixserve", *place.words("endless"), stdout=subprocess.DEVNULL, stderr=err)
        waitUntil(lambda: b"begun" in (place.box.path / "err").read_bytes())
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT)
        assert process.returncode == 130
        assert time.monotonic() - begun < 5
        assert (place.box.path / "err").read_text().split() == ["begun", "Aborted!"]
        waitUntil(lambda: roots(place.there) == roots(place.here) == [])


def test_exitStatusesAreDocumented():
    """The help and the README name each status that a failure can have by itself, and no other."""
    results = [*map(BuildResult, BuildStatus), BuildResult(BuildStatus.OUTPUT_REJECTED, hashMismatch=True)]
    single = {exitStatus([result]) for result in results}
    told = CliRunner().invoke(build, ["--help"]).output
    assert {int(number) for number in re.findall(r"\b1\d\d\b", told)} == {*single, 130} - {0, 1}
    rows = re.findall(r"^\| (\d+) \|", (Path(__file__).parents[2] / "README.md").read_text(), re.M)
    assert {int(number) for number in rows} == {*single, 2, 130}

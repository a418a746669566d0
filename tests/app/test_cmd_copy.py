"""
C{nixserve copy}, to and from C{nixserve-store} as a child process: every option, every end.
"""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from nixserve.testing import addObject, makeInfo, makeNar
from tests.app.box import TIMEOUT, number, refused, waitUntil
from tests.app.otherstore import (
    addChain,
    addDerivation,
    facts,
    onTerminal,
    opened,
    passing,
    program,
    roots,
    url,
)


class Place:
    """
    Two stores in a box.

    @ivar source: the root of one with a chain of objects.
    @ivar chain: their paths; the last refers to all others.
    @ivar target: where there is no store yet.
    """

    def __init__(self, box):
        self.box = box
        self.source = box.path / "source"
        self.target = box.path / "target"
        self.chain = addChain(self.source, 4)

    def to(self, *arguments, program=None, **options):
        """Run C{copy --to}; the last of the chain if no path is given."""
        there = url(self.target, program) if program else url(self.target)
        paths = [] if any(str(word).startswith("/nix") for word in arguments) else self.chain[-1:]
        return self.box.run("nixserve", "copy", "--store", self.source, "--to", there, *arguments, *paths, **options)

    def back(self, *arguments, program=None, store=None, **options):
        """Run C{copy --from}, out of the store with the chain."""
        there = url(self.source, program) if program else url(self.source)
        here = self.target if store is None else store
        paths = [] if any(str(word).startswith("/nix") for word in arguments) else self.chain[-1:]
        return self.box.run("nixserve", "copy", "--store", here, "--from", there, *arguments, *paths, **options)


@pytest.fixture
def place(box):
    """A L{Place}."""
    return Place(box)


def quiet(done):
    """It succeeded and said nothing."""
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def events(done):
    """The facts printed."""
    return [json.loads(line) for line in done.stdout.splitlines()]


class TestCopying:
    """What arrives."""

    @pytest.mark.parametrize("way", ["to", "back"])
    def test_closure(self, place, way):
        """Everything that the path refers to, with what is registered about it; not a word about it."""
        quiet(getattr(place, way)())
        assert facts(place.target) == facts(place.source)
        assert roots(place.target) == roots(place.source) == []

    @pytest.mark.parametrize("way", ["to", "back"])
    def test_again(self, place, way):
        """What is there already is not copied again."""
        quiet(getattr(place, way)())
        done = getattr(place, way)("--json")
        assert events(done) == [
            {"event": "planned", "paths": 0, "narBytes": 0, "present": 4},
            {"event": "done", "paths": 0, "narBytes": 0, "present": 4},
        ]

    def test_defaultStore(self, place):
        """Without C{--store} it is the one that Nix's environment variable names."""
        words = ["copy", "--to", url(place.target), place.chain[0]]
        quiet(place.box.run("nixserve", *words, env={"NIX_REMOTE": str(place.source)}))
        assert list(facts(place.target)) == place.chain[:1]

    @pytest.mark.parametrize("way", ["to", "back"])
    def test_names(self, place, way):
        """A file in an object, or links that lead there, stand for the object; links in the store are not followed."""
        store = opened(place.source)
        nar = makeNar({"bin": {"tool": b""}})
        info = makeInfo("tool", nar)
        addObject(store.openSession(), info, nar)
        store.close()
        (place.box.path / "directory").symlink_to(f"{info.path}/bin")
        (place.box.path / "again").symlink_to("directory")
        end = ["--to", url(place.target)] if way == "to" else ["--from", url(place.source)]
        here = place.source if way == "to" else place.target
        quiet(place.box.run("nixserve", "copy", "--store", here, *end, "again/tool", f"{place.chain[0]}/x"))
        assert set(facts(place.target)) == {info.path, place.chain[0]}

    def test_linkToItself(self, place):
        """A chain of links without an end is no store path."""
        (place.box.path / "loop").symlink_to("loop")
        words = ["copy", "--store", place.source, "--to", url(place.target), "loop"]
        assert "is not in the Nix store" in refused(place.box.run("nixserve", *words))

    @pytest.mark.parametrize("way", ["to", "back"])
    def test_noClosure(self, place, way):
        """With C{--no-closure} only the paths themselves; what they refer to must be there."""
        done = getattr(place, way)("--no-closure", place.chain[1])
        assert f"'{place.chain[1]}' refers to '{place.chain[0]}', which the store" in refused(done)
        quiet(getattr(place, way)("--no-closure", place.chain[0]))
        quiet(getattr(place, way)("--no-closure", place.chain[1]))
        assert set(facts(place.target)) == set(place.chain[:2])

    @pytest.mark.parametrize("way", ["to", "back"])
    def test_includeOutputs(self, place, way):
        """With C{--include-outputs} what a derivation has built goes with it."""
        store = opened(place.source)
        session = store.openSession()
        drvPath, outputs = addDerivation(session, "thing", "true")
        nar = makeNar(b"built")
        addObject(session, makeInfo("thing", nar, path=outputs["out"]), nar)
        store.close()
        quiet(getattr(place, way)(drvPath))
        assert set(facts(place.target)) == {drvPath}
        quiet(getattr(place, way)("--include-outputs", drvPath))
        assert set(facts(place.target)) == {drvPath, outputs["out"]}

    def test_substitute(self, place):
        """With C{--substitute} the remote is asked to fetch by itself; not in a dry run, which changes nothing."""
        spy = program(place.box, 'tee -a sent | "$SERVER" "$@"')
        for options, expected in [(["-s"], (1, 1)), ([], (1, 0)), (["-s", "--dry-run"], (0, 0))]:
            (place.box.path / "sent").write_bytes(b"")
            assert place.to(*options, program=spy).returncode == 0
            lock, substitute = expected
            sent = (place.box.path / "sent").read_bytes()[16:]
            assert sent.startswith(number(1) + number(lock) + number(substitute)), options

    @pytest.mark.parametrize("way", ["to", "back"])
    def test_jobs(self, place, way):
        """With C{--jobs} several sessions do it."""
        spy = program(place.box, 'echo "$@" >>sessions; exec "$SERVER" "$@"')
        quiet(getattr(place, way)("--jobs", "3", program=spy))
        assert len((place.box.path / "sessions").read_text().splitlines()) == 3
        assert facts(place.target) == facts(place.source)

    def test_maxConnections(self, place):
        """Without C{--jobs} the URL says how many sessions; a dry run needs one."""
        spy = program(place.box, 'echo "$@" >>sessions; exec "$SERVER" "$@"')
        there = f"{url(place.target, spy)}&max-connections=3"
        for option, expected in (("--dry-run", 1), ("--jobs=2", 3), ("--json", 6)):
            words = ("copy", "--store", place.source, "--to", there, option, place.chain[-1])
            assert place.box.run("nixserve", *words).returncode == 0
            assert len((place.box.path / "sessions").read_text().splitlines()) == expected

    def test_signatures(self, place):
        """Signatures are copied and not judged, with Nix's option to that effect or without."""
        nar = makeNar(b"signed")
        info = makeInfo("signed", nar, sigs=frozenset({"key:" + "A" * 86 + "=="}))
        store = opened(place.source)
        addObject(store.openSession(), info, nar)
        store.close()
        quiet(place.back(info.path))
        quiet(place.back("--no-check-sigs"))
        assert facts(place.target)[info.path].sigs == info.sigs

    def test_service(self, place, service):
        """A running service is reached over its socket."""
        running = service()
        there = f"unix://{running.socket}"
        quiet(place.box.run("nixserve", "copy", "--store", place.source, "--to", there, place.chain[-1]))
        quiet(place.box.run("nixserve", "copy", "--store", place.target, "--from", there, place.chain[-1]))
        assert facts(place.target) == facts(place.source) == facts(running.state / "store")


class TestReadOnly:
    """A store here that this user may not write."""

    def test_to(self, place):
        """It can be copied from: then nothing here is kept from a collector."""
        words = ["--store", f"{place.source}?read-only=true", "--to", url(place.target)]
        quiet(place.box.run("nixserve", "copy", *words, place.chain[-1]))
        assert facts(place.target) == facts(place.source)

    def test_from(self, place):
        """Nothing can be copied to it, which is said before anything is connected."""
        done = place.back(program="/nonexistent", store=f"{place.source}?read-only=true")
        assert done.stderr == (
            f"error: the store here ({place.source}/nix/store): this user may not write to it; run this as one who "
            "may, or name a store of your own with --store\n"
        )
        assert done.returncode == 1


class TestDryRun:
    """C{--dry-run}."""

    @pytest.mark.parametrize("way", ["to", "back"])
    def test_dryRun(self, place, way):
        """What would be copied is printed, references first, with sizes; nothing is."""
        quiet(getattr(place, way)(place.chain[0]))
        before = facts(place.target)
        done = getattr(place, way)("--dry-run")
        known = facts(place.source)
        assert done.stdout == "".join(f"{path}\t{known[path].narSize}\n" for path in place.chain[1:])
        size = sum(known[path].narSize for path in place.chain[1:])
        assert done.stderr == f"would copy 3 paths, {size} B; 1 there already\n"
        assert done.returncode == 0
        assert facts(place.target) == before

    def test_makesNoStore(self, place):
        """A store that is not there yet is empty, and stays so."""
        done = place.back("--dry-run")
        assert (done.returncode, len(done.stdout.splitlines())) == (0, 4)
        assert not place.target.exists()

    def test_asksForNoRights(self, place):
        """It needs no right to write there."""
        spy = program(place.box, 'echo "$@" >>arguments; exec "$SERVER" "$@"')
        place.to("--dry-run", program=spy)
        place.to(program=spy)
        first, second = (place.box.path / "arguments").read_text().splitlines()
        assert "--write" not in first and "--write" in second

    def test_json(self, place):
        """The same as facts."""
        done = place.to("--dry-run", "--json")
        sizes = {path: info.narSize for path, info in facts(place.source).items()}
        total = {"paths": 4, "narBytes": sum(sizes.values()), "present": 0}
        missing = [{"event": "missing", "path": path, "narSize": sizes[path]} for path in place.chain]
        assert events(done) == [{"event": "planned", **total}, *missing, {"event": "dry-run", **total}]


class TestTelling:
    """What is said."""

    def test_json(self, place):
        """One object a line: planned, each path, done."""
        done = place.to("--json")
        sizes = {path: info.narSize for path, info in facts(place.source).items()}
        total = {"paths": 4, "narBytes": sum(sizes.values()), "present": 0}
        copied = [{"event": "copied", "path": path, "narSize": sizes[path]} for path in place.chain]
        assert events(done) == [{"event": "planned", **total}, *copied, {"event": "done", **total}]

    @pytest.mark.parametrize("way", ["--to", "--from"])
    def test_terminal(self, place, way):
        """On a terminal there are a bar with paths and bytes, and a sentence at the end."""
        source, target = place.source, place.target
        here, there = (source, target) if way == "--to" else (target, source)
        process, shown = onTerminal(place.box, "copy", "--store", here, way, url(there), place.chain[-1])
        assert process.returncode == 0
        size = sum(info.narSize for info in facts(source).values())
        assert re.search(r"copying: +[0-9]+%\|.*[0-9.]+k?/[0-9.]+k?, [0-9]/4 paths \[", shown), shown
        assert shown.splitlines()[-1].strip("\r") == f"copied 4 paths, {size} B; 0 there already"

    def test_remoteLines(self, place):
        """What the remote says on standard error is passed on, with its name, without what a terminal would obey."""
        talkative = program(place.box, 'printf \'take \\033[2Jcare\\nhalf a line\' >&2; exec "$SERVER" "$@"')
        done = place.to(program=talkative)
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr == "ssh://localhost: take care\nssh://localhost: half a line\n"

    def test_remoteLinesAndBar(self, place):
        """A line does not break the bar."""
        slow = program(
            place.box,
            "(until [ -e half ]; do sleep 0.05; done; sleep 1.5; echo careful >&2) & "
            f'"$SERVER" "$@" | ({passing(place.box, 1500, 3)}; cat)',
        )
        words = ["copy", "--store", place.target, "--from", url(place.source, slow), place.chain[-1]]
        process, shown = onTerminal(place.box, *words)
        assert process.returncode == 0
        assert re.search(r"\rssh://localhost: careful\r?\n", shown), shown

    def test_nothingTwice(self, place):
        """What the remote says before it fails stands in the error alone."""
        failing = program(place.box, "echo 'the disk is on fire' >&2; exit 3")
        done = place.to(program=failing)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line.startswith("error: ssh://localhost: ") and "the disk is on fire" in line


class TestFailures:
    """Each is one line that says which side it is about."""

    @pytest.mark.parametrize(
        ("words", "status", "complaint"),
        [
            (["x"], 2, "Give either --to URL or --from URL."),
            (["--to", "ssh://h", "--from", "ssh://h", "x"], 2, "Give either --to URL or --from URL."),
            (["--to", "ssh://h"], 2, "Missing argument"),
            (["--from", "ssh://h", "-s", "x"], 2, "--substitute goes with --to"),
            (["--to", "ssh://h", "--no-closure", "--include-outputs", "x"], 2, "which --no-closure leaves out"),
            (["--to", "ssh://h", "--jobs", "0", "x"], 2, "Invalid value for '--jobs'"),
            (["--to", "ssh://h?colour=red", "x"], 2, "unknown parameter 'colour'"),
            (["--to", "http://h", "x"], 2, "is no remote store"),
            (["--to", "ssh://h", "x"], 1, "path 'x' is not in the Nix store"),
            (["--to", "ssh://h?store=/gnu/store", "/nix/store/x"], 2, "nothing can be copied between them"),
            (["--to", "ssh://h", "--store", "s3://x", "x"], 2, "cannot open store 's3://x'"),
        ],
    )
    def test_mistakes(self, box, words, status, complaint):
        """What cannot be is said before anything is opened or connected, in C{--json} as well."""
        done = box.run("nixserve", "copy", "--store", box.path / "store", *words)
        assert complaint in refused(done)
        assert done.returncode == status
        assert not (box.path / "store").exists()

    def test_notHere(self, place):
        """A path that is not valid here."""
        path = place.chain[0] + "x"
        done = place.to(path)
        assert done.stderr == (
            f"error: the store here ({place.source}/nix/store): path '{path}' is not valid; build it or copy it here "
            "first, or name another store with --store\n"
        )
        assert done.returncode == 1

    @pytest.mark.parametrize("closure", [[], ["--no-closure"]])
    def test_notThere(self, place, closure):
        """A path that is not valid there."""
        path = place.chain[0] + "x"
        done = place.back(path, *closure)
        assert re.fullmatch(rf"error: ssh://localhost: .*path '{path}' is not valid.*\n", done.stderr)
        assert done.returncode == 1
        assert roots(place.target) == []

    def test_noStoreHere(self, place):
        """Copying from a store that is not there makes none."""
        missing = place.box.path / "missing"
        done = place.box.run("nixserve", "copy", "--store", missing, "--to", url(place.target), place.chain[0])
        assert f"error: the store here ({missing}/nix/store): " in refused(done)
        assert not missing.exists()

    def test_json(self, place):
        """With C{--json} the error is a fact as well, with the side."""
        [fact] = events(place.to("--json", place.chain[0] + "x"))
        assert (fact["event"], fact["side"], fact["exitStatus"]) == ("error", "here", 1)
        [fact] = events(place.to("--json", program="/nonexistent"))
        assert (fact["event"], fact["side"], fact["exitStatus"]) == ("error", "there", 1)
        [fact] = events(place.box.run("nixserve", "copy", "--json", "--to", "http://x", "/nix/store/x"))
        assert (fact["event"], fact["side"], fact["exitStatus"]) == ("error", "", 2)

    @pytest.mark.parametrize("way", ["to", "back"])
    def test_halfWay(self, place, way):
        """After a copy that broke half way another line says that what has come stays. Doing it again does the rest."""
        chain = addChain(place.source, 20, 100_000)
        some = passing(place.box, 1_000_000)
        cut = {"to": f'{some} | "$SERVER" "$@"', "back": f'"$SERVER" "$@" | {some}'}
        done = getattr(place, way)(chain[-1], program=program(place.box, cut[way]))
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 2, done.stderr
        error, hint = done.stderr.splitlines()
        assert error.startswith("error: ssh://localhost: ")
        match = re.fullmatch(r"([0-9]+) paths copied before that stay; run it again to copy the rest", hint)
        assert match, hint
        arrived = facts(place.target)
        # A remote may have stored more than it could say.
        assert 0 < int(match[1]) <= len(arrived) < 20
        # A server behind a pipe hears of the end a little later.
        waitUntil(lambda: roots(place.target) == [])
        quiet(getattr(place, way)(chain[-1]))
        assert facts(place.target).keys() == set(chain)

    def test_closedOutput(self, place):
        """Facts that nobody reads end it without a word, as they end other programs."""
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = place.to("--json", stdout=writing, stderr=subprocess.PIPE, capture_output=False)
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")


class TestInterrupted:
    """Ctrl-C."""

    def interrupt(self, place, words, ready, signalNumber=signal.SIGINT):
        """Start it, wait until it is C{ready}, end it; gives the process and what it said."""
        with open(place.box.path / "err", "wb") as err:
            process = place.box.spawn("nixserve", "copy", *words, stdout=subprocess.DEVNULL, stderr=err)
        waitUntil(lambda: ready() or process.poll() is not None)
        begun = time.monotonic()
        process.send_signal(signalNumber)
        process.wait(TIMEOUT)
        assert time.monotonic() - begun < 5
        assert process.returncode == 130, (place.box.path / "err").read_text()
        assert (place.box.path / "err").read_text().strip() == "Aborted!"

    @pytest.mark.parametrize("signalNumber", [signal.SIGINT, signal.SIGTERM])
    def test_waiting(self, place, signalNumber):
        """A remote that says nothing does not hold it up. Until then the path is a root here."""
        directory = place.source / "nix/var/nix/temproots"

        def isRoot():
            return any(place.chain[-1].encode() in file.read_bytes() for file in directory.iterdir())

        there = url(place.target, program(place.box, f'"$SERVER" "$@" | {passing(place.box, 16, TIMEOUT)}'))
        words = ["--store", place.source, "--to", there, place.chain[-1]]
        self.interrupt(place, words, isRoot, signalNumber)
        assert roots(place.source) == []

    def test_terminal(self, place):
        """On a terminal Ctrl-C goes to the remote program too, and what that says of it is not shown."""
        begun = 'trap "echo interrupted >&2; exit 1" INT; touch started; sleep 60 & wait'
        there = url(place.target, program(place.box, f'"$SERVER" "$@" | {passing(place.box, 16)}; {begun}'))
        words = ["copy", "--store", place.source, "--to", there, place.chain[-1]]
        with open(place.box.path / "err", "wb") as err:
            process = place.box.spawn("nixserve", *words, stdout=err, stderr=err, start_new_session=True)
        waitUntil((place.box.path / "started").exists)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(5) == 130
        assert (place.box.path / "err").read_text().strip() == "Aborted!"

    def test_connecting(self, place):
        """Nor does one that does not even answer."""
        program(place.box, "touch started; exec sleep 60")
        words = ["--store", place.source, "--to", url(place.target, place.box.path / "remote"), place.chain[-1]]
        self.interrupt(place, words, (place.box.path / "started").exists)

    @pytest.mark.parametrize("way", ["to", "back"])
    def test_half(self, place, way):
        """In the middle of an object, it is not registered, and what came before stays. Again, it copies the rest."""
        chain = addChain(place.source, 3, 1_000_000)
        some = passing(place.box, 1_500_000, TIMEOUT)
        slow = {"to": f'{some} | "$SERVER" "$@"', "back": f'"$SERVER" "$@" | {some}'}
        script = program(place.box, slow[way])
        if way == "to":
            words = ["--store", place.source, "--to", url(place.target, script), chain[-1]]
        else:
            words = ["--store", place.target, "--from", url(place.source, script), chain[-1]]

        def isHalf():
            return (place.box.path / "half").exists() and list(place.target.glob("nix/store/*-path-0"))

        self.interrupt(place, words, isHalf)
        waitUntil(lambda: roots(place.target) == [])
        assert set(facts(place.target)) == set(chain[:1])
        quiet(getattr(place, way)(chain[-1]))
        assert facts(place.target).keys() == set(chain)
        # The remote of the first try has somebody behind it who holds its pipe and does not read.
        waitUntil(lambda: roots(place.source) == [])


def test_help(box):
    """The help names the options, and costs no Twisted."""
    done = box.run("nixserve", "copy", "--help")
    for option in ("--to", "--from", "--store", "--no-closure", "--substitute", "--include-outputs", "--jobs"):
        assert option in done.stdout
    assert os.path.basename(done.args[0]) == "nixserve"

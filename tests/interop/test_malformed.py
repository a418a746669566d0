"""
What no client should send, sent to C{nixserve-store --serve --write}: one line of error, exit status 1, nothing
registered, nothing outside the object's own place, and no debris but that of real Nix: the object, and a lock file of
size 0.
"""

import os
from dataclasses import replace

import pytest

from nixserve.testing import makeInfo, makeNar
from tests.interop.archives import MALFORMED, deep
from tests.interop.conversations import (
    addHeader,
    addToStoreNar,
    converse,
    dumpStorePath,
    exportItem,
    hello,
    importPaths,
    queryPathInfos,
    queryValidPaths,
    string,
    strings,
    u64,
)
from tests.interop.nix import ourProgram
from tests.interop.stores import add, assertVerified, infos, opened, temporaryRoots

MIB = 1024 * 1024
GOOD = makeNar({"file": b"good", "link": "file"})
UNKNOWN = "/nix/store/00000000000000000000000000000000-unknown"


class Victim:
    """
    A store with one object in it, and what lies around it.

    @ivar root: of the store.
    @ivar path: of the object.
    """

    def __init__(self, directory):
        self.directory = directory
        self.root = directory / "root"
        # Where the hostile ones aim: from inside an object, three levels up.
        (self.root / "outside").mkdir(parents=True)
        (directory / "outside").mkdir()
        with opened(self.root) as session:
            self.path = add(session, "resident", GOOD)
        # For real Nix's collector.
        (self.root / "nix/var/nix/gcroots/resident").symlink_to(self.path)
        self.around = self._around()

    def _around(self):
        """Everything outside the directories of the store, which are looked at apart."""
        found = {}
        for place, directories, files in os.walk(self.directory):
            if place == f"{self.root}/nix":
                for own in ("store", "var"):
                    directories.remove(own)
            for name in directories + files:
                path = os.path.join(place, name)
                found[path] = (os.lstat(path).st_mode, None if name in directories else os.path.getsize(path))
        return found

    def send(self, nix, data, **options):
        """Say something to a server of ours; what came of it."""
        return converse(
            nix, [ourProgram("nixserve-store"), "--serve", "--write", "--store", self.root], data, **options
        )

    def assertUnharmed(self, nix, debris=()):
        """
        @param debris: path of the object that may have been begun.
        """
        assert self._around() == self.around
        assert not os.path.exists("/tmp/nixserve-interop-evil")
        assert list(infos(nix, self.root)) == [self.path]
        store = f"{self.root}/nix/store"
        allowed = {".links", os.path.basename(self.path)}
        if debris:
            allowed |= {os.path.basename(debris), os.path.basename(debris) + ".lock"}
        assert set(os.listdir(store)) <= allowed
        for name in os.listdir(store):
            assert not name.endswith(".lock") or os.path.getsize(f"{store}/{name}") == 0
        assert temporaryRoots(self.root) == []


@pytest.fixture(scope="module")
def sharedVictim(scratch):
    """One for all tests that leave it as it was."""
    place = scratch / "victim"
    place.mkdir()
    return Victim(place)


@pytest.fixture
def victim(nix, sharedVictim):
    """Cleared of debris afterwards by real Nix's collector."""
    yield sharedVictim
    nix.run("nix-store", "--gc", store=sharedVictim.root)
    sharedVictim.assertUnharmed(nix)


def assertRefused(outcome, replies=b""):
    """One line of error, exit status 1, and only these replies."""
    assert outcome.reply == replies
    assert outcome.status == 1
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    assert "internal error" not in outcome.stderr


@pytest.mark.parametrize("name", MALFORMED)
def test_archive(nix, victim, name):
    """Hash and size are right, the NAR itself is not."""
    nar = MALFORMED[name]
    info = makeInfo("hostile", nar)
    outcome = victim.send(nix, hello() + addToStoreNar(info, nar) + queryValidPaths([]))
    print(outcome.stderr)
    assertRefused(outcome)
    victim.assertUnharmed(nix, info.path)


@pytest.mark.parametrize("name", [name for name in MALFORMED if not name.startswith(("surplus", "two", "cut"))])
def test_importedArchive(nix, victim, name):
    """The same in an export stream, where no size is announced; nothing is left of it at all."""
    nar = MALFORMED[name]
    outcome = victim.send(nix, hello() + importPaths(exportItem(nar, makeInfo("hostile", nar).path)))
    assertRefused(outcome)
    victim.assertUnharmed(nix)


@pytest.mark.parametrize("levels", [2500, 4000, 5000, 100_000])
def test_deepArchive(nix, directory, levels):
    """
    Nested so deeply that the files at the bottom have no path that the system takes. Real Nix cannot restore it; an
    object of this kind, or a piece of one, would stop every later collection and verification of the store.
    """
    (directory / "victim").mkdir()
    victim = Victim(directory / "victim")
    nar = deep(levels)
    info = makeInfo("deep", nar)
    outcome = victim.send(nix, hello() + addToStoreNar(info, nar))
    nix.run("nix-store", "--gc", store=victim.root)
    assertVerified(nix, victim.root)
    assertRefused(outcome)
    victim.assertUnharmed(nix)


def test_nextOne(nix, victim):
    """Whoever adds the path after a failure succeeds: what was left behind is in nobody's way."""
    info = makeInfo("contested", GOOD)
    for nar in (GOOD[:-8] + b"\1" * 8, GOOD[:100], b"x" * len(GOOD)):
        assertRefused(victim.send(nix, hello() + addToStoreNar(info, nar.ljust(len(GOOD), b"\0"))))
        victim.assertUnharmed(nix, info.path)
    outcome = victim.send(nix, hello() + addToStoreNar(info, GOOD) + dumpStorePath(info.path))
    assert outcome.reply == u64(1) + GOOD
    assert not os.path.exists(f"{victim.root}{info.path}.lock")
    assertVerified(nix, victim.root)


LIES = {
    "wrong hash": {"narHash": "0" * 64},
    "size one too small": {"narSize": len(GOOD) - 1},
    "size too small": {"narSize": len(GOOD) - 8},
    "size too large": {"narSize": len(GOOD) + 8},
    "size 0": {"narSize": 0},
    "size 2^63": {"narSize": 1 << 63},
    "size 2^64 - 1": {"narSize": (1 << 64) - 1},
    "missing reference": {"references": [UNKNOWN]},
    "reference elsewhere": {"references": ["/etc/passwd"]},
    "path elsewhere": {"path": "/etc/passwd"},
    "path above the store": {"path": "/nix/store/../../etc/passwd"},
    "path inside the object": {"path": "/nix/store/00000000000000000000000000000000-a/../../x"},
    "path of a lock": {"path": "/nix/store/.links"},
    "no derivation": {"path": "/nix/store/33333333333333333333333333333333-x.drv"},
    "deriver that is no path": {"deriver": "x.drv"},
    "content address of something else": {"ca": "text:sha256:" + "0" * 52},
    "content address that is none": {"ca": "fixed:"},
    "signature that is none": {"sigs": ["x"]},
    "hash that is none": {"narHash": "zz"},
}


@pytest.mark.parametrize("name", LIES)
def test_lie(nix, victim, name):
    """The NAR is right, what is said about it is not."""
    info = makeInfo("lie", GOOD)
    said = LIES[name]
    assertRefused(victim.send(nix, hello() + addToStoreNar(info, GOOD, **said) + bytes(8)))
    victim.assertUnharmed(
        nix, info.path if "path" not in said else UNKNOWN.replace("0" * 32, "3" * 32).replace("unknown", "x.drv")
    )


def pathsOf(count, length):
    """A set of distinct paths, all of one length."""
    width = length - 44
    return strings([f"/nix/store/{'0' * 32}-{number:0{width}d}" for number in range(count)])


LIMITS = {
    "wrong magic": lambda: u64(0x5452EECB) + u64(0x207),
    "path of 4 KiB": lambda: hello() + queryValidPaths(["/nix/store/" + "0" * 4096]),
    "length of a path": lambda: hello() + u64(3) + u64(1 << 40),
    "count of a set": lambda: hello() + u64(2) + u64(1_000_001) + string(UNKNOWN) * 64,
    "length of a string": lambda: hello() + addHeader(UNKNOWN, "0" * 64, 96)[:-8] + u64(16 * MIB + 1) + b"x" * MIB,
    "a whole request": lambda: hello() + u64(2) + u64(900_000) + pathsOf(640_000, 208)[8:],
    "many signatures": lambda: hello() + addHeader(UNKNOWN, "0" * 64, 96, sigs=["x" * MIB] * 130),
    "padding of a path": lambda: hello() + u64(3) + string(UNKNOWN)[:-1] + b"x",
    "unknown command": lambda: hello() + u64(77),
    "import: no marker": lambda: hello() + u64(4) + u64(3),
    "import: path elsewhere": lambda: hello() + importPaths(exportItem(GOOD, "/etc/passwd")),
    "import: path going up": lambda: hello() + importPaths(exportItem(GOOD, "/nix/store/../../../outside/evil")),
    "import: reference that is not valid": lambda: (
        hello()
        + importPaths(
            exportItem(GOOD, "/nix/store/33333333333333333333333333333333-x.drv".replace(".drv", ""), [UNKNOWN])
        )
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit(nix, victim, name):
    """Lengths and counts beyond the limits, and what else is malformed outside a NAR."""
    outcome = victim.send(nix, LIMITS[name]())
    assertRefused(outcome)
    victim.assertUnharmed(nix, "/nix/store/33333333333333333333333333333333-x")


def test_largeButLegal(nix, victim):
    """Just below the limits everything works: 300,000 paths in one question."""
    outcome = victim.send(nix, hello() + u64(1) + bytes(16) + pathsOf(300_000, 64) + queryPathInfos([victim.path]))
    assert outcome.status == 0 and outcome.reply[:8] == u64(0) and victim.path.encode() in outcome.reply


def test_selfReferenceTwice(nix, victim):
    """An object that says to refer to itself, with a reference that is not valid besides."""
    info = makeInfo("self", GOOD)
    info = replace(info, references=frozenset([info.path, UNKNOWN]))
    assertRefused(victim.send(nix, hello() + addToStoreNar(info, GOOD)))
    victim.assertUnharmed(nix, info.path)

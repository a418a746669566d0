"""
The same conversations with real Nix's server and with ours: the same bytes come back, with the same exit status, and
each error is one line.
"""

import re
import shutil
from typing import NamedTuple

import pytest

from tests.interop.conversations import (
    converse,
    dumpStorePath,
    hello,
    queryPathInfos,
    queryValidPaths,
    string,
    strings,
    u64,
)
from tests.interop.nix import ourProgram
from tests.interop.scripts import READING, REFUSED, UNKNOWN, WRITING, Cast
from tests.interop.stores import infos, temporaryRoots

SERVER_MAGIC = u64(0x5452EECB)
OFFSET = re.compile(r" at offset \d+$")


class Difference(NamedTuple):
    """
    One difference that is meant.

    @ivar why: the reason.
    @ivar says: part of what ours says on standard error, if it says something else.
    @ivar answers: whether the bytes on standard output or the exit status differ, too.
    """

    why: str
    says: str | None = None
    answers: bool = False


#: Where ours is meant to differ from real Nix 2.8. Anything else is a bug. Besides, ours announces 2.8 where Nix 2.8
#: announces 2.7, and says at which offset it found something malformed.
DIFFERENCES = {
    "client version 0x300": Difference(
        "the lower version is spoken, as Nix does from 2.23 on; 2.8 looks at the client's minor number alone",
        answers=True,
    ),
    "export: unknown": Difference("2.8 announces an object before it looks whether it has it", answers=True),
    "path: empty": Difference("2.8 dies of an assertion", "not an absolute path: ''", answers=True),
    "add: malformed signature": Difference(
        "2.8 stores it, and 2.34 then cannot read the path; refused as by 2.34", "is corrupt", answers=True
    ),
    "text": Difference("2.8 reads it as an integer that is too large", "protocol mismatch"),
    "valid: flag too large": Difference(
        "2.8 adds the name of a C++ type", "serialised integer 4294967296 is too large"
    ),
    "command 4294967296": Difference("2.8 adds the name of a C++ type", "serialised integer 4294967296 is too large"),
    "command 18446744073709551615": Difference(
        "2.8 adds the name of a C++ type", "serialised integer 18446744073709551615 is too large"
    ),
    "command 4294967295": Difference("2.8 takes it for a negative number", "unknown serve command 4294967295"),
    "path: the store itself and a slash": Difference(
        "2.8 shows the path normalised", "path '/nix/store/' is not in the Nix store"
    ),
    "path: no ASCII in the name": Difference("2.8 shows half a character", "contains illegal character"),
    "path: no text": Difference("2.8 shows half a character", "contains illegal character"),
    "length without end": Difference("2.8 tries to allocate it", "the limit is 4096"),
    "count without end": Difference("2.8 has no limit and goes on reading", "the limit is 1000000"),
    "add: wrong hash": Difference("2.8 has the hashes on further lines", "hash mismatch importing path"),
    "add: size 0": Difference("ours names the path", "narInfo is too old and missing the narSize field"),
    "add: size too small": Difference("ours knows that a NAR is cut off", "bad archive: unexpected end"),
    "add: no NAR": Difference("ours knows that a NAR is cut off", "bad archive: unexpected end"),
    "add: size too large": Difference("ours finds more bytes first", "bad archive: data after its end"),
    "add: unknown content address": Difference("ours shows it whole", "expected 'text:' or 'fixed:'"),
    "add: content address of something else": Difference(
        "refused before the NAR is read", "because it claims to be content-addressed but isn't"
    ),
}


@pytest.fixture(scope="session")
def cast(nix, oddStore):
    """Who the conversations are about."""
    drv = next(path for path in oddStore.paths if path.endswith("-odd.drv"))
    signed = next(path for path, info in infos(nix, oddStore.root).items() if info["signatures"])
    return Cast(oddStore.paths, oddStore.top, drv, signed)


@pytest.fixture
def twins(directory, oddStore):
    """Two equal stores, to be changed alike: by real Nix and by us."""
    roots = {who: directory / who for who in ("real", "ours")}
    for root in roots.values():
        shutil.copytree(oddStore.root, root, symlinks=True)
        # Nix kills the server that it runs for ssh://localhost when it has what it wants: those leave their files.
        for name in temporaryRoots(root):
            (root / "nix/var/nix/temproots" / name).unlink()
    return roots


def server(who, root, *options):
    """The command of a server."""
    program = {"real": "nix-store", "ours": ourProgram("nixserve-store")}[who]
    return [program, "--serve", *options, "--store", root]


def compare(nix, roots, data, name, *options):
    """Hold a conversation with both."""
    real, ours = (converse(nix, server(who, roots[who], *options), data) for who in ("real", "ours"))
    print(f"real: {real.status} {real.stderr.strip()}\nours: {ours.status} {ours.stderr.strip()}")
    greeted = len(data) >= 8 and data[:8] == hello()[:8]
    assert real.stdout[:16] == (SERVER_MAGIC + u64(0x207) if greeted else b"")
    assert ours.stdout[:16] == (SERVER_MAGIC + u64(0x208) if greeted else b"")
    assert ours.status == (1 if ours.errors else 0)
    assert ours.stderr == "".join(f"{line}\n" for line in ours.errors) and len(ours.errors) <= 1
    difference = DIFFERENCES.get(name, Difference("there is none"))
    assert ((ours.reply, ours.status) != (real.reply, real.status)) is difference.answers, difference.why
    if difference.says is not None:
        assert difference.says in ours.stderr
        assert OFFSET.sub("", ours.stderr) != real.stderr, "the difference is gone"
    else:
        assert [OFFSET.sub("", line) for line in ours.errors] == real.errors


@pytest.mark.parametrize("name", READING)
def test_reading(nix, oddStore, cast, name):
    """Questions, well and badly put, to servers that may not write."""
    compare(nix, dict.fromkeys(("real", "ours"), oddStore.root), READING[name](cast), name)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(nix, oddStore, cast, name):
    """What needs C{--write} is refused without, in the words of real Nix."""
    compare(nix, dict.fromkeys(("real", "ours"), oddStore.root), REFUSED[name](cast), name)


@pytest.mark.parametrize(
    "name", [name for name in READING if name.startswith(("valid", "client version 0x20", "pipe"))]
)
def test_readingWithWrite(nix, twins, cast, name):
    """Servers that may write answer questions in the same way."""
    compare(nix, twins, READING[name](cast), name, "--write")


@pytest.mark.parametrize("name", WRITING)
def test_writing(nix, twins, cast, name):
    """What is sent to be added is there afterwards in both stores or in neither, with the same facts."""
    compare(nix, twins, WRITING[name](cast), name, "--write")
    if name == "add: malformed signature":
        return
    assert infos(nix, twins["ours"]) == infos(nix, twins["real"])
    assert temporaryRoots(twins["ours"]) == []


def infoBytes(info, minor):
    """What a client of some minor version gets to read about a path, from what real Nix says about it otherwise."""
    data = string(info["path"]) + string(info.get("deriver", "")) + strings(sorted(info["references"]))
    data += u64(info["narSize"]) * 2
    if minor >= 4:
        data += string(info["narHash"]) + string(info.get("ca", "")) + strings(sorted(info["signatures"]))
    return data


@pytest.mark.parametrize("who", ["real", "ours"])
@pytest.mark.parametrize("minor", range(9))
def test_layouts(nix, oddStore, cast, who, minor):
    """The layout of every reply at every minor version, byte for byte."""
    known = infos(nix, oddStore.root)
    hashes = nix.lines("nix-store", "--query", "--hash", *cast.paths, store=oddStore.root)
    asked = [*cast.paths, UNKNOWN]
    data = hello(0x200 | minor) + queryValidPaths(asked) + queryPathInfos(asked) + dumpStorePath(cast.top)
    outcome = converse(nix, server(who, oddStore.root), data)
    nar = nix.run("nix", "store", "dump-path", cast.top, "--store", oddStore.root).stdout
    described = b"".join(
        infoBytes(known[path] | {"narHash": narHash}, minor) for path, narHash in zip(cast.paths, hashes, strict=True)
    ) + string("")
    assert outcome.reply == strings(cast.paths) + described + nar
    assert (outcome.status, outcome.stderr) == (0, "")

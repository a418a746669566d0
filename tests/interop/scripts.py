"""
Conversations, by name: what is sent to real Nix's server and to ours, to see the same come back.

Each is a function of a L{Cast}, the paths that it speaks about.
"""

from dataclasses import dataclass, replace

from nixserve.codec.hashes import hashBytes
from nixserve.testing import Executable, makeInfo, makeNar
from tests.interop.conversations import (
    addHeader,
    addToStoreNar,
    buildPaths,
    dumpStorePath,
    exportItem,
    exportPaths,
    hello,
    importPaths,
    queryClosure,
    queryPathInfos,
    queryValidPaths,
    string,
    strings,
    u64,
)

UNKNOWN = "/nix/store/00000000000000000000000000000000-unknown"
OTHER = "/nix/store/11111111111111111111111111111111-other"


@dataclass(frozen=True)
class Cast:
    """
    @ivar paths: valid ones, sorted.
    @ivar top: the one that refers to all others.
    @ivar drv: a derivation whose outputs are valid.
    @ivar signed: one with signatures.
    """

    paths: list
    top: str
    drv: str
    signed: str


NEW = makeNar({"bin": {"run": Executable(b"#!/bin/sh\n")}, "link": "bin/run", "empty": b""})


def new(tag, references=(), **fields):
    """An object that no store has."""
    return makeInfo(f"new-{tag}", NEW, references, **fields)


#: Without C{--write} and with it these are answered alike.
READING = {
    "nothing": lambda c: b"",
    "half of the magic": lambda c: hello()[:4],
    "only the magic": lambda c: hello()[:8],
    "half of the version": lambda c: hello()[:12],
    "hello": lambda c: hello(),
    "wrong magic": lambda c: u64(0x390C9DEC) + u64(0x207),
    "text": lambda c: b"GET / HTTP/1.0\r\n\r\n",
    **{
        f"client version {version:#x}": lambda c, version=version: (
            hello(version) + queryValidPaths(c.paths) + queryPathInfos([*c.paths[:3], c.signed])
        )
        for version in (0x000, 0x100, *range(0x200, 0x209), 0x2FF, 0x300, 0x307)
    },
    "valid: unsorted, repeated, unknown": lambda c: (
        hello() + queryValidPaths([*reversed(c.paths), UNKNOWN, c.top, OTHER, c.top])
    ),
    "valid: none": lambda c: hello() + queryValidPaths([]),
    "valid: flags": lambda c: hello() + queryValidPaths([c.top, UNKNOWN], lock=True, substitute=True),
    "valid: flags that are no bool": lambda c: hello() + queryValidPaths([c.top], lock=2, substitute=0xFFFFFFFF),
    "valid: flag too large": lambda c: hello() + queryValidPaths([c.top], lock=1 << 32),
    "infos: all": lambda c: hello() + queryPathInfos(c.paths),
    "infos: unsorted, repeated, unknown": lambda c: (
        hello() + queryPathInfos([UNKNOWN, c.top, *reversed(c.paths), c.top, OTHER])
    ),
    "infos: none known": lambda c: hello() + queryPathInfos([OTHER, UNKNOWN]),
    "infos: none": lambda c: hello() + queryPathInfos([]),
    "dump: all": lambda c: hello() + b"".join(map(dumpStorePath, c.paths)),
    "dump: unknown": lambda c: hello() + dumpStorePath(UNKNOWN),
    "dump: unknown after known": lambda c: hello() + dumpStorePath(c.top) + dumpStorePath(UNKNOWN),
    "export: all": lambda c: hello() + exportPaths(c.paths),
    "export: unsorted, repeated, signed": lambda c: hello() + exportPaths([c.top, *reversed(c.paths), c.top], sign=1),
    "export: some": lambda c: hello() + exportPaths([c.top, c.paths[0]]),
    "export: none": lambda c: hello() + exportPaths([]),
    "export: unknown": lambda c: hello() + exportPaths([UNKNOWN]),
    "closure": lambda c: hello() + queryClosure([c.top]),
    "closure: of a derivation": lambda c: hello() + queryClosure([c.drv]),
    "closure: of a derivation, with outputs": lambda c: hello() + queryClosure([c.drv], includeOutputs=True),
    "closure: with outputs by another number": lambda c: hello() + queryClosure([c.drv], includeOutputs=2),
    "closure: of several, with outputs": lambda c: hello() + queryClosure([c.drv, c.top, c.drv], includeOutputs=True),
    "closure: of none": lambda c: hello() + queryClosure([]),
    "closure: of an unknown one": lambda c: hello() + queryClosure([c.top, UNKNOWN]),
    "pipelined": lambda c: (
        hello()
        + (queryValidPaths(c.paths) + dumpStorePath(c.paths[0]) + queryPathInfos(c.paths)) * 3
        + queryClosure([c.top])
        + exportPaths([c.paths[0]])
        + queryValidPaths([UNKNOWN])
    ),
    **{
        f"path: {what}": lambda c, path=path: hello() + queryValidPaths([c.paths[0], path])
        for what, path in {
            "elsewhere": "/x/y",
            "short": "short",
            "empty": "",
            "the store itself": "/nix/store",
            "the store itself and a slash": "/nix/store/",
            "relative": "nix/store/00000000000000000000000000000000-a",
            "inside an object": f"{UNKNOWN}/bin",
            "without a name": "/nix/store/00000000000000000000000000000000-",
            "without a dash": "/nix/store/00000000000000000000000000000000",
            "short hash": "/nix/store/0000000000000000000000000000000-a",
            "wrong letter in the hash": "/nix/store/e0000000000000000000000000000000-a",
            "upper case in the hash": "/nix/store/A0000000000000000000000000000000-a",
            "blank in the name": f"{UNKNOWN} ",
            "slash in the name": "/nix/store/00000000000000000000000000000000-a%",
            "no ASCII in the name": f"{UNKNOWN}ü",
            "NUL in the name": f"{UNKNOWN}\0",
            "no text": b"/nix/store/00000000000000000000000000000000-\xff",
            "name of 211 characters": f"/nix/store/{'0' * 32}-{'n' * 211}",
            "name of 212 characters": f"/nix/store/{'0' * 32}-{'n' * 212}",
            "slash at the end": f"{UNKNOWN}/",
            "two slashes": "/nix//store///00000000000000000000000000000000-a",
            "dots": "/nix/./store/../store/00000000000000000000000000000000-a",
            "name with a dot in front": "/nix/store/00000000000000000000000000000000-.a",
        }.items()
    },
    "padding that is not zero": lambda c: hello() + queryValidPaths([UNKNOWN])[:-1] + b"\1",
    "length without end": lambda c: hello() + u64(2) + u64(1) + u64((1 << 63) - 1) + b"x" * 64,
    "count without end": lambda c: hello() + u64(2) + u64((1 << 63) - 1) + string(UNKNOWN),
    **{
        f"command {number}": lambda c, number=number: hello() + u64(number) + bytes(8)
        for number in (0, 10, 11, 99, 0xFFFFFFFF, 1 << 32, (1 << 64) - 1)
    },
    **{
        f"{size} bytes of a command": lambda c, size=size: hello() + queryValidPaths([c.top]) + u64(1)[:size]
        for size in (1, 7)
    },
    **{
        f"cut off after {size} bytes": lambda c, size=size: hello() + queryValidPaths([UNKNOWN])[:size]
        for size in (8, 9, 16, 24, 31, 32, 40, 60, 88)
    },
}

#: Of those who may not write: refused before the body is read.
REFUSED = {
    "import": lambda c: hello() + queryValidPaths([c.top]) + importPaths(),
    "import, body missing": lambda c: hello() + u64(4),
    "add": lambda c: hello() + addToStoreNar(new("refused"), NEW),
    "add, body missing": lambda c: hello() + u64(9),
    "build": lambda c: hello() + buildPaths([c.drv]),
    "build, body missing": lambda c: hello() + u64(6),
    "build a derivation": lambda c: hello() + u64(8),
}


def added(tag, **fields):
    """An object that no store has, added with something said otherwise."""
    return lambda c: hello() + addToStoreNar(new(tag), NEW, **fields)


SELF = "/nix/store/22222222222222222222222222222222-refers-to-itself"

#: Of those who may write, on stores of their own that are equal before and must be after.
WRITING = {
    "add": added("plain"),
    "add again": lambda c: hello() + addToStoreNar(new("plain"), NEW) * 2,
    "add a valid one: nothing is checked": lambda c: (
        hello() + addToStoreNar(new("top"), NEW, path=c.top, narHash="0" * 64, references=[UNKNOWN], deriver=OTHER)
    ),
    "add: malformed signature": added("badsig", sigs=["no signature"]),
    "add: hash in base 32": added("b32", narHash=hashBytes("sha256", NEW).nix32),
    "add: hash in base 64": added("b64", narHash=hashBytes("sha256", NEW).base64),
    "add: hash with its algorithm": added("typed", narHash=str(hashBytes("sha256", NEW))),
    "add: hash as SRI": added("sri", narHash=hashBytes("sha256", NEW).sri),
    "add: hash as nothing": added("nohash", narHash=""),
    "add: hash of another length": added("short", narHash="00"),
    "add: hash by another algorithm": added("sha1", narHash=str(hashBytes("sha1", NEW))),
    "add: deriver": added("deriver", deriver=OTHER.replace("other", "other.drv")),
    "add: references": lambda c: (
        hello() + addToStoreNar(new("references", [c.top, c.drv]), NEW) + queryPathInfos([c.top])
    ),
    "add: refers to itself": lambda c: (
        hello()
        + addToStoreNar(replace(new("self"), path=SELF, references=frozenset([SELF, c.top])), NEW)
        + queryPathInfos([SELF])
    ),
    "add: signatures": added("sigs", sigs=["b:" + "B" * 85 + "A==", "a:" + "A" * 86 + "=="]),
    "add: built here": added("ultimate", ultimate=1),
    "add: time": added("time", time=12345),
    "add: content address": lambda c: (
        hello()
        + addToStoreNar(new("ca"), NEW, ca=f"fixed:r:{hashBytes('sha256', NEW)}")
        + queryPathInfos([new("ca").path])
    ),
    "add: wrong hash": added("hash", narHash="0" * 64),
    "add: size 0": added("size0", narSize=0),
    "add: size too small": added("small", narSize=len(NEW) - 8),
    "add: size too large": lambda c: hello() + addToStoreNar(new("large"), NEW + bytes(8), narSize=len(NEW) + 8),
    "add: no NAR": added("junk", path=new("junk").path, narSize=8),
    "add: reference that is not valid": added("reference", references=[UNKNOWN]),
    "add: unknown content address": added("unknownca", ca="strange:sha256:" + "0" * 52),
    "add: content address of something else": added("otherca", ca="fixed:r:sha256:" + "0" * 52),
    "add: path elsewhere": added("elsewhere", path="/x/y"),
    "add: cut off": lambda c: (hello() + addToStoreNar(new("cut"), NEW))[:-100],
    "add: cut off before the NAR": lambda c: hello() + addToStoreNar(new("cut2"), b""),
    "two at once, then a question": lambda c: (
        hello()
        + addToStoreNar(new("one"), NEW)
        + addToStoreNar(new("two", [new("one").path]), NEW)
        + queryClosure([new("two", [new("one").path]).path])
    ),
    "import: nothing": lambda c: hello() + importPaths() + queryValidPaths([c.top]),
    "import: two": lambda c: (
        hello()
        + importPaths(
            exportItem(NEW, new("i1").path, deriver=c.drv),
            exportItem(NEW, new("i2").path, [new("i1").path, c.top], signature="an old one"),
        )
        + queryPathInfos([new("i1").path, new("i2").path])
    ),
    "import: a valid one": lambda c: hello() + importPaths(exportItem(NEW, c.top)) + queryPathInfos([c.top]),
    "import: reference that is not valid": lambda c: hello() + importPaths(exportItem(NEW, new("i3").path, [UNKNOWN])),
    "import: second refers to nothing": lambda c: (
        hello() + importPaths(exportItem(NEW, new("i4").path), exportItem(NEW, new("i5").path, [UNKNOWN]))
    ),
    "import: marker": lambda c: hello() + u64(4) + u64(2),
    "import: inner magic": lambda c: hello() + u64(4) + u64(1) + NEW + u64(0x4558494F) + string(UNKNOWN) + strings([]),
    "import: cut off": lambda c: (hello() + importPaths(exportItem(NEW, new("i6").path)))[:-24],
    "header alone": lambda c: hello() + addHeader(new("header").path, "0" * 64, 96)[:40],
}

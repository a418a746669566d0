"""
The messages of the serve protocol: values beside their bytes, and the captures that lie beside this file.

The bytes are put together by L{wire}, which knows nothing but integers and padded strings; what stands where follows
Nix 2.8 to 2.36. C{conversation-2.N.request} and C{.reply} are what real C{nix-store --serve --write} (Nix 2.8) was
sent and answered for L{conversation} by a client of version 2.N. To make them again, from the top of the repository::

    python -m tests.vectors.serve.messages
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from nixserve.codec import base32
from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.derivation import BasicDerivation, DerivationOutput
from nixserve.codec.hashes import Hash
from nixserve.codec.messages import (
    AddToStoreNar,
    BuildDerivation,
    BuildOptions,
    BuildPaths,
    BuildPathsResult,
    Command,
    DumpStorePath,
    ExportPaths,
    ImportPaths,
    QueryClosure,
    QueryPathInfos,
    QueryValidPaths,
)
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath

HERE = Path(__file__).parent
STORE_DIR = StoreDir()
MINORS = range(9)

CLIENT_MAGIC = bytes.fromhex("eb9d0c3900000000")
SERVER_MAGIC = bytes.fromhex("cbee525400000000")


def wire(*items: int | bool | str | bytes | list[Any]) -> bytes:
    """Integers, padded strings, and lists (a count and the elements) as they travel."""
    out = b""
    for item in items:
        if isinstance(item, int):
            out += int(item).to_bytes(8, "little")
        elif isinstance(item, list):
            out += len(item).to_bytes(8, "little") + b"".join(wire(one) for one in item)
        elif isinstance(item, tuple):
            out += wire(*item)
        else:
            data = item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item
            out += len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)
    return out


def path(name: str) -> StorePath:
    """A store path, well-formed and otherwise arbitrary."""
    return StorePath(f"/nix/store/{base32.encode(hashlib.sha256(name.encode()).digest()[:20])}-{name}")


def nar(data: bytes) -> bytes:
    """The NAR of a regular file."""
    return wire("nix-archive-1", "(", "type", "regular", "contents", data, ")")


def narInfo(name: str, data: bytes, *references: StorePath, **more: Any) -> ValidPathInfo:
    """What is registered about L{path}C{(name)} with the contents L{nar}C{(data)}."""
    archive = nar(data)
    return ValidPathInfo(
        path=path(name),
        narHash=Hash("sha256", hashlib.sha256(archive).digest()),
        narSize=len(archive),
        references=frozenset(references),
        **more,
    )


ZEROS = StorePath(f"/nix/store/{'0' * 32}-a")
ONES_DRV = StorePath(f"/nix/store/{'1' * 32}-a.drv")
COUNTING = Hash("sha256", bytes(range(32)))
COUNTING_NIX32 = "07qy3lf1n6hr30bic58l2c91240g1q6hq2qa1440f1h50h1h4080"
SIG = "key-1:" + "A" * 86 + "=="
SIG2 = "key-2:" + "A" * 86 + "=="

OPTIONS = BuildOptions(3600, 7200, 1 << 40, 2, True, True)
OPTIONS_AT = [
    (3600, 7200),
    (3600, 7200),
    (3600, 7200, 1 << 40),
    *[(3600, 7200, 1 << 40, 2, 1)] * 4,
    *[(3600, 7200, 1 << 40, 2, 1, 1)] * 2,
]
"""L{OPTIONS} by minor version."""


def optionsReadAt(minor: int) -> BuildOptions:
    """What is left of L{OPTIONS} at a minor version."""
    if minor < 2:
        return BuildOptions(3600, 7200)
    if minor < 3:
        return BuildOptions(3600, 7200, 1 << 40)
    return BuildOptions(3600, 7200, 1 << 40, 2, True, minor >= 7)


INFO = ValidPathInfo(
    path=path("full"),
    narHash=COUNTING,
    narSize=120,
    references=frozenset({path("full"), ZEROS, path("lib")}),
    deriver=ONES_DRV,
    registrationTime=1_600_000_000,
    ultimate=True,
    sigs=frozenset({SIG, SIG2}),
    ca=ContentAddress(ContentAddressMethod.NAR, COUNTING),
)

DERIVATION = BasicDerivation(
    name="a",
    outputs={
        "dev": DerivationOutput(None, "r:sha256"),
        "doc": DerivationOutput(None, "r:sha256", "impure"),
        "lib": DerivationOutput(None),
        "out": DerivationOutput(ZEROS),
        "src": DerivationOutput(path("src"), "sha256", COUNTING.hex),
    },
    inputSrcs=frozenset({path("lib"), ZEROS}),
    platform="x86_64-linux",
    builder="/bin/sh",
    args=("-c", ": > $out", ""),
    # What is no UTF-8 comes first in the order of bytes and last in that of Python's strings.
    env={"out": str(ZEROS), "b\udc80": "\udcff\0", "b\U0001f600": "é", "": ""},
)


class Message(NamedTuple):
    """
    One row.

    @ivar value: what the reader gives.
    @ivar minor: of the version at which it is read and written.
    @ivar data: its bytes.
    @ivar command: for a reply, of what; C{None} for a request, whose bytes begin with the number of the command.
    @ivar written: what is written, if the reader gives less at this version.
    """

    name: str
    value: Any
    minor: int
    data: bytes
    command: Command | None = None
    written: Any = None


def _texts(*paths: StorePath) -> list[Any]:
    return sorted(map(str, paths))


def _requests(minor: int) -> list[Message]:
    """One of each kind at a minor version."""
    options = optionsReadAt(minor)
    refs = _texts(path("full"), ZEROS, path("lib"))
    rows: list[tuple[str, Any, bytes, Any]] = [
        ("queryValidPaths", QueryValidPaths(frozenset({ZEROS}), True), wire(1, 1, 0, [ZEROS]), None),
        (
            "queryValidPathsSubstitute",
            QueryValidPaths(frozenset({ZEROS, path("b"), path("c")}), False, True),
            wire(1, 0, 1, _texts(ZEROS, path("b"), path("c"))),
            None,
        ),
        ("queryValidPathsEmpty", QueryValidPaths(frozenset(), True), wire(1, 1, 0, []), None),
        ("queryPathInfos", QueryPathInfos(frozenset({ZEROS, path("b")})), wire(2, _texts(ZEROS, path("b"))), None),
        ("dumpStorePath", DumpStorePath(ZEROS), wire(3, ZEROS), None),
        ("importPaths", ImportPaths(), wire(4), None),
        ("exportPaths", ExportPaths((path("b"), ZEROS), True), wire(5, 1, [path("b"), ZEROS]), None),
        (
            "buildPaths",
            BuildPaths((f"{ONES_DRV}!dev,out", str(ZEROS)), options),
            wire(6, [f"{ONES_DRV}!dev,out", ZEROS], *OPTIONS_AT[minor]),
            BuildPaths((f"{ONES_DRV}!dev,out", str(ZEROS)), OPTIONS),
        ),
        ("queryClosure", QueryClosure(frozenset({ZEROS}), True), wire(7, 1, [ZEROS]), None),
        (
            "buildDerivation",
            BuildDerivation(ONES_DRV, DERIVATION, options),
            wire(
                8,
                ONES_DRV,
                [
                    ("dev", "", "r:sha256", ""),
                    ("doc", "", "r:sha256", "impure"),
                    ("lib", "", "", ""),
                    ("out", ZEROS, "", ""),
                    ("src", path("src"), "sha256", COUNTING.hex),
                ],
                _texts(path("lib"), ZEROS),
                "x86_64-linux",
                "/bin/sh",
                ["-c", ": > $out", ""],
                [("", ""), (b"b\x80", b"\xff\0"), ("b\U0001f600", "é"), ("out", ZEROS)],
                *OPTIONS_AT[minor],
            ),
            BuildDerivation(ONES_DRV, DERIVATION, OPTIONS),
        ),
        (
            "addToStoreNar",
            AddToStoreNar(INFO),
            wire(
                9, INFO.path, ONES_DRV, COUNTING.hex, refs, 1_600_000_000, 120, 1,
                [SIG, SIG2], f"fixed:r:sha256:{COUNTING_NIX32}",
            ),
            None,
        ),
        (
            "addToStoreNarLeast",
            AddToStoreNar(ValidPathInfo(path=ZEROS, narHash=COUNTING, narSize=1)),
            wire(9, ZEROS, "", COUNTING.hex, [], 0, 1, 0, [], ""),
            None,
        ),
    ]  # fmt: skip
    return [Message(f"{name}-2.{minor}", value, minor, data, None, written) for name, value, data, written in rows]


UNKNOWN_HASH = Hash("sha256", bytes(32))


def _infoReply(minor: int) -> Message:
    refs = _texts(path("full"), ZEROS, path("lib"))
    first = ValidPathInfo(path=ZEROS, narHash=COUNTING, narSize=120, deriver=ONES_DRV)
    written = {INFO.path: INFO, ZEROS: first}
    if minor < 4:
        data = wire(ZEROS, ONES_DRV, [], 120, 120, INFO.path, ONES_DRV, refs, 120, 120, "")
        value = {
            info.path: ValidPathInfo(
                path=info.path, narHash=UNKNOWN_HASH, narSize=120, references=info.references, deriver=info.deriver
            )
            for info in written.values()
        }
    else:
        data = wire(
            ZEROS, ONES_DRV, [], 120, 120, f"sha256:{COUNTING_NIX32}", "", [],
            INFO.path, ONES_DRV, refs, 120, 120, f"sha256:{COUNTING_NIX32}", f"fixed:r:sha256:{COUNTING_NIX32}",
            [SIG, SIG2], "",
        )  # fmt: skip
        # Neither time nor the flag "ultimate" travels.
        full = ValidPathInfo(
            path=INFO.path,
            narHash=COUNTING,
            narSize=120,
            references=INFO.references,
            deriver=ONES_DRV,
            sigs=INFO.sigs,
            ca=INFO.ca,
        )
        value = {ZEROS: first, INFO.path: full}
    return Message(f"pathInfos-2.{minor}", value, minor, data, Command.QUERY_PATH_INFOS, written)


DRV_HASH = "sha256:" + "a1" * 32


def _jsonRealisation(drvHash: str, output: str, base: str, *sigs: str) -> tuple[str, str]:
    quoted = ",".join(f'"{sig}"' for sig in sigs)
    key = f"{drvHash}!{output}"
    return key, f'{{"dependentRealisations":{{}},"id":"{key}","outPath":"{base}","signatures":[{quoted}]}}'


def _buildReplies(minor: int) -> list[Message]:
    outputs = {
        "dev": Realisation(path("a-dev"), DRV_HASH, frozenset({SIG, SIG2})),
        "out": Realisation(ZEROS, DRV_HASH),
    }
    times = wire(3, 1, 100, 110) if minor >= 3 else b""
    success = BuildResult(BuildStatus.BUILT, "", 3, True, 100, 110, outputs)
    data = wire(0, "") + times
    read = BuildResult(BuildStatus.BUILT, "", *((3, True, 100, 110) if minor >= 3 else ()))
    if minor >= 8:
        data += wire([("dev", path("a-dev"), [SIG, SIG2]), ("out", ZEROS, [])])
        bare = {name: Realisation(one.outPath, signatures=one.signatures) for name, one in outputs.items()}
        read = BuildResult(BuildStatus.BUILT, "", 3, True, 100, 110, bare)
    elif minor >= 6:
        data += wire(
            [
                _jsonRealisation(DRV_HASH, "dev", path("a-dev").baseName, SIG, SIG2),
                _jsonRealisation(DRV_HASH, "out", ZEROS.baseName),
            ]
        )
        # Signatures in this form are of no use to anybody and not read.
        bare = {name: Realisation(one.outPath, DRV_HASH) for name, one in outputs.items()}
        read = BuildResult(BuildStatus.BUILT, "", 3, True, 100, 110, bare)
    rows = [Message(f"built-2.{minor}", read, minor, data, Command.BUILD_DERIVATION, success)]
    for status in (*BuildStatus, 99):
        failure = BuildResult(status, "boom \x1b[31mred\udcff", *((1, False, 5, 6) if minor >= 3 else ()))
        data = wire(int(status), b"boom \x1b[31mred\xff")
        data += wire(1, 0, 5, 6) if minor >= 3 else b""
        data += wire([]) if minor >= 6 else b""
        rows.append(Message(f"status{int(status)}-2.{minor}", failure, minor, data, Command.BUILD_DERIVATION))
    return rows


def _replies(minor: int) -> list[Message]:
    paths = frozenset({ZEROS, path("b"), path("c")})
    rows = [
        Message("valid", paths, minor, wire(_texts(*paths)), Command.QUERY_VALID_PATHS),
        Message("noneValid", frozenset(), minor, wire([]), Command.QUERY_VALID_PATHS),
        Message("closure", paths, minor, wire(_texts(*paths)), Command.QUERY_CLOSURE),
        Message("noInfos", {}, minor, wire(""), Command.QUERY_PATH_INFOS),
        Message("imported", None, minor, wire(1), Command.IMPORT_PATHS),
        Message("added", None, minor, wire(1), Command.ADD_TO_STORE_NAR),
        Message("pathsBuilt", BuildPathsResult(), minor, wire(0), Command.BUILD_PATHS),
        Message("pathsFailed", BuildPathsResult(100, "boom"), minor, wire(100, "boom"), Command.BUILD_PATHS),
    ]
    rows = [row._replace(name=f"{row.name}-2.{minor}") for row in rows]
    return [*rows, _infoReply(minor), *(_buildReplies(minor) if minor else ())]


REQUESTS = [message for minor in MINORS for message in _requests(minor)]
REPLIES = [message for minor in MINORS for message in _replies(minor)]


# --- a conversation with the real server --------------------------------------------------------------------

LIB = narInfo("lib", b"hi\n", registrationTime=1_500_000_000)
APP = narInfo(
    "app", b"uses lib\n", path("lib"), path("app"), deriver=path("app.drv"), sigs=frozenset({SIG}), ultimate=True
)
IMPORTED = narInfo("imported", b"came in a stream\n", path("lib"))
CONTENTS = {path("last"): b"", LIB.path: b"hi\n", APP.path: b"uses lib\n", IMPORTED.path: b"came in a stream\n"}


def exportItem(info: ValidPathInfo) -> bytes:
    """One object of an export stream."""
    return (
        wire(1)
        + nar(CONTENTS[info.path])
        + wire(0x4558494E, info.path, _texts(*info.references), info.deriver or "", 0)
    )


def addRequest(info: ValidPathInfo, narHash: str = "") -> bytes:
    """AddToStoreNar with its NAR."""
    return wire(
        9, info.path, info.deriver or "", narHash or info.narHash.hex, _texts(*info.references),
        info.registrationTime, info.narSize, info.ultimate, sorted(info.sigs), "",
    ) + nar(CONTENTS[info.path])  # fmt: skip


def conversation(minor: int) -> bytes:
    """What a client says: every command that does not build, twice what may be said twice."""
    everything = [APP.path, IMPORTED.path, LIB.path]
    return b"".join(
        [
            CLIENT_MAGIC,
            wire(0x200 | minor),
            wire(1, 1, 0, [*reversed(everything), LIB.path]),
            addRequest(LIB),
            addRequest(APP, f"sha256:{APP.narHash.nix32}"),
            addRequest(LIB),
            wire(4),
            exportItem(IMPORTED),
            exportItem(LIB),
            wire(0),
            wire(4, 0),
            wire(1, 0, 1, [*everything, LIB.path, path("missing")]),
            wire(2, [*everything, path("missing")]),
            wire(2, []),
            wire(3, APP.path),
            wire(7, 0, [APP.path]),
            wire(7, 2, [IMPORTED.path]),
            wire(5, 1, everything),
            wire(5, 0, []),
            wire(3, LIB.path),
        ]
    )


def missingInput(minor: int) -> bytes:
    """A build that cannot begin, since an input is missing."""
    derivation = wire(
        [("out", path("b"), "", "")], [path("missing")], "x86_64-linux", "/bin/sh", [], [("out", path("b"))]
    )
    options = wire(*(0,) * len(OPTIONS_AT[minor]))
    return CLIENT_MAGIC + wire(0x200 | minor, 8, path("b.drv")) + derivation + options


def alreadyValid(minor: int) -> bytes:
    """A build whose output is there already."""
    derivation = wire([("out", LIB.path, "", "")], [], "x86_64-linux", "/bin/sh", [], [("out", LIB.path)])
    options = wire(*(0,) * len(OPTIONS_AT[minor]))
    return CLIENT_MAGIC + wire(0x200 | minor) + addRequest(LIB) + wire(8, path("lib.drv")) + derivation + options


CAPTURES = {
    **{f"conversation-2.{minor}": conversation(minor) for minor in range(8)},
    **{f"missingInput-2.{minor}": missingInput(minor) for minor in (6, 7)},
    **{f"alreadyValid-2.{minor}": alreadyValid(minor) for minor in (6, 7)},
}


def captured(name: str) -> tuple[bytes, bytes]:
    """What real Nix was sent and what it answered."""
    return (HERE / f"{name}.request").read_bytes(), (HERE / f"{name}.reply").read_bytes()


LAST = narInfo("last", b"")
LAST_REQUESTS = addRequest(LAST) + wire(1, 0, 0, [LAST.path])
LAST_REPLIES = wire(1, [LAST.path])
"""What only the last replies end with: closing the input of a server before they are here would end a build."""


def _ask(request: bytes) -> bytes:
    """What real Nix answers on an empty store of its own."""
    with tempfile.TemporaryDirectory() as root:
        command = ["nix-store", "--serve", "--write", "--store", root, "--option", "substituters", ""]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(request + LAST_REQUESTS)
            server.stdin.flush()
            reply = b""
            while not reply.endswith(LAST_REPLIES):
                data = server.stdout.read1()
                assert data, f"the server gave up after {reply!r}"
                reply += data
            server.stdin.close()
        assert server.returncode == 0
        subprocess.run(["chmod", "-R", "u+w", root], check=True)
    return reply.removesuffix(LAST_REPLIES)


def regenerate() -> None:
    """Ask the real server everything again."""
    for name, request in CAPTURES.items():
        (HERE / f"{name}.request").write_bytes(request)
        (HERE / f"{name}.reply").write_bytes(_ask(request))


if __name__ == "__main__":
    regenerate()

"""
The messages of L{nixserve.codec.messages} as bytes, in every version of the serve protocol.

Everything that differs by protocol version is decided here, by comparing versions. Order of fields, numbers and
leniencies are those of Nix 2.8 to 2.36 (src/libstore/serve-protocol*.cc, src/nix-store/nix-store.cc:opServe),
seen in captures of the real programs.

Readers are generators over a L{Reader}; each stands beside its writer. Store paths are parsed against the
store directory, so a request for a foreign store fails here.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from nixserve.codec.aterm import MAX_STRINGS
from nixserve.codec.buildresult import UNKNOWN_DRV_HASH, BuildResult, BuildStatus, Realisation, saysHashMismatch
from nixserve.codec.contentaddress import ContentAddress
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
    ImportItem,
    ImportPaths,
    QueryClosure,
    QueryPathInfos,
    QueryValidPaths,
    Request,
)
from nixserve.codec.pathinfo import Signature, ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.codec.text import encodeText
from nixserve.codec.wire import MAX_REPLY_SIZE, Parse, Reader, Writer, asText
from nixserve.errors import FormatError

__all__ = [
    "CLIENT_MAGIC",
    "EXPORT_MAGIC",
    "MAX_INFOS_ASKED",
    "SERVER_MAGIC",
    "SERVE_VERSION",
    "batches",
    "hasCommand",
    "hasHashes",
    "inOrder",
    "readCommand",
    "readReply",
    "readRequest",
    "replyPieces",
    "versionText",
    "writeReply",
    "writeRequest",
]

T = TypeVar("T")

CLIENT_MAGIC = 0x390C9DEB
SERVER_MAGIC = 0x5452EECB
EXPORT_MAGIC = 0x4558494E
"""Between the NAR and the facts of each object of an export stream."""

SERVE_VERSION = 0x208
"""What we announce: 2.8. A version is C{major << 8 | minor}; the lower of both sides' is spoken."""

MAX_PATH_SIZE = 4096
"""A store path: the kernel's limit for any path."""

MAX_SIGNATURES = 64
"""Signatures of one object: one for each cache that it went through, a handful in practice."""

MAX_SIGNATURE_SIZE = 1024
"""One of them: 88 digits behind the name of the key, which is a host's."""

MAX_INFOS_ASKED = 1024
"""Path infos that our client asks for at once, so that it can tell how large the reply may be."""

MAX_INFO_SIZE = 8 * 1024
"""One path info of a reply, on average: a hundred references. A few may have many more."""

_INFOS_ALLOWANCE = 8 * 1024 * 1024
"""What all path infos of a reply may have more than that: single objects with tens of thousands of references."""

MAX_ERROR_SIZE = 64 * 1024
"""What is kept of the text of a failure, which quotes the last lines of the log, however long these are."""

MAX_REALISATION_SIZE = 1024 * 1024
"""One built output in JSON, which names those that it depends on."""

AT_ONCE = 1024
"""Elements of a reply that are sorted or encoded without a pause. Sorting lets no other thread in until it is done: a
thousand paths take a millisecond."""

# What each minor version brought.
_BUILD_LOG_LIMIT = 2
_BUILD_TIMES = 3
_PATH_INFO_HASHES = 4
_ADD_TO_STORE_NAR = 5
_BUILT_OUTPUTS = 6
_KEEP_FAILED = 7
_BINARY_BUILT_OUTPUTS = 8


def minorOf(version: int) -> int:
    """The minor part. The major part is never checked on requests, as Nix does."""
    return version & 0xFF


def versionText(version: int) -> str:
    """A version as people say it: C{2.8}."""
    return f"{version >> 8}.{minorOf(version)}"


def hasCommand(version: int, command: Command) -> bool:
    """Whether a version of the protocol has C{command}."""
    return command is not Command.ADD_TO_STORE_NAR or minorOf(version) >= _ADD_TO_STORE_NAR


def hasHashes(version: int) -> bool:
    """Whether path infos of a version say what is in a path."""
    return minorOf(version) >= _PATH_INFO_HASHES


# --- paths ------------------------------------------------------------------------------------------------


def readPath(reader: Reader, storeDir: StoreDir) -> Parse[StorePath]:
    """Read one store path."""
    return storeDir.parse((yield from reader.text(MAX_PATH_SIZE)))


def readOptionalPath(reader: Reader, storeDir: StoreDir) -> Parse[StorePath | None]:
    """A store path, or the empty string for none."""
    text = yield from reader.text(MAX_PATH_SIZE)
    return storeDir.parse(text) if text else None


def readPathList(reader: Reader, storeDir: StoreDir) -> Parse[list[StorePath]]:
    """Store paths, in order. They are parsed as they come: all at once, a million would stop everybody else."""
    return (yield from reader.converted(storeDir.parseMany, MAX_PATH_SIZE))


def readPathSet(reader: Reader, storeDir: StoreDir) -> Parse[frozenset[StorePath]]:
    """Store paths; any order and repetition is accepted."""
    return frozenset((yield from readPathList(reader, storeDir)))


# --- requests ---------------------------------------------------------------------------------------------


def readCommand(reader: Reader) -> Parse[Command]:
    """The number that begins a request."""
    number = yield from reader.u32()
    try:
        return Command(number)
    except ValueError:
        raise FormatError(f"unknown serve command {number}") from None


def readRequest(reader: Reader, command: Command, version: int, storeDir: StoreDir) -> Parse[Request]:
    """What follows the number of the command, except NARs."""
    request: Request = yield from _REQUESTS[command].read(reader, version, storeDir)
    return request


def writeRequest(request: Request, version: int) -> bytes:
    """A whole request, except NARs."""
    writer = Writer().u64(request.command)
    _REQUESTS[request.command].write(writer, request, version)
    return bytes(writer)


def dependsOnVersion(request: Request) -> bool:
    """Must the version be known before this request can be written?"""
    return isinstance(request, BuildPaths | BuildDerivation)


def _readQueryValidPaths(reader: Reader, version: int, storeDir: StoreDir) -> Parse[QueryValidPaths]:
    lock = yield from reader.boolean()
    substitute = yield from reader.boolean()
    return QueryValidPaths((yield from readPathSet(reader, storeDir)), lock, substitute)


def _writeQueryValidPaths(writer: Writer, request: QueryValidPaths, version: int) -> None:
    writer.u64(request.lock).u64(request.substitute).textSet(request.paths)


def _readQueryPathInfos(reader: Reader, version: int, storeDir: StoreDir) -> Parse[QueryPathInfos]:
    return QueryPathInfos((yield from readPathSet(reader, storeDir)))


def _writeQueryPathInfos(writer: Writer, request: QueryPathInfos, version: int) -> None:
    writer.textSet(request.paths)


def _readDumpStorePath(reader: Reader, version: int, storeDir: StoreDir) -> Parse[DumpStorePath]:
    return DumpStorePath((yield from readPath(reader, storeDir)))


def _writeDumpStorePath(writer: Writer, request: DumpStorePath, version: int) -> None:
    writer.text(request.path)


def _readImportPaths(reader: Reader, version: int, storeDir: StoreDir) -> Parse[ImportPaths]:
    yield from ()
    return ImportPaths()


def _writeImportPaths(writer: Writer, request: ImportPaths, version: int) -> None:
    pass


def _readExportPaths(reader: Reader, version: int, storeDir: StoreDir) -> Parse[ExportPaths]:
    sign = yield from reader.boolean()
    return ExportPaths(tuple((yield from readPathList(reader, storeDir))), sign)


def _writeExportPaths(writer: Writer, request: ExportPaths, version: int) -> None:
    writer.u64(request.sign).strings(request.paths)


def _readBuildPaths(reader: Reader, version: int, storeDir: StoreDir) -> Parse[BuildPaths]:
    targets = yield from reader.strings(MAX_PATH_SIZE)
    return BuildPaths(tuple(targets), (yield from _readBuildOptions(reader, version)))


def _writeBuildPaths(writer: Writer, request: BuildPaths, version: int) -> None:
    writer.strings(request.targets)
    _writeBuildOptions(writer, request.options, version)


def _readQueryClosure(reader: Reader, version: int, storeDir: StoreDir) -> Parse[QueryClosure]:
    includeOutputs = yield from reader.boolean()
    return QueryClosure((yield from readPathSet(reader, storeDir)), includeOutputs)


def _writeQueryClosure(writer: Writer, request: QueryClosure, version: int) -> None:
    writer.u64(request.includeOutputs).textSet(request.paths)


def _readBuildDerivation(reader: Reader, version: int, storeDir: StoreDir) -> Parse[BuildDerivation]:
    drvPath = yield from readPath(reader, storeDir)
    if not drvPath.isDerivation:
        raise FormatError(f"path '{drvPath}' is not a valid derivation path: it does not end in '.drv'")
    drv = yield from _readBasicDerivation(reader, storeDir, drvPath.name.removesuffix(".drv"))
    return BuildDerivation(drvPath, drv, (yield from _readBuildOptions(reader, version)))


def _writeBuildDerivation(writer: Writer, request: BuildDerivation, version: int) -> None:
    writer.text(request.drvPath)
    _writeBasicDerivation(writer, request.drv)
    _writeBuildOptions(writer, request.options, version)


def _readAddToStoreNar(reader: Reader, version: int, storeDir: StoreDir) -> Parse[AddToStoreNar]:
    path = yield from readPath(reader, storeDir)
    deriver = yield from readOptionalPath(reader, storeDir)
    # Nix sends bare hex; servers take every form, bare or with the algorithm.
    narHash = Hash.parse((yield from reader.text(MAX_PATH_SIZE)), "sha256")
    references = yield from readPathSet(reader, storeDir)
    registrationTime = yield from reader.u64()
    narSize = yield from reader.u64()
    ultimate = yield from reader.boolean()
    sigs = yield from _readSignatures(reader)
    ca = yield from _readOptionalCA(reader)
    if not narSize:
        raise FormatError(f"cannot add '{path}': narInfo is too old and missing the narSize field")
    # SQLite and time_t hold 63 bits.
    if narSize >> 63 or registrationTime >> 63:
        raise FormatError(f"cannot add '{path}': narSize or registrationTime is out of range")
    return AddToStoreNar(
        ValidPathInfo(
            path=path,
            narHash=narHash,
            narSize=narSize,
            references=references,
            deriver=deriver,
            registrationTime=registrationTime,
            ultimate=ultimate,
            sigs=sigs,
            ca=ca,
        )
    )


def _writeAddToStoreNar(writer: Writer, request: AddToStoreNar, version: int) -> None:
    info = request.info
    writer.text(info.path).text(info.deriver or "").text(info.narHash.hex).textSet(info.references)
    writer.u64(info.registrationTime).u64(info.narSize).u64(info.ultimate).textSet(info.sigs)
    writer.text(str(info.ca) if info.ca else "")


def _readSignatures(reader: Reader) -> Parse[frozenset[str]]:
    """Signatures. Nix up to 2.26 stores what it gets; a malformed one then breaks every query of Nix 2.34."""
    sigs = yield from _readAnySignatures(reader)
    for sig in sigs:
        Signature.parse(sig)
    return sigs


def _readAnySignatures(reader: Reader) -> Parse[frozenset[str]]:
    """The same, malformed ones included."""
    return frozenset((yield from reader.strings(MAX_SIGNATURE_SIZE, MAX_SIGNATURES)))


def _readOptionalCA(reader: Reader) -> Parse[ContentAddress | None]:
    text = yield from reader.text(MAX_PATH_SIZE)
    return ContentAddress.parse(text) if text else None


def _readBuildOptions(reader: Reader, version: int) -> Parse[BuildOptions]:
    minor = minorOf(version)
    maxSilentTime = yield from reader.u32()
    buildTimeout = yield from reader.u32()
    maxLogSize = nrRepeats = 0
    enforceDeterminism = keepFailed = False
    if minor >= _BUILD_LOG_LIMIT:
        maxLogSize = yield from reader.u64()
    if minor >= _BUILD_TIMES:
        nrRepeats = yield from reader.u32()
        enforceDeterminism = yield from reader.boolean()
    if minor >= _KEEP_FAILED:
        keepFailed = yield from reader.boolean()
    return BuildOptions(maxSilentTime, buildTimeout, maxLogSize, nrRepeats, enforceDeterminism, keepFailed)


def _writeBuildOptions(writer: Writer, options: BuildOptions, version: int) -> None:
    minor = minorOf(version)
    writer.u64(options.maxSilentTime).u64(options.buildTimeout)
    if minor >= _BUILD_LOG_LIMIT:
        writer.u64(options.maxLogSize)
    if minor >= _BUILD_TIMES:
        writer.u64(options.nrRepeats).u64(options.enforceDeterminism)
    if minor >= _KEEP_FAILED:
        writer.u64(options.keepFailed)


def _readBasicDerivation(reader: Reader, storeDir: StoreDir, name: str) -> Parse[BasicDerivation]:
    outputs = yield from reader.pairs(reader.text, lambda: _readDerivationOutput(reader, storeDir), MAX_STRINGS)
    inputSrcs = yield from readPathSet(reader, storeDir)
    platform = yield from reader.text()
    builder = yield from reader.text()
    args = yield from reader.strings(most=MAX_STRINGS)
    env = yield from reader.pairs(reader.text, reader.text, MAX_STRINGS)
    return BasicDerivation(
        name=name,
        outputs=outputs,
        inputSrcs=inputSrcs,
        platform=platform,
        builder=builder,
        args=tuple(args),
        env=env,
    )


def _writeBasicDerivation(writer: Writer, drv: BasicDerivation) -> None:
    writer.u64(len(drv.outputs))
    for name, output in _bytewise(drv.outputs):
        writer.text(name).text(output.path or "").text(output.hashAlgo).text(output.hash)
    writer.textSet(drv.inputSrcs).text(drv.platform).text(drv.builder).strings(drv.args)
    writer.u64(len(drv.env))
    for key, value in _bytewise(drv.env):
        writer.text(key).text(value)


def _bytewise(mapping: Mapping[str, T]) -> list[tuple[str, T]]:
    """The order of maps on the wire."""
    return sorted(mapping.items(), key=lambda pair: encodeText(pair[0]))


def _readDerivationOutput(reader: Reader, storeDir: StoreDir) -> Parse[DerivationOutput]:
    path = yield from readOptionalPath(reader, storeDir)
    hashAlgo = yield from reader.text(MAX_PATH_SIZE)
    hashText = yield from reader.text(MAX_PATH_SIZE)
    if hashText and hashText != "impure":
        # Hex, nix32 and base64 travel, without the algorithm; derivations hold hex.
        hashText = Hash.parse(hashText, hashAlgo.rpartition(":")[2]).hex
    return DerivationOutput(path, hashAlgo, hashText)


# --- replies ----------------------------------------------------------------------------------------------


def readReply(reader: Reader, request: Request, version: int, storeDir: StoreDir) -> Parse[Any]:
    """
    The reply to a request, except those that are NARs or export streams. What a peer can make us keep is limited by
    what it was asked for, and there is nothing in a reply that it was not asked about. Its type by command:

      - QUERY_VALID_PATHS, QUERY_CLOSURE: C{frozenset} of L{StorePath}
      - QUERY_PATH_INFOS: C{dict} of L{StorePath} to L{ValidPathInfo}
      - IMPORT_PATHS, ADD_TO_STORE_NAR: C{None}
      - BUILD_PATHS: L{BuildPathsResult}
      - BUILD_DERIVATION: L{BuildResult}
    """
    reader.limit(_replyLimit(request), "a reply")
    return (yield from _REPLIES[request.command].read(reader, request, version, storeDir))


def _replyLimit(request: Request) -> int:
    if isinstance(request, QueryPathInfos):
        return _INFOS_ALLOWANCE + len(request.paths) * MAX_INFO_SIZE
    return MAX_REPLY_SIZE


def writeReply(command: Command, value: Any, version: int) -> bytes:
    """The reply to a command: L{readReply} says what C{value} is; path infos are written in sorted order."""
    return b"".join(replyPieces(command, value, version))


def replyPieces(command: Command, value: Any, version: int) -> Iterator[bytes]:
    """
    As L{writeReply}, in pieces, each of which takes milliseconds to make at most.

    @param value: for QUERY_PATH_INFOS it may also be an iterator of L{ValidPathInfo} in sorted order, of which
        no more is taken than the next piece needs.
    """
    return _REPLIES[command].pieces(value, version)


def inOrder(paths: Collection[StorePath]) -> Iterator[StorePath]:
    """
    Store paths in the order in which sets of them are written, each once.

    What takes long lets other threads in between.
    """
    unique = paths if isinstance(paths, set | frozenset) else set(paths)
    # Store paths are ASCII: their order is that of their bytes.
    blocks = [sorted(block) for block in batches(unique, AT_ONCE)]
    return heapq.merge(*blocks) if len(blocks) > 1 else iter(blocks[0] if blocks else ())


def batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """C{values} in lists of C{size}; the last one may be shorter."""
    rest = iter(values)
    while batch := list(islice(rest, size)):
        yield batch


def _readValidPaths(
    reader: Reader, request: QueryValidPaths, version: int, storeDir: StoreDir
) -> Parse[frozenset[StorePath]]:
    texts = yield from reader.strings(MAX_PATH_SIZE, len(request.paths))
    paths = frozenset(storeDir.parseMany(texts))
    for path in sorted(paths - request.paths):
        raise FormatError(f"the remote says that '{path}' is valid, which it was not asked about")
    return paths


def _readClosure(
    reader: Reader, request: QueryClosure, version: int, storeDir: StoreDir
) -> Parse[frozenset[StorePath]]:
    return (yield from readPathSet(reader, storeDir))


def _pathSetPieces(paths: Collection[StorePath], version: int) -> Iterator[bytes]:
    unique = paths if isinstance(paths, set | frozenset) else frozenset(paths)
    if len(unique) <= AT_ONCE:
        yield bytes(Writer().strings(sorted(unique)))
        return
    writer = Writer().u64(len(unique))
    for batch in batches(inOrder(unique), AT_ONCE):
        yield bytes(writer.texts(batch))
        writer = Writer()


def _readPathInfos(
    reader: Reader, request: QueryPathInfos, version: int, storeDir: StoreDir
) -> Parse[dict[StorePath, ValidPathInfo]]:
    infos: dict[StorePath, ValidPathInfo] = {}
    # Most references are to paths that have been named before.
    known: dict[str, StorePath] = {path: path for path in request.paths}
    while text := (yield from reader.text(MAX_PATH_SIZE)):
        path = storeDir.parse(text)
        if path not in request.paths or path in infos:
            why = "twice" if path in infos else "although it was not asked about it"
            raise FormatError(f"the remote describes '{path}' {why}")
        infos[path] = yield from _readPathInfo(reader, version, storeDir, path, known)
    return infos


def _readPathInfo(
    reader: Reader, version: int, storeDir: StoreDir, path: StorePath, known: dict[str, StorePath]
) -> Parse[ValidPathInfo]:
    deriver = yield from readOptionalPath(reader, storeDir)
    texts = yield from reader.strings(MAX_PATH_SIZE)
    references = frozenset(known.get(text) or known.setdefault(text, storeDir.parse(text)) for text in texts)
    yield from reader.u64()  # the size of the download, which nobody fills in
    narSize = yield from reader.u64()
    if not hasHashes(version):
        # Peers that old say nothing about hashes. Nothing can be checked against such an info.
        return ValidPathInfo(path=path, narHash=UNKNOWN_HASH, narSize=narSize, references=references, deriver=deriver)
    narHash = Hash.parse((yield from reader.text(MAX_PATH_SIZE)))
    ca = yield from _readOptionalCA(reader)
    sigs = yield from _readAnySignatures(reader)
    return ValidPathInfo(
        path=path, narHash=narHash, narSize=narSize, references=references, deriver=deriver, sigs=sigs, ca=ca
    )


UNKNOWN_HASH = Hash("sha256", bytes(32))
"""In path infos from peers below 2.4."""


def _pathInfosPieces(
    infos: Mapping[StorePath, ValidPathInfo] | Iterator[ValidPathInfo], version: int
) -> Iterator[bytes]:
    ordered = (infos[path] for path in sorted(infos)) if isinstance(infos, Mapping) else infos
    for batch in batches(ordered, AT_ONCE // 4):
        writer = Writer()
        for info in batch:
            _writePathInfo(writer, info, version)
        yield bytes(writer)
    yield bytes(Writer().text(""))


def _writePathInfo(writer: Writer, info: ValidPathInfo, version: int) -> None:
    writer.text(info.path).text(info.deriver or "").textSet(info.references)
    writer.u64(info.narSize).u64(info.narSize)
    if hasHashes(version):
        writer.text(str(info.narHash)).text(str(info.ca) if info.ca else "").textSet(info.sigs)


def _readDone(reader: Reader, request: Request, version: int, storeDir: StoreDir) -> Parse[None]:
    value = yield from reader.u64()
    if value != 1:
        raise FormatError("the remote did not add the path", expected="1", found=f"{value}{asText(value)}")


def _writeDone(writer: Writer, value: None, version: int) -> None:
    writer.u64(1)


def _readError(reader: Reader) -> Parse[str]:
    return (yield from reader.text())[:MAX_ERROR_SIZE]


def _readBuildPathsResult(
    reader: Reader, request: BuildPaths, version: int, storeDir: StoreDir
) -> Parse[BuildPathsResult]:
    status = yield from reader.u64()
    return BuildPathsResult(status, (yield from _readError(reader)) if status else "")


def _writeBuildPathsResult(writer: Writer, result: BuildPathsResult, version: int) -> None:
    writer.u64(result.status)
    if result.status:
        writer.text(result.errorMsg)


def _readBuildResult(reader: Reader, request: BuildDerivation, version: int, storeDir: StoreDir) -> Parse[BuildResult]:
    minor = minorOf(version)
    number = yield from reader.u64()
    status = BuildStatus(number) if number <= max(BuildStatus) else number
    errorMsg = yield from _readError(reader)
    timesBuilt = startTime = stopTime = 0
    isNonDeterministic = False
    builtOutputs: dict[str, Realisation] = {}
    most = len(request.drv.outputs)

    def name() -> Parse[str]:
        return reader.text(MAX_PATH_SIZE)

    if minor >= _BUILD_TIMES:
        timesBuilt = yield from reader.u64()
        isNonDeterministic = yield from reader.boolean()
        startTime = yield from reader.u64()
        stopTime = yield from reader.u64()
    if minor >= _BINARY_BUILT_OUTPUTS:
        builtOutputs = yield from reader.pairs(name, lambda: _readRealisation(reader, storeDir), most)
    elif minor >= _BUILT_OUTPUTS:
        realisations = yield from reader.pairs(name, lambda: reader.text(MAX_REALISATION_SIZE), most)
        parsed = [_parseRealisation(key, text, storeDir) for key, text in realisations.items()]
        builtOutputs = dict(parsed)
        if len(builtOutputs) != len(parsed):
            raise FormatError("a built output is described twice")
    times = (timesBuilt, isNonDeterministic, startTime, stopTime)
    return BuildResult(status, errorMsg, *times, builtOutputs, saysHashMismatch(status, errorMsg))


def _writeBuildResult(writer: Writer, result: BuildResult, version: int) -> None:
    minor = minorOf(version)
    writer.u64(result.status).text(result.errorMsg)
    if minor >= _BUILD_TIMES:
        writer.u64(result.timesBuilt).u64(result.isNonDeterministic)
        writer.u64(result.startTime).u64(result.stopTime)
    if minor >= _BINARY_BUILT_OUTPUTS:
        writer.u64(len(result.builtOutputs))
        for name, realisation in _bytewise(result.builtOutputs):
            writer.text(name).text(realisation.outPath).textSet(realisation.signatures)
    elif minor >= _BUILT_OUTPUTS:
        writer.u64(len(result.builtOutputs))
        for key, text in _bytewise(dict(_unparseRealisations(result.builtOutputs))):
            writer.text(key).text(text)


def _readRealisation(reader: Reader, storeDir: StoreDir) -> Parse[Realisation]:
    outPath = yield from readPath(reader, storeDir)
    return Realisation(outPath, UNKNOWN_DRV_HASH, (yield from _readAnySignatures(reader)))


def _unparseRealisations(outputs: Mapping[str, Realisation]) -> Iterable[tuple[str, str]]:
    """The JSON form: compact, keys sorted, the output as a base name."""
    for name, realisation in outputs.items():
        key = f"{realisation.drvHash}!{name}"
        value = {
            "dependentRealisations": {},
            "id": key,
            "outPath": realisation.outPath.baseName,
            "signatures": sorted(realisation.signatures),
        }
        yield key, json.dumps(value, separators=(",", ":"), sort_keys=True)


def _parseRealisation(key: str, text: str, storeDir: StoreDir) -> tuple[str, Realisation]:
    """The JSON form. Only what every server fills in is believed: the name in the key, and C{outPath}."""
    drvHash, mark, name = key.partition("!")
    try:
        value = json.loads(text)
        baseName = value["outPath"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FormatError("a built output is not described as it should be", found=repr(text[:200])) from None
    # JSON can also spell surrogates that stand for no byte, so that no error with them could be passed on.
    if not mark or not isinstance(baseName, str) or not baseName.isascii():
        raise FormatError("a built output is not described as it should be", found=repr(key[:200]))
    return name, Realisation(storeDir.parseBaseName(baseName), drvHash)


# --- export streams ---------------------------------------------------------------------------------------


def readExportMarker(reader: Reader) -> Parse[bool]:
    """Read, in an export stream, whether another object follows."""
    marker = yield from reader.u64()
    if marker > 1:
        raise FormatError("input doesn't look like something created by 'nix-store --export'", offset=reader.offset - 8)
    return bool(marker)


def readImportItem(reader: Reader, storeDir: StoreDir) -> Parse[ImportItem]:
    """Read what follows each NAR of an export stream."""
    magic = yield from reader.u32()
    if magic != EXPORT_MAGIC:
        raise FormatError("Nix archive cannot be imported; wrong format", offset=reader.offset - 8)
    path = yield from readPath(reader, storeDir)
    references = yield from readPathSet(reader, storeDir)
    deriver = yield from readOptionalPath(reader, storeDir)
    if (yield from reader.u32()) == 1:
        yield from reader.string(MAX_SIGNATURE_SIZE)  # of the 1.x kind, ignored
    return ImportItem(path, references, deriver)


def writeExportMarker(another: bool) -> bytes:
    """What stands before each object of an export stream, and at its end."""
    return bytes(Writer().u64(another))


def writeImportItem(item: ImportItem) -> bytes:
    """What follows each NAR of an export stream."""
    writer = Writer().u64(EXPORT_MAGIC).text(item.path).textSet(item.references)
    return bytes(writer.text(item.deriver or "").u64(0))


# --- tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Form:
    """How one kind of request is read and written."""

    read: Callable[[Reader, int, StoreDir], Parse[Any]]
    write: Callable[[Writer, Any, int], None]


@dataclass(frozen=True, slots=True)
class _ReplyForm:
    """How one kind of reply is read and written, in pieces. Reading needs the request."""

    read: Callable[[Reader, Any, int, StoreDir], Parse[Any]]
    pieces: Callable[[Any, int], Iterator[bytes]]


def _whole(write: Callable[[Writer, Any, int], None]) -> Callable[[Any, int], Iterator[bytes]]:
    """A reply that is always small: one piece."""

    def pieces(value: Any, version: int) -> Iterator[bytes]:
        writer = Writer()
        write(writer, value, version)
        yield bytes(writer)

    return pieces


_REQUESTS: dict[Command, _Form] = {
    Command.QUERY_VALID_PATHS: _Form(_readQueryValidPaths, _writeQueryValidPaths),
    Command.QUERY_PATH_INFOS: _Form(_readQueryPathInfos, _writeQueryPathInfos),
    Command.DUMP_STORE_PATH: _Form(_readDumpStorePath, _writeDumpStorePath),
    Command.IMPORT_PATHS: _Form(_readImportPaths, _writeImportPaths),
    Command.EXPORT_PATHS: _Form(_readExportPaths, _writeExportPaths),
    Command.BUILD_PATHS: _Form(_readBuildPaths, _writeBuildPaths),
    Command.QUERY_CLOSURE: _Form(_readQueryClosure, _writeQueryClosure),
    Command.BUILD_DERIVATION: _Form(_readBuildDerivation, _writeBuildDerivation),
    Command.ADD_TO_STORE_NAR: _Form(_readAddToStoreNar, _writeAddToStoreNar),
}

_REPLIES: dict[Command, _ReplyForm] = {
    Command.QUERY_VALID_PATHS: _ReplyForm(_readValidPaths, _pathSetPieces),
    Command.QUERY_PATH_INFOS: _ReplyForm(_readPathInfos, _pathInfosPieces),
    Command.IMPORT_PATHS: _ReplyForm(_readDone, _whole(_writeDone)),
    Command.BUILD_PATHS: _ReplyForm(_readBuildPathsResult, _whole(_writeBuildPathsResult)),
    Command.QUERY_CLOSURE: _ReplyForm(_readClosure, _pathSetPieces),
    Command.BUILD_DERIVATION: _ReplyForm(_readBuildResult, _whole(_writeBuildResult)),
    Command.ADD_TO_STORE_NAR: _ReplyForm(_readDone, _whole(_writeDone)),
}

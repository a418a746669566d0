"""
The messages of the serve protocol as values: commands, requests, and those replies that have no type elsewhere.

L{nixserve.codec.serve} has their encodings and offers the same names.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from nixserve.codec.derivation import BasicDerivation
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath

__all__ = [
    "AddToStoreNar",
    "BuildDerivation",
    "BuildOptions",
    "BuildPaths",
    "BuildPathsResult",
    "Command",
    "DumpStorePath",
    "ExportPaths",
    "ImportItem",
    "ImportPaths",
    "QueryClosure",
    "QueryPathInfos",
    "QueryValidPaths",
    "Request",
]


class Command(enum.IntEnum):
    """The commands. The numbers travel."""

    QUERY_VALID_PATHS = 1
    QUERY_PATH_INFOS = 2
    DUMP_STORE_PATH = 3
    IMPORT_PATHS = 4
    EXPORT_PATHS = 5
    BUILD_PATHS = 6
    QUERY_CLOSURE = 7
    BUILD_DERIVATION = 8
    ADD_TO_STORE_NAR = 9

    def __init__(self, number: int) -> None:
        first, *others = self.name.lower().split("_")
        self.camelName = first + "".join(map(str.capitalize, others))
        """The name as Nix writes it and as methods are called: C{queryValidPaths}."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """
    How to build.

    @ivar maxSilentTime: seconds without output after which the build is killed, 0 for none.
    @ivar buildTimeout: seconds, 0 for none.
    @ivar maxLogSize: bytes, 0 for none.
    @ivar nrRepeats: obsolete, must be 0 for servers from Nix 2.13 on.
    """

    maxSilentTime: int = 0
    buildTimeout: int = 0
    maxLogSize: int = 0
    nrRepeats: int = 0
    enforceDeterminism: bool = False
    keepFailed: bool = False

    @property
    def refusal(self) -> str:
        """Why nobody builds in this way, as Nix says it from 2.13 on; empty if they do."""
        return "client requested repeating builds, but this is not currently implemented" if self.nrRepeats else ""


@dataclass(frozen=True, slots=True)
class QueryValidPaths:
    """
    Which of these paths are valid?

    @ivar lock: keep them from the garbage collector until the connection ends.
    @ivar substitute: try to fetch the missing ones from the server's substituters first.
    """

    command: ClassVar[Command] = Command.QUERY_VALID_PATHS
    paths: frozenset[StorePath]
    lock: bool = False
    substitute: bool = False


@dataclass(frozen=True, slots=True)
class QueryPathInfos:
    """What is registered about these paths?"""

    command: ClassVar[Command] = Command.QUERY_PATH_INFOS
    paths: frozenset[StorePath]


@dataclass(frozen=True, slots=True)
class DumpStorePath:
    """Send the NAR of a path."""

    command: ClassVar[Command] = Command.DUMP_STORE_PATH
    path: StorePath


@dataclass(frozen=True, slots=True)
class ImportPaths:
    """Add the objects of the export stream that follows."""

    command: ClassVar[Command] = Command.IMPORT_PATHS


@dataclass(frozen=True, slots=True)
class ExportPaths:
    """
    Send an export stream of these paths.

    @ivar sign: obsolete and ignored.
    """

    command: ClassVar[Command] = Command.EXPORT_PATHS
    paths: tuple[StorePath, ...]
    sign: bool = False


@dataclass(frozen=True, slots=True)
class BuildPaths:
    """
    Build derivations that are in the store.

    @ivar targets: as they travel: a path, or C{path.drv!out,dev}.
    """

    command: ClassVar[Command] = Command.BUILD_PATHS
    targets: tuple[str, ...]
    options: BuildOptions = BuildOptions()


@dataclass(frozen=True, slots=True)
class QueryClosure:
    """What do these paths refer to, all in all?"""

    command: ClassVar[Command] = Command.QUERY_CLOSURE
    paths: frozenset[StorePath]
    includeOutputs: bool = False


@dataclass(frozen=True, slots=True)
class BuildDerivation:
    """Build a derivation that comes with the request."""

    command: ClassVar[Command] = Command.BUILD_DERIVATION
    drvPath: StorePath
    drv: BasicDerivation
    options: BuildOptions = BuildOptions()

    @property
    def mentioned(self) -> set[StorePath]:
        """What must not vanish while it is built."""
        return {self.drvPath, *self.drv.mentioned}


@dataclass(frozen=True, slots=True)
class AddToStoreNar:
    """A NAR of C{info.narSize} bytes follows: add it."""

    command: ClassVar[Command] = Command.ADD_TO_STORE_NAR
    info: ValidPathInfo


Request = (
    QueryValidPaths
    | QueryPathInfos
    | DumpStorePath
    | ImportPaths
    | ExportPaths
    | BuildPaths
    | QueryClosure
    | BuildDerivation
    | AddToStoreNar
)


@dataclass(frozen=True, slots=True)
class BuildPathsResult:
    """
    What came of BuildPaths.

    @ivar status: 0 for success, else what C{nix-store -r} would have exited with.
    @ivar errorMsg: empty on success.
    """

    status: int = 0
    errorMsg: str = ""


@dataclass(frozen=True, slots=True)
class ImportItem:
    """What follows each NAR of an export stream."""

    path: StorePath
    references: frozenset[StorePath]
    deriver: StorePath | None

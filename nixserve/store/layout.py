"""
Where the directories of a local store lie, and how Nix's store URIs say it.

Everything here is a pure function of its arguments, but for L{chooseAutoRoot}, which looks at the file system and says
so. Sources: Nix 2.8, src/libstore/local-fs-store.hh and store-api.cc (openStore), with the spellings checked
against Nix 2.34.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote

from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import FormatError, UsageError
from nixserve.store.durability import Durability

__all__ = ["StoreDefaults", "StoreLayout", "chooseAutoRoot", "parseStoreURI"]

_SUPPORTED = (
    "'auto', 'local', an absolute path, each with parameters such as '?state=/path'; "
    "a remote store cannot be opened as a local one"
)

_TRUE = frozenset({"true", "yes", "1"})
_FALSE = frozenset({"false", "no", "0"})


@dataclass(frozen=True, slots=True)
class StoreLayout:
    """
    Where one store lies. Paths below are physical, and absolute.

    In the database, in roots and in what is said to a garbage collector stand logical paths; in the file system
    are physical ones, and so are the C{.lock} files beside the objects.

    @ivar storeDir: the logical store directory, which the paths of objects begin with.
    @ivar realStoreDir: where the objects are.
    @ivar stateDir: database, locks, roots.
    @ivar logDir: build logs.
    @ivar readOnly: nothing is to be written, not even locks or directories.
    @ivar allowSymlinkedStore: do not insist that the store directory is reached without symbolic links.
    @ivar systemFeatures: what builders on this store have, or C{None} for the default.
    @ivar durability: what survives a crash of the machine. Says nothing about where the store is.
    """

    storeDir: StoreDir
    realStoreDir: str
    stateDir: str
    logDir: str
    readOnly: bool = False
    allowSymlinkedStore: bool = False
    systemFeatures: frozenset[str] | None = None
    durability: Durability = field(default=Durability(), compare=False)

    @classmethod
    def underRoot(cls, root: str, storeDir: StoreDir | None = None) -> StoreLayout:
        """
        A chroot store: everything below C{root}, in the places that it has below C{/}.

        @param root: an absolute path.
        """
        return cls(storeDir or StoreDir(), f"{root}/nix/store", f"{root}/nix/var/nix", f"{root}/nix/var/log/nix")

    @property
    def dbDir(self) -> str:
        """The directory of the database and what belongs to it."""
        return f"{self.stateDir}/db"

    @property
    def dbPath(self) -> str:
        """The SQLite database. Never open it but through SQLite: closing it would drop SQLite's own locks."""
        return f"{self.dbDir}/db.sqlite"

    @property
    def schemaPath(self) -> str:
        """The file that holds the number of the database's schema."""
        return f"{self.dbDir}/schema"

    @property
    def bigLockPath(self) -> str:
        """Locked shared by whoever has the store open, exclusively by upgrades of the schema."""
        return f"{self.dbDir}/big-lock"

    @property
    def reservedPath(self) -> str:
        """Some MiB that a collector frees first, so that it can work on a full disk."""
        return f"{self.dbDir}/reserved"

    @property
    def tempRootsDir(self) -> str:
        """A file of temporary roots for each session."""
        return f"{self.stateDir}/temproots"

    @property
    def gcLockPath(self) -> str:
        """Locked exclusively by a collector at work."""
        return f"{self.stateDir}/gc.lock"

    @property
    def gcSocketPath(self) -> str:
        """Where a collector at work is told about new temporary roots."""
        return f"{self.stateDir}/gc-socket/socket"

    @property
    def gcRootsDir(self) -> str:
        """Permanent roots, as symbolic links."""
        return f"{self.stateDir}/gcroots"

    @property
    def profilesDir(self) -> str:
        """Profiles, which are roots as well."""
        return f"{self.stateDir}/profiles"

    @property
    def linksDir(self) -> str:
        """One hard link to each file that deduplication has seen."""
        return f"{self.realStoreDir}/.links"

    def realPath(self, path: StorePath) -> str:
        """Where the object of the logical C{path} is."""
        return f"{self.realStoreDir}/{path.baseName}"


@dataclass(frozen=True, slots=True)
class StoreDefaults:
    """
    What a store URI leaves open. Whoever reads the environment makes this value.

    @ivar storeDir: the logical store directory (C{NIX_STORE_DIR}).
    @ivar stateDir: C{NIX_STATE_DIR}; not used below a root.
    @ivar logDir: C{NIX_LOG_DIR}; not used below a root.
    @ivar autoRoot: the root of the chroot store that C{auto} without parameters means, or C{None} if it means
        the machine's own store; see L{chooseAutoRoot}.
    @ivar allowSymlinkedStore: C{NIX_IGNORE_SYMLINK_STORE}.
    """

    storeDir: StoreDir = field(default_factory=StoreDir)
    stateDir: str = "/nix/var/nix"
    logDir: str = "/nix/var/log/nix"
    autoRoot: str | None = None
    allowSymlinkedStore: bool = False


def chooseAutoRoot(stateDir: str, userRoot: str) -> str | None:
    """
    Decide what C{auto} means where there is no daemon, as Nix does. Looks at the file system.

    Call it only if the environment names neither a store nor a state directory: Nix decides so for its
    defaults alone.

    @param stateDir: the machine's state directory.
    @param userRoot: the root of the user's own chroot store; for Nix C{~/.local/share/nix/root}.
    @return: C{userRoot} if the machine has no store and the user could not make one, else C{None}.
    """
    if os.geteuid() == 0 or os.path.lexists(stateDir):
        return None
    return userRoot


def parseStoreURI(uri: str, defaults: StoreDefaults) -> StoreLayout:
    """
    Read C{auto} (or nothing), C{local}, C{/absolute/root}, C{local:///absolute/root}; each may carry
    C{?parameter=value&…}, percent-encoded: C{root}, C{store}, C{real}, C{state}, C{log}, C{read-only},
    C{system-features}.

    @raise UsageError: another kind of store, an unknown parameter, or a value that cannot be. The text names it.
    """
    kind, _, query = uri.partition("?")
    parameters = _parseParameters(uri, query)
    root = parameters.pop("root", None)
    if kind.startswith("local:///"):
        kind = kind.removeprefix("local://")
    if kind.startswith("/"):
        if root is not None:
            raise UsageError(f"store '{uri}' names two roots: '{kind}' and '{root}'")
        root = kind
    elif kind in ("", "auto"):
        root = root if root is not None or parameters else defaults.autoRoot
    elif kind not in ("local", "local://"):
        hint = "; write the root as an absolute path" if "/" in kind and "://" not in kind else ""
        raise UsageError(f"cannot open store '{uri}'{hint}: supported are {_SUPPORTED}")
    return _makeLayout(uri, None if root is None else _absolute(uri, "root", root), parameters, defaults)


def _parseParameters(uri: str, query: str) -> dict[str, str]:
    """The parameters behind the question mark, decoded; each at most once."""
    parameters: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"store '{uri}': parameter '{name}' has no value; write '{name}=VALUE'")
        if name not in _PARAMETERS:
            raise UsageError(f"store '{uri}': unknown parameter '{name}'; known are {', '.join(sorted(_PARAMETERS))}")
        if name in parameters:
            raise UsageError(f"store '{uri}': parameter '{name}' is given twice")
        if re.search(r"%(?![0-9A-Fa-f]{2})", value):
            raise UsageError(f"store '{uri}': '{value}' is not percent-encoded; write '%25' for '%'")
        parameters[name] = unquote(value, errors="surrogateescape")
    return parameters


_PARAMETERS = frozenset({"root", "store", "real", "state", "log", "read-only", "system-features"})


def _makeLayout(uri: str, root: str | None, parameters: Mapping[str, str], defaults: StoreDefaults) -> StoreLayout:
    """Fill what the parameters leave open: from the root if there is one, else from the defaults."""

    def directory(name: str, default: str) -> str:
        return _absolute(uri, name, parameters[name]) if name in parameters else default

    try:
        storeDir = StoreDir(directory("store", defaults.storeDir.path))
    except FormatError as error:
        raise UsageError(f"store '{uri}': {error}") from error
    if root is None:
        base = StoreLayout(storeDir, storeDir.path, defaults.stateDir, defaults.logDir)
    else:
        base = StoreLayout.underRoot(root.rstrip("/"), storeDir)
    features = parameters.get("system-features")
    return StoreLayout(
        storeDir,
        directory("real", base.realStoreDir),
        directory("state", base.stateDir),
        directory("log", base.logDir),
        readOnly=_boolean(uri, "read-only", parameters.get("read-only", "false")),
        allowSymlinkedStore=defaults.allowSymlinkedStore,
        systemFeatures=None if features is None else frozenset(features.split()),
    )


def _absolute(uri: str, name: str, path: str) -> str:
    """C{path} normalised by its text alone."""
    if not path.startswith("/") or "\0" in path:
        raise UsageError(f"store '{uri}': '{path}', the value of '{name}', is not an absolute path")
    # POSIX gives two leading slashes a meaning, so normpath keeps them; Nix does not.
    return posixpath.normpath("/" + path.lstrip("/"))


def _boolean(uri: str, name: str, value: str) -> bool:
    if value not in _TRUE | _FALSE:
        raise UsageError(f"store '{uri}': '{value}', the value of '{name}', is neither 'true' nor 'false'")
    return value in _TRUE

"""
Which store a command means, by its arguments, the environment and Nix's own settings.

Apart from the rest of the settings because a build hook, a process for each build, needs nothing else of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nixserve.app.nixconf import NixConf
from nixserve.codec.storepath import StoreDir
from nixserve.errors import FormatError, UsageError
from nixserve.remote.address import RemoteAddress
from nixserve.store.durability import Durability
from nixserve.store.layout import StoreDefaults, StoreLayout, chooseAutoRoot, parseStoreURI

__all__ = [
    "Environment",
    "chooseDurability",
    "chooseServedStore",
    "chooseStore",
    "homeDir",
    "parseStore",
    "storeDefaults",
]

Environment = Mapping[str, str]


def storeDefaults(environ: Environment) -> StoreDefaults:
    """
    What a store URI leaves open.

    @raise UsageError: C{NIX_STORE_DIR} is no store directory.
    """
    storeDir = environ.get("NIX_STORE_DIR") or environ.get("NIX_STORE") or "/nix/store"
    stateDir = environ.get("NIX_STATE_DIR") or "/nix/var/nix"
    chosen = any(environ.get(name) for name in ("NIX_STORE_DIR", "NIX_STORE", "NIX_STATE_DIR"))
    data = environ.get("XDG_DATA_HOME") or str(homeDir(environ) / ".local" / "share")
    try:
        return StoreDefaults(
            storeDir=StoreDir(os.path.normpath(storeDir)),
            stateDir=stateDir,
            logDir=environ.get("NIX_LOG_DIR") or "/nix/var/log/nix",
            autoRoot=None if chosen else chooseAutoRoot(stateDir, f"{data}/nix/root"),
            allowSymlinkedStore=environ.get("NIX_IGNORE_SYMLINK_STORE") == "1",
        )
    except FormatError as e:
        raise UsageError(f"NIX_STORE_DIR: {e}") from e


def chooseStore(uri: str | None, environ: Environment) -> StoreLayout:
    """
    The store on this machine that a command means.

    @param uri: what C{--store} says, if it is given; else C{NIX_REMOTE} counts, else C{auto}.
    """
    return replace(
        parseStoreURI(_chosen(uri, environ), storeDefaults(environ)), durability=chooseDurability({}, environ)
    )


def chooseServedStore(uri: str | None, environ: Environment) -> StoreLayout | RemoteAddress:
    """
    The store that a command serves: as L{chooseStore}, or one elsewhere.
    """
    place = parseStore(_chosen(uri, environ), environ)
    return place if isinstance(place, RemoteAddress) else replace(place, durability=chooseDurability({}, environ))


def _chosen(uri: str | None, environ: Environment) -> str:
    return uri or environ.get("NIX_REMOTE") or "auto"


def parseStore(uri: str, environ: Environment) -> StoreLayout | RemoteAddress:
    """
    Where the store is that a URI names: on this machine, or elsewhere. Reads no file.

    @raise UsageError: it names none.
    """
    if uri.startswith(_REMOTE_SCHEMES):
        return RemoteAddress.parse(uri)
    return parseStoreURI(uri, storeDefaults(environ))


_REMOTE_SCHEMES = ("ssh://", "ssh-ng://", "unix://")


def homeDir(environ: Environment) -> Path:
    """The user's home directory."""
    return Path(environ.get("HOME") or "/")


def chooseDurability(options: Mapping[str, Any], environ: Environment) -> Durability:
    """
    What survives a crash: what is given under the names that Nix has for it, else what the machine's Nix is told.

    @param options: the service's; of others none are asked for.
    @raise UsageError: neither true nor false.
    """
    conf = NixConf.read(environ)

    def choose(name: str, default: bool) -> bool:
        given = str(options.get(name, "")).lower()
        if given not in ("", "true", "false"):
            raise UsageError(f"the value of '{name}' is '{options[name]}'; it must be true or false")
        return given == "true" if given else conf.boolean(name, default)

    return Durability(
        fsyncMetadata=choose("fsync-metadata", True),
        fsyncStorePaths=choose("fsync-store-paths", False),
        syncBeforeRegistering=choose("sync-before-registering", False),
    )

"""
The reader of the environment and of configuration files, but for what says which store is meant
(L{nixserve.app.storechoice}). It gives each layer a small value of its own.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nixserve.app.statedirs import defaultStateDir
from nixserve.app.storechoice import Environment, chooseDurability
from nixserve.builder.settings import EXTRA_JOBS, BuildSettings, SandboxMode
from nixserve.errors import UsageError
from nixserve.protocol.limits import DEFAULT_LIMITS, Limits
from nixserve.store.durability import Durability

__all__ = [
    "ServiceSettings",
    "defaultMaxJobs",
    "logPath",
    "readConfig",
]


def logPath(environ: Environment) -> str | None:
    """Where a session on standard streams, which has no log of its own, writes one: C{NIXSERVE_LOG}."""
    return environ.get("NIXSERVE_LOG") or None


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """
    What the service is told, complete.

    @ivar store: the URI of the store served.
    @ivar state: directory of the service's own files.
    @ivar listen: Twisted endpoint strings of the SSH port.
    @ivar socket: path of the unix socket for relays.
    @ivar maxJobs: how many builds may run at once; 0 to refuse to build.
    @ivar extraJobs: how many more, for keys that all others keep from building.
    @ivar builds: how to build.
    @ivar durability: what survives a crash of the machine.
    @ivar limits: what the sessions of one key may use.
    """

    store: str
    state: str
    listen: tuple[str, ...]
    authorizedKeys: str
    hostKey: str
    defaultRights: str
    socket: str
    maxJobs: int
    extraJobs: int
    builds: BuildSettings
    limits: Limits
    durability: Durability = field(default_factory=Durability)

    @classmethod
    def complete(cls, given: Mapping[str, Any], environ: Environment) -> ServiceSettings:
        """
        Fill in what is not given.

        @param given: by the names of the options, without the leading dashes; C{None} counts as not given.
        @raise UsageError: a value cannot be.
        """
        options = {name: value for name, value in given.items() if value is not None}
        state = os.path.abspath(options.get("state") or defaultStateDir(environ))
        listen = options.get("listen") or ["tcp:2222:interface=127.0.0.1"]
        return cls(
            store=options.get("store") or f"{state}/store",
            state=state,
            listen=tuple([listen] if isinstance(listen, str) else listen),
            authorizedKeys=options.get("authorized-keys") or f"{state}/authorized_keys",
            hostKey=options.get("host-key") or f"{state}/ssh_host_ed25519_key",
            defaultRights=options.get("default-rights") or "read",
            socket=options.get("socket") or f"{state}/serve.sock",
            maxJobs=_count("max-jobs", options.get("max-jobs"), defaultMaxJobs()),
            extraJobs=_count("extra-jobs", options.get("extra-jobs"), EXTRA_JOBS),
            builds=_buildSettings(options),
            durability=chooseDurability(options, environ),
            limits=_limits(options),
        )


def defaultMaxJobs() -> int:
    """As many builds at once as there are processors for us."""
    return len(os.sched_getaffinity(0))


def _buildSettings(options: Mapping[str, Any]) -> BuildSettings:
    mode = str(options.get("sandbox", "auto"))
    if mode not in _SANDBOX_MODES:
        raise UsageError(f"the value of 'sandbox' is '{mode}'; it must be auto, on or off")
    numbers: dict[str, Any] = {field: _count(name, options.get(name), 0) for name, field in _BUILD_NUMBERS.items()}
    settings = BuildSettings(
        sandbox=_SANDBOX_MODES[mode],
        networkHelper=_networkHelper(str(options.get("build-network", "host"))),
        **numbers,
    )
    features = options.get("system-features")
    if features is None:
        return settings
    words = features if isinstance(features, list) else str(features).replace(",", " ").split()
    return replace(settings, systemFeatures=frozenset(words))


def _networkHelper(network: str) -> str:
    """What C{build-network} says, as the path of a program."""
    if network not in ("host", "own"):
        raise UsageError(f"the value of 'build-network' is '{network}'; it must be host or own")
    if network == "host":
        return ""
    helper = shutil.which("slirp4netns")
    if helper is None:
        raise UsageError("the value of 'build-network' is 'own', for which slirp4netns must be installed")
    return helper


#: Of the keys with numbers the fields of L{BuildSettings}.
_BUILD_NUMBERS = {
    "cores": "cores",
    "timeout": "timeout",
    "max-silent-time": "maxSilentTime",
    "max-build-log-size": "maxBuildLogSize",
    "max-output-size": "maxOutputSize",
}


def _limits(options: Mapping[str, Any]) -> Limits:
    def size(name: str, default: int) -> int:
        return _count(name, options.get(name), default >> 20, least=1) << 20

    return Limits(
        keyMemory=size("max-key-memory", DEFAULT_LIMITS.keyMemory),
        untrustedMemory=size("max-untrusted-memory", DEFAULT_LIMITS.untrustedMemory),
        keyRequests=_count("max-key-requests", options.get("max-key-requests"), DEFAULT_LIMITS.keyRequests, least=1),
    )


_SANDBOX_MODES = {"auto": SandboxMode.AUTO, "on": SandboxMode.ON, "off": SandboxMode.OFF}


def _count(name: str, value: Any, default: int, least: int = 0) -> int:
    if value is None:
        return default
    try:
        number = int(value)
    except ValueError:
        number = -1
    if number < least:
        raise UsageError(f"the value of '{name}' is '{value}'; it must be a number, {least} or more")
    return number


_LIMITS = ("max-key-memory", "max-untrusted-memory", "max-key-requests")

CONFIG_KEYS = (
    *("store", "state", "listen", "authorized-keys", "host-key", "default-rights", "socket"),
    *("max-jobs", "extra-jobs", "sandbox", "build-network", "system-features", *_BUILD_NUMBERS),
    *("fsync-metadata", "fsync-store-paths", "sync-before-registering"),
    *_LIMITS,
)

_LIST_KEYS = frozenset({"listen", "system-features"})
_NUMBER_KEYS = frozenset({"max-jobs", "extra-jobs", *_BUILD_NUMBERS, *_LIMITS})
_BOOLEAN_KEYS = frozenset({"fsync-metadata", "fsync-store-paths", "sync-before-registering"})


def readConfig(path: str) -> dict[str, Any]:
    """
    Read a TOML file whose keys are the options of the service.

    @raise UsageError: it cannot be read, is no TOML, or has a key or value that is none of the service's.
    """
    try:
        with open(path, "rb") as stream:
            config = tomllib.load(stream)
    except OSError as e:
        raise UsageError(f"configuration file '{path}': {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"configuration file '{path}' is no TOML: {e}") from e
    for key, value in config.items():
        if key not in CONFIG_KEYS:
            raise UsageError(f"configuration file '{path}': unknown key '{key}'; the keys are {', '.join(CONFIG_KEYS)}")
        many = isinstance(value, list) and key in _LIST_KEYS and all(isinstance(item, str) for item in value)
        number = type(value) is int and key in _NUMBER_KEYS
        boolean = isinstance(value, bool) and key in _BOOLEAN_KEYS
        if not isinstance(value, str) and not many and not number and not boolean:
            kind = "number" if key in _NUMBER_KEYS else "boolean" if key in _BOOLEAN_KEYS else "string"
            raise UsageError(f"configuration file '{path}': the value of '{key}' must be a {kind}")
    return config

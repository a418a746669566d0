"""
What the operator decides about building.
"""

from __future__ import annotations

import enum
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nixserve.builder.sandbox import SandboxPath, findShell
from nixserve.codec.messages import BuildOptions

__all__ = ["EXTRA_JOBS", "BuildSettings", "SandboxMode", "defaultSystemFeatures", "hostPlatforms"]

EXTRA_JOBS = 1
"""Builds beyond as many as may run at once, for clients that others keep from building. One does: they take turns."""


class SandboxMode(enum.Enum):
    """Whether builders are confined."""

    #: Where the machine can.
    AUTO = "auto"
    #: Always; a build that cannot be confined fails.
    ON = "on"
    #: Only where it must be: for clients that are not trusted, and in stores that are not where their paths say.
    OFF = "off"


def hostPlatforms() -> tuple[str, frozenset[str]]:
    """
    @return: what Nix calls the machine that we run on, and what else it can run.
    """
    machine = platform.machine()
    system = f"{machine}-{platform.system().lower()}"
    return system, frozenset({"i686-linux"} if system == "x86_64-linux" else ())


def defaultSystemFeatures() -> frozenset[str]:
    """
    Nix's default for its setting system-features, and C{ca-derivations}: floating outputs need nothing special here.
    """
    features = {"benchmark", "big-parallel", "ca-derivations", "nixos-test"}
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        features.add("kvm")
    return frozenset(features)


def _defaultSandboxPaths() -> tuple[SandboxPath, ...]:
    shell = findShell()
    return (shell,) if shell else ()


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """
    How to build, whoever asks.

    @ivar system: the platform of the machine, such as C{x86_64-linux}.
    @ivar extraPlatforms: others that it can run.
    @ivar systemFeatures: what derivations may require; a store's own C{system-features} come before it.
    @ivar cores: for each build, 0 for all that there are.
    @ivar sandboxPaths: what every sandbox shows of the host; by default a static C{/bin/sh} if one is installed.
    @ivar buildDir: where build directories are made; empty for C{STATE/builds} of the store.
    @ivar impureEnv: variables that fixed-output derivations may ask for with C{impureEnvVars}.
    @ivar networkHelper: the path of slirp4netns, by way of which builds with network reach that of the host from one of
        their own, in a sandbox; empty to leave them in that of the host.
    @ivar caBundle: a file of certificates for builds with network.
    @ivar keepLogs: write logs to the store's log directory.
    @ivar timeout: seconds that a build may take at most, until its outputs are registered, whatever its client allows;
        0 for as long as that allows. So are C{maxSilentTime}, seconds without output, and C{maxBuildLogSize}, bytes of
        it.
    @ivar maxOutputSize: bytes of the NAR of an output at most, 0 for any number.
    """

    system: str = field(default_factory=lambda: hostPlatforms()[0])
    extraPlatforms: frozenset[str] = field(default_factory=lambda: hostPlatforms()[1])
    systemFeatures: frozenset[str] = field(default_factory=defaultSystemFeatures)
    cores: int = 0
    sandbox: SandboxMode = SandboxMode.AUTO
    sandboxPaths: tuple[SandboxPath, ...] = field(default_factory=_defaultSandboxPaths)
    buildDir: str = ""
    impureEnv: Mapping[str, str] = field(default_factory=dict)
    networkHelper: str = ""
    caBundle: str = "/etc/ssl/certs/ca-certificates.crt"
    keepLogs: bool = True
    timeout: int = 0
    maxSilentTime: int = 0
    maxBuildLogSize: int = 0
    maxOutputSize: int = 0

    def limit(self, asked: BuildOptions) -> BuildOptions:
        """
        What a client asks for, within what is allowed here.
        """
        return replace(
            asked,
            buildTimeout=_lower(asked.buildTimeout, self.timeout),
            maxSilentTime=_lower(asked.maxSilentTime, self.maxSilentTime),
            maxLogSize=_lower(asked.maxLogSize, self.maxBuildLogSize),
        )


def _lower(one: int, other: int) -> int:
    """The lower of two limits, each of which may be 0 for none."""
    return min(one, other) if one and other else one or other

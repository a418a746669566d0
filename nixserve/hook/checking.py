"""
What a machine is good for, found out by trying: can it be reached, does it take what builds need, does it build.

What is tried leaves little behind, which the machine's next collector removes: one path of a hundred bytes that is the
same each time, and an empty file for each system.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from twisted.internet.defer import Deferred

from nixserve.codec.buildresult import BuildResult
from nixserve.codec.derivation import BasicDerivation, DerivationOutput, drvPathOf, unparse
from nixserve.codec.hashes import hashBytes
from nixserve.codec.narwriter import regularEnd, regularStart
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.serve import versionText
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import NixServeError
from nixserve.hook.machines import Machine
from nixserve.protocol.client import ServeClient
from nixserve.protocol.reactors import IClientReactor
from nixserve.protocol.workers import Door
from nixserve.remote.address import RemoteAddress, Via
from nixserve.remote.connecting import connect
from nixserve.remote.failures import oneLine
from nixserve.remote.localfiles import ReactorThreads

__all__ = ["MAX_SKEW_SECONDS", "MachineReport", "checkMachine"]

MAX_SKEW_SECONDS: Final = 5.0
"""How far a clock may be off. Builds see it in the times of what they unpack and make."""

_NAME: Final = "nixserve-hook-check"

_SHELL: Final = "/bin/sh"

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")

_HOST_KEY = re.compile(rb"Server host key: (\S+ \S+)")
"""What C{ssh -v} says (OpenSSH 9.2, sshconnect2.c)."""


@dataclass(frozen=True, slots=True)
class MachineReport:
    """
    What was found out.

    @ivar seconds: that it took until there was a session; C{None} if there was none.
    @ivar version: of the protocol, as text.
    @ivar hostKey: kind and fingerprint; empty if it is not known, or there is no SSH.
    @ivar takesUnsigned: it takes paths that nobody has signed, as most inputs are; C{None} if that was not tried.
    @ivar builds: for each system, whether it builds for that, with all features that its line names.
    @ivar clockSkew: seconds that its clock is ahead of ours, C{None} if it does not tell.
    @ivar problems: what is wrong and what to change, one line each; none if all is well.
    """

    seconds: float | None = None
    version: str = ""
    hostKey: str = ""
    takesUnsigned: bool | None = None
    builds: Mapping[str, bool] = field(default_factory=dict)
    clockSkew: float | None = None
    problems: tuple[str, ...] = ()


def checkMachine(
    reactor: IClientReactor,
    machine: Machine,
    environ: Mapping[str, str],
    clock: Callable[[], float],
    timeoutSeconds: float,
) -> Deferred[MachineReport]:
    """
    Try a machine.

    @param clock: seconds since the epoch.
    @param timeoutSeconds: for each connection.
    @return: fires with what was found out, whatever that is.
    """
    return Deferred.fromCoroutine(_Check(reactor, machine, environ, clock, timeoutSeconds).run())


class _Check:
    """
    The check of one machine.
    """

    def __init__(
        self,
        reactor: IClientReactor,
        machine: Machine,
        environ: Mapping[str, str],
        clock: Callable[[], float],
        timeoutSeconds: float,
    ) -> None:
        self._reactor = reactor
        self._machine = machine
        self._environ = environ
        self._clock = clock
        self._timeoutSeconds = timeoutSeconds
        self._report = MachineReport()

    async def run(self) -> MachineReport:
        """Each question in a session of its own: one that is answered with an error ends its session."""
        begun = self._reactor.seconds()
        try:
            async with await self._connect(self._environ) as client:
                seconds = self._reactor.seconds() - begun
                assert client.version is not None, "it is ready"
                self._report = replace(self._report, seconds=seconds, version=versionText(client.version))
                if not await self._send(client):
                    # The session is over, and closing it would fail for the same reason.
                    client.cut()
        except NixServeError as e:
            self._problem(str(e))
            return self._report
        await self._askHostKey()
        for system in sorted(self._machine.systems):
            await self._build(system)
        return self._report

    def _problem(self, text: str) -> None:
        line = oneLine(_ESCAPES.sub("", text).encode("utf-8", "surrogateescape"))
        self._report = replace(self._report, problems=(*self._report.problems, line))

    def _connect(
        self, environ: Mapping[str, str], onError: Callable[[bytes], None] = lambda data: None
    ) -> Deferred[ServeClient]:
        return connect(
            self._reactor, self._machine.address, environ=environ, onError=onError, timeoutSeconds=self._timeoutSeconds
        )

    async def _send(self, client: ServeClient) -> bool:
        """
        Does it take a path that nobody has signed and that no content address vouches for?

        @return: whether it does.
        """
        text = b"Sent by 'nixserve hook --check' to see whether this machine takes paths without signatures.\n"
        nar = regularStart(b"", False, len(text)) + text + regularEnd(b"", len(text))
        storeDir = self._machine.address.storeDir
        path = storeDir.makeOutputPath("out", hashBytes("sha256", text), _NAME)
        info = ValidPathInfo(path, hashBytes("sha256", nar), len(nar))
        try:
            await client.addToStoreNar(info, Door(ReactorThreads(self._reactor)), lambda: iter([nar]))
        except NixServeError as e:
            self._report = replace(self._report, takesUnsigned=False)
            self._problem(
                f"{e}; give our key the right to write without signatures there ('nix-store --serve --write' as its "
                "forced command), or sign what is built here"
            )
            return False
        self._report = replace(self._report, takesUnsigned=True)
        return True

    async def _askHostKey(self) -> None:
        address = self._machine.address
        if address.hostKey:
            kind, _, data = address.hostKey.partition(" ")
            digest = base64.b64encode(hashlib.sha256(base64.b64decode(data.split()[0])).digest()).decode().rstrip("=")
            self._report = replace(self._report, hostKey=f"{kind} SHA256:{digest}")
        elif address.via is Via.OPENSSH:
            said: list[bytes] = []
            options = f"{self._environ.get('NIX_SSHOPTS', '')} -v"
            try:
                async with await self._connect({**self._environ, "NIX_SSHOPTS": options}, said.append):
                    pass
            except NixServeError as e:
                self._problem(str(e))
            if found := _HOST_KEY.search(b"".join(said)):
                self._report = replace(self._report, hostKey=found[1].decode("ascii", "replace"))

    async def _build(self, system: str) -> None:
        """Does it build for a system, what requires all of its features?"""
        machine = self._machine
        features = machine.supportedFeatures | machine.mandatoryFeatures
        drvPath, drv = _probe(machine.address, system, features)
        result: BuildResult | None = None
        problem = ""
        try:
            async with await self._connect(self._environ) as client:
                result = await client.buildDerivation(drvPath, drv)
                after = self._clock()
        except NixServeError as e:
            problem = f"{e}; give our key the right to build there"
        if result is not None and not result.success:
            names = ", ".join(sorted(features)) or "none"
            problem = (
                f"{machine.uri} does not build for {system} with features {names}: {result.errorMsg}; correct its line "
                "in the machines file, or there the settings 'extra-platforms', 'system-features' and, if it lacks "
                "/bin/sh, 'sandbox-paths'"
            )
        self._report = replace(self._report, builds={**self._report.builds, system: not problem})
        if problem:
            self._problem(problem)
        elif result is not None and result.stopTime:
            # Whole seconds, cut off.
            self._tellSkew(result.stopTime + 0.5 - after)

    def _tellSkew(self, skew: float) -> None:
        if self._report.clockSkew is not None:
            return
        self._report = replace(self._report, clockSkew=skew)
        if abs(skew) > MAX_SKEW_SECONDS:
            where = "ahead of" if skew > 0 else "behind"
            self._problem(f"the clock of {self._machine.uri} is {abs(skew):.0f} s {where} ours; have both set by NTP")


def _probe(address: RemoteAddress, system: str, features: frozenset[str]) -> tuple[StorePath, BasicDerivation]:
    """
    A derivation that nobody has built before, and that needs nothing but a shell and no time. (The builders that are
    part of Nix build for any system.)
    """
    storeDir: StoreDir = address.storeDir
    env = {
        "builder": _SHELL,
        "name": _NAME,
        "requiredSystemFeatures": " ".join(sorted(features)),
        "salt": secrets.token_hex(8),
        "system": system,
    }
    unknown = BasicDerivation(
        _NAME, {"out": DerivationOutput(None)}, frozenset(), system, _SHELL, ("-c", ": > $out"), {**env, "out": ""}
    )
    path = storeDir.makeOutputPath("out", hashBytes("sha256", unparse(unknown, maskOutputs=True)), _NAME)
    drv = replace(unknown, outputs={"out": DerivationOutput(path)}, env={**env, "out": path})
    return drvPathOf(drv, storeDir), drv

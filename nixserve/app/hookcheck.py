"""
C{nixserve hook --check}: tells what there is to know about the machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import click
from twisted.internet.defer import gatherResults

from nixserve.app.facts import emitJSON
from nixserve.app.hookcommand import readMachines
from nixserve.app.react import runReactor
from nixserve.app.statedirs import hookStateDir
from nixserve.app.storechoice import chooseStore
from nixserve.builder.settings import hostPlatforms
from nixserve.codec.terminal import onOneLine
from nixserve.errors import NixServeError
from nixserve.hook.aside import Aside
from nixserve.hook.checking import MachineReport, checkMachine
from nixserve.hook.conversation import HookSettings
from nixserve.hook.machines import Machine
from nixserve.hook.running import CONNECT_SECONDS
from nixserve.hook.slots import Slots
from nixserve.protocol.reactors import IServiceReactor

__all__ = ["checkMachines", "nixSettings"]

_SHOW_SETTINGS = (["config", "show"], ["show-config"])
"""What tells the settings: from Nix 2.20 on, and before."""

_SHOW_SECONDS = 10.0


def checkMachines(builders: str | None, asJSON: bool, environ: Mapping[str, str]) -> int:
    """
    Try all machines at once, and tell about them in the order of the file.

    @param builders: in place of Nix's setting.
    @return: the exit status: 0 if all is well.
    @raise NixServeError: the machines file breaks the rules.
    """
    settings = nixSettings(environ)
    if builders is not None:
        settings = HookSettings({**settings.values, "builders": builders})
    machines = readMachines(settings)

    async def main(reactor: IServiceReactor) -> list[MachineReport]:
        checks = [checkMachine(reactor, machine, environ, time.time, CONNECT_SECONDS) for machine in machines.usable]
        return await gatherResults(checks)

    status = 0 if machines.usable and not machines.unusable else 1
    for text in machines.unusable:
        _tellUnusable(text, asJSON)
    if not machines.usable and not machines.unusable:
        click.echo(
            f"error: there are no machines in '{settings.builders}'; name some in the setting 'builders' of nix.conf, "
            "in its machines file, or behind --check",
            err=True,
        )
    for machine, report in zip(machines.usable, runReactor(main) if machines.usable else [], strict=True):
        status = 1 if report.problems else status
        facts = _facts(machine, report, environ)
        if asJSON:
            emitJSON({"event": "machine", **facts})
        else:
            _tell(machine, report, facts)
    return status


def nixSettings(environ: Mapping[str, str]) -> HookSettings:
    """
    C{builders} and C{system} as the Nix of this machine has them from its files and environment; without one, as it
    has them by default.
    """
    values = {"builders": f"@{environ.get('NIX_CONF_DIR') or '/etc/nix'}/machines", "system": hostPlatforms()[0]}
    for command in _SHOW_SETTINGS:
        words = ["nix", "--extra-experimental-features", "nix-command", *command, "--json"]
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError):
            done = subprocess.run(words, capture_output=True, check=True, env=environ, timeout=_SHOW_SECONDS)
            found = json.loads(done.stdout)
            return HookSettings({name: str(found[name]["value"]) for name in values})
    return HookSettings(values)


def _tellUnusable(text: str, asJSON: bool) -> None:
    if asJSON:
        emitJSON({"event": "unusable", "problems": [text]})
    else:
        click.echo(f"not usable: {onOneLine(text)}")


def _facts(machine: Machine, report: MachineReport, environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        "uri": machine.uri,
        "well": not report.problems,
        "seconds": report.seconds,
        "version": report.version,
        "hostKey": report.hostKey,
        "takesUnsigned": report.takesUnsigned,
        "builds": dict(report.builds),
        "clockSkew": report.clockSkew,
        "systems": sorted(machine.systems),
        "supportedFeatures": sorted(machine.supportedFeatures),
        "mandatoryFeatures": sorted(machine.mandatoryFeatures),
        "speedFactor": machine.speedFactor,
        "maxJobs": machine.maxJobs,
        "freeSlots": _freeSlots(machine, environ),
        "putAside": _putAside(machine, environ),
        "problems": list(report.problems),
    }


def _freeSlots(machine: Machine, environ: Mapping[str, str]) -> int | None:
    """C{None} if this user may not know."""
    try:
        stateDir = chooseStore(None, environ).stateDir
        if not os.path.isdir(f"{stateDir}/current-load"):
            return machine.maxJobs
        return machine.maxJobs - Slots(stateDir).load(machine, wait=True)
    except NixServeError:
        return None


def _putAside(machine: Machine, environ: Mapping[str, str]) -> str | None:
    failure = Aside(f"{hookStateDir(environ)}/aside", "", time.time).failure(machine)
    return None if failure is None else failure.reason


def _tell(machine: Machine, report: MachineReport, facts: Mapping[str, Any]) -> None:
    click.echo(f"{machine.uri}: {'well' if facts['well'] else 'not well'}")
    if report.seconds is not None:
        _line("reached", f"in {report.seconds:.2f} s, protocol {report.version}")
    _line("host key", report.hostKey)
    if report.takesUnsigned is not None:
        _line("takes", "any path" if report.takesUnsigned else "signed paths only, or none")
    _line("builds for", ", ".join(system for system, works in report.builds.items() if works))
    _line("systems", ", ".join(facts["systems"]))
    _line("features", ", ".join(facts["supportedFeatures"]))
    _line("only for", ", ".join(facts["mandatoryFeatures"]))
    free = facts["freeSlots"]
    _line("slots", f"{machine.maxJobs}, of which {'an unknown number' if free is None else free} free")
    if report.clockSkew is not None:
        _line("clock", f"{round(report.clockSkew):+d} s")
    _line("put aside", facts["putAside"] or "")
    for problem in report.problems:
        _line("problem", problem)


def _line(name: str, text: str) -> None:
    if text:
        click.echo(f"  {name + ':':<12}{onOneLine(text)}")

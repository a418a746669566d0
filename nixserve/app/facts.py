"""
What C{--json} prints: facts, one JSON object a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

from nixserve.app.localside import CommandFailed
from nixserve.errors import NixServeError

__all__ = ["Emit", "emitJSON", "emitNothing", "errorFact"]

Emit = Callable[[Mapping[str, Any]], None]
"""Takes one fact: C{event}, which says what has happened, and whatever belongs to it."""


def emitJSON(fact: Mapping[str, Any]) -> None:
    """Print a fact on standard output: one JSON object, on a line of its own."""
    click.echo(json.dumps(fact))


def emitNothing(fact: Mapping[str, Any]) -> None:
    """Print no facts: people read something else."""


def errorFact(error: NixServeError) -> dict[str, Any]:
    """What ends a command, and on which side it happened, if on any."""
    side = error.side if isinstance(error, CommandFailed) else ""
    return {"event": "error", "message": str(error), "side": side, "exitStatus": error.exitStatus}

"""
The C{nixserve} command. Each subcommand is a module C{cmd_*} with its parser and body together, imported when it is
asked for; what they raise becomes an exit status here, and only here.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any, Final

import click

from nixserve import __version__
from nixserve.codec.terminal import onOneLine, printableLines
from nixserve.errors import NixServeError

__all__ = ["main", "nixserve"]

INTERRUPTED: Final = 130
"""What a shell says of a command that SIGINT has ended: 128 and the number of the signal."""

_COMMANDS: Final = {
    "build": ("cmd_build", "build"),
    "copy": ("cmd_copy", "copy"),
    "demo": ("cmd_demo", "demo"),
    "hook": ("cmd_hook", "hook"),
    "path-info": ("cmd_pathinfo", "pathInfo"),
}
"""By name: the module and what it is called there."""


class _Commands(click.Group):
    """Imports a command when it is asked for: each needs other things, and all together take long to import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, for the help."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"nixserve.app.{module}"), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Click itself would exit with 1 for Ctrl-C, as for a failure."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nAborted!", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nixserve")
def nixserve() -> None:
    """Nix stores over SSH: the protocol of 'nix-store --serve'.

    To serve a store, run 'twistd -n nixserve'; to see it all at work, 'nixserve demo'.
    """


def main() -> None:
    """
    The command. Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted; and for builds that failed
    what C{nixserve build} says in its help.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal cannot show is no reason to fail.
            stream.reconfigure(errors="replace")
    try:
        nixserve()
    except NixServeError as e:
        _fail(str(e), e.exitStatus, e)
    except OSError as e:
        # It may have been standard output, of which Python tries to write the rest once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _fail(": ".join(filter(None, (e.filename, e.strerror or str(e)))), 1, e)


def _fail(text: str, status: int, error: BaseException) -> None:
    """
    End with one line, behind what the log has to say about it, if anything, and before what else should be known.
    Nothing is in them that a terminal would obey, whomever they quote.

    @raise SystemExit: always.
    """
    for note in getattr(error, "__notes__", ()):
        click.echo(printableLines(note), err=True)
    click.echo(f"error: {onOneLine(text)}", err=True)
    if hint := getattr(error, "hint", ""):
        click.echo(printableLines(hint), err=True)
    sys.exit(status)

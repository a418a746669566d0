"""
The C{nixserve} command. Each subcommand is a module C{cmd_*} with its parser and body together; what they raise
becomes an exit status here, and only here.
"""

from __future__ import annotations

import io
import os
import sys

import click

from nixserve import __version__
from nixserve.app.cmd_demo import demo
from nixserve.app.cmd_pathinfo import pathInfo
from nixserve.errors import NixServeError

__all__ = ["main", "nixserve"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nixserve")
def nixserve() -> None:
    """Nix stores over SSH: the protocol of 'nix-store --serve'.

    To serve a store, run 'twistd -n nixserve'; to see it all at work, 'nixserve demo'.
    """


nixserve.add_command(demo)
nixserve.add_command(pathInfo)


def main() -> None:
    """The command. Exit status: 0 done, 1 refused or failed, 2 wrong usage."""
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
    End with one line, behind what the log has to say about it, if anything.

    @raise SystemExit: always.
    """
    for note in getattr(error, "__notes__", ()):
        click.echo(note, err=True)
    click.echo(f"error: {text}", err=True)
    sys.exit(status)

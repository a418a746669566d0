"""
C{nixserve demo}: shows the whole thing at work, without any set-up.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import click

from nixserve import __version__
from nixserve.store.files import deletePath

__all__ = ["demo", "realUse"]

# Needs nothing but a shell.
_EXPRESSION = (
    'derivation { name = "hello"; system = builtins.currentSystem; builder = "/bin/sh"; '
    'args = [ "-c" "echo hello >$out" ]; }'
)


@click.command()
@click.option("--no-ssh", "noSSH", is_flag=True, help="Connect in this process, even if there is an ssh program.")
@click.option("--no-sandbox", "noSandbox", is_flag=True, help="Build without a sandbox, even if there could be one.")
def demo(noSSH: bool, noSandbox: bool) -> None:
    """Start an endpoint, copy a closure there and back, check every hash, build something there.

    Needs no set-up and leaves nothing behind: keys, stores and port are made for the occasion, in a temporary
    directory, and the endpoint listens on the loopback interface only.
    """
    # Twisted takes 0.3 s to import, which the other commands need not spend.
    from nixserve.app.demonstration import Demonstration
    from nixserve.app.narration import PrintingNarrator
    from nixserve.app.react import runReactor

    click.secho(f"nixserve {__version__}", bold=True)
    click.echo()
    with _temporaryDirectory() as directory:
        runReactor(
            lambda reactor: Demonstration(reactor, directory, PrintingNarrator(), not noSSH, not noSandbox).run()
        )
    click.echo()
    click.echo(f"Nothing is left of it. In earnest, with the keys in {click.style('~/.ssh', bold=True)} let in:")
    click.echo()
    for what, line in realUse(sys.argv[0]):
        click.secho(f"  # {what}", dim=True)
        click.echo(f"  {line}")


def realUse(program: str) -> list[tuple[str, str]]:
    """
    What to type for a store that stays.

    @param program: how this program was called.
    @return: pairs of what it is for, and the line.
    """
    twistd = os.path.join(os.path.dirname(program), "twistd")
    ssh = "NIX_SSHOPTS='-p 2222 -o StrictHostKeyChecking=accept-new'"
    nix = "nix --extra-experimental-features nix-command copy"
    return [
        ("serve a store of its own under the state directory, on port 2222 of this machine", f"{twistd} -n nixserve"),
        ("copy what 'nix-build' has left here to it", f"{ssh} {nix} --to ssh://127.0.0.1 ./result"),
        (
            "and back, unsigned as it is",
            f'{ssh} {nix} --from ssh://127.0.0.1 --no-check-sigs "$(readlink ./result)"',
        ),
        ("build there", f"{ssh} nix-build --max-jobs 0 --builders ssh://127.0.0.1 -E '{_EXPRESSION}'"),
    ]


@contextmanager
def _temporaryDirectory() -> Iterator[str]:
    """
    A directory that is gone in the end, whatever is in it, even if Ctrl-C is pressed again meanwhile.
    """
    # A store must not be reached through symbolic links, which TMPDIR may contain.
    directory = os.path.realpath(tempfile.mkdtemp(prefix="nixserve-demo-"))
    try:
        yield directory
    finally:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            deletePath(directory)
        finally:
            signal.signal(signal.SIGINT, previous)

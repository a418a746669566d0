"""
C{nixserve hook}: Nix's build hook, and what it sees of the machines.
"""

from __future__ import annotations

import os

import click

from nixserve.app.hookentry import answerNix

__all__ = ["hook"]


@click.command()
@click.option(
    "--no-share", "noShare", is_flag=True, help="Let every build have a process and an SSH connection of its own."
)
@click.option("--check", is_flag=True, help="Look at the machines in place of building.")
@click.option("--json", "asJSON", is_flag=True, help="With --check: print one JSON object a machine.")
@click.argument("argument", metavar="[VERBOSITY | MACHINES]", required=False)
def hook(noShare: bool, check: bool, asJSON: bool, argument: str | None) -> None:
    """Build for Nix on other machines.

    Nix runs this itself, with the number VERBOSITY: write 'build-hook = /path/to/nixserve-hook' in nix.conf, or, from
    Nix 2.18 on, 'build-hook = /path/to/nixserve hook'.

    With --check, look at each machine of the setting 'builders' or of MACHINES, which is what that setting may be:
    @/path/to/file, or the lines of such a file. Exit status 0 if all of them are well.

    NIXSERVE_HOOK_SHARE is the number of seconds that what the hook's processes share stays without a build: SSH
    connections, and loaded code; 0 for nothing of the kind. NIXSERVE_HOOK_STATE is the directory for what they share.
    """
    if check:
        from nixserve.app.hookcheck import checkMachines

        status = checkMachines(argument, asJSON, os.environ)
    elif asJSON:
        raise click.UsageError("--json goes with --check.")
    elif argument is None or not argument.isdecimal():
        raise click.UsageError(
            "This is for Nix to run: set 'build-hook' in nix.conf. To look at machines, add --check."
        )
    else:
        status = answerNix(argument, not noShare)
    click.get_current_context().exit(status)

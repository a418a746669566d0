"""
What a run of C{nixserve demo} looks like.
"""

from __future__ import annotations

import click

from nixserve.app.demonstration import HOST, BuildFigures, CopyFigures, Narrator, Server
from nixserve.app.progress import CopyReport, Screen
from nixserve.app.recipe import Recipe
from nixserve.app.sample import Sample
from nixserve.app.text import formatBytes
from nixserve.codec.serve import versionText
from nixserve.protocol.copying import CopyProgress

__all__ = ["PrintingNarrator"]

_COLUMNS = "  {:<14}{:>6}{:>13}{:>11}{:>14}"


class PrintingNarrator(Narrator):
    """
    Prints a line for each step, and bars for the copies if somebody is watching.
    """

    def __init__(self) -> None:
        self._isTable = False

    def made(self, sample: Sample, seconds: float) -> None:
        """See L{Narrator}."""
        _step(
            "closure",
            f"{sample.paths} store paths that refer to each other: {sample.files} files ({sample.executables} "
            f"executable), {sample.links} links, {formatBytes(sample.narBytes)}",
        )

    def connected(self, server: Server) -> None:
        """See L{Narrator}."""
        _step("endpoint", f"the service of 'twistd nixserve', on {HOST}:{server.port}, with an empty store")
        _step(
            "client",
            f"{server.client}, logged in after {server.loginSeconds:.2f} s; protocol {versionText(server.version)}",
        )

    def progress(self, what: str) -> CopyProgress:
        """See L{Narrator}."""
        return CopyReport(Screen(), f"  {what}")

    def copied(self, what: str, copy: CopyFigures) -> None:
        """See L{Narrator}."""
        if not self._isTable:
            self._isTable = True
            click.echo()
            click.secho(_COLUMNS.format("", "paths", "bytes", "time", "rate"), dim=True)
        size = copy.copied.narBytes
        rate = f"{size / copy.seconds / 1e6:.1f} MB/s" if size else "all there"
        cells = (what, len(copy.copied.infos), formatBytes(size), f"{copy.seconds:.3f} s", rate)
        click.echo(_COLUMNS.format(*map(str, cells)))

    def checked(self, paths: int, narBytes: int, seconds: float) -> None:
        """See L{Narrator}."""
        click.echo()
        click.secho("  ✓ ", fg="green", bold=True, nl=False)
        click.echo(f"hashed all {paths} paths in the last store: contents, sizes and references are those of the first")
        click.echo()

    def building(self, recipe: Recipe, paths: int, narBytes: int) -> None:
        """See L{Narrator}."""
        name, inputs = recipe.drvPath.name, len(recipe.basic.inputSrcs)
        _step("recipe", f"{name} and what it depends on, {paths} paths of {formatBytes(narBytes)}, stay here")
        _step("build", f"at the endpoint, which has the {inputs} inputs; the last derivation alone is sent:")

    def said(self, line: str) -> None:
        """See L{Narrator}."""
        click.secho("            │ ", dim=True, nl=False)
        click.echo(line)

    def built(self, build: BuildFigures) -> None:
        """See L{Narrator}."""
        place = "in a sandbox" if build.confined else "without a sandbox"
        _step("built", f"{place}, in {build.seconds:.3f} s")
        moved, factor = formatBytes(build.moved), build.recipeBytes / build.moved
        _step("moved", f"{moved}, log and output included; to copy the recipe takes {factor:,.0f} times as much")
        click.echo()
        click.secho("  ✓ ", fg="green", bold=True, nl=False)
        click.echo("fetched the output, and counted again here: its contents and references are right")


def _step(title: str, text: str) -> None:
    click.secho(f"  {title:<10}", bold=True, nl=False)
    click.echo(text)

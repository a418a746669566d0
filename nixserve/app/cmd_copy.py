"""
C{nixserve copy}: closures from the store here to another one, or back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from nixserve.app.arguments import toStorePath
from nixserve.app.facts import emitJSON, emitNothing, errorFact
from nixserve.app.localside import LocalSide, checkStoreDirs
from nixserve.app.text import formatBytes
from nixserve.codec.storepath import StorePath
from nixserve.errors import NixServeError
from nixserve.remote.address import RemoteAddress

if TYPE_CHECKING:
    from nixserve.app.bothsides import BothSides
    from nixserve.app.progress import CopyReport, Screen
    from nixserve.protocol.copying import Copied

__all__ = ["copy"]

MAX_JOBS = 64
"""Sessions at once: the endpoint of nixserve lets in as many on one connection."""


@click.command()
@click.option("--to", metavar="URL", help="Copy to this store: ssh://[USER@]HOST[:PORT] or unix:///PATH/serve.sock.")
@click.option("--from", "source", metavar="URL", help="Copy from this store. The PATHs are those there.")
@click.option("--store", metavar="URI", help="The store here, as Nix spells it: auto, /absolute/root, local?root=...")
@click.option("--no-closure", "noClosure", is_flag=True, help="Only the PATHs, not what they refer to.")
@click.option(
    "-s", "--substitute", is_flag=True, help="Have the other store fetch from its own substituters what it can."
)
@click.option("--include-outputs", "includeOutputs", is_flag=True, help="Also what derivations among them have built.")
@click.option(
    "--jobs", metavar="N", type=click.IntRange(1, MAX_JOBS), help="Sessions at once; max-connections in the URL, or 1."
)
@click.option("--dry-run", "dryRun", is_flag=True, help="Only show what would be copied, and its size.")
@click.option("--json", "asJSON", is_flag=True, help="Print one JSON object a line: planned, copied, done, error.")
@click.option(
    "--no-check-sigs", is_flag=True, expose_value=False, help="Accepted for users of 'nix copy', without effect."
)
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def copy(asJSON: bool, **options: Any) -> None:
    """Copy store paths, with all that they refer to, to or from another store.

    A PATH is in the store, or a symbolic link that leads there. Only what is missing is copied; nothing of it can
    vanish meanwhile on the other side, whatever collector runs there. Interrupted, run it again: it copies the rest.

    Signatures are copied and not judged: every hash is checked by the store that receives, and who may add what is for
    the other side to decide; here it is who may write to the store.
    """
    emit = emitJSON if asJSON else emitNothing
    try:
        _CopyCommand.fromOptions(asJSON=asJSON, **options).run()
    except NixServeError as e:
        emit(errorFact(e))
        raise


@dataclass(frozen=True, slots=True)
class _CopyCommand:
    """
    What the command line asks for.

    @ivar upload: from here to there.
    """

    address: RemoteAddress
    upload: bool
    store: str | None
    noClosure: bool
    substitute: bool
    includeOutputs: bool
    jobs: int | None
    dryRun: bool
    asJSON: bool
    paths: tuple[str, ...]

    @classmethod
    def fromOptions(cls, to: str | None, source: str | None, substitute: bool, **options: Any) -> _CopyCommand:
        """
        @raise click.UsageError: some do not go together.
        """
        url = to if source is None else source
        if url is None or (to is not None and source is not None):
            raise click.UsageError("Give either --to URL or --from URL.")
        if substitute and to is None:
            raise click.UsageError("--substitute goes with --to: it is the other store that fetches.")
        if options["noClosure"] and options["includeOutputs"]:
            raise click.UsageError("--include-outputs adds to the closure, which --no-closure leaves out.")
        # Asking a remote to substitute has it do so.
        substitute = substitute and not options["dryRun"]
        return cls(RemoteAddress.parse(url), upload=to is not None, substitute=substitute, **options)

    def run(self) -> None:
        """
        @raise NixServeError: it cannot be done.
        """
        local = LocalSide(self.store, os.environ)
        checkStoreDirs(local.layout.storeDir, self.address.storeDir, self.address.name)
        paths = [toStorePath(local.layout.storeDir, path) for path in self.paths]
        # Twisted takes 0.15 s to import, which mistakes need not wait for.
        from nixserve.app.progress import CopyReport, Screen

        screen = Screen()
        emit = emitJSON if self.asJSON else emitNothing
        report = CopyReport(screen, "copying", emit, listPaths=self.dryRun)
        try:
            self._open(local)
            copied = self._copy(local, paths, screen, report)
        except (NixServeError, OSError) as e:
            screen.endBar()
            failure = local.explain(e, self.upload, self.address.name)
            if report.paths:
                failure.hint = f"{_count(report.paths)} copied before that stay; run it again to copy the rest"
            raise failure from e
        finally:
            screen.endBar()
            local.close()
        self._tell(copied, screen.isTerminal)

    def _open(self, local: LocalSide) -> None:
        if self.dryRun:
            local.openForLooking()
        elif self.upload:
            local.openForReading()
        else:
            local.openForWriting("run this as one who may, or name a store of your own with --store")

    def _copy(self, local: LocalSide, paths: list[StorePath], screen: Screen, report: CopyReport) -> Copied:
        from nixserve.app.bothsides import withBothSides
        from nixserve.protocol.copying import copyClosure

        async def work(sides: BothSides) -> Copied:
            if self.upload and local.writable:
                await sides.here[0].addTempRoots(paths)
            source, target = (sides.here, sides.there) if self.upload else (sides.there, sides.here)
            return await copyClosure(
                source,
                target,
                paths,
                closure=not self.noClosure,
                substitute=self.substitute,
                includeOutputs=self.includeOutputs,
                dryRun=self.dryRun,
                progress=report,
            )

        return withBothSides(
            local.store,
            self.address,
            work,
            show=screen.foreignLine,
            sessions=1 if self.dryRun else self.jobs or min(self.address.maxConnections, MAX_JOBS),
            write=not self.dryRun,
            onWait=screen.waitLine,
        )

    def _tell(self, copied: Copied, isTerminal: bool) -> None:
        done = f"{_count(len(copied.infos))}, {formatBytes(copied.narBytes)}; {copied.present} there already"
        if self.asJSON:
            event = "dry-run" if self.dryRun else "done"
            facts = {"paths": len(copied.infos), "narBytes": copied.narBytes, "present": copied.present}
            emitJSON({"event": event, **facts})
        elif self.dryRun:
            for info in copied.infos:
                click.echo(f"{info.path}\t{info.narSize}")
            click.echo(f"would copy {done}", err=True)
        elif isTerminal:
            click.echo(f"copied {done}", err=True)


def _count(paths: int) -> str:
    return "1 path" if paths == 1 else f"{paths} paths"

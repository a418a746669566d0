"""
C{nixserve build}: builds elsewhere, without the .drv files going there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from nixserve.app.arguments import Target
from nixserve.app.facts import emitJSON, emitNothing, errorFact
from nixserve.app.localside import LocalSide, checkStoreDirs
from nixserve.app.outlinks import OutLinks
from nixserve.app.text import formatBytes
from nixserve.codec.buildresult import BuildResult, BuildStatus, exitStatus
from nixserve.codec.derivation import derivationName
from nixserve.codec.messages import BuildOptions
from nixserve.codec.storepath import StorePath
from nixserve.codec.terminal import printable
from nixserve.errors import NixServeError
from nixserve.remote.address import RemoteAddress

if TYPE_CHECKING:
    from nixserve.app.bothsides import BothSides
    from nixserve.app.progress import CopyReport, Screen
    from nixserve.protocol.copying import Copied
    from nixserve.protocol.remotebuild import RemoteBuildResult, RemotePlan

__all__ = ["build"]

_Seconds = click.IntRange(min=0)


@click.command()
@click.option("--on", metavar="URL", required=True, help="Build there: ssh://[USER@]HOST[:PORT] or unix:///PATH.")
@click.option("--store", metavar="URI", help="The store here, as Nix spells it: auto, /absolute/root, local?root=...")
@click.option("-o", "--out-link", "outLink", metavar="PATH", help="Link to the outputs.  [default: result]")
@click.option(
    "--no-out-link", "noOutLink", is_flag=True, help="Make no links: the next collector may take the outputs."
)
@click.option("--no-fetch", "noFetch", is_flag=True, help="Leave the outputs there.")
@click.option("-K", "--keep-failed", "keepFailed", is_flag=True, help="Keep the directories of failed builds there.")
@click.option("-k", "--keep-going", "keepGoing", is_flag=True, help="Go on with the other DRVs when one fails.")
@click.option("--timeout", "buildTimeout", metavar="SECONDS", type=_Seconds, default=0, help="What a build may take.")
@click.option(
    "--max-silent-time", "maxSilentTime", metavar="SECONDS", type=_Seconds, default=0, help="And without any output."
)
@click.option(
    "--max-log-size", "maxLogSize", metavar="BYTES", type=click.IntRange(min=0), default=0, help="What it may print."
)
@click.option("-s", "--substitute", is_flag=True, help="Have the other store fetch from its substituters what it can.")
@click.option("--dry-run", "dryRun", is_flag=True, help="Only show what would be copied and built.")
@click.option(
    "--json", "asJSON", is_flag=True, help="Print one JSON object a line: planned, copied, built, failed, ..."
)
@click.argument("drvs", metavar="DRV[!OUTPUT,...]...", nargs=-1, required=True)
def build(
    on: str,
    asJSON: bool,
    keepFailed: bool,
    buildTimeout: int,
    maxSilentTime: int,
    maxLogSize: int,
    drvs: tuple[str, ...],
    **options: Any,
) -> None:
    """Build derivations on another machine and fetch what comes of it.

    A DRV is a .drv file in the store here, or a symbolic link to one; !dev or ^dev behind it names an output, otherwise
    all are meant. Only what the builders may read is copied there, not the .drv files. The log comes on standard error,
    the paths of the outputs on standard output.

    Exit status as of 'nix-store -r': 100 if a builder failed, 101 if one took too long, 102 if a fixed output has
    another hash, 104 if a build gives different outputs each time. With several of these the numbers are joined
    bit by bit. 1 for anything else, 2 for wrong usage, 130 if interrupted.
    """
    emit = emitJSON if asJSON else emitNothing
    settings = BuildOptions(maxSilentTime, buildTimeout, maxLogSize, keepFailed=keepFailed)
    try:
        status = _BuildCommand(on, settings, asJSON, drvs, **options).run()
    except NixServeError as e:
        emit(errorFact(e))
        raise
    click.get_current_context().exit(status)


@dataclass(slots=True)
class _BuildCommand:
    """
    What the command line asks for.
    """

    on: str
    settings: BuildOptions
    asJSON: bool
    drvs: tuple[str, ...]
    store: str | None
    outLink: str | None
    noOutLink: bool
    noFetch: bool
    keepGoing: bool
    substitute: bool
    dryRun: bool

    def run(self) -> int:
        """
        @return: the exit status.
        @raise NixServeError: it cannot be done.
        """
        if self.outLink is not None and (self.noOutLink or self.noFetch):
            other = "--no-out-link" if self.noOutLink else "--no-fetch"
            raise click.UsageError(f"--out-link and {other} contradict each other.")
        address = RemoteAddress.parse(self.on)
        local = LocalSide(self.store, os.environ)
        checkStoreDirs(local.layout.storeDir, address.storeDir, address.name)
        targets = [Target.parse(local.layout.storeDir, drv) for drv in self.drvs]
        # Twisted takes 0.15 s to import, which mistakes need not wait for.
        from nixserve.app.bothsides import withBothSides
        from nixserve.app.progress import CopyReport, Screen

        screen = Screen()
        report = CopyReport(screen, "copying", emitJSON if self.asJSON else emitNothing)
        session = _BuildRun(self, address, local, targets, screen, report)
        try:
            self._open(local)
            withBothSides(
                local.store,
                address,
                session.planAll if self.dryRun else session.buildAll,
                show=screen.foreignLine,
                onWait=screen.waitLine,
            )
        except (NixServeError, OSError) as e:
            screen.endBar()
            raise local.explain(e, True, address.name) from e
        finally:
            screen.endBar()
            local.close()
            # Behind the logs, whose last lines may come after the result.
            for failed in session.failed:
                self._tellFailed(failed, address, screen)
        return exitStatus(session.results)

    def _open(self, local: LocalSide) -> None:
        if self.dryRun:
            local.openForLooking()
        elif self.noFetch:
            local.openForReading()
        else:
            local.openForWriting("leave the outputs there with --no-fetch, or name a store of your own with --store")

    def _tellFailed(self, done: RemoteBuildResult, address: RemoteAddress, screen: Screen) -> None:
        lines = done.result.errorMsg.strip().splitlines()
        if self.asJSON:
            message = "\n".join(map(printable, lines))
            emitJSON({"event": "failed", "drvPath": done.drvPath, "message": message, **_resultFacts(done.result)})
        begin = f"error: build of '{done.drvPath}' on '{address.name}' failed: "
        screen.foreignLine(begin + (lines[0] if lines else f"status {done.result.status}"))
        for line in lines[1:]:
            screen.foreignLine(line)

    @property
    def links(self) -> bool:
        """Whether links to the outputs are to be made."""
        return not (self.noFetch or self.noOutLink)


class _BuildRun:
    """
    One run of the command, in the reactor.

    @ivar failed: the builds that have.
    @ivar results: of all builds that have ended; in place of one whose dependency failed, that of the dependency.
    """

    def __init__(
        self,
        asked: _BuildCommand,
        address: RemoteAddress,
        local: LocalSide,
        targets: list[Target],
        screen: Screen,
        report: CopyReport,
    ) -> None:
        self.failed: list[RemoteBuildResult] = []
        self.results: list[BuildResult] = []
        self._asked = asked
        self._address = address
        self._local = local
        self._targets = targets
        self._screen = screen
        self._report = report
        self._links = OutLinks(local.layout, asked.outLink or "result")

    async def planAll(self, sides: BothSides) -> None:
        """Say what would be done."""
        from nixserve.protocol.remotebuild import planRemoteBuild

        for target in self._targets:
            plan = await planRemoteBuild(sides.there[0], target.drvPath, sides.here[0], outputs=target.outputs)
            self._tellPlan(target, plan)

    async def buildAll(self, sides: BothSides) -> None:
        """
        Build one derivation after the other.

        @raise NixServeError: something else went wrong than a build.
        """
        if self._local.writable:
            await sides.here[0].addTempRoots({target.drvPath for target in self._targets})
        if self._asked.links:
            for target in self._targets:
                await sides.here[0].call(self._links.check, target.drvPath, target.outputs or {"out"})
        for target in self._targets:
            done = await self._build(sides, target)
            self.results.append(done.cause or done.result)
            if done.result.success:
                links = {}
                if self._asked.links:
                    links = await sides.here[0].call(self._links.make, target.drvPath, done.outputs)
                self._tellBuilt(done, links)
                continue
            self.failed.append(done)
            if not self._asked.keepGoing:
                return

    async def _build(self, sides: BothSides, target: Target) -> RemoteBuildResult:
        from nixserve.protocol.remotebuild import buildRemotely

        names: set[str] = {derivationName(other.drvPath) for other in self._targets}

        def onBuild(drvPath: StorePath) -> None:
            names.add(derivationName(drvPath))
            # One needs no name, as long as it is the only one.
            sides.lines.prefix = f"{derivationName(drvPath)}> " if len(names) > 1 else ""

        return await buildRemotely(
            sides.there[0],
            target.drvPath,
            sides.here[0],
            outputs=target.outputs,
            fetch=not self._asked.noFetch,
            options=self._asked.settings,
            substitute=self._asked.substitute,
            progress=self._report,
            onBuild=onBuild,
        )

    def _tellPlan(self, target: Target, plan: RemotePlan) -> None:
        if self._asked.asJSON:
            sends = [{"path": info.path, "narSize": info.narSize} for info in plan.sends.infos]
            facts = {"drvPath": target.drvPath, "builds": list(plan.builds), "sends": sends}
            emitJSON({"event": "plan", **facts, "narBytes": plan.sends.narBytes})
            return
        for info in plan.sends.infos:
            click.echo(f"copy\t{info.path}\t{info.narSize}")
        for drvPath in plan.builds:
            click.echo(f"build\t{drvPath}")
        size = formatBytes(plan.sends.narBytes)
        click.echo(
            f"'{target.drvPath}': would copy {len(plan.sends.infos)} paths, {size}; would build {len(plan.builds)}",
            err=True,
        )

    def _tellBuilt(self, done: RemoteBuildResult, links: Mapping[str, str]) -> None:
        if self._asked.asJSON:
            emitJSON(
                {
                    "event": "built",
                    "drvPath": done.drvPath,
                    "outputs": dict(sorted(done.outputs.items())),
                    "links": dict(sorted(links.items())),
                    "sent": _amount(done.sent),
                    "fetched": _amount(done.fetched),
                    **_resultFacts(done.result),
                }
            )
            return
        for _, path in sorted(done.outputs.items()):
            click.echo(path)


def _resultFacts(result: BuildResult) -> dict[str, Any]:
    known = result.status in BuildStatus.__members__.values()
    return {
        "status": result.status,
        "statusName": BuildStatus(result.status).name if known else "",
        "startTime": result.startTime,
        "stopTime": result.stopTime,
    }


def _amount(copied: Copied | None) -> dict[str, int] | None:
    return None if copied is None else {"paths": len(copied.infos), "narBytes": copied.narBytes}

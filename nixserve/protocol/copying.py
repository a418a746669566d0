"""
Closures from one store to another over L{ServeClient}s: query and copy as one locked round trip.

Upload: one question for the whole closure, which also makes all of it roots there; then every missing path straight
behind the one before it. Download: closure, infos, then NARs requested ahead. Between question and copy nothing can
vanish on the remote, whatever collector runs, as long as the session of the question lives. Paths arrive in dependency
order, so whatever ends a copy half way leaves the receiving store with whole closures only, and doing it again copies
what is missing.

Who may add what is not decided here: signatures are passed on unjudged. Hashes are checked by the store that receives.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from twisted.internet.defer import Deferred, DeferredList, FirstError, gatherResults

from nixserve.codec.messages import Command
from nixserve.codec.pathinfo import ValidPathInfo, topoSort
from nixserve.codec.storepath import StorePath
from nixserve.errors import LocalProtocolError, RemoteError, UsageError
from nixserve.protocol.buildoutputs import KnownOutputs, asPromised
from nixserve.protocol.client import ServeClient
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.schedule import Schedule
from nixserve.protocol.transfers import Arrived, Moved, download, upload, uploadStream
from nixserve.store.api import InvalidPath

__all__ = ["Copied", "CopyProgress", "Explain", "MissingReference", "copyClosure", "queryMissing", "sendPaths"]

Explain = Callable[[Mapping[StorePath, ValidPathInfo]], Awaitable[KnownOutputs]]
"""
Is told how a remote describes what would come here, before any of it does. Gives what derivations that are here say of
some of it: what is to be in those, they decide. Raises if something may not come.
"""


class MissingReference(UsageError):
    """
    Something to be copied refers to what neither is where it would go nor will be copied.

    @ivar path: the one that is to be copied.
    @ivar reference: what it refers to.
    """

    def __init__(self, path: StorePath, reference: StorePath, where: str) -> None:
        """
        @param where: what store it would go to.
        """
        self.path = path
        self.reference = reference
        super().__init__(f"'{path}' refers to '{reference}', which {where} lacks; copy the closure, or that too")


class CopyProgress:
    """
    Hears how a copy is getting on. This one ignores it; a subclass shows it.
    """

    def planned(self, infos: Sequence[ValidPathInfo], present: int) -> None:
        """
        It is known what is to be done.

        @param infos: what will be copied, references before what refers to them.
        @param present: how many of the paths asked for are there already.
        """

    def moved(self, size: int) -> None:
        """C{size} more bytes of NARs are on their way or have come. Called in any thread."""

    def copied(self, info: ValidPathInfo) -> None:
        """The receiving store has this path."""


@dataclass(frozen=True, slots=True)
class Copied:
    """
    What came of a copy.

    @ivar infos: what was copied, references before what refers to them.
    @ivar present: how many of the paths asked for were there before.
    """

    infos: tuple[ValidPathInfo, ...]
    present: int

    @property
    def narBytes(self) -> int:
        """The bytes of the NARs that were copied."""
        return sum(info.narSize for info in self.infos)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """
    What is to be copied: C{paths}, and with C{closure} what they refer to, with C{includeOutputs} also what derivations
    among that have built.

    @ivar explain: see L{Explain}.
    """

    paths: frozenset[StorePath]
    closure: bool
    includeOutputs: bool
    substitute: bool
    lock: bool
    explain: Explain


_SILENT: Final = CopyProgress()


async def _asDescribed(infos: Mapping[StorePath, ValidPathInfo]) -> KnownOutputs:
    """Whatever the source says is so."""
    return {}


def copyClosure(
    source: DeferredSession | ServeClient | Sequence[DeferredSession] | Sequence[ServeClient],
    target: DeferredSession | ServeClient | Sequence[DeferredSession] | Sequence[ServeClient],
    paths: Collection[StorePath],
    *,
    closure: bool = True,
    substitute: bool = False,
    includeOutputs: bool = False,
    dryRun: bool = False,
    progress: CopyProgress = _SILENT,
    explain: Explain = _asDescribed,
) -> Deferred[Copied]:
    """
    Copy C{paths} and all that they refer to.

    One side is a session of a store here, the other a session on a remote store. Either may be several of the same
    store, to copy over several connections at once; the first of each asks and keeps the roots. Until they are closed
    everything asked about stays in the remote store, and what came here or was here stays here. (Whoever copies from
    here makes what must not vanish meanwhile roots of his session: a store that is only read takes none.)

    @param closure: otherwise only C{paths} themselves; what they refer to must be there, or it is a
        L{MissingReference}.
    @param substitute: the remote, if it is the target, shall try to fetch the paths from its own substituters first.
    @param includeOutputs: also what derivations among them have built.
    @param dryRun: only ask.
    @param explain: asked about what comes here. By default whatever the remote says of it is so.
    @return: fires when the target has everything. Fails with L{InvalidPath} if the source lacks one of C{paths},
        L{nixserve.protocol.client.RemoteFailure} if the remote refuses or is gone, or L{StoreError} if the store here
        fails or something that came is not what its info says. Failing or cancelled it cuts the connections: what is
        under way cannot be taken back.
    """
    wanted = _Wanted(frozenset(paths), closure, includeOutputs, substitute, not dryRun, explain)
    sources, targets = _several(source), _several(target)
    match sources[0], targets[0]:
        case DeferredSession(), ServeClient():
            copying = _upload(sources, targets, wanted, progress, dryRun)
            return Deferred.fromCoroutine(_orCut(targets, copying))
        case ServeClient(), DeferredSession():
            copying = _download(sources, targets, wanted, progress, dryRun)
            return Deferred.fromCoroutine(_orCut(sources, copying))
    raise LocalProtocolError("a copy goes from a DeferredSession to a ServeClient or the other way round")


def _several(ends: Any) -> list[Any]:
    return [ends] if isinstance(ends, DeferredSession | ServeClient) else list(ends)


async def _orCut(clients: Sequence[ServeClient], copying: Coroutine[Any, Any, Copied]) -> Copied:
    """Answers to what is under way have nobody to take them if a copy ends early."""
    try:
        return await copying
    except BaseException:
        for client in clients:
            client.cut()
        raise


async def _upload(
    sources: Sequence[DeferredSession],
    clients: Sequence[ServeClient],
    wanted: _Wanted,
    progress: CopyProgress,
    dryRun: bool,
) -> Copied:
    here, client = sources[0], clients[0]
    if wanted.closure:
        paths = frozenset(await here.queryClosure(wanted.paths, wanted.includeOutputs))
        missing = await queryMissing(here, client, paths, lock=wanted.lock, substitute=wanted.substitute)
    else:
        paths = wanted.paths
        infos = await here.queryPathInfos(paths)
        asked = _withReferences(paths, infos)
        present = await client.queryValidPaths(asked, lock=wanted.lock, substitute=wanted.substitute)
        missing = _inOrder(paths - present, infos)
        _requireReferences(missing, present, f"the store of {_nameOf(client)}")
    copied = Copied(tuple(missing), len(paths) - len(missing))
    progress.planned(missing, copied.present)
    if dryRun or not missing:
        return copied
    await sendPaths(sources, clients, missing, progress.moved, progress.copied)
    return copied


async def queryMissing(
    here: DeferredSession, client: ServeClient, paths: frozenset[StorePath], *, lock: bool, substitute: bool
) -> list[ValidPathInfo]:
    """
    Which of C{paths} a remote lacks. One question to each side.

    @param lock: all of them become roots there.
    @param substitute: the remote shall try to fetch them from its own substituters first.
    @return: those, references first.
    @raise InvalidPath: one of them is not valid here.
    """
    missing = paths - await client.queryValidPaths(paths, lock=lock, substitute=substitute)
    return _inOrder(missing, await here.queryPathInfos(missing))


async def sendPaths(
    sources: Sequence[DeferredSession],
    clients: Sequence[ServeClient],
    infos: Sequence[ValidPathInfo],
    moved: Moved,
    arrived: Arrived,
) -> None:
    """
    Send what a remote lacks, over one or several sessions.

    @param infos: references before what refers to them. What they refer to beside each other is there.
    """
    if not clients[0].knows(Command.ADD_TO_STORE_NAR):
        await uploadStream(sources[0], clients[0], infos, moved, arrived)
        return
    schedule = Schedule(infos, len(clients))
    hasArrived = _arrived(schedule, arrived)
    await _together(
        upload(sources[lane % len(sources)], client, schedule, lane, moved, hasArrived)
        for lane, client in enumerate(clients)
    )


async def _download(
    clients: Sequence[ServeClient],
    targets: Sequence[DeferredSession],
    wanted: _Wanted,
    progress: CopyProgress,
    dryRun: bool,
) -> Copied:
    client, here = clients[0], targets[0]
    # Asked together: the roots are there before the closure is looked up.
    rooted = client.queryValidPaths(wanted.paths, lock=wanted.lock)
    paths: frozenset[StorePath] = wanted.paths
    if wanted.closure:
        # Whatever fails it fails what is asked behind it.
        rooted.addErrback(lambda _: None)
        paths = await client.queryClosure(paths, wanted.includeOutputs)
        for path in sorted(wanted.paths - paths):
            raise RemoteError(f"{_nameOf(client)} was asked for '{path}' and what it refers to, and left it out")
    else:
        await rooted
    if not client.tellsHashes():
        raise RemoteError(f"{_nameOf(client)} speaks a protocol without hashes of paths; it needs Nix 2.0")
    # Roots first: what is valid after that stays so.
    if wanted.lock:
        await here.addTempRoots(paths)
    present = await here.queryValidPaths(paths)
    missing = _inOrder(paths - present, await _described(client, here, wanted, paths - present, present))
    if wanted.closure:
        _requireClosed(client, missing, paths)
    else:
        references = _withReferences(paths, {info.path: info for info in missing})
        if wanted.lock:
            await here.addTempRoots(references)
        _requireReferences(missing, await here.queryValidPaths(references), "the store here")
    copied = Copied(tuple(missing), len(present))
    progress.planned(missing, copied.present)
    if dryRun or not missing:
        return copied
    schedule = Schedule(missing, min(len(clients), len(targets)))
    arrived = _arrived(schedule, progress.copied)
    lanes = list(zip(clients, targets, strict=False))
    await _together(
        download(one, target, schedule, lane, progress.moved, arrived) for lane, (one, target) in enumerate(lanes)
    )
    return copied


async def _described(
    client: ServeClient,
    here: DeferredSession,
    wanted: _Wanted,
    missing: frozenset[StorePath],
    present: set[StorePath],
) -> dict[StorePath, ValidPathInfo]:
    """
    What a remote says of what is to come here, with what derivations say of it in the place of that.

    @param present: what is here already.
    @raise RemoteError: something cannot be what its derivation says, be it here already.
    """
    told = await client.queryPathInfos(missing) if missing else {}
    known = await wanted.explain(told)
    if outputs := wanted.paths & known.keys() & present:
        # Where a floating output is the remote has said, so what is here already may be anything.
        for info in (await here.queryPathInfos(outputs)).values():
            asPromised(client.name, info, known)
    return {path: asPromised(client.name, info, known) for path, info in told.items()}


async def _together(lanes: Iterable[Coroutine[Any, Any, None]]) -> None:
    """
    Wait for all; the first that fails ends the others, and their sessions with them, and is what is raised.
    """
    running = [Deferred.fromCoroutine(lane) for lane in lanes]
    try:
        await gatherResults(running, consumeErrors=True)
    except FirstError as e:
        e.subFailure.raiseException()
    finally:
        if not all(lane.called for lane in running):
            for lane in running:
                lane.cancel()
            await DeferredList(running, consumeErrors=True)


def _arrived(schedule: Schedule, arrived: Arrived) -> Arrived:
    """Both hear of a path."""

    def both(info: ValidPathInfo) -> None:
        schedule.arrived(info)
        arrived(info)

    return both


def _nameOf(client: ServeClient) -> str:
    return client.name or "the remote"


def _inOrder(wanted: Iterable[StorePath], infos: Mapping[StorePath, ValidPathInfo]) -> list[ValidPathInfo]:
    """
    @param infos: those of C{wanted}, and maybe more.
    @return: those of C{wanted}, references first.
    @raise InvalidPath: the source has not got one, or no more.
    """
    references: dict[StorePath, frozenset[StorePath]] = {}
    for path in sorted(wanted):
        if path not in infos:
            raise InvalidPath(path)
        references[path] = infos[path].references
    return [infos[path] for path in topoSort(references)]


def _withReferences(paths: frozenset[StorePath], infos: Mapping[StorePath, ValidPathInfo]) -> frozenset[StorePath]:
    return paths.union(*(info.references for info in infos.values()))


def _requireClosed(client: ServeClient, infos: Sequence[ValidPathInfo], closure: frozenset[StorePath]) -> None:
    """
    @raise RemoteError: one refers to something outside of what the remote has called a closure.
    """
    for info in infos:
        for reference in sorted(info.references - closure):
            raise RemoteError(
                f"{_nameOf(client)} says that '{info.path}' refers to '{reference}', but left that out of the closure"
            )


def _requireReferences(missing: Sequence[ValidPathInfo], present: Collection[StorePath], where: str) -> None:
    """
    @raise MissingReference: something to be copied refers to what neither is there nor will be copied.
    """
    available = {*present, *(info.path for info in missing)}
    for info in missing:
        for reference in sorted(info.references - available):
            raise MissingReference(info.path, reference, where)

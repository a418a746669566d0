"""
What Nix's build hook does until there is a machine to connect to, in the process that Nix has started
(L{nixserve.app.hookentry}) or in one that was loaded already (L{nixserve.app.preloaded}).

There is one such process for each build, for which Nix waits: so this imports only what it takes to read the question
and choose a machine. Twisted follows when there is one to connect to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nixserve.app.handover import persistSeconds
from nixserve.app.statedirs import hookStateDir, socketDirectory
from nixserve.app.storechoice import chooseStore
from nixserve.errors import FormatError, NixServeError, RemoteError, StoreError, UsageError
from nixserve.hook.aside import Aside
from nixserve.hook.choice import Refusal
from nixserve.hook.conversation import BuildQuestion, HookSettings, Verbosity
from nixserve.hook.lastseen import LastSeen
from nixserve.hook.machines import Machines, parseMachines
from nixserve.hook.negotiation import Chooser, HookPlaces, NixPipes, Taken
from nixserve.hook.queue import Queue, Ticket
from nixserve.hook.slots import Slots
from nixserve.store.durability import Durability
from nixserve.store.layout import StoreLayout
from nixserve.store.ownpaths import makeOwnDirectory

if TYPE_CHECKING:
    from nixserve.protocol.reactors import IServiceReactor

__all__ = ["HookOptions", "answer", "readMachines"]

INTERRUPTED = 130
"""What a shell says of a command that SIGINT has ended."""

_POLL_SECONDS, _LATER_POLL_SECONDS = 0.02, 0.2
"""How often the build whose turn it is looks for a slot, and how often after L{_HASTY_SECONDS}: then what it waits for
are no builds of tenths of a second. To look takes some milliseconds on a farm of hundreds of slots."""

_HASTY_SECONDS = 2.0
"""For so long a build whose turn it is looks for a slot as often as it can."""


@dataclass(frozen=True, slots=True)
class HookOptions:
    """
    @ivar verbosity: a number that Nix gives.
    @ivar share: have all hook processes share one SSH connection to each machine.
    @ivar waiting: a descriptor whose end is that of the hook process that waits for this one; C{None} if this is it.
    """

    verbosity: int
    share: bool = True
    waiting: int | None = None


def answer(
    options: HookOptions, environ: Mapping[str, str], parent: int, prepareNext: Callable[[], None] = lambda: None
) -> int:
    """
    Answer the Nix that has started this process, until it asks no more or one build was done.

    @param parent: the process that runs Nix.
    @param prepareNext: called when there is a build, before Nix hears that it is done elsewhere: then Nix starts the
        next hook process.
    @return: the exit status.
    """
    pipes = NixPipes(options.verbosity, os.getpid(), waiting=options.waiting)
    try:
        return _Hook(pipes, options, environ, parent, prepareNext).answer()
    except NixServeError as e:
        pipes.write(pipes.log.error(f"build hook: {e}"))
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


class _Hook:
    """
    The questions of one Nix, as far as they need no connection.
    """

    def __init__(
        self,
        pipes: NixPipes,
        options: HookOptions,
        environ: Mapping[str, str],
        parent: int,
        prepareNext: Callable[[], None],
    ) -> None:
        """
        Hear the settings. Waits for them.

        @raise NixServeError: nothing can be done with them.
        """
        settings = pipes.readSettings()
        layout = _chooseStore(settings, environ)
        state = hookStateDir(environ)
        machines = readMachines(settings)
        if machines.usable:
            _requireWritable(state)
        run, since = _runOf(parent)
        self._pipes = pipes
        self._prepareNext = prepareNext
        self._chooser = Chooser(
            machines,
            settings,
            Slots(layout.stateDir),
            Aside(f"{state}/aside", run, time.time),
            LastSeen(f"{state}/seen", time.time),
            Queue(f"{state}/queue", layout.stateDir),
            since,
            time.time,
        )
        persist = persistSeconds(environ) if options.share else 0
        masters = socketDirectory(state, "masters") if persist else ""
        self._places = HookPlaces(layout, f"{state}/claims", masters, persist, environ)

    def answer(self) -> int:
        """
        @return: the exit status.
        """
        pipes = self._pipes
        while isinstance(question := pipes.readEvent(), BuildQuestion):
            decision = self._chooser.choose(question)
            for text in self._chooser.news():
                pipes.write(pipes.log.message(Verbosity.WARN, f"warning: {text}"))
            if isinstance(decision, Taken):
                self._prepareNext()
                accepted = self._chooser.mayAcceptUnseen(question, decision)
                if accepted:
                    pipes.accept(decision.machine)
                return self._run(question, decision, accepted)
            if decision is Refusal.POSTPONE and (waiting := self._chooser.queue(question)):
                machine, ticket = waiting
                self._prepareNext()
                pipes.accept(machine)
                taken = self._wait(question, ticket)
                return self._run(question, taken, True)
            pipes.write(self._chooser.refusalLines(question, decision, pipes.log))
            pipes.write(getattr(pipes.conversation, decision.value)())
            if decision is Refusal.DECLINE_PERMANENTLY:
                break
        return 0

    def _wait(self, question: BuildQuestion, ticket: Ticket) -> Taken:
        """
        A slot for a build that was accepted without one.

        @param ticket: its place, which it leaves.
        @raise BrokenPipeError: Nix is gone.
        @raise RemoteError: no machine is left that could build it.
        """
        ours = replace(question, amWilling=False)
        ticket.waitForTurn()
        # Nix may be gone meanwhile.
        self._pipes.sleep(0)
        hasty = time.monotonic() + _HASTY_SECONDS
        while not isinstance(decision := self._chooser.choose(ours), Taken):
            if decision is not Refusal.POSTPONE:
                raise RemoteError(f"no machine can be reached that could build '{question.drvPath}'")
            self._pipes.sleep(_POLL_SECONDS if time.monotonic() < hasty else _LATER_POLL_SECONDS)
        ticket.leave()
        return decision

    def _run(self, question: BuildQuestion, taken: Taken, accepted: bool) -> int:
        from nixserve.app.react import runReactor
        from nixserve.hook.running import HookRun

        def main(reactor: IServiceReactor) -> Coroutine[Any, Any, int]:
            return HookRun(reactor, self._pipes, self._chooser, self._places).run(question, taken, accepted)

        return runReactor(main)


def _chooseStore(settings: HookSettings, environ: Mapping[str, str]) -> StoreLayout:
    """
    The store of the Nix that asks.

    @raise StoreError: it is none of this machine's, or not this user's to write to.
    """
    try:
        layout = chooseStore(settings.store, environ)
    except UsageError as e:
        raise StoreError(
            f"the store of this Nix is '{settings.store}', which only its own hook can write to: {e}"
        ) from e
    for path in (layout.realStoreDir, layout.dbDir):
        if not os.access(path, os.W_OK):
            raise StoreError(f"this user may not write to '{path}'; where there is a daemon, it must run the hook")
    durability = layout.durability
    return replace(
        layout,
        durability=Durability(
            fsyncMetadata=settings.flag("fsync-metadata", durability.fsyncMetadata),
            fsyncStorePaths=settings.flag("fsync-store-paths", durability.fsyncStorePaths),
            syncBeforeRegistering=settings.flag("sync-before-registering", durability.syncBeforeRegistering),
        ),
    )


def _requireWritable(state: str) -> None:
    """
    @param state: see L{hookStateDir}.
    @raise StoreError: nothing can be written there, or others could.
    """
    advice = "set NIXSERVE_HOOK_STATE to a directory that this user may write to"
    try:
        makeOwnDirectory(state)
    except OSError as e:
        raise StoreError(f"cannot make the directory '{state}': {e.strerror}; {advice}") from e
    if not os.access(state, os.W_OK | os.X_OK):
        raise StoreError(f"this user may not write to '{state}'; {advice}")


def readMachines(settings: HookSettings) -> Machines:
    """
    The machines that Nix knows.

    @raise FormatError: a machines file breaks the rules.
    """
    return parseMachines(settings.builders, _readFile, settings.system)


def _readFile(path: str) -> str | None:
    """As the original: one that is not there has no machines."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise FormatError(f"cannot read the machines file '{path}': {e.strerror}") from e


def _runOf(parent: int) -> tuple[str, float]:
    """
    The run of the user's that this process belongs to.

    @return: a name that no other has, and when it began, in seconds since the epoch.
    """
    try:
        with open(f"/proc/{parent}/stat", "rb") as stream:
            # The name of the program, in parentheses, may hold anything.
            started = int(stream.read().rpartition(b")")[2].split()[19])
        with open("/proc/uptime", "rb") as stream:
            uptime = float(stream.read().split()[0])
    except (OSError, ValueError, IndexError):
        return f"{parent}", time.time()
    return f"{parent}-{started}", time.time() - uptime + started / os.sysconf("SC_CLK_TCK")

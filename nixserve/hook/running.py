"""
The build hook in the reactor: from the first machine that is tried to the outputs in the store here.

Theory of operation. A machine is connected to before the build is accepted, so that of those which cannot be reached
none gets it, and Nix may still build it itself. Once accepted the build is ours: all that it needs goes there, it is
built, and what it made comes back in one session, whose roots keep every path of it from collectors there, as the
session of the store here does for those here. If the machine is lost meanwhile, the next suitable one takes the build
from the start.

Order of what is held: slot, session there, roots here, claims. Whatever ends this process ends them all.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.task import deferLater

from nixserve.codec.buildresult import BuildResult
from nixserve.codec.derivation import BasicDerivation, Derivation
from nixserve.codec.messages import BuildOptions
from nixserve.codec.realisation import realisations
from nixserve.codec.resolution import basicDerivation
from nixserve.codec.storepath import StorePath
from nixserve.errors import NixServeError, RemoteError, RemoteProtocolError
from nixserve.hook.activities import CopyActivities
from nixserve.hook.choice import Refusal
from nixserve.hook.claims import Claims
from nixserve.hook.conversation import BuildQuestion, BuildTask, Event, HookSettings, Verbosity
from nixserve.hook.inputs import sendInputs
from nixserve.hook.machines import Machine
from nixserve.hook.negotiation import Chooser, HookPlaces, NixPipes, Taken
from nixserve.hook.outputs import fetchOutputs
from nixserve.hook.pipes import PipeToNix, whenReadable
from nixserve.protocol.buildoutputs import outputsOf, promisedOutputs
from nixserve.protocol.client import RemoteFailure, ServeClient
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.reactors import IClientReactor
from nixserve.protocol.workers import Workers
from nixserve.remote.address import Via
from nixserve.remote.connecting import connect
from nixserve.remote.failures import oneLine
from nixserve.remote.master import SSHMaster
from nixserve.store.local import LocalSession, LocalStore
from nixserve.store.realisations import registerRealisations

__all__ = ["CONNECT_SECONDS", "HookRun"]

CONNECT_SECONDS: Final = 10.0
"""How long a machine may take until its session is there, if Nix's setting C{connect-timeout} does not say. Nix waits
meanwhile, with everything that it does; and for an SSH server, behind however slow a link, this is plenty."""

POLL_SECONDS: Final = 1.0
"""How often a build that has lost its machine looks for a free slot on another one."""

MAX_EARLY: Final = 64 * 1024
"""Bytes that a machine may say before it has the build."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Connected:
    """
    A machine that is to build, and the session on it.
    """

    taken: Taken
    client: ServeClient

    @property
    def uri(self) -> str:
        """What the machine is called."""
        return self.taken.machine.uri


class HookRun:
    """
    One hook process, from when the reactor runs.
    """

    def __init__(self, reactor: IClientReactor, pipes: NixPipes, chooser: Chooser, places: HookPlaces) -> None:
        self._reactor = reactor
        self._pipes = pipes
        self._chooser = chooser
        self._places = places
        self._workers = Workers(reactor)
        self._store: LocalStore | None = None
        self._running: Deferred[int] = Deferred()
        self._watching: Deferred[None] = succeed(None)
        self._isDeserted = False
        self._replies = PipeToNix(reactor, pipes.replies, self._deserted)
        self._log = PipeToNix(reactor, pipes.logWriting, self._deserted)
        # What the machine has said while Nix had not given it the build; None from then on.
        self._early: bytes | None = b""

    async def run(self, question: BuildQuestion, taken: Taken, accepted: bool) -> int:
        """
        Have a build done, and answer what Nix asks until there is one.

        @param question: the one that C{taken} is for.
        @param taken: the machine to try first.
        @param accepted: the question has been answered: the build is ours. Otherwise Nix waits for that.
        @return: the exit status.
        """
        self._workers.start()
        try:
            self._watch()
            self._running = Deferred.fromCoroutine(self._run(question, taken, accepted))
            return await self._running
        except NixServeError as e:
            self._replies.write(self._pipes.log.error(str(e)))
            return 1
        except CancelledError:
            if self._isDeserted:
                return 1
            raise
        except Exception as e:
            # A bug, or a system that is out of something. Nothing can be said after this.
            self._replies.write(self._pipes.log.error(f"build hook: internal error: {type(e).__name__}: {e}"))
            self._log.write(traceback.format_exc().encode("utf-8", "surrogateescape"))
            return 1
        finally:
            self._watching.cancel()
            if self._store is not None:
                await self._call(self._store.close)
            await self._log.finish()
            await self._replies.finish()
            self._workers.stop()

    def _watch(self) -> None:
        """Who waits for this process says no more, and with its end Nix gives up the locks of the outputs."""
        if self._pipes.waiting is not None:
            self._watching = whenReadable(self._reactor, self._pipes.waiting)
            self._watching.addCallbacks(lambda _: self._deserted(), lambda _: None)

    def _deserted(self) -> None:
        """Nix is gone: nobody wants the build."""
        self._isDeserted = True
        self._running.cancel()

    def _call(self, function: Callable[..., T], *args: Any) -> Deferred[T]:
        return self._workers.call(function, *args)

    # --- until there is a build ---------------------------------------------------------------------------

    async def _run(self, question: BuildQuestion, decision: Taken | Refusal, accepted: bool) -> int:
        if accepted and isinstance(decision, Taken):
            return await self._build(question, decision)
        while True:
            connected = await self._connect(question, decision, set())
            if isinstance(connected, _Connected):
                self._replies.write(self._pipes.acceptance(connected.taken.machine))
                return await self._build(question, connected)
            self._refuse(question, connected)
            event = await self._nextEvent()
            if not isinstance(event, BuildQuestion):
                return 0
            question = event
            decision = await self._call(self._chooser.choose, question)

    async def _nextEvent(self) -> Event:
        while (event := self._pipes.conversation.nextEvent()) is None:
            await whenReadable(self._reactor, self._pipes.requests)
            self._pipes.receive()
        return event

    def _refuse(self, question: BuildQuestion, refusal: Refusal) -> None:
        self._replies.write(self._chooser.refusalLines(question, refusal, self._pipes.log))
        self._replies.write(getattr(self._pipes.conversation, refusal.value)())

    async def _connect(
        self, question: BuildQuestion, decision: Taken | Refusal, failed: set[Machine]
    ) -> _Connected | Refusal:
        """
        Connect to a machine, one after the other.

        @param decision: the machine to begin with, or why there is none.
        @param failed: those that are not to be tried; added to.
        """
        while isinstance(decision, Taken):
            taken = decision
            try:
                client = await self._attempt(taken.machine)
            except NixServeError as e:
                failed.add(taken.machine)
                await self._putAside(taken, e)
                decision = await self._call(self._chooser.choose, question, failed)
            except BaseException:
                taken.leave()
                raise
            else:
                await self._call(self._chooser.succeeded, taken)
                return _Connected(taken, client)
        return decision

    async def _attempt(self, machine: Machine) -> ServeClient:
        number, line = self._pipes.log.start(Verbosity.TALKATIVE, f"connecting to '{machine.uri}'")
        self._replies.write(line)
        if self._early:
            self._early = b""
        try:
            return await connect(
                self._reactor,
                machine.address,
                environ=self._places.environ,
                onError=self._machineSaid,
                timeoutSeconds=self._connectSeconds,
                master=self._master(machine),
            )
        finally:
            self._replies.write(self._pipes.log.stop(number))

    @property
    def _connectSeconds(self) -> float:
        return float(self._settings.number("connect-timeout")) or CONNECT_SECONDS

    def _master(self, machine: Machine) -> SSHMaster | None:
        """The connection that all hook processes share; it stays when this one ends."""
        if not self._places.masters or machine.address.via is not Via.OPENSSH:
            return None
        places = self._places
        return SSHMaster(self._reactor, machine.address, places.environ, places.masters, places.persistSeconds)

    def _machineSaid(self, data: bytes) -> None:
        if self._early is None:
            self._log.write(data)
        else:
            self._early = (self._early + data)[-MAX_EARLY:]

    async def _putAside(self, taken: Taken, error: NixServeError) -> str:
        """
        @return: why, in one line.
        """
        reason = _reasonOf(error)
        await self._call(self._chooser.failed, taken, reason)
        for text in await self._call(lambda: list(self._chooser.news())):
            self._replies.write(self._pipes.log.message(Verbosity.WARN, f"warning: {text}"))
        return reason

    # --- the build ----------------------------------------------------------------------------------------

    @property
    def _settings(self) -> HookSettings:
        return self._chooser.settings

    async def _build(self, question: BuildQuestion, on: Taken | _Connected) -> int:
        """
        Do a build that was accepted.

        @param on: the machine to try first.
        @return: the exit status.
        @raise NixServeError: it could not be done.
        """
        self._log.write(self._early or b"")
        self._early = None
        async with AsyncExitStack() as stack:
            if isinstance(on, _Connected):
                stack.callback(on.client.cut)
            task = await self._nextEvent()
            if not isinstance(task, BuildTask):
                raise RemoteProtocolError("Nix did not say what the build needs")
            here = await stack.enter_async_context(await self._openHere())
            build = await _Job.read(here, question.drvPath, task)
            return await self._anywhere(question, build, here, on)

    async def _openHere(self) -> DeferredSession:
        def onWait(what: str) -> None:
            self._replies.write(self._pipes.log.message(Verbosity.WARN, f"waiting for {what}"))

        self._store = await self._call(LocalStore, self._places.layout)
        return await DeferredSession.open(self._store, self._workers, onWait)

    async def _anywhere(
        self, question: BuildQuestion, build: _Job, here: DeferredSession, on: Taken | _Connected
    ) -> int:
        """
        Build on one machine, or on the next one if that is lost.

        @return: the exit status.
        """
        # Nix itself cannot take it any more.
        ours = replace(question, amWilling=False)
        failed: set[Machine] = set()
        while True:
            if isinstance(on, Taken):
                on = await self._reach(ours, on, failed)
            try:
                async with on.client:
                    result = await self._on(on, build, here)
                break
            except RemoteError as e:
                failed.add(on.taken.machine)
                self._log.write(f"\n{await self._putAside(on.taken, e)}\n".encode())
                on = await self._another(ours, failed, e)
        if result.success:
            return 0
        text = f"build of '{build.drvPath}' on '{on.uri}' failed: {result.errorMsg}"
        self._replies.write(self._pipes.log.error(text))
        return 1

    async def _reach(self, question: BuildQuestion, taken: Taken, failed: set[Machine]) -> _Connected:
        """
        A connection to this machine, or to another one.

        @raise RemoteError: there is none.
        """
        found = await self._connect(question, taken, failed)
        while not isinstance(found, _Connected):
            why = RemoteError(f"no machine can be reached that could build '{question.drvPath}'")
            found = await self._connect(question, await self._another(question, failed, why), failed)
        return found

    async def _another(self, question: BuildQuestion, failed: set[Machine], why: RemoteError) -> Taken:
        """
        Another machine for a build that has lost one. Waits until one has a free slot.

        @raise RemoteError: there is none.
        """
        while not isinstance(found := await self._call(self._chooser.choose, question, failed), Taken):
            if found is not Refusal.POSTPONE:
                raise why
            await deferLater(self._reactor, POLL_SECONDS)
        return found

    async def _on(self, connected: _Connected, build: _Job, here: DeferredSession) -> BuildResult:
        """
        The build on one machine, with all that it needs and makes.

        @raise RemoteError: the machine is lost.
        """
        client = connected.client
        log, write, uri = self._pipes.log, self._replies.write, connected.uri
        # Roots there from now on; whatever fails it fails what is asked behind it.
        client.queryValidPaths(build.known, lock=True).addErrback(lambda _: None)

        def onWait(path: StorePath) -> None:
            write(log.message(Verbosity.TALKATIVE, f"another build hook sends '{path}' to '{uri}'; waiting for it"))

        async with AsyncExitStack() as stack:
            sending = CopyActivities(log, write, "", uri)
            stack.callback(sending.end)
            with await self._call(Claims, self._places.claims, connected.taken.machine) as claims:
                await sendInputs(
                    self._reactor,
                    here,
                    client,
                    build.inputs,
                    claims,
                    substitute=self._settings.flag("builders-use-substitutes"),
                    progress=sending,
                    onWait=onWait,
                )
        result = await client.buildDerivation(build.drvPath, build.basic, self._options)
        if not result.success:
            return result
        outputs = outputsOf(uri, build.drvPath, build.basic, result, build.wanted, here.storeDir)
        fetching = CopyActivities(log, write, uri, "")
        try:
            await fetchOutputs(here, client, promisedOutputs(build.basic, outputs), fetching)
        finally:
            fetching.end()
        floating = {name: path for name, path in outputs.items() if path not in build.known}
        if floating:
            assert self._store is not None, "it is open"
            # Not as the machine says them: from protocol 2.8 on it no more says of what.
            recorded = realisations(build.basic, floating, here.storeDir)
            await here.call(registerRealisations, self._store.database, recorded)
        return result

    @property
    def _options(self) -> BuildOptions:
        settings = self._settings
        return BuildOptions(
            maxSilentTime=settings.number("max-silent-time"),
            buildTimeout=settings.number("timeout"),
            maxLogSize=settings.number("max-build-log-size"),
            keepFailed=settings.flag("keep-failed"),
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """
    What is to be built.

    @ivar inputs: all that must be there.
    @ivar wanted: names of the outputs that are to come back.
    @ivar basic: the derivation as it is sent.
    """

    drvPath: StorePath
    inputs: frozenset[StorePath]
    wanted: frozenset[str]
    basic: BasicDerivation

    @property
    def known(self) -> frozenset[StorePath]:
        """The outputs whose paths are known. The Nix that asks has locked them."""
        return frozenset(self.basic.knownOutputPaths.values())

    @classmethod
    async def read(cls, here: DeferredSession, drvPath: str, task: BuildTask) -> _Job:
        """
        What Nix asks for. All of it becomes roots here, and may be added under the locks that Nix holds.

        @raise NixServeError: it is not there, or makes no sense.
        """
        session = here.session
        assert isinstance(session, LocalSession)
        path = here.storeDir.parse(drvPath)
        inputs = frozenset(map(here.storeDir.parse, task.inputs))
        drv = await here.call(session.readDerivation, path)
        # A derivation without input derivations is sent as it is: other sources would be another derivation.
        sources = inputs if isinstance(drv, Derivation) and drv.inputDrvs else drv.inputSrcs
        build = cls(path, inputs, task.wantedOutputs, basicDerivation(drv, sources))
        await here.addTempRoots({path} | inputs | build.known)
        await here.call(session.assumeLocked, build.known)
        return build


def _reasonOf(error: NixServeError) -> str:
    """Why a machine does not work, in one line that is the same for all builds."""
    text = str(error)
    if isinstance(error, RemoteFailure) and error.path is not None:
        said = re.sub(f"'[^']*{re.escape(error.path.baseName)}[^']*'", "a path", error.said)
        if error.about.startswith("building"):
            # It may be the log.
            said = ""
        why = error.why if error.decidedHere else said or error.why
        text = f"{error.name}: the session was lost: {why}"
    return oneLine(text.encode("utf-8", "surrogateescape"))

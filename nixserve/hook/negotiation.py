"""
How a build hook comes to a build: Nix's questions, and for each the machine that takes it, or why none does.

Blocking, and without Twisted, which takes longer to import than most questions to answer: a hook that only ever
declines never loads it.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nixserve.errors import RemoteProtocolError
from nixserve.hook.aside import Aside, Attempt
from nixserve.hook.choice import Refusal, canBuildLocally, isSuitable, refusalText, refuse
from nixserve.hook.conversation import BuildQuestion, Event, HookConversation, HookLog, HookSettings, Verbosity
from nixserve.hook.lastseen import LastSeen
from nixserve.hook.machines import Machine, Machines
from nixserve.hook.queue import Queue, Ticket
from nixserve.hook.slots import Slot, Slots
from nixserve.store.layout import StoreLayout

__all__ = ["Chooser", "HookPlaces", "NixPipes", "Taken"]

RECENT_SECONDS = 60.0
"""How long a machine that worked is expected to work on."""

_READ_SIZE = 64 * 1024

_PATIENCE = 3
"""Failures, of which the pauses of L{Aside} make a minute, that a machine may need to come back."""


class NixPipes:
    """
    The descriptors that a build hook has from Nix.

    @ivar conversation: what was read, and what may be answered.
    @ivar log: makes lines for L{write}.
    """

    def __init__(
        self,
        verbosity: int,
        pid: int,
        requests: int = 0,
        replies: int = 2,
        logWriting: int = 4,
        logReading: int = 5,
        waiting: int | None = None,
    ) -> None:
        """
        @param verbosity: see L{HookLog}.
        @param pid: of this process.
        @param requests: the descriptor that questions come from.
        @param replies: the one that answers and messages go to.
        @param logWriting: the one that takes the log of the build.
        @param logReading: the other end of the same pipe. While it is open here, Nix does not see the end of the log.
        @param waiting: a descriptor whose end is that of the process that Nix waits for; C{None} if that is this one.
        """
        self.conversation = HookConversation()
        self.log = HookLog(verbosity, pid)
        self.requests = requests
        self.replies = replies
        self.logWriting = logWriting
        self.waiting = waiting
        self._logReading = logReading

    def readEvent(self) -> Event:
        """
        What Nix says next. Waits for it.

        @raise RemoteProtocolError: it is not what a Nix says here.
        """
        while (event := self.conversation.nextEvent()) is None:
            self.receive()
        return event

    def receive(self) -> None:
        """Read what has come; waits if nothing has."""
        self.conversation.receiveData(os.read(self.requests, _READ_SIZE))

    def readSettings(self) -> HookSettings:
        """
        The first event.

        @raise RemoteProtocolError: Nix ended before, or it is no Nix.
        """
        settings = self.readEvent()
        if not isinstance(settings, HookSettings):
            raise RemoteProtocolError("Nix sent no settings to its build hook")
        return settings

    def write(self, data: bytes) -> None:
        """
        Say something, all of it. Waits for Nix to read.

        @raise BrokenPipeError: Nix is gone.
        """
        while data:
            data = data[os.write(self.replies, data) :]

    def acceptance(self, machine: Machine) -> bytes:
        """
        What is to be said to have the build.

        @param machine: that Nix names to its user.
        """
        os.close(self._logReading)
        return self.conversation.accept(machine.uri)

    def accept(self, machine: Machine) -> None:
        """Tell Nix that this machine takes the build."""
        self.write(self.acceptance(machine))

    def sleep(self, seconds: float) -> None:
        """
        Wait a while.

        @raise BrokenPipeError: Nix is gone.
        """
        poll = select.poll()
        # Errors are told in any case.
        poll.register(self.replies, 0)
        if self.waiting is not None:
            poll.register(self.waiting, select.POLLRDHUP)
        if poll.poll(seconds * 1000):
            raise BrokenPipeError


@dataclass(frozen=True, slots=True)
class Taken:
    """
    A machine that is to take a build.

    @ivar slot: on it; to be released.
    @ivar attempt: whose result is to be told.
    """

    slot: Slot
    attempt: Attempt

    @property
    def machine(self) -> Machine:
        """The machine that has the slot."""
        return self.slot.machine

    def leave(self) -> None:
        """It takes the build no more, for no fault of its own."""
        self.attempt.leave()
        self.slot.release()


@dataclass(frozen=True, slots=True)
class HookPlaces:
    """
    Where a build hook finds things.

    @ivar layout: of the store here.
    @ivar claims: directory of L{Claims}.
    @ivar masters: directory of shared connections; or empty if every process is to make its own.
    @ivar persistSeconds: how long one of these stays without a session.
    @ivar environ: the environment of the user whose Nix it is.
    """

    layout: StoreLayout
    claims: str
    masters: str
    persistSeconds: int
    environ: Mapping[str, str]


class Chooser:
    """
    Finds a machine for each build, on shared ground: see L{Slots} and L{Aside}.
    """

    def __init__(
        self,
        machines: Machines,
        settings: HookSettings,
        slots: Slots,
        aside: Aside,
        seen: LastSeen,
        queue: Queue,
        since: float,
        clock: Callable[[], float],
    ) -> None:
        """
        @param since: when the user's command that this hook works for began, in seconds since the epoch.
        @param clock: likewise, now.
        """
        self._clock = clock
        self._seen = seen
        self._queue = queue
        self.machines = machines
        self.settings = settings
        self._slots = slots
        self._aside = aside
        self._since = since

    def choose(self, question: BuildQuestion, excluded: Collection[Machine] = ()) -> Taken | Refusal:
        """
        The best machine that is free and, as far as anybody knows, works. Waits while others choose.

        @param excluded: machines that have failed this build already.
        @raise StoreError: the file system refuses.
        """
        suitable = [
            machine for machine in self.machines.usable if isSuitable(machine, question) and machine not in excluded
        ]
        local = canBuildLocally(question, self.settings)
        open_, taken = self._take(suitable)
        if taken is not None:
            return taken
        waiting: Sequence[Machine] = open_
        if suitable and not open_ and not local:
            # Better a machine that failed a while ago than none.
            early = [machine for machine in suitable if not self._failedNow(machine)]
            _, taken = self._take(early, early=True)
            if taken is not None:
                return taken
            waiting = [machine for machine in suitable if machine in early or self._mayRecover(machine)]
        return refuse(self.machines.usable, waiting, local)

    def succeeded(self, taken: Taken) -> None:
        """
        The machine works.

        @raise StoreError: the file system refuses.
        """
        taken.attempt.succeeded()
        self._seen.worked(taken.machine)

    def failed(self, taken: Taken, reason: str) -> None:
        """
        The machine does not work: it is put aside, and its slot is free.

        @param reason: one line.
        @raise StoreError: the file system refuses.
        """
        try:
            taken.attempt.failed(reason)
        finally:
            taken.slot.release()

    def isOurs(self, question: BuildQuestion) -> bool:
        """Can Nix never build it itself, whatever slots it has? Then it may be accepted whenever there is hope."""
        asked = replace(question, amWilling=True)
        return not (self.settings.number("max-jobs") > 0 and canBuildLocally(asked, self.settings))

    def mayAcceptUnseen(self, question: BuildQuestion, taken: Taken) -> bool:
        """
        May the build be accepted before there is a connection? Nix goes on at once then, while it waits otherwise; but
        it cannot build it itself any more. So only if it never could, or if the machine has just worked.
        """
        if self.isOurs(question):
            return True
        return taken.attempt.failure is None and self._seen.isSince(taken.machine, self._clock() - RECENT_SECONDS)

    def queue(self, question: BuildQuestion) -> tuple[Machine, Ticket] | None:
        """
        Where a build that is to be postponed may wait for a slot, in place of Nix: that asks again only every 5
        seconds, whatever ends meanwhile.

        @return: a machine that may take it, to be named to Nix, and the place in the queue; C{None} if Nix is to wait.
        @raise StoreError: the file system refuses.
        """
        if not self.isOurs(question):
            return None
        suitable = [machine for machine in self.machines.usable if isSuitable(machine, question) and machine.maxJobs]
        ticket = self._queue.take(suitable)
        return None if ticket is None else (suitable[0], ticket)

    def news(self) -> Iterable[str]:
        """A line for each machine that is put aside, if the user has not been told."""
        for machine in self.machines.usable:
            failure = self._aside.news(machine)
            if failure is not None:
                yield f"build machine {machine.uri} is put aside: {failure.reason}"

    def refusalLines(self, question: BuildQuestion, refusal: Refusal, log: HookLog) -> bytes:
        """What to say before a refusal."""
        if refusal is Refusal.POSTPONE:
            return b""
        local = canBuildLocally(question, self.settings)
        lines = b"".join(log.message(Verbosity.WARN, f"warning: {text}") for text in self.machines.unusable)
        if refusal is Refusal.DECLINE:
            lines += log.message(*refusalText(question, self.machines.usable, local))
        return lines

    def _take(self, machines: Iterable[Machine], early: bool = False) -> tuple[list[Machine], Taken | None]:
        """
        @return: those that are not put aside, and what was taken of them.
        """
        with contextlib.ExitStack() as stack:
            attempts: dict[Machine, Attempt] = {}
            for machine in machines:
                attempt = self._aside.attempt(machine, early)
                if attempt is not None:
                    attempts[machine] = attempt
                    stack.callback(attempt.leave)
            slot = self._slots.take(attempts, wait=True) if attempts else None
            if slot is None:
                return list(attempts), None
            taken = attempts.pop(slot.machine)
            stack.pop_all()
            for attempt in attempts.values():
                attempt.leave()
            return [slot.machine, *attempts], Taken(slot, taken)

    def _failedNow(self, machine: Machine) -> bool:
        """Has it failed since the user's command began?"""
        failure = self._aside.failure(machine)
        return failure is not None and failure.failedAt >= self._since

    def _mayRecover(self, machine: Machine) -> bool:
        """Has it worked since then, and then not failed too often? So does one that is started anew."""
        failure = self._aside.failure(machine)
        return self._seen.isSince(machine, self._since) and (failure is None or failure.count <= _PATIENCE)

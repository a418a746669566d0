"""
Runs a builder from its start until nothing of it is left, and passes its output on.

The output comes over a pseudoterminal in raw mode, and its end of file is the end of the build, as in Nix (2.8,
src/libstore/build/local-derivation-goal.cc): then everything that still runs is killed. A builder that closes its
output is therefore killed, and outside a sandbox a process that it leaves behind with the terminal open is waited for.

Output is never held back: the log on disk gets every byte in the thread of the build, whoever watches gets lines
through L{LogDelivery}. Memory is bounded whatever the builder writes; it waits when its thread is slow.
"""

from __future__ import annotations

import enum
import errno
import math
import os
import select
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from nixserve.builder import child, seccomp, spawn
from nixserve.builder.loglines import LogDelivery, LogLines
from nixserve.builder.sandbox import BUILD_DIR, Sandbox
from nixserve.builder.users import BuildUser
from nixserve.codec.buildresult import BuildStatus
from nixserve.errors import BuildError

__all__ = ["CancelToken", "Ending", "Outcome", "ProcessLimits", "ProcessSpec", "runBuilder"]

# More than any build of nixpkgs needs, far less than the 4 million ids that a 64-bit machine can have.
_MAX_PROCESSES = 32768
# Where it has fewer: a part of all that there are. Of 32,768, the kernel's default, four builds may take all.
_PROCESSES_SHARE = 4
# Bytes. The terminal holds 4 KiB for a reader.
_READ_SIZE = 64 * 1024
# Seconds for the last lines to reach whoever watches.
_FLUSH_TIMEOUT = 2.0
# How long to sleep at most, in milliseconds: poll(2) takes no more than 24 days, and a client may allow 136 years.
_LONGEST_SLEEP = 3_600_000
# <sys/personality.h>: ADDR_NO_RANDOMIZE, PER_LINUX32.
_NO_RANDOMIZE, _LINUX32 = 0x40000, 0x8


class CancelToken:
    """
    Stops a build, from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._waiting: set[int] = set()

    @property
    def cancelled(self) -> bool:
        """Whether L{cancel} was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Stop what watches this, now and in future. Returns at once. Safe to call twice."""
        with self._lock:
            self._cancelled = True
            for fd in self._waiting:
                os.eventfd_write(fd, 1)

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """A descriptor that is readable as soon as this is cancelled."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with self._lock:
            self._waiting.add(fd)
            if self._cancelled:
                os.eventfd_write(fd, 1)
        try:
            yield fd
        finally:
            with self._lock:
                self._waiting.discard(fd)
                os.close(fd)


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """
    What a builder may use. 0 means without limit, except for C{maxProcesses}.

    @ivar maxSilentTime: seconds without a byte of output.
    @ivar timeout: seconds since the start.
    @ivar maxLogSize: bytes of output.
    @ivar maxProcesses: processes and threads at one time, at most a quarter of what the machine can have. Not limited
        where the builder shares the server's uid and has no sandbox.
    """

    maxSilentTime: int = 0
    timeout: int = 0
    maxLogSize: int = 0
    maxProcesses: int = _MAX_PROCESSES


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """
    A builder to run.

    @ivar builder: the program, as the builder sees the file system.
    @ivar args: its arguments, without C{argv[0]}, which is the last part of C{builder}.
    @ivar env: all of its environment.
    @ivar user: who it is on the host.
    @ivar cwd: the directory that it starts in, unless there is a sandbox, which has one for that.
    @ivar sandbox: a prepared sandbox.
    @ivar stdin: what it reads; C{None} for /dev/null.
    @ivar module: a Python module of ours that is run instead of C{builder}, which then only gives its name: its
        function C{main()}, which returns the exit status, with the environment, standard streams, user and sandbox
        of any builder. It is imported before all that, and can import nothing later.
    @ivar linux32: tell it that the machine has 32 bits, for C{i686-linux} and the like.
    @ivar socketcall: let it make sockets in the way of 32-bit x86 programs, see L{seccomp.filterProgram}.
    @ivar filterSyscalls: Nix's setting filter-syscalls. Off only for programs of our own.
    """

    builder: str
    args: Sequence[str]
    env: Mapping[str, str]
    user: BuildUser
    cwd: str = BUILD_DIR
    sandbox: Sandbox | None = None
    stdin: bytes | None = None
    module: str = ""
    linux32: bool = False
    socketcall: bool = False
    filterSyscalls: bool = True


class Ending(enum.Enum):
    """How a builder's process came to its end."""

    EXIT = "exit"
    SIGNAL = "signal"
    SILENCE = "silence"
    TIMEOUT = "timeout"
    LOG_LIMIT = "log limit"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    How a builder ended.

    @ivar ending: why. After the last four of L{Ending} it was killed.
    @ivar code: the exit status after C{EXIT}, the number of the signal after C{SIGNAL}, otherwise 0.
    @ivar startTime: Unix seconds; C{stopTime} likewise.
    @ivar logSize: bytes of output.
    """

    ending: Ending
    code: int
    startTime: int
    stopTime: int
    logSize: int

    @property
    def success(self) -> bool:
        """Did it exit with status 0?"""
        return self.ending is Ending.EXIT and self.code == 0


def runBuilder(
    spec: ProcessSpec,
    log: Callable[[bytes], None],
    limits: ProcessLimits,
    cancel: CancelToken,
    record: Callable[[bytes], None] | None = None,
) -> Outcome:
    """
    Run a builder. Blocks until none of its processes is left.

    @param log: for somebody who watches: called with whole lines, one or many, as Nix shows them, from another thread.
        It may take its time; lines that come meanwhile are dropped when there are too many.
    @param record: for the log on disk: called from this thread with every byte as it came. It should not block for
        longer than a disk does.
    @raise BuildError: the builder could not be started, or was lost. What C{record} raises comes out as it is, when
        everything is killed.
    """
    with cancel.descriptor() as cancelled:
        master, slave = _openTerminal(spec.user)
        delivery = LogDelivery(log)
        try:
            try:
                supervisor = spawn.startSupervisor(_job(spec, limits), slave)
            except OSError as error:
                raise _setupFailure(f"starting the builder: {error.strerror}") from error
            finally:
                os.close(slave)
            return _Run(supervisor, master, spec.user, limits, delivery, record).complete(cancelled)
        finally:
            delivery.close(_FLUSH_TIMEOUT)
            os.close(master)


def _openTerminal(user: BuildUser) -> tuple[int, int]:
    """
    A raw pseudoterminal: no echo, no translation of line ends. The builder may open it again, as C{/dev/stderr}.
    """
    try:
        master, slave = os.openpty()
    except OSError as error:
        raise _setupFailure(f"opening a pseudoterminal: {error.strerror}") from error
    tty.setraw(slave)
    if user.own:
        os.fchown(slave, user.uid, 0)
        os.fchmod(slave, 0o600)
    os.set_blocking(master, False)
    return master, slave


def _job(spec: ProcessSpec, limits: ProcessLimits) -> child.Job:
    """The job for L{nixserve.builder.child}."""
    return {
        "action": "build",
        "uid": spec.user.uid,
        "gid": spec.user.gid,
        "ownUid": spec.user.own,
        "builder": os.fsencode(spec.builder),
        "argv": [os.fsencode(text) for text in (os.path.basename(spec.builder), *spec.args)],
        "env": {os.fsencode(name): os.fsencode(value) for name, value in spec.env.items()},
        "cwd": BUILD_DIR if spec.sandbox else spec.cwd,
        "stdin": spec.stdin,
        "module": spec.module,
        "path": [os.path.abspath(entry) for entry in sys.path] if spec.module else [],
        "maxProcesses": min(limits.maxProcesses, _mostProcesses()),
        "filter": seccomp.filterProgram(socketcall=spec.socketcall) if spec.filterSyscalls else b"",
        "personality": _NO_RANDOMIZE | (_LINUX32 if spec.linux32 else 0),
        "sandbox": spec.sandbox.mounts() if spec.sandbox else None,
    }


def _mostProcesses() -> int:
    """How many processes and threads one builder may have here, so that the machine has some left for others."""
    most = _MAX_PROCESSES
    for name in ("pid_max", "threads-max"):
        with suppress(OSError, ValueError), open(f"/proc/sys/kernel/{name}") as file:
            most = min(most, int(file.read()) // _PROCESSES_SHARE)
    return most


def _setupFailure(text: str) -> BuildError:
    """The error of a build that did not begin."""
    return BuildError(BuildStatus.MISC_FAILURE, f"{spawn.SETUP_FAILED}: {text}")


@dataclass(slots=True)
class _Run:
    """
    One builder that runs.

    @ivar started: when, on the monotonic clock; C{lastOutput} likewise.
    """

    supervisor: spawn.Supervisor
    master: int
    user: BuildUser
    limits: ProcessLimits
    delivery: LogDelivery
    record: Callable[[bytes], None] | None
    lines: LogLines = field(default_factory=LogLines)
    logSize: int = 0
    started: float = field(default_factory=time.monotonic)
    lastOutput: float = field(default_factory=time.monotonic)

    def complete(self, cancelled: int) -> Outcome:
        """
        Watch until the end, then have everything killed.

        @param cancelled: readable when the build is to stop.
        """
        startTime = int(time.time())
        try:
            ending = self._watch(cancelled)
        finally:
            # Whatever happened here, a failing log for instance: nothing goes on running.
            word, detail = self.supervisor.end()
        self.delivery.write(self.lines.finish())
        if word == "error":
            raise _setupFailure(detail)
        if word == "lost":
            self.user.killAll()
        if ending is None and word == "lost":
            raise BuildError(BuildStatus.MISC_FAILURE, "the supervisor of the builder was killed")
        code = 0 if ending else int(detail)
        return Outcome(ending or Ending(word), code, startTime, int(time.time()), self.logSize)

    def _watch(self, cancelled: int) -> Ending | None:
        """
        @return: why the builder has to be killed; C{None} at the end of its output.
        """
        poll = select.poll()
        control = self.supervisor.control.fileno()
        for fd in (self.master, control, cancelled):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._millisecondsLeft())}
            if cancelled in ready:
                return Ending.CANCELLED
            if self.master in ready and not self._readOutput():
                return None
            if self.limits.maxLogSize and self.logSize > self.limits.maxLogSize:
                return Ending.LOG_LIMIT
            # With a report there are no processes any more: what is there to read is all, even if the terminal was
            # handed to somebody who keeps it open.
            if control in ready and self.master not in ready:
                return None
            if expired := self._expired():
                return expired

    def _readOutput(self) -> bool:
        """
        Pass on what is there.

        @return: whether there may be more.
        """
        try:
            data = os.read(self.master, _READ_SIZE)
        except BlockingIOError:
            return True
        except OSError as error:
            # What Linux says when nobody has the other side open.
            if error.errno != errno.EIO:
                raise
            return False
        self.lastOutput = time.monotonic()
        self.logSize += len(data)
        if self.record:
            self.record(data)
        self.delivery.write(self.lines.feed(data))
        return bool(data)

    def _deadlines(self) -> Iterator[tuple[float, Ending]]:
        """When time will be up, on the monotonic clock, and what for."""
        if self.limits.maxSilentTime:
            yield self.lastOutput + self.limits.maxSilentTime, Ending.SILENCE
        if self.limits.timeout:
            yield self.started + self.limits.timeout, Ending.TIMEOUT

    def _millisecondsLeft(self) -> int | None:
        """How long to sleep at most."""
        first = min((deadline for deadline, _ in self._deadlines()), default=None)
        return None if first is None else min(_LONGEST_SLEEP, max(0, math.ceil((first - time.monotonic()) * 1000)))

    def _expired(self) -> Ending | None:
        """The limit of time that is exceeded, if one is."""
        now = time.monotonic()
        return next((ending for deadline, ending in self._deadlines() if now >= deadline), None)

"""
One SSH connection for several sessions: a master process of the system's C{ssh}, with a control socket of ours.

The user's own masters are never used and never touched. Ours lives in a directory of ours, to which several processes
may point: the first that needs a master starts it, and if nobody stops it, it ends some time after its last session.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.error import ProcessTerminated
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from nixserve.errors import UsageError
from nixserve.protocol.childprocess import ProcessTransport
from nixserve.protocol.interfaces import IErrorReceiver
from nixserve.protocol.reactors import IClientReactor
from nixserve.protocol.workers import Door, whenFired
from nixserve.remote.address import RemoteAddress
from nixserve.remote.failures import SSH_FAILED, CannotConnect, Evidence, explain, noProgram
from nixserve.remote.localfiles import ReactorThreads, findProgram, temporaryName
from nixserve.remote.openssh import knownHostsLine, sshArguments, sshEnvironment
from nixserve.store.api import Busy
from nixserve.store.ownpaths import UnsafePath, makeOwnDirectory

__all__ = ["PERSIST_SECONDS", "SSHMaster"]

PERSIST_SECONDS = 60
"""How long a master waits for another session before it ends by itself: whoever started it may have been killed."""

MAX_CONTROL_PATH = 107 - 17
"""Bytes in the path of a unix socket (unix(7)), less those that ssh appends while it makes one (mux.c)."""

ANSWER_SECONDS = 3.0
"""How long a master may take to say that it is there, or that it ends. One that hangs is as good as dead."""

MAX_SAID = 16 * 1024
"""Bytes of what ssh says that are kept, the last ones. A host that nobody has logged in to yet can have it say banners
without end (RFC 4252, section 5.4)."""

_ALIVE = ("-oServerAliveInterval=5", "-oServerAliveCountMax=9")
"""A master whose network has gone ends within a minute, and with it whatever waits for it. And it wakes up every few
seconds: when an ssh that uses it is killed before whoever holds the ends of its pipes, a master (OpenSSH 9.2) notes the
end of that session, but tells the server only when it wakes up for something else."""


class SSHMaster:
    """
    A shared connection. C{async with} stops it at the end of the block.

    @ivar address: where it leads.
    @ivar knownHosts: a file with the host's key, if the URL has one; or empty. It is there while the master is.
    """

    def __init__(
        self,
        reactor: IClientReactor,
        address: RemoteAddress,
        environ: Mapping[str, str],
        directory: str = "",
        persistSeconds: int = PERSIST_SECONDS,
    ) -> None:
        """
        @param environ: see L{nixserve.remote.connecting.connect}.
        @param directory: where the control socket lies, made if missing, for this user alone. Processes that share it
            share the connection. Without it there is a temporary one, removed by L{stop}.
        @param persistSeconds: how long the master stays without a session.
        @raise UsageError: the path of C{directory} is too long.
        """
        self.address = address
        self._reactor = reactor
        self._environ = environ
        self._door = Door(ReactorThreads(reactor))
        self._temporary = not directory
        name = _digest(address, environ)
        self._directory = directory or temporaryName(environ, MAX_CONTROL_PATH - len(name) - 1)
        self.controlPath = f"{self._directory}/{name}"
        self.knownHosts = f"{self.controlPath}.hosts" if address.hostKey else ""
        self._persistSeconds = persistSeconds
        # In this process; the lock file is for others.
        self._turns = DeferredLock()
        self._lockFile: int | None = None
        if len(os.fsencode(self.controlPath)) > MAX_CONTROL_PATH:
            raise UsageError(f"the path of '{self._directory}' is too long for a socket of ssh; choose a shorter one")

    def arguments(self, command: str) -> list[str]:
        """
        Arguments of an C{ssh} that runs C{command} over this connection; or over one of its own if the master has just
        ended or lets in no more (sshd_config(5), MaxSessions).
        """
        return sshArguments(
            self.address, self._environ, knownHosts=self.knownHosts, controlPath=self.controlPath, command=command
        )

    def start(self) -> Deferred[None]:
        """
        Have a master that answers: the one that runs, or a new one in place of one that has died.

        @return: fails with L{CannotConnect} if there is no connection. Cancelling ends what was begun.
        """
        return self._turns.run(lambda: Deferred.fromCoroutine(self._start()))

    def stop(self) -> Deferred[None]:
        """End the master, with the sessions that are left. Nothing remains of it."""
        return self._turns.run(lambda: Deferred.fromCoroutine(self._stop()))

    async def __aenter__(self) -> SSHMaster:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def _start(self) -> None:
        try:
            await self._door.call(self._prepare)
            if not await self._answers():
                await self._door.call(self._removeSocket)
                await self._connect()
        finally:
            # Behind the preparation, which may have been given up half way.
            await self._door.call(self._unlock)

    async def _connect(self) -> None:
        # With ControlPersist, -f makes ssh wait for the login and leave the master behind.
        status, errors = await self._run(
            "-f", "-N", "-oControlMaster=yes", f"-oControlPersist={self._persistSeconds}", *_ALIVE
        )
        if status != 0:
            # There is no command yet: whatever went wrong, it was ssh.
            evidence = Evidence(b"", errors, ProcessTerminated(exitCode=SSH_FAILED), "")
            raise explain(self.address, "", evidence)

    async def _answers(self) -> bool:
        status, _ = await self._run("-O", "check", seconds=ANSWER_SECONDS)
        return status == 0

    async def _stop(self) -> None:
        if await self._door.call(os.path.exists, self.controlPath):
            await self._run("-O", "exit", seconds=ANSWER_SECONDS)
        if self._temporary:
            await self._door.call(shutil.rmtree, self._directory, ignore_errors=True)

    async def _run(self, *options: str, seconds: float | None = None) -> tuple[int, bytes]:
        """
        Run C{ssh} without a command.

        @param seconds: after which it is killed.
        @return: its exit status and what it said.
        """
        words = sshArguments(
            self.address,
            self._environ,
            knownHosts=self.knownHosts,
            controlPath=self.controlPath,
            options=options,
        )
        program = await self._door.call(findProgram, words[0], self._environ)
        if program is None:
            raise noProgram(self.address, words[0])
        run = _Run()
        ProcessTransport.spawn(run, self._reactor, [program, *words[1:]], sshEnvironment(self._environ))
        deadline = None if seconds is None else self._reactor.callLater(seconds, run.abort)
        try:
            await whenFired(run.ended)
            return run.status, run.errors
        finally:
            if deadline is not None and deadline.active():
                deadline.cancel()
            if not run.ended.called:
                run.abort()
                await whenFired(run.ended)

    # --- what happens in threads --------------------------------------------------------------------------

    def _prepare(self) -> None:
        """
        Make what has to lie there, and lock out other processes that would start a master.

        @raise Busy: one does.
        @raise CannotConnect: it cannot lie there.
        """
        try:
            makeOwnDirectory(self._directory)
            found = os.lstat(self._directory)
            if found.st_uid != os.geteuid() or found.st_mode & 0o170077 != 0o040000:
                raise CannotConnect(
                    self.address.name,
                    f"'{self._directory}' is open to others",
                    "chmod 700 it, or choose another directory",
                )
            if self._lockFile is None:
                self._lockFile = os.open(
                    f"{self.controlPath}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
                )
            fcntl.flock(self._lockFile, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.knownHosts:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
                with open(os.open(self.knownHosts, flags, 0o600), "w", encoding="ascii") as stream:
                    stream.write(knownHostsLine(self.address))
        except UnsafePath as e:
            raise CannotConnect(self.address.name, f"no shared connection: {e.reason}", e.advice) from e
        except BlockingIOError:
            raise Busy(f"another process that connects to {self.address.name}", 0.05) from None
        except OSError as e:
            raise CannotConnect(
                self.address.name,
                f"a shared connection needs '{self._directory}': {e.strerror}",
                "choose another directory",
            ) from e

    def _unlock(self) -> None:
        if self._lockFile is not None:
            os.close(self._lockFile)
            self._lockFile = None

    def _removeSocket(self) -> None:
        """What a master that was killed has left; ssh would not start another one beside it."""
        with suppress(FileNotFoundError):
            os.unlink(self.controlPath)


@implementer(IErrorReceiver)
class _Run(Protocol):
    """
    A program that is run to its end.

    @ivar ended: fires when it has.
    @ivar status: its exit status; as a shell has it if a signal has killed it.
    @ivar errors: the end of what it has said.
    """

    transport: ProcessTransport

    def __init__(self) -> None:
        self.ended: Deferred[None] = Deferred()
        self.status = 0
        self.errors = b""

    def connectionMade(self) -> None:
        """Give the child no input."""
        self.transport.loseConnection()

    def abort(self) -> None:
        """Kill the child."""
        self.transport.abortConnection()

    def errorReceived(self, data: bytes) -> None:
        """See L{IErrorReceiver}."""
        self.errors = (self.errors + data)[-MAX_SAID:]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Note how the child has ended."""
        error = reason.value
        if isinstance(error, ProcessTerminated):
            self.status = 128 + error.signal if error.exitCode is None else error.exitCode
        self.ended.callback(None)


def _digest(address: RemoteAddress, environ: Mapping[str, str]) -> str:
    """A short name for what makes one connection differ from another."""
    parts = (address.name, address.sshKey, address.hostKey, str(address.compress), environ.get("NIX_SSHOPTS", ""))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]

"""
L{connect}: a session on the store that a URL names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.endpoints import UNIXClientEndpoint, connectProtocol
from twisted.internet.error import ConnectError
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.python.reflect import namedAny

from nixserve.codec.relay import RelayHeader
from nixserve.codec.serve import SERVER_MAGIC
from nixserve.codec.wire import encodeU64
from nixserve.protocol.childprocess import ProcessTransport
from nixserve.protocol.client import RemoteFailure, ServeClient
from nixserve.protocol.reactors import IClientReactor
from nixserve.protocol.relayclient import RelayTransport
from nixserve.protocol.workers import Door, whenFired
from nixserve.remote.address import RemoteAddress, Via
from nixserve.remote.failures import CannotConnect, Evidence, explain, noProgram, tooSlow
from nixserve.remote.localfiles import PrivateFile, ReactorThreads, findProgram
from nixserve.remote.master import SSHMaster
from nixserve.remote.openssh import knownHostsLine, sshArguments, sshEnvironment
from nixserve.store.ownpaths import UnsafePath

__all__ = ["SETUP_SECONDS", "connect"]

SETUP_SECONDS = 30.0
"""Until the other side must have answered. A person who is asked for a passphrase meanwhile has as long."""

MAX_EVIDENCE = 16 * 1024
"""Bytes of each stream that are kept until the session is there."""


def connect(
    reactor: IClientReactor,
    url: str | RemoteAddress,
    *,
    environ: Mapping[str, str] | None = None,
    write: bool = True,
    onError: Callable[[bytes], None] = lambda data: None,
    timeoutSeconds: float = SETUP_SECONDS,
    master: SSHMaster | None = None,
) -> Deferred[ServeClient]:
    """
    Begin a session on another store.

    @param reactor: with timers, child processes, threads and connections.
    @param url: see L{RemoteAddress.parse}.
    @param environ: of the user: C{PATH}, C{HOME}, C{SSH_AUTH_SOCK}, C{NIX_SSHOPTS} and whatever child processes need;
        by default that of this process.
    @param write: ask for the right to change the store there.
    @param onError: called with the remote's standard error as it comes, cut anywhere; that of C{ssh} as well.
    @param timeoutSeconds: until the remote must have answered.
    @param master: a shared connection to the same address; where the way there is not the system's C{ssh} it is not
        used.
    @return: fires with the session, whose version is known. Fails with L{CannotConnect} or another L{NixServeError};
        nothing is left running then. Cancelling it stops and removes whatever was begun.
    """
    user = os.environ if environ is None else environ
    return Deferred.fromCoroutine(_connect(reactor, url, user, write, onError, timeoutSeconds, master))


async def _connect(
    reactor: IClientReactor,
    url: str | RemoteAddress,
    environ: Mapping[str, str],
    write: bool,
    onError: Callable[[bytes], None],
    timeoutSeconds: float,
    master: SSHMaster | None,
) -> ServeClient:
    address = url if isinstance(url, RemoteAddress) else RemoteAddress.parse(url)
    attempt = _Attempt(reactor, address, environ, write, onError, timeoutSeconds, master)
    try:
        await Deferred.fromCoroutine(attempt.run()).addTimeout(timeoutSeconds, reactor)
    except TimeoutError:
        raise attempt.tooSlow() from None
    return attempt.client


class _UnreadyClient(ServeClient):
    """
    A session that remembers, until it is ready, what would explain why it does not get there.

    @ivar output: what came from the remote.
    @ivar errors: the end of its standard error.
    @ivar reason: how the connection ended, if it was not cut here.
    """

    output = b""
    errors = b""
    reason: BaseException | None = None

    def dataReceived(self, data: bytes) -> None:
        """Keep the first bytes as evidence; see L{ServeClient} for the rest."""
        if not self.ready.called:
            self.output = (self.output + data)[:MAX_EVIDENCE]
        super().dataReceived(data)

    def errorReceived(self, data: bytes) -> None:
        """Standard error of the remote."""
        if not self.ready.called:
            self.errors = (self.errors + data)[-MAX_EVIDENCE:]
        super().errorReceived(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The remote is gone."""
        if not self.ready.called:
            self.reason = reason.value
        super().connectionLost(reason)


class _Attempt:
    """
    One try to get to a session.

    @ivar client: the session.
    """

    def __init__(
        self,
        reactor: IClientReactor,
        address: RemoteAddress,
        environ: Mapping[str, str],
        write: bool,
        onError: Callable[[bytes], None],
        timeoutSeconds: float,
        master: SSHMaster | None,
    ) -> None:
        self._reactor = reactor
        self._master = master
        self._timeoutSeconds = timeoutSeconds
        self._address = address
        self._environ = environ
        self._write = write
        self._door = Door(ReactorThreads(reactor))
        self.client = _UnreadyClient(address.storeDir, onError, name=address.name, clock=reactor)

    async def run(self) -> None:
        """
        Connect and agree on a version.

        @raise NixServeError: why not; nothing is left.
        """
        try:
            match self._address.via:
                case Via.CHILD:
                    await self._child()
                case Via.OPENSSH:
                    await self._openssh()
                case Via.CONCH:
                    await self._conch()
                case Via.SOCKET:
                    await self._socket()
        except BaseException as e:
            await self._leaveNothing()
            raise self._explain(e) from None

    async def _child(self) -> None:
        await self._spawn(self._address.commandWords(self._write), self._environ)

    async def _openssh(self) -> None:
        address = self._address
        command = address.command(self._write)
        if self._master is not None:
            await self._master.start()
            await self._spawn(self._master.arguments(command), sshEnvironment(self._environ))
        elif not address.hostKey:
            await self._spawn(sshArguments(address, self._environ, command=command), sshEnvironment(self._environ))
        else:
            file = PrivateFile(self._environ, "known_hosts")
            try:
                await self._door.call(file.write, knownHostsLine(address))
                argv = sshArguments(address, self._environ, knownHosts=file.path, command=command)
                await self._spawn(argv, sshEnvironment(self._environ))
            except UnsafePath as e:
                raise CannotConnect(address.name, e.reason, e.advice) from e
            finally:
                # Through the same door: behind the writing, even if that was given up half way.
                await self._door.call(file.remove)

    async def _conch(self) -> None:
        # Loaded only where it is wanted: Conch and its cryptography take longer to load than ssh to start.
        connectConch = namedAny("nixserve.remote.conch.connectConch")
        command = self._address.command(self._write)
        await connectConch(
            self._reactor, self._address, self._environ, self.client, command, self._timeoutSeconds, self._door
        )
        await self.client.ready

    async def _socket(self) -> None:
        address = self._address
        header = RelayHeader("read,write,build,trust" if self._write else "read", address.remoteStore)
        endpoint = UNIXClientEndpoint(self._reactor, address.socket, self._timeoutSeconds)
        try:
            await connectProtocol(endpoint, RelayTransport(self.client, header))
        except ConnectError as e:
            what = f"cannot connect to the socket ({os.strerror(e.osError) if e.osError else e})"
            raise CannotConnect(address.name, what, "start 'twistd nixserve' and give its serve.sock") from e
        await self.client.ready

    async def _spawn(self, argv: list[str], environ: Mapping[str, str]) -> None:
        program = await self._door.call(findProgram, argv[0], environ)
        if program is None:
            raise noProgram(self._address, argv[0])
        ProcessTransport.spawn(self.client, self._reactor, [program, *argv[1:]], environ)
        await self.client.ready

    async def _leaveNothing(self) -> None:
        if self.client.transport is not None:
            self.client.transport.abortConnection()
            await whenFired(self.client.ended)

    def _explain(self, error: BaseException) -> BaseException:
        """The error to raise for C{error}."""
        client = self.client
        if client.transport is None or not isinstance(error, RemoteFailure):
            return error
        output = b"" if client.output.startswith(encodeU64(SERVER_MAGIC)) else client.output
        evidence = Evidence(output, client.errors, client.reason, error.why)
        return explain(self._address, self._address.command(self._write), evidence)

    def tooSlow(self) -> CannotConnect:
        """The error for the case that there was no answer in time."""
        command = self._address.command(self._write)
        return tooSlow(self._address, command, self.client.errors, self._timeoutSeconds)

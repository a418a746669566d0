"""
What C{nixserve demo} does: the real service on a free port, a client that copies a closure there and back, a check of
every hash, and a build there from a derivation whose recipe stays here.

Everything is made for the occasion in one directory: three stores, host key, user key.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric import ed25519
from twisted.conch.ssh.keys import Key
from twisted.internet.defer import maybeDeferred
from twisted.internet.protocol import Factory

from nixserve.app.recipe import Recipe, makeRecipe
from nixserve.app.sample import Sample, makeSample
from nixserve.app.service import FORCED_COMMAND, ServeService
from nixserve.app.settings import ServiceSettings
from nixserve.builder.sandbox import findShell, sandboxProblem
from nixserve.codec.hashes import Hash
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import RemoteError, StoreError
from nixserve.protocol.childprocess import ProcessTransport
from nixserve.protocol.client import ServeClient
from nixserve.protocol.copying import Copied, CopyProgress, copyClosure
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.protocol.reactors import IServiceReactor
from nixserve.protocol.workers import Workers
from nixserve.ssh.client import SSHCommandEndpoint
from nixserve.ssh.keys import loadHostKey
from nixserve.store.api import StoreSession
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore

__all__ = ["BuildFigures", "CopyFigures", "Demonstration", "Narrator", "Server"]

T = TypeVar("T")

HOST: Final = "127.0.0.1"
USER: Final = "demo"
"""Means nothing to the endpoint: there the key decides."""

INDEXED: Final = ("email", "http", "json", "urllib")
"""The packages of the sample that the build is about."""


@dataclass(frozen=True, slots=True)
class Server:
    """
    The endpoint as a client finds it.

    @ivar client: C{"ssh"}, or C{"Conch"} if the client is in this process.
    @ivar loginSeconds: from the start of the client to the agreed version.
    @ivar version: of the protocol, C{major << 8 | minor}.
    """

    port: int
    client: str
    loginSeconds: float
    version: int


@dataclass(frozen=True, slots=True)
class CopyFigures:
    """
    One way of the closure.

    @ivar seconds: from the first question to the last acknowledgement or registration.
    """

    copied: Copied
    seconds: float


@dataclass(frozen=True, slots=True)
class BuildFigures:
    """
    What a build there has taken, until its output was here.

    @ivar confined: in a sandbox.
    @ivar seconds: from the request to the result.
    @ivar moved: bytes of the protocol and the log, both ways, from the request until the output was here.
    @ivar recipeBytes: sizes of the NARs that copying the .drv file would have had to move.
    """

    confined: bool
    seconds: float
    moved: int
    recipeBytes: int


class Narrator:
    """
    Is told about each step when it is over; each does nothing here.
    """

    def made(self, sample: Sample, seconds: float) -> None:
        """The closure is in the first store."""

    def connected(self, server: Server) -> None:
        """The service runs and the client has logged in."""

    def progress(self, what: str) -> CopyProgress:
        """A copy begins. What is returned hears how far it is."""
        return CopyProgress()

    def copied(self, what: str, copy: CopyFigures) -> None:
        """A copy is complete."""

    def checked(self, paths: int, narBytes: int, seconds: float) -> None:
        """The contents of all these paths were hashed again where they have arrived, and are right."""

    def building(self, recipe: Recipe, paths: int, narBytes: int) -> None:
        """
        A build begins.

        @param paths: how many paths the remote lacks of the closure of the .drv file; C{narBytes}: their size.
        """

    def said(self, line: str) -> None:
        """A line of the log of the build."""

    def built(self, build: BuildFigures) -> None:
        """The output is here, and is right."""


class Demonstration:
    """
    One run of C{nixserve demo}.
    """

    def __init__(
        self, reactor: IServiceReactor, directory: str, narrator: Narrator, useSSH: bool = True, useSandbox: bool = True
    ) -> None:
        """
        @param directory: an empty one, reached without symbolic links; to be deleted afterwards.
        @param useSSH: let the C{ssh} program connect, if there is one.
        @param useSandbox: build in a sandbox, if this machine has what that takes.
        """
        self._reactor = reactor
        self._directory = directory
        self._narrator = narrator
        self._ssh = shutil.which("ssh") if useSSH else None
        self._confined = useSandbox and findShell() is not None and not sandboxProblem()
        # Builders outside a sandbox find store paths only where they are: then there is a store directory of our own.
        self._storeDir = StoreDir() if self._confined else StoreDir(f"{directory}/nix/store")
        self._workers = Workers(reactor)
        # What has been started, to be ended in the opposite order.
        self._started = AsyncExitStack()

    async def run(self) -> None:
        """
        All of it.

        @raise NixServeError: something went wrong. Whatever happens, nothing runs any more afterwards.
        """
        async with self._started:
            self._workers.start()
            self._started.callback(self._workers.stop)
            source, target = self._openStore("source"), self._openStore("target")
            sample = await self._make(source)
            service = await self._serve()
            client = await self._connect(service)
            for what in ("upload", "upload again"):
                async with await DeferredSession.open(source, self._workers) as here:
                    await self._copy(what, here, client, sample.root)
            async with await DeferredSession.open(target, self._workers) as here:
                await self._copy("download", client, here, sample.root)
            await self._check(source, target, sample.root)
            await self._build(client, source, sample)
            await client.close()

    def _openStore(self, name: str) -> LocalStore:
        store = LocalStore(StoreLayout.underRoot(f"{self._directory}/{name}", self._storeDir), reservedSize=0)
        self._started.callback(store.close)
        return store

    async def _make(self, source: LocalStore) -> Sample:
        begun = time.monotonic()
        work = f"{self._directory}/work"
        os.mkdir(work)
        sample = await self._workers.call(_inSession, source, partial(makeSample, directory=work))
        self._narrator.made(sample, time.monotonic() - begun)
        return sample

    async def _serve(self) -> ServeService:
        """The service that C{twistd} runs, on a store and with a host key that it makes itself."""
        state = f"{self._directory}/state"
        os.mkdir(state, 0o700)
        key = Key(ed25519.Ed25519PrivateKey.generate())
        _writePrivate(self._path("user_key"), key.toString("OPENSSH", subtype="v1"))
        public = key.public().toString("OPENSSH", comment=USER)
        _writePrivate(f"{state}/authorized_keys", f'command="{FORCED_COMMAND}" '.encode() + public + b"\n")
        options = {"state": state, "listen": f"tcp:0:interface={HOST}", **self._storeOptions()}
        settings = ServiceSettings.complete(options, {})
        service = ServeService(settings, self._reactor, {})

        async def stop() -> None:
            await maybeDeferred(service.stopService)

        service.startService()
        self._started.push_async_callback(stop)
        return service

    def _storeOptions(self) -> Mapping[str, str]:
        """An embedded store, as the service makes by itself; if need be one that builders can use as they are."""
        if self._confined:
            return {"sandbox": "on"}
        base = f"{self._directory}/nix"
        for path in (self._directory, f"{self._directory}/state"):
            # As root, builders have a uid of their own, and have to get through to the store.
            os.chmod(path, 0o711)
        return {"store": f"local?store={base}/store&state={base}/var&log={base}/log", "sandbox": "off"}

    async def _connect(self, service: ServeService) -> _Client:
        begun = time.monotonic()
        port: int = service.ports[0].getHost().port  # type: ignore[attr-defined]
        hostKey = loadHostKey(service.settings.hostKey).public()
        client = _Client(self._storeDir, self._narrator)
        if self._ssh is not None:
            known = f"[{HOST}]:{port} ".encode() + hostKey.toString("OPENSSH") + b"\n"
            _writePrivate(self._path("known_hosts"), known)
            environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
            ProcessTransport.spawn(client, self._reactor, self._sshCommand(port), environment)
        else:
            key = Key.fromFile(self._path("user_key"))
            endpoint = SSHCommandEndpoint(
                self._reactor, HOST, port, USER, FORCED_COMMAND, keys=[key], hostKeys=[hostKey]
            )
            await endpoint.connect(Factory.forProtocol(lambda: client))
        self._started.callback(client.transport.abortConnection)
        version = await client.ready
        seconds = time.monotonic() - begun
        self._narrator.connected(Server(port, "ssh" if self._ssh else "Conch", seconds, version))
        return client

    def _sshCommand(self, port: int) -> list[str]:
        """With nothing of the user's own: no configuration, agent, keys or known hosts."""
        options = {
            "BatchMode": "yes",
            "GlobalKnownHostsFile": "/dev/null",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "IdentityFile": self._path("user_key"),
            "LogLevel": "ERROR",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": self._path("known_hosts"),
        }
        flags = [flag for name, value in options.items() for flag in ("-o", f"{name}={value}")]
        return [self._ssh or "ssh", "-F", "none", "-T", *flags, "-p", str(port), f"{USER}@{HOST}", FORCED_COMMAND]

    async def _copy(
        self, what: str, source: DeferredSession | ServeClient, target: DeferredSession | ServeClient, root: StorePath
    ) -> None:
        begun = time.monotonic()
        copied = await copyClosure(source, target, [root], progress=self._narrator.progress(what))
        self._narrator.copied(what, CopyFigures(copied, time.monotonic() - begun))

    async def _check(self, source: LocalStore, target: LocalStore, root: StorePath) -> None:
        begun = time.monotonic()
        paths, narBytes = await self._workers.call(_inSession, source, partial(_compare, target=target, root=root))
        self._narrator.checked(paths, narBytes, time.monotonic() - begun)

    async def _build(self, client: _Client, store: LocalStore, sample: Sample) -> None:
        """
        Build there and fetch the output.

        @raise RemoteError: it did not build.
        @raise StoreError: the output is not what it should be.
        """
        async with await DeferredSession.open(store, self._workers) as here:
            packages = {name: sample.packages[name] for name in INDEXED}
            recipe = await here.call(makeRecipe, here.session, f"{self._directory}/work", packages)
            paths, size = await _weigh(client, here, recipe.drvPath)
            self._narrator.building(recipe, paths, size)
            before, begun = client.moved, time.monotonic()
            result = await client.buildDerivation(recipe.drvPath, recipe.basic)
            seconds = time.monotonic() - begun
            if not result.success:
                raise RemoteError(f"'{recipe.drvPath}' was not built: {result.errorMsg}")
            await copyClosure(client, here, [recipe.output])
            moved = client.moved - before
            await here.call(_checkOutput, here.session, store.layout.realPath(recipe.output), recipe)
        self._narrator.built(BuildFigures(self._confined, seconds, moved, size))

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}"


class _Client(ServeClient):
    """
    Counts what it sends and gets, and tells the narrator the lines of logs.
    """

    def __init__(self, storeDir: StoreDir, narrator: Narrator) -> None:
        super().__init__(storeDir, self._takeLog)
        self._narrator = narrator
        self._received = 0
        self._line = b""

    @property
    def moved(self) -> int:
        """How many bytes went both ways, those of the log included."""
        sent: int = self.transport.sent
        return sent + self._received

    def dataReceived(self, data: bytes) -> None:
        """See L{ServeClient}."""
        self._received += len(data)
        super().dataReceived(data)

    def _takeLog(self, data: bytes) -> None:
        self._received += len(data)
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._narrator.said(line.decode("utf-8", "replace"))


async def _weigh(client: ServeClient, here: DeferredSession, drvPath: StorePath) -> tuple[int, int]:
    """
    What copying a .drv file would take, asked of the remote store itself.

    @return: how many paths of its closure are not there, and the sizes of their NARs.
    """
    missing = (await copyClosure(here, client, [drvPath], dryRun=True)).infos
    return len(missing), sum(info.narSize for info in missing)


def _checkOutput(session: StoreSession, realPath: str, recipe: Recipe) -> None:
    """
    In a worker: is the output what it should be? Its hash was looked at when it was stored.

    @param realPath: where it is.
    @raise StoreError: it is not.
    """
    with open(realPath, encoding="utf-8") as stream:
        text = stream.read()
    if text != recipe.expected:
        raise StoreError(f"the contents of '{recipe.output}' are wrong")
    if session.queryPathInfos([recipe.output])[recipe.output].references != recipe.basic.inputSrcs:
        raise StoreError(f"the references of '{recipe.output}' are wrong")


def _inSession(store: LocalStore, function: Callable[[StoreSession], T]) -> T:
    """Call C{function} with a session of its own on C{store}. Blocks: for a worker."""
    session = store.openSession()
    try:
        return function(session)
    finally:
        session.close()


def _compare(session: StoreSession, target: LocalStore, root: StorePath) -> tuple[int, int]:
    """
    In a worker: hash everything in the last store, and compare what is registered in both.

    @return: how many paths and bytes have been hashed.
    @raise StoreError: a difference.
    """
    copy = target.openSession()
    expected = session.queryPathInfos(session.queryClosure([root]))
    infos = copy.queryPathInfos(copy.queryClosure([root]))
    if infos.keys() != expected.keys():
        raise StoreError(f"the closure of '{root}' differs: {len(infos)} paths instead of {len(expected)}")
    for path, info in infos.items():
        digest = hashlib.sha256()
        for chunk in copy.narFromPath(path):
            digest.update(chunk)
        if Hash("sha256", digest.digest()) != expected[path].narHash:
            raise StoreError(f"path '{path}' has changed on its way")
        if _facts(info) != _facts(expected[path]):
            raise StoreError(f"what is registered about '{path}' has changed on its way")
    copy.close()
    return len(infos), sum(info.narSize for info in infos.values())


def _facts(info: Any) -> tuple[Any, ...]:
    """All but the time of registration and whether it was built here: each store has its own."""
    return info.path, info.narHash, info.narSize, info.references, info.deriver, info.sigs, info.ca


def _writePrivate(path: str, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(content)

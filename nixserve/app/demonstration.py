"""
What C{nixserve demo} does: the real service on a free port, a client that copies a closure there and back, and a check
of every hash.

Everything is made for the occasion in one directory: three stores, host key, user key.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric import ed25519
from twisted.conch.ssh.keys import Key
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.protocol import Factory

from nixserve.app.sample import Sample, makeSample
from nixserve.app.service import FORCED_COMMAND, ServeService
from nixserve.app.settings import ServiceSettings
from nixserve.codec.hashes import Hash
from nixserve.codec.storepath import StorePath
from nixserve.errors import StoreError
from nixserve.protocol.childprocess import ProcessTransport
from nixserve.protocol.client import ServeClient
from nixserve.protocol.copying import Copied, CopyProgress, downloadClosure, uploadClosure
from nixserve.protocol.workers import Door, Workers
from nixserve.ssh.client import SSHCommandEndpoint
from nixserve.ssh.keys import loadHostKey
from nixserve.store.api import StoreSession
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore

__all__ = ["Copy", "Demonstration", "Narrator", "Server"]

T = TypeVar("T")

HOST: Final = "127.0.0.1"
USER: Final = "demo"
"""Means nothing to the endpoint: there the key decides."""


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
class Copy:
    """
    One way of the closure.

    @ivar seconds: from the first question to the last acknowledgement or registration.
    """

    copied: Copied
    seconds: float


class Narrator:
    """
    Is told about each step when it is over; each does nothing here.
    """

    def made(self, sample: Sample, seconds: float) -> None:
        """The closure is in the first store."""

    def connected(self, server: Server) -> None:
        """The service runs and the client has logged in."""

    def progress(self, what: str) -> CopyProgress:
        """A copy begins."""
        return CopyProgress()

    def copied(self, what: str, copy: Copy) -> None:
        """A copy is over."""

    def checked(self, paths: int, narBytes: int, seconds: float) -> None:
        """All hashes are right."""


class Demonstration:
    """
    One run.
    """

    def __init__(self, reactor: Any, directory: str, narrator: Narrator, useSSH: bool) -> None:
        """
        @param directory: an empty one, reached without symbolic links; to be deleted afterwards.
        @param useSSH: let the C{ssh} program connect, if there is one.
        """
        self._reactor = reactor
        self._directory = directory
        self._narrator = narrator
        self._ssh = shutil.which("ssh") if useSSH else None
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
            up, down = partial(uploadClosure, client), partial(downloadClosure, client)
            await self._copy("upload", up, source, sample.root)
            await self._copy("upload again", up, source, sample.root)
            await self._copy("download", down, target, sample.root)
            await self._check(source, target, sample.root)
            await client.close()

    def _openStore(self, name: str) -> LocalStore:
        store = LocalStore(StoreLayout.underRoot(f"{self._directory}/{name}"), reservedSize=0)
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
        settings = ServiceSettings.complete({"state": state, "listen": f"tcp:0:interface={HOST}"}, {})
        service = ServeService(settings, self._reactor, {})

        async def stop() -> None:
            await maybeDeferred(service.stopService)

        service.startService()
        self._started.push_async_callback(stop)
        return service

    async def _connect(self, service: ServeService) -> ServeClient:
        begun = time.monotonic()
        port: int = service.ports[0].getHost().port  # type: ignore[attr-defined]
        hostKey = loadHostKey(service.settings.hostKey).public()
        client = ServeClient(StoreLayout.underRoot("/").storeDir)
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
        self,
        what: str,
        copy: Callable[[Door, StoreSession, Collection[StorePath], CopyProgress], Deferred[Copied]],
        store: LocalStore,
        root: StorePath,
    ) -> None:
        session = store.openSession()
        progress = self._narrator.progress(what)
        begun = time.monotonic()
        copied = await copy(Door(self._workers), session, [root], progress)
        seconds = time.monotonic() - begun
        await self._workers.call(session.close)
        self._narrator.copied(what, Copy(copied, seconds))

    async def _check(self, source: LocalStore, target: LocalStore, root: StorePath) -> None:
        begun = time.monotonic()
        paths, narBytes = await self._workers.call(_inSession, source, partial(_compare, target=target, root=root))
        self._narrator.checked(paths, narBytes, time.monotonic() - begun)

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}"


def _inSession(store: LocalStore, function: Callable[[StoreSession], T]) -> T:
    """In a worker."""
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

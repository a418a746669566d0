"""
A store on another machine, or behind another program, as a L{nixserve.store.api.Store}.

So whatever works on a store works on a remote one; C{twistd nixserve --store ssh://HOST} serves another nixserve, or a
plain C{nix-store --serve --write}, with the rights, limits and logs of this one.

Each session has clients of its own there: see L{RemoteClients}. All paths that matter to it are roots there until
it closes, so what it has once found valid stays valid and is not asked about again. That needs the right to write
there: a remote that only lets read keeps no roots, and what another's collector takes is an error here.

Everything blocks, in any thread but the reactor's; the conversations themselves happen in the reactor. Bytes of NARs
pass through bounded queues in both directions. What is added is locked here against other sessions of the same
L{RemoteStore}, which hear L{nixserve.store.api.Busy}. Locks that others hold over there are waited for over there,
with a thread of ours: give such a store as many threads as it may have sessions (L{MAX_THREADS}), which cost nothing
until they are needed.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final

from twisted.internet.defer import Deferred

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.protocol.client import ServeClient
from nixserve.protocol.reactors import IClientReactor, IThreadReactor
from nixserve.remote.adding import RemoteImportWriter, RemotePathWriter, addSmallPaths
from nixserve.remote.address import RemoteAddress
from nixserve.remote.clients import Open, RemoteClients
from nixserve.remote.connecting import connect
from nixserve.remote.link import AddingLocks, Link
from nixserve.store.api import Closable, ImportWriter, InvalidPath, OpenSessions, PathWriter, StoreSession
from nixserve.store.contents import checkNewInfo, exportStream, referencesFirst
from nixserve.store.writers import DrainingWriter

__all__ = ["MAX_THREADS", "RemoteSession", "RemoteStore"]

MAX_THREADS: Final = 512
"""Worker threads for whoever serves a remote store: one that waits for the remote keeps its thread, and must not keep
one from the session that it waits for."""


class RemoteStore:
    """
    L{nixserve.store.api.Store} over sessions of L{nixserve.protocol.client.ServeClient}. Opens nothing before it is
    needed.
    """

    def __init__(self, reactor: IThreadReactor, open: Open, storeDir: StoreDir | None = None) -> None:
        """
        @param reactor: in whose thread the remote sessions live.
        @param open: called in that thread for each remote session.
        @param storeDir: the logical store directory, here and there.
        """
        self._reactor = reactor
        self._open = open
        self._storeDir = storeDir or StoreDir()
        self._locks = AddingLocks()
        self._sessions = OpenSessions[RemoteSession]()

    @classmethod
    def at(cls, reactor: IClientReactor, address: RemoteAddress, environ: Mapping[str, str]) -> RemoteStore:
        """
        The store that a URL names.

        @param environ: see L{connect}.
        """

        def open(onError: Callable[[bytes], None]) -> Deferred[ServeClient]:
            return connect(reactor, address, environ=environ, onError=onError)

        return cls(reactor, open, address.storeDir)

    @property
    def storeDir(self) -> StoreDir:
        """The logical store directory."""
        return self._storeDir

    def openSession(self) -> RemoteSession:
        """
        @return: a new session.
        @raise StoreError: the store is closed.
        """
        clients = RemoteClients(self._reactor, self._open)
        link = Link(self._reactor, clients, self._locks, self._storeDir)
        return self._sessions.open(lambda: RemoteSession(link, self._sessions.forget))

    def close(self) -> None:
        """
        Close every session. Safe to call twice, and in the reactor's thread: there it cuts them, and does not wait.
        """
        for session in self._sessions.end():
            session.close()


class RemoteSession(Closable, StoreSession):
    """
    L{nixserve.store.api.StoreSession} of a L{RemoteStore}.

    An error of the remote in a query ends the session, for with its connection the roots are gone; one in a transfer
    does not.
    """

    def __init__(self, link: Link, onClose: Callable[[RemoteSession], None]) -> None:
        """
        @param onClose: see L{Closable}.
        """
        super().__init__(onClose)
        self._link = link

    @property
    def storeDir(self) -> StoreDir:
        """The logical store directory."""
        return self._link.storeDir

    @property
    def clients(self) -> RemoteClients:
        """Of the store there. Only for the reactor's thread."""
        return self._link.clients

    def addTempRoots(self, paths: Collection[StorePath]) -> None:
        """
        See L{nixserve.store.api.StoreSession.addTempRoots}. Never busy: a collector is waited for by the remote.
        """
        self._link.keep(paths)

    def queryValidPaths(self, paths: Collection[StorePath]) -> set[StorePath]:
        """See L{nixserve.store.api.StoreSession.queryValidPaths}."""
        self._link.requireOpen()
        known = self._link.kept(paths)
        unknown = {path for path in self._ours(paths) if path not in known}
        if not unknown:
            return known
        return known | self._link.ask(lambda keeper: keeper.queryValidPaths(unknown))

    def queryPathInfos(self, paths: Collection[StorePath]) -> dict[StorePath, ValidPathInfo]:
        """
        See L{nixserve.store.api.StoreSession.queryPathInfos}. In the order of C{paths}. The protocol says neither when
        something was registered nor whether it was built there.
        """
        infos = self._link.ask(lambda keeper: keeper.queryPathInfos(self._ours(paths)))
        return {path: infos[path] for path in paths if path in infos}

    def queryClosure(self, paths: Collection[StorePath], includeOutputs: bool = False) -> set[StorePath]:
        """
        See L{nixserve.store.api.StoreSession.queryClosure}. C{paths} become roots: one that vanished in between would
        end the session.
        """
        self._link.require(paths)
        return set(self._link.ask(lambda keeper: keeper.queryClosure(paths, includeOutputs)))

    def narFromPath(self, path: StorePath) -> Iterator[bytes]:
        """
        See L{nixserve.store.api.StoreSession.narFromPath}. The path becomes a root. Closing the iterator early cuts
        this transfer off and nothing else.

        @raise nixserve.errors.RemoteError: while it is being read: the remote cannot go on.
        """
        self._link.require([path])
        return self._link.nars([path])

    def narsFromPaths(self, paths: Sequence[StorePath]) -> Iterator[bytes]:
        """
        See L{nixserve.store.api.StoreSession.narsFromPaths}. The paths become roots. They are requested ahead, so that
        none has to wait for the way there and back.
        """
        self._link.keep(paths)
        valid = self._link.kept(paths)
        known = list(itertools.takewhile(valid.__contains__, paths))
        missing = paths[len(known) : len(known) + 1]
        if missing and not known:
            raise InvalidPath(missing[0])
        return self._narsUntil(known, missing)

    def exportPaths(self, paths: Collection[StorePath]) -> Iterator[bytes]:
        """
        See L{nixserve.store.api.StoreSession.exportPaths}. The paths become roots. The stream is put together here:
        Nix from 2.32 on sends none.
        """
        self._link.require(paths)
        infos = self.queryPathInfos(paths)
        return self._export(referencesFirst(infos))

    def addToStore(self, info: ValidPathInfo) -> PathWriter:
        """
        See L{nixserve.store.api.StoreSession.addToStore}. The path and its references become roots.
        """
        self._link.requireOpen()
        checkNewInfo(info, self.storeDir)
        return RemotePathWriter(self._link, info) if self._link.lockInvalid(info) else DrainingWriter(info)

    def importPath(self) -> ImportWriter:
        """See L{nixserve.store.api.StoreSession.importPath}. Never busy."""
        self._link.requireOpen()
        return RemoteImportWriter(self._link)

    def addSmallPaths(self, objects: Sequence[tuple[ValidPathInfo, bytes]]) -> int:
        """
        See L{nixserve.store.api.StoreSession.addSmallPaths}. They go straight behind each other, in one round trip
        after the question which are there.
        """
        self._link.requireOpen()
        return addSmallPaths(self._link, objects)

    def interrupt(self) -> None:
        """
        Have whatever waits for the remote fail soon. From any thread, at any time; only L{close} is of use afterwards.
        """
        self._link.interrupt()

    def _free(self) -> None:
        self._link.close()

    def _ours(self, paths: Collection[StorePath]) -> list[StorePath]:
        """Those in the store directory: with another in it, the remote refuses the whole question."""
        return [path for path in paths if path.storeDir == self.storeDir.path]

    def _narsUntil(self, paths: Sequence[StorePath], missing: Sequence[StorePath]) -> Iterator[bytes]:
        yield from self._link.nars(paths)
        for path in missing:
            raise InvalidPath(path)

    def _export(self, infos: Sequence[ValidPathInfo]) -> Iterator[bytes]:
        with contextlib.closing(self._link.dump([info.path for info in infos])) as stream:
            yield from exportStream(infos, lambda _: _nextOf(stream))


def _nextOf(stream: Iterator[bytes | None]) -> Iterator[bytes]:
    """The pieces of the next NAR in a stream of several, each of which ends with C{None}."""
    while (chunk := next(stream)) is not None:
        yield chunk

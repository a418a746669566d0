"""
One session on the standard streams of this process, on a store that it opens itself, here or elsewhere.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ReactorNotRunning
from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    LogEvent,
    Logger,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)
from zope.interface import provider

from nixserve.app.settings import defaultMaxJobs, logPath
from nixserve.app.storechoice import chooseServedStore
from nixserve.builder.local import LocalBuilder
from nixserve.builder.openfiles import raiseOpenFiles
from nixserve.codec.text import shownText
from nixserve.errors import NixServeError, UsageError
from nixserve.protocol.builds import LocalBuilds
from nixserve.protocol.monotonic import useMonotonicTime
from nixserve.protocol.policy import Peer, Policy, Right
from nixserve.protocol.reactors import IServiceReactor
from nixserve.protocol.sessions import ServeSessions
from nixserve.protocol.stdio import StdioTransport
from nixserve.protocol.workers import Workers
from nixserve.remote.address import RemoteAddress
from nixserve.remote.builds import RemoteBuilds
from nixserve.remote.store import RemoteStore
from nixserve.ssh.command import ServeCommand
from nixserve.store.api import Store
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.store.ownpaths import requireOwn

__all__ = ["serveStdio"]

_log = Logger()


def serveStdio(command: ServeCommand, environ: Mapping[str, str]) -> int:
    """
    Serve until the session ends.

    @return: the exit status.
    """
    _startLog(logPath(environ))
    try:
        return _serve(command, environ)
    except NixServeError as e:
        # The client is told less.
        _log.critical("cannot serve: {error}", error=e)
        raise


def _serve(command: ServeCommand, environ: Mapping[str, str]) -> int:
    runner = cast(IServiceReactor, reactor)
    useMonotonicTime(runner)
    raiseOpenFiles()
    workers = Workers(runner)
    place = chooseServedStore(command.storeURI, environ)
    builds: LocalBuilds | None = None
    if isinstance(place, RemoteAddress):
        store: Store = RemoteStore.at(runner, place, environ)
        sessions = ServeSessions(store, workers, runner, builds=RemoteBuilds())
    else:
        store = local = LocalStore(_restrict(place, command.policy))
        if Right.BUILD in command.policy.rights:
            builds = LocalBuilds(local, LocalBuilder(local), workers, runner, defaultMaxJobs())
        sessions = ServeSessions(store, workers, runner, builds=builds)
    statuses: list[int] = []

    def start() -> None:
        workers.start()
        if builds is not None:
            builds.start()
        peer = Peer("stdio", shownText(environ.get("SSH_CONNECTION", "")), os.getpid())
        session = sessions.buildSession(command.policy, peer)
        transport = StdioTransport(session, runner)
        transport.exited.addCallback(statuses.append)
        transport.exited.addBoth(end)

    def end(_: object) -> None:
        # After a signal it has been stopped already.
        with contextlib.suppress(ReactorNotRunning):
            runner.stop()

    def stop() -> Deferred[None]:
        """At the session's end, or at a signal: free everything, a running build above all."""
        stopping = sessions.stop()
        return stopping.addCallback(lambda _: builds.stop()) if builds is not None else stopping

    gc.freeze()
    runner.callWhenRunning(start)
    runner.addSystemEventTrigger("before", "shutdown", stop)
    runner.run()
    workers.stop()
    store.close()
    return statuses[0] if statuses else 1


def _restrict(layout: StoreLayout, policy: Policy) -> StoreLayout:
    """A session that may only read can do so on a store that this user may not write."""
    if Right.WRITE in policy.rights or not os.path.isdir(layout.dbDir) or os.access(layout.dbDir, os.W_OK):
        return layout
    return replace(layout, readOnly=True)


def _startLog(path: str | None) -> None:
    """
    Standard error belongs to the client: events go to the file that was asked for, or nowhere.
    """
    if path is None:
        globalLogBeginner.beginLoggingTo([_drop], redirectStandardIO=False, discardBuffer=True)
        return
    try:
        # In a directory for all, somebody else may have put a link there.
        requireOwn(path)
        stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    except OSError as e:
        raise UsageError(f"NIXSERVE_LOG: cannot write '{path}': {e.strerror}") from e
    observer = FilteringLogObserver(textFileLogObserver(stream), [LogLevelFilterPredicate(LogLevel.info)])
    globalLogBeginner.beginLoggingTo([observer], redirectStandardIO=False, discardBuffer=True)


@provider(ILogObserver)
def _drop(event: LogEvent) -> None:
    """The log's observer where nobody has asked for a log: keeps nothing."""

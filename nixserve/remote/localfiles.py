"""
The few files of this machine that a connection needs, and the threads that touch them.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from zope.interface import implementer

from nixserve.protocol.interfaces import IWorkers
from nixserve.protocol.reactors import IThreadReactor
from nixserve.store.ownpaths import requireOwn

__all__ = ["PrivateFile", "ReactorThreads", "findProgram", "temporaryName"]


@implementer(IWorkers)
class ReactorThreads:
    """The reactor's own threads: enough for what a connection asks of them, and there without being started."""

    def __init__(self, reactor: IThreadReactor) -> None:
        self.reactor = reactor

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Deferred[Any]:
        """See L{IWorkers}."""
        return deferToThreadPool(self.reactor, self.reactor.getThreadPool(), function, *args, **kwargs)


class PrivateFile:
    """
    A temporary file, in a directory that only this user may enter. Its methods block: for threads.

    @ivar path: of the file.
    """

    def __init__(self, environ: Mapping[str, str], name: str) -> None:
        self._directory = temporaryName(environ)
        self.path = f"{self._directory}/{name}"

    def write(self, content: str) -> None:
        """
        Make it.

        @raise UnsafePath: others could put another in its place.
        """
        os.mkdir(self._directory, 0o700)
        requireOwn(self._directory)
        with open(self.path, "x", encoding="ascii") as stream:
            stream.write(content)

    def remove(self) -> None:
        """Remove it, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        with suppress(FileNotFoundError):
            os.rmdir(self._directory)


def temporaryName(environ: Mapping[str, str], longest: int = 4096) -> str:
    """
    A path that nobody uses, for a directory. Known before it is made, so that it can be removed in any case.

    @param longest: how many bytes it may have; if C{TMPDIR} does not allow that it is ignored.
    """
    name = f"nixserve-{secrets.token_hex(8)}"
    chosen = f"{environ.get('TMPDIR') or '/tmp'}/{name}"
    return chosen if len(os.fsencode(chosen)) <= longest else f"/tmp/{name}"


def findProgram(program: str, environ: Mapping[str, str]) -> str | None:
    """
    The path of a program, as a shell with this environment finds it. Blocks: for threads.
    """
    return shutil.which(program, path=environ.get("PATH", os.defpath))

"""
May those who are logged in still be? A key that is taken out of C{authorized_keys}, or changed there, loses its
connections, and with them its sessions and builds, within seconds.
"""

from __future__ import annotations

from typing import Protocol

from twisted.cred.error import UnauthorizedLogin
from twisted.internet.interfaces import IDelayedCall, IReactorTime

from nixserve.ssh.authorizedkeys import AuthorizedKey
from nixserve.ssh.keys import AuthorizedKeysChecker, KnownKeyRefused

__all__ = ["LOOK_SECONDS", "KeyWatch", "LoggedIn"]

# Twice that is how long a key that was taken away works at most: see KeyWatch.
LOOK_SECONDS = 1.5


class LoggedIn(Protocol):
    """
    A connection that a key has opened.

    @ivar entry: the line of C{authorized_keys} that lets it in.
    @ivar host: the text of the client's IP address, or empty.
    """

    entry: AuthorizedKey
    host: str

    def expel(self, reason: str) -> None:
        """Tell the client why, and disconnect it."""


class KeyWatch:
    """
    Looks at the file and at the clock now and then, and lets each connection be judged as if it logged in now.

    Only what two looks in a row say counts: editors that write a file in place leave it empty for a moment. If it
    cannot be known what the file says (a fault of the disk, no descriptors left), nobody is disconnected for that.
    """

    def __init__(self, checker: AuthorizedKeysChecker, clock: IReactorTime) -> None:
        self._checker = checker
        self._clock = clock
        # Whether the last look would have ended it.
        self._watched: dict[LoggedIn, bool] = {}
        self._call: IDelayedCall | None = None

    def add(self, connection: LoggedIn) -> None:
        """A client has logged in."""
        self._watched[connection] = False
        if self._call is None:
            self._call = self._clock.callLater(LOOK_SECONDS, self._look)

    def discard(self, connection: LoggedIn) -> None:
        """Watch a connection no more: it is gone."""
        self._watched.pop(connection, None)
        if not self._watched and self._call is not None:
            self._call.cancel()
            self._call = None

    def _look(self) -> None:
        self._call = self._clock.callLater(LOOK_SECONDS, self._look)
        if not self._checker.keys.refresh():
            return
        for connection, isSuspect in list(self._watched.items()):
            reason = self._judge(connection)
            if reason and isSuspect:
                self.discard(connection)
                connection.expel(reason)
            else:
                self._watched[connection] = bool(reason)

    def _judge(self, connection: LoggedIn) -> str:
        """Why it may be logged in no longer; empty if it may."""
        before = connection.entry
        try:
            now = self._checker.choose(self._checker.keys.known(before.blob), connection.host)
        except KnownKeyRefused as error:
            return str(error)
        except UnauthorizedLogin:
            return "the key is no longer let in here"
        if now.forced != before.forced:
            return "what the key may do has changed; log in again"
        if now.touchRequired and not before.touchRequired:
            return "the key has to be touched now; log in again"
        connection.entry = now
        return ""

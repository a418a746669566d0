"""L{nixserve.store.api}: what is the same in the sessions of every store."""

import pytest

from nixserve.errors import StoreError
from nixserve.store.api import Closable, InvalidPath, OpenSessions, requireValid
from nixserve.testing import makeInfo, makeNar

PATHS = [makeInfo(f"object-{number}", makeNar(b"")).path for number in range(4)]


def test_requireValid():
    """The first in order that is missing is named, whatever those are that are there."""
    requireValid([], [])
    requireValid(PATHS[:2], {PATHS[1]: 1, PATHS[0]: 2, PATHS[2]: 3})
    with pytest.raises(InvalidPath) as caught:
        requireValid([*reversed(PATHS)], {PATHS[1]})
    assert caught.value.path == min({*PATHS} - {PATHS[1]})


class Session(Closable):
    """
    Closes with the errors that it is given, and counts.
    """

    def __init__(self, onClose=lambda session: None, error=None):
        super().__init__(onClose)
        self.freed = 0
        self.error = error

    def _free(self):
        self.freed += 1
        if self.error is not None:
            raise self.error


def test_closable():
    """It is of use until it is closed, which it is once."""
    heard = []
    session = Session(heard.append)
    session.requireOpen()
    session.close()
    session.close()
    assert (session.freed, heard) == (1, [session])
    with pytest.raises(StoreError, match="the session is closed"):
        session.requireOpen()


def test_closingFails():
    """Who waits for its end hears of it also if something could not be freed."""
    heard = []
    session = Session(heard.append, StoreError("the disk fails"))
    with pytest.raises(StoreError, match="the disk fails"):
        session.close()
    session.close()
    assert (session.freed, heard) == (1, [session])


def test_openSessions():
    """A store knows its sessions while they are open; when it ends it has them all, and opens no other."""
    sessions = OpenSessions("the store in '/x'")
    first, second = (sessions.open(lambda: Session(sessions.forget)) for _ in range(2))
    assert {*sessions.all()} == {first, second}
    first.close()
    assert sessions.all() == [second]
    assert sessions.end() == [second]
    with pytest.raises(StoreError, match="the store in '/x' is closed"):
        sessions.open(lambda: Session(sessions.forget))
    second.close()
    assert sessions.all() == sessions.end() == []

"""L{nixserve.store.writers}: when an object on its way has ended, and what follows."""

import pytest

from nixserve.errors import StoreError
from nixserve.store.api import Busy
from nixserve.store.writers import DrainingWriter, ObjectWriter
from nixserve.testing import makeInfo, makeNar

NAR = makeNar(b"hello")


class Writer(ObjectWriter):
    """
    Records what it takes.

    @ivar errors: what the next steps fail with.
    @ivar freed: how often it was.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.taken = []
        self.errors = []
        self.freed = 0

    def finish(self):
        """The last step."""
        with self._working(isLast=True):
            self._take(b"the end")

    def _take(self, data):
        if self.errors:
            raise self.errors.pop()
        self.taken.append(data)

    def _free(self):
        self.freed += 1


@pytest.mark.parametrize("step", [lambda writer: writer.feed(b"x"), Writer.finish])
def test_failureEndsIt(step):
    """Whatever goes wrong in a step comes out, and frees everything, once."""
    writer = Writer()
    writer.errors = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        step(writer)
    assert writer.freed == 1
    writer.abort()
    assert writer.freed == 1


def test_busyDoesNot():
    """What has to wait is called again."""
    writer = Writer()
    writer.feed(b"x")
    writer.errors = [Busy("a lock")]
    with pytest.raises(Busy):
        writer.finish()
    assert writer.freed == 0
    writer.finish()
    assert (writer.taken, writer.freed) == ([b"x", b"the end"], 1)


@pytest.mark.parametrize("end", [Writer.finish, Writer.abort])
@pytest.mark.parametrize("step", [lambda writer: writer.feed(b"x"), Writer.finish])
def test_nothingAfterTheEnd(end, step):
    """What was finished or aborted takes nothing more, and says so."""
    writer = Writer()
    end(writer)
    taken = list(writer.taken)
    with pytest.raises(StoreError, match="adding this object to the store has ended already"):
        step(writer)
    assert (writer.taken, writer.freed) == (taken, 1)


def test_closedSession():
    """Nor does one whose session is closed, which says that; it is freed then."""

    def requireOpen():
        if closed:
            raise StoreError("the session is closed")

    closed = []
    writer = Writer(requireOpen)
    writer.feed(b"x")
    closed.append(True)
    with pytest.raises(StoreError, match="the session is closed"):
        writer.feed(b"y")
    assert (writer.taken, writer.freed) == ([b"x"], 1)


def test_drains():
    """What is valid already is counted, cut anywhere, and not looked at."""
    writer = DrainingWriter(makeInfo("x", NAR))
    for position in range(len(NAR)):
        writer.feed(NAR[position : position + 1])
    writer.finish()
    writer.abort()


@pytest.mark.parametrize("data", [NAR + b"x", NAR[1:]])
def test_drainsAsMuchAsAnnounced(data):
    """Other sizes are refused."""
    writer = DrainingWriter(makeInfo("x", NAR))
    with pytest.raises(StoreError, match=f"size mismatch importing path .*; wanted: {len(NAR)}, got: {len(data)}"):
        writer.feed(data)
        writer.finish()

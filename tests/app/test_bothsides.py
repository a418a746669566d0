"""
L{nixserve.app.bothsides}: what of a remote's text reaches people.
"""

import pytest
from twisted.internet.task import Clock

from nixserve.app.bothsides import MAX_HELD, RemoteLines
from nixserve.codec.terminal import MAX_LINE


class TestRemoteLines:
    """L{RemoteLines}."""

    def setup_method(self):
        """One whose lines are kept."""
        self.clock, self.shown = Clock(), []
        self.lines = RemoteLines(self.clock, self.shown.append, "host: ")

    def test_whole(self):
        """Lines are shown a moment later, whole, with the prefix of their time; what is left, at the end."""
        self.lines.feed(b"a li")
        self.lines.feed(b"ne\nanother\nha")
        self.lines.prefix = "later: "
        assert self.shown == []
        self.clock.advance(1)
        assert self.shown == ["host: a line", "host: another"]
        self.lines.end()
        assert self.shown[2:] == ["later: ha"]

    def test_endless(self):
        """A line without an end is shown in pieces."""
        self.lines.feed(b"x" * (MAX_LINE + 1))
        self.clock.advance(1)
        assert self.shown == ["host: " + "x" * (MAX_LINE + 1)]

    def test_flood(self):
        """Of a flood only so many lines wait; the rest is shown at once."""
        for _ in range(5):
            self.lines.feed(b"\n" * MAX_HELD)
            assert len(self.lines._held) <= MAX_HELD
        assert len(self.clock.getDelayedCalls()) == 1 and len(self.shown) >= 4 * MAX_HELD
        self.clock.advance(1)
        assert len(self.shown) == 5 * MAX_HELD

    def test_error(self):
        """What the error says is not shown as well; nothing is after the end."""
        self.lines.feed(b"harmless\nerror: \x1b[31mbad\x1b[0m\n@@@@@\n@ WARNING @")
        self.lines.end("host: failed (error: bad WARNING)")
        self.lines.feed(b"afterwards\n")
        self.clock.advance(1)
        assert self.shown == ["host: harmless"]

    def test_block(self):
        """As a context manager it ends with a block that fails, not with one that does not."""
        with self.lines:
            pass
        with pytest.raises(ZeroDivisionError), self.lines:
            self.lines.feed(b"before\n")
            raise ZeroDivisionError
        self.lines.feed(b"after\n")
        self.clock.advance(1)
        assert self.shown == ["host: before"]

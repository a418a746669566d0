"""
L{nixserve.builder.loglines}: the log of a builder, line by line.
"""

import threading
import time

import pytest

from nixserve.builder.loglines import _MAX_WAITING, LogDelivery, LogLines
from nixserve.codec.terminal import MAX_LINE


class TestLogDelivery:
    """Lines for somebody slow."""

    def test_dropped(self):
        """Too much is dropped in whole lines, and a line says how many are missing where they are missing."""
        taken, entered, release = [], threading.Event(), threading.Event()

        def target(lines):
            taken.append(lines)
            entered.set()
            release.wait(10)

        delivery = LogDelivery(target)
        delivery.write(b"first\n")
        entered.wait(10)
        delivery.write(b"x" * (_MAX_WAITING - 1) + b"\n")
        delivery.write(b"lost\n")
        delivery.write(b"lost\nlost\n")
        release.set()
        while len(taken) < 2:
            time.sleep(0.01)
        delivery.write(b"last\n")
        delivery.close(10)
        assert [taken[0], len(taken[1])] == [b"first\n", _MAX_WAITING]
        assert b"".join(taken[2:]).startswith(b"[3 lines of the log are not shown")
        assert b"".join(taken).endswith(b"\nlast\n")

    def test_nothing(self):
        """Without output there is no thread."""
        before = threading.active_count()
        delivery = LogDelivery(None)
        delivery.write(b"")
        assert threading.active_count() == before
        delivery.close(1)


CASES = [
    (b"", b""),
    (b"text\n", b"text\n"),
    (b"no end", b"no end\n"),
    (b"a\n\nb\n", b"a\n\nb\n"),
    (b"\n", b"\n"),
    (b"abc\rX\n", b"Xbc\n"),
    (b"dos\r\n", b"dos\n"),
    (b"10%\r20%\r30%\ndone\n", b"30%\ndone\n"),
    (b'@nix {"action":"msg","level":0,"msg":"bad \\u00e9"}\n', "bad é\n".encode()),
    (b'@nix {"action":"msg","level":3,"msg":"quiet"}\nx\n', b"x\n"),
    (b'@nix {"action":"setPhase","phase":"build"}\n', b""),
    (b'@nix {"action":"start","id":1}\na @nix b\n', b"a @nix b\n"),
    (b"@nix {broken\n", b"@nix {broken\n"),
    (b"@nix []\n", b"@nix []\n"),
    (b"@nix " + 3000 * b"[" + b"\n", b"@nix " + 3000 * b"[" + b"\n"),
    (b"x" * (MAX_LINE + 5) + b"\ny\n", b"x" * MAX_LINE + b"\ny\n"),
    (b"x" * MAX_LINE + b"\ny", b"x" * MAX_LINE + b"\ny\n"),
    (b"\xff\xfe\n", b"\xff\xfe\n"),
]


@pytest.mark.parametrize(("output", "shown"), CASES)
@pytest.mark.parametrize("piece", [1, 7, 4096, 1 << 20])
def test_lines(output, shown, piece):
    """Output is shown as Nix shows it, however it is cut."""
    lines = LogLines()
    found = b"".join(lines.feed(output[start : start + piece]) for start in range(0, len(output), piece))
    assert found.count(b"\n") == len(found.splitlines()) or b"\r" in found
    assert found + lines.finish() == shown
    assert lines.finish() == b""

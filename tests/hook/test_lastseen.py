"""
L{nixserve.hook.lastseen}: when a machine was last reached.
"""

import os

from nixserve.hook.lastseen import LastSeen
from tests.hook.machinelist import machine


def test_clockSetBack(tmp_path):
    """A machine that was seen in the future was not seen."""
    now = [1000.0]
    seen = LastSeen(str(tmp_path / "new"), lambda: now[0])
    assert not seen.isSince(machine(), 0)
    seen.worked(machine())
    assert seen.isSince(machine(), 1000) and not seen.isSince(machine(), 1001)
    now[0] = 900
    assert not seen.isSince(machine(), 0)


def test_seenFiles(tmp_path):
    """Nobody else can say that a machine works."""
    before = os.umask(0)
    try:
        LastSeen(str(tmp_path / "new"), lambda: 1000.0).worked(machine())
    finally:
        os.umask(before)
    (file,) = (tmp_path / "new").iterdir()
    assert [path.stat().st_mode & 0o777 for path in (file, file.parent)] == [0o600, 0o700]

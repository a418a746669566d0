"""
Real Nix's collector, beside other runs of these tests.

It looks where the open files and working directories of all processes of the machine lead, and gives up at a path that
the kernel cannot show, of more than 4,095 bytes (Nix 2.8 to 2.34: C{reading symlink: File name too long}). Tests of
deep trees have such for a moment.
"""

import time

_PATIENCE = 60.0
_GIVEN_UP = b"File name too long"


def collecting(run):
    """
    Run a collection, again if it has given up for what some process has open.

    @param run: runs it, and gives a C{CompletedProcess} with standard error as bytes.
    @return: that of the last time.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        done = run()
        if done.returncode == 0 or _GIVEN_UP not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(0.1)

"""
Watching a process and a condition from outside.
"""

import threading
import time
from pathlib import Path

MIB = 1024 * 1024


def residentSize(pid):
    """How much memory a process has, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no memory: it has ended")


class Peak:
    """
    The largest size of a process, sampled as long as the block runs.

    @ivar size: bytes.
    """

    def __init__(self, pid, interval=0.02):
        self.size = residentSize(pid)
        self._pid, self._interval = pid, interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self):
        while not self._end.wait(self._interval):
            self.size = max(self.size, residentSize(self._pid))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


def until(condition, seconds=20.0, message="it did not come true"):
    """Wait until a condition holds, and fail if it takes longer than C{seconds}."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{message} in {seconds} s"
        time.sleep(0.02)

"""
What the benchmarks share: a place in memory, commands on the clock, tables.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

GIB = 1024**3
TMPFS = Path("/dev/shm")
LIMIT = 900.0
"""Seconds that a command may take."""

PATIENCE = 60.0
"""Seconds to wait for a quiet machine."""

QUIET = 0.15
"""Of the time of all processors, what others may use then."""


@contextmanager
def workingDirectory(need: int) -> Iterator[Path]:
    """
    A directory in memory for the block, removed at its end, also if a signal ends it.

    @param need: how many bytes must be free there.
    @raise SystemExit: fewer are.
    """
    place = TMPFS if TMPFS.is_dir() else Path(tempfile.gettempdir())
    if (free := shutil.disk_usage(place).free) < need:
        sys.exit(f"{place} has {free / GIB:.1f} GiB free; this needs {need / GIB:.1f} GiB")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    directory = Path(tempfile.mkdtemp(prefix="nixserve-bench-", dir=place))
    try:
        yield directory
    finally:
        remove(directory)


def remove(tree: Path) -> None:
    """Remove a tree, also one with stores in it; nothing happens if it is not there."""
    if tree.exists():
        subprocess.run(["chmod", "-R", "u+w", tree], check=False)
        shutil.rmtree(tree, ignore_errors=True)


def timed(command: Sequence[str | Path], environment: Mapping[str, str]) -> float:
    """
    Run a command to its end.

    @return: how many seconds it took.
    @raise RuntimeError: it failed; the text ends with what it said.
    """
    started = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=LIMIT)
    took = time.monotonic() - started
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {done.returncode}: {said}")
    return took


def inTurn(rounds: int, measurements: Sequence[Callable[[], T]]) -> list[list[T]]:
    """
    Make each measurement once in each round, each time beginning with another: the speed of a shared machine drifts.
    Each waits until nothing else is running.

    @return: for each measurement, its results.
    """
    results: list[list[T]] = [[] for _ in measurements]
    for number in range(rounds):
        for offset in range(len(measurements)):
            index = (number + offset) % len(measurements)
            awaitQuiet()
            results[index].append(measurements[index]())
    return results


def awaitQuiet() -> None:
    """Wait until the processors have little else to do, but not for ever."""
    end = time.monotonic() + PATIENCE
    busy, total = _processorTime()
    while time.monotonic() < end:
        time.sleep(0.5)
        (earlierBusy, earlierTotal), (busy, total) = (busy, total), _processorTime()
        if busy - earlierBusy < QUIET * (total - earlierTotal):
            return


def _processorTime() -> tuple[int, int]:
    """
    See proc(5).

    @return: how long the processors have been busy, and how long they have been there, in ticks.
    """
    user, nice, system, idle, waiting, *rest = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    total = user + nice + system + idle + waiting + sum(rest)
    return total - idle - waiting, total


def printTable(rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown. The first row is its head."""
    head, *body = rows
    for row in (head, ["---"] * len(head), *body):
        print(f"| {' | '.join(row)} |", flush=True)


def printLoad() -> None:
    """Say how busy the machine is: figures of a busy one mean little."""
    print(f"\nload: {' '.join(f'{load:.2f}' for load in os.getloadavg())} on {os.cpu_count()} cores\n", flush=True)

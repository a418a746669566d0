"""
What the tests of the build hook's parts share: machines, and other processes.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

from nixserve.hook.machines import parseMachines

ROOT = Path(__file__).parents[2]


def machines(text):
    """The machines of a text, all of them usable."""
    parsed = parseMachines(text, {}.get, "x86_64-linux")
    assert parsed.unusable == ()
    return parsed.usable


def machine(line="ssh://h1"):
    """One machine."""
    (only,) = machines(line)
    return only


@contextlib.contextmanager
def otherProcess(code, *arguments):
    """
    Another process that runs Python code up to its end and then waits, with all that it holds, until the block ends or
    it is killed.

    @param code: may print one line.
    @return: the process, with C{said}, the line.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint(flush=True); import sys; sys.stdin.read()", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        process.said = process.stdout.readline().strip()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

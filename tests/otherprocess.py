"""
Other processes that hold something.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


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

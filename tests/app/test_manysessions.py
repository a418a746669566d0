"""
A service that may have few descriptors, and clients that want many.
"""

import resource
import subprocess
from functools import partial
from pathlib import Path

from nixserve.app.service import FORCED_COMMAND
from tests.app.box import HELLO, TIMEOUT, Relay, number

LIMIT = 2000


def limits(process):
    """The soft and the hard limit on descriptors of a process."""
    (line,) = [line for line in Path(f"/proc/{process.pid}/limits").read_text().splitlines() if "open files" in line]
    return tuple(int(word) for word in line.split()[3:5])


def test_oneKeyKeepsNobodyOut(box, service, ssh):
    """
    Sessions of one client in any number leave descriptors for others: the one too many is refused in one line, the
    rest goes on, somebody else logs in and works, and when one has ended there is room again.
    """
    key = box.makeKey()
    few = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (600, LIMIT))
    running = service("--max-jobs", "2", preexec_fn=few)
    assert limits(running.process) == (LIMIT, LIMIT)
    assert f"{LIMIT} open files are enough for" in running.log
    relays = []
    while True:
        done = box.run("nixserve-store", "--serve", "--write", "--connect", running.socket, input=HELLO, text=False)
        if done.returncode:
            break
        relays.append(Relay(box, running))
        relays[-1].beginToAdd(f"half-{len(relays)}")
        assert len(relays) < 100
    refusal = b"error: your key has as many connections and sessions as it may have here; end some of them\n"
    assert done.stderr == refusal
    assert len(relays) > 2
    command = [
        *("ssh", "-F", "none", "-p", str(running.port), "-i", str(key), "-o", "BatchMode=yes"),
        *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
        *("127.0.0.1", FORCED_COMMAND),
    ]
    question = HELLO + number(1) + number(0) + number(0) + number(0)
    done = subprocess.run(command, input=question, capture_output=True, timeout=TIMEOUT, env=box.environ, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout) == 24
    assert all(relay.process.poll() is None for relay in relays)
    last = relays.pop()
    last.process.stdin.close()
    assert last.process.wait(TIMEOUT) == 1
    Relay(box, running)
    assert "Traceback" not in running.log and "Too many open files" not in running.log

"""
Starts L{nixserve.builder.child}, the small program beside each build, and talks with it.
"""

from __future__ import annotations

import marshal
import os
import select
import socket
import subprocess
import sys
from dataclasses import dataclass

from nixserve.builder import child
from nixserve.builder.openfiles import childLimit
from nixserve.codec.buildresult import BuildStatus
from nixserve.errors import BuildError

__all__ = ["SETUP_FAILED", "Supervisor", "killProcesses", "startSupervisor"]

SETUP_FAILED = "while setting up the build environment"
"""What Nix puts around an error between fork and exec."""

# Seconds until the supervisor, told to kill everything, is killed itself. It needs milliseconds; on a machine that
# swaps, unmapping a large builder takes longer.
_END_TIMEOUT = 10.0
# The message of a failed set-up is one line with at most two paths.
_MAX_REPORT = 64 * 1024

# Imported rather than run as a script, which would be compiled each time, in as much time as all the rest needs.
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); import child; child.main()"


@dataclass(frozen=True, slots=True)
class Supervisor:
    """
    A running supervisor.

    @ivar process: of the small program that is the supervisor.
    @ivar control: our end of the socket. Readable when there is a report.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket

    def awaitReport(self, timeout: float) -> None:
        """Wait until the job has ended, for so many seconds at most."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.poll(timeout * 1000)

    def end(self) -> tuple[str, str]:
        """
        Have everything that the builder started killed, unless the builder has ended by itself, and wait for that.

        @return: C{"exit"} and a status, C{"signal"} and a number, C{"error"} and a text, or C{"lost"} and nothing if
            the supervisor was killed.
        """
        try:
            self.control.shutdown(socket.SHUT_WR)
            self.control.settimeout(_END_TIMEOUT)
            text = b""
            while len(text) < _MAX_REPORT and (data := self.control.recv(_MAX_REPORT)):
                text += data
        except OSError:
            text = b""
        finally:
            self.control.close()
            self.process.kill()
            self.process.wait()
        word, _, rest = text.partition(b"\n")[0].decode(errors="replace").partition(" ")
        return (word, rest) if word else ("lost", "")


def startSupervisor(job: child.Job, terminal: int) -> Supervisor:
    """
    Start a job.

    @param job: without C{control} and C{terminal}.
    @param terminal: the builder's standard output and standard error. The caller closes its own copy.
    @raise OSError: no more processes or descriptors.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            fds = {"control": theirs.fileno(), "terminal": terminal}
            process = _launch(job | fds, tuple(fds.values()))
        except BaseException:
            ours.close()
            raise
    return Supervisor(process, ours)


def killProcesses(uid: int) -> None:
    """
    Kill all processes of a user.

    @raise BuildError: that cannot be done.
    """
    if _launch({"action": "kill", "uid": uid}, ()).wait() != 0:
        raise BuildError(BuildStatus.MISC_FAILURE, f"cannot kill the processes of uid {uid}")


def _launch(job: child.Job, fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """
    Run the program with nothing of ours but the job and C{fds}.
    """
    # Not a pipe: writing a large environment would have to wait for the reader.
    stdin = os.memfd_create("job", os.MFD_CLOEXEC)
    try:
        with open(stdin, "wb", closefd=False) as file:
            marshal.dump(job | {"openFiles": childLimit()}, file)
        os.lseek(stdin, 0, os.SEEK_SET)
        # -I and -S: nothing of the user's or of site-packages is imported. A session of its own: Ctrl-C at the
        # server's terminal is for the server, which then ends its builds.
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, os.path.dirname(child.__file__)],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=fds,
            env={},
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(stdin)

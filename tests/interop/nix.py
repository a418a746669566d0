"""
Real Nix's programs, run in an environment that holds nothing of the user's or the machine's.
"""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.realcollector import collecting

NIX_CONFIG = "\n".join(
    [
        "substituters =",
        "extra-experimental-features = nix-command",
        "sandbox = false",
        # Nix insists on such a group when root opens a store.
        "build-users-group =",
        "",
    ]
)

#: Seconds that a call may take if the test does not say otherwise.
TIMEOUT = 60


def unavailable(reason):
    """
    The machine lacks what a test needs: skip it, or fail it where C{NIXSERVE_REQUIRE_INTEROP=1} says that everything
    has to be there.
    """
    if os.environ.get("NIXSERVE_REQUIRE_INTEROP") == "1":
        pytest.fail(f"NIXSERVE_REQUIRE_INTEROP=1, but {reason}", pytrace=False)
    pytest.skip(reason)


def requireProgram(name):
    """The path of a program."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin") or unavailable(f"there is no {name} here")


class Nix:
    """
    Real Nix. Every call has a timeout and, unless told otherwise, must succeed.

    @ivar environment: all that the programs find in theirs; C{NIX_REMOTE} leads nowhere, so that a test that forgets
        to name a store fails instead of touching the machine's.
    """

    def __init__(self, home):
        """@param home: an empty directory."""
        for name in ("conf", "tmp"):
            (home / name).mkdir()
        self.environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C.UTF-8",
            "HOME": str(home),
            "USER": "interop",
            "TMPDIR": str(home / "tmp"),
            "NIX_CONF_DIR": str(home / "conf"),
            "NIX_CONFIG": NIX_CONFIG,
            "NIX_REMOTE": "ssh://nobody.invalid",
        }
        for name in ("CACHE", "CONFIG", "DATA", "STATE"):
            self.environment[f"XDG_{name}_HOME"] = str(home / "xdg" / name.lower())

    def run(self, *arguments, store=None, check=True, timeout=TIMEOUT, stdin=None, environment=()):
        """
        Run a program to its end.

        @param store: root of the store that C{NIX_REMOTE} names.
        @param stdin: bytes for its standard input.
        @param environment: additions to the environment.
        @return: the C{CompletedProcess}, output as bytes.
        """
        variables = {**self.environment, **dict(environment)}
        if store is not None:
            variables["NIX_REMOTE"] = str(store)
        command = [str(argument) for argument in arguments]

        def run():
            given = b"" if stdin is None else stdin
            return subprocess.run(command, input=given, capture_output=True, timeout=timeout, env=variables)

        done = collecting(run) if "--gc" in command else run()
        if check:
            assert done.returncode == 0, (
                f"{arguments[:8]} exited with {done.returncode}: {done.stderr.decode()[-2000:]}"
            )
        return done

    def lines(self, *arguments, **options):
        """The lines that a program prints."""
        return self.run(*arguments, **options).stdout.decode().splitlines()

    def start(self, *arguments, store=None, environment=(), timeout=2 * TIMEOUT, **options):
        """
        Start a program; its C{Popen}, which the caller ends. Whatever it is doing, it is killed when its time is up, so
        that nobody who reads from it waits for ever.
        """
        variables = {**self.environment, **dict(environment)}
        if store is not None:
            variables["NIX_REMOTE"] = str(store)
        process = subprocess.Popen([str(argument) for argument in arguments], env=variables, **options)
        watchdog = threading.Timer(timeout, process.kill)
        watchdog.daemon = True
        watchdog.start()
        return process


def ourProgram(name):
    """A program of ours, from the environment that the tests run in."""
    path = Path(sys.executable).with_name(name)
    return str(path) if path.exists() else unavailable(f"{name} is not installed beside {sys.executable}")

"""
Makes a server of the serve protocol and its client believe that the other one speaks an old version, so that real Nix
can be met as it was.

    python versionrelay.py VERSION COMMAND...

C{VERSION} is a number like 516 for 2.4. Everything but the second word in either direction passes as it is.
"""

import contextlib
import os
import subprocess
import sys
import threading

HELLO = 16


def relay(source, target, version):
    """Pass on what one side says until it ends."""
    hello = b""
    while len(hello) < HELLO and (data := os.read(source, HELLO - len(hello))):
        hello += data
    os.write(target, hello[:8] + (version.to_bytes(8, "little") if len(hello) == HELLO else hello[8:]))
    while data := memoryview(os.read(source, 1 << 18)):
        while data:
            data = data[os.write(target, data) :]
    os.close(target)


def upwards(server, version):
    """What the client says. A server that is gone takes nothing more."""
    with contextlib.suppress(BrokenPipeError):
        relay(0, server.stdin.fileno(), version)


def main(version, *command):
    """Run a server until it ends."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        threading.Thread(target=upwards, args=(server, int(version)), daemon=True).start()
        relay(server.stdout.fileno(), 1, int(version))
        os._exit(server.wait())


if __name__ == "__main__":
    main(*sys.argv[1:])

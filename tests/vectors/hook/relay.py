"""
Stands between Nix and its build hook, and records what passes: C{<number>.in}, C{<number>.out}.

Run as C{python relay.py DIRECTORY HOOK VERBOSITY}, with the file descriptors that Nix gives its hook.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path


def forward(stream, record):
    """Pass on what Nix sends."""
    with open(record, "wb", buffering=0) as recording, stream:
        while data := os.read(0, 65536):
            recording.write(data)
            stream.write(data)


def main():
    """Run the hook to its end, and exit as it does."""
    directory, *command = sys.argv[1:]
    number = len(list(Path(directory).glob("*.in")))
    reading, writing = os.pipe()
    hook = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=writing, stderr=writing, pass_fds=(4, 5), bufsize=0, cwd="/"
    )
    for descriptor in (writing, 4, 5):
        os.close(descriptor)
    threading.Thread(target=forward, args=(hook.stdin, f"{directory}/{number}.in"), daemon=True).start()
    with open(f"{directory}/{number}.out", "wb", buffering=0) as recordOut:
        while data := os.read(reading, 65536):
            recordOut.write(data)
            os.write(2, data)
    # Nix may hold its end open for as long as we live.
    os._exit(hook.wait())


if __name__ == "__main__":
    main()

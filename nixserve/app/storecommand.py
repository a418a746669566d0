"""
C{nixserve-store}: the drop-in for C{nix-store --serve}.

It speaks the protocol on standard input and output, on a store of its own or, with C{--connect}, as a relay to a
running service. The relay must start fast, so Twisted is imported only where a store is served.
"""

from __future__ import annotations

import os
import queue
import shlex
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from nixserve import __version__
from nixserve.codec.peertext import peerText
from nixserve.codec.relay import MAX_FRAME, Frame, FrameReader, RelayHeader
from nixserve.codec.terminal import onOneLine
from nixserve.errors import FormatError, NixServeError, PolicyError, RemoteError, UsageError
from nixserve.ssh.command import ServeCommand, parseForced

__all__ = ["main"]

USAGE = """\
Usage: nixserve-store --serve [--write | --rights LIST] [--store URI]
       nixserve-store --serve [--write | --rights LIST] --connect SOCKET

Speak the protocol of 'nix-store --serve' on standard input and output. Use it as
the forced command of a key in OpenSSH's authorized_keys, or from Nix:
  ssh://HOST?remote-program=nixserve-store

  --write           the client may add paths (the same as --rights read,write,build,trust)
  --rights LIST     'read', or 'read,write,build,trust'
  --store URI       the store, as Nix spells it: auto, /absolute/root, local?root=...
  --connect SOCKET  relay to a running 'twistd nixserve' instead of opening a store
  --version, --help
"""

_SYNOPSIS = "usage: nixserve-store --serve [--write | --rights LIST] [--store URI] [--connect SOCKET]"

_VALUES = {
    "--serve": 0, "--write": 0, "--rights": 1, "--store": 1, "--connect": 1,
    # Of real Nix. The one is added by some clients, and the other refused in one place with the forced commands.
    "--builders": 1, "--option": 2,
}  # fmt: skip
"""How many values follow each option."""


def main(argv: Sequence[str] | None = None) -> int:
    """
    The command.

    @return: the exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments:
        print(USAGE, end="")
        return 0
    if "--version" in arguments:
        print(f"nixserve-store (nixserve) {__version__}")
        return 0
    try:
        command, socketPath = _parse(arguments)
        if sys.stdin is not None and sys.stdin.isatty():
            raise UsageError("this speaks a protocol to a program, not to a person; " + _SYNOPSIS)
    except NixServeError as e:
        print(f"error: {onOneLine(str(e))}", file=sys.stderr)
        return e.exitStatus
    try:
        if socketPath is not None:
            return relay(socketPath, RelayHeader(str(command.policy), command.storeURI or ""))
        return serve(command, os.environ)
    except NixServeError as e:
        # Standard error leads to the client.
        print(f"error: {onOneLine(peerText(e, '/nix/store'))}", file=sys.stderr)
        return e.exitStatus
    except KeyboardInterrupt:
        return 130


def _parse(arguments: list[str]) -> tuple[ServeCommand, str | None]:
    """
    What is asked for, and the socket of C{--connect}. The rest of the command line is read by what reads forced
    commands, so that both are the same language.
    """
    socketPath = None
    words, serving = list(arguments), False
    rest: list[str] = []
    while words:
        word = words.pop(0)
        if word not in _VALUES:
            raise UsageError(f"unknown argument '{word}'; {_SYNOPSIS}")
        values, words = words[: _VALUES[word]], words[_VALUES[word] :]
        if len(values) < _VALUES[word]:
            raise UsageError(f"'{word}' needs {_VALUES[word]} more; {_SYNOPSIS}")
        serving = serving or word == "--serve"
        if word == "--connect":
            if socketPath is not None:
                raise UsageError("'--connect' is given twice")
            socketPath = values[0]
        else:
            rest += [word, *values]
    if not serving:
        raise UsageError(f"'--serve' is missing; {_SYNOPSIS}")
    try:
        return parseForced(shlex.join(["nixserve-store", *rest])), socketPath
    except PolicyError as e:
        raise UsageError(str(e)) from e


def serve(command: ServeCommand, environ: Mapping[str, str]) -> int:
    """Serve one session on the standard streams."""
    # Twisted costs 0.2 s, which a relay must not pay.
    from nixserve.app.stdiosession import serveStdio

    return serveStdio(command, environ)


# --- the relay --------------------------------------------------------------------------------------------


def relay(path: str, header: RelayHeader) -> int:
    """
    Pass standard input to the service and its frames to standard output and error.

    Blocking, in three threads: one for each stream, so that none has to wait for another. Standard error goes
    through a bounded queue and is dropped when nobody reads it: it must never hold up a reply.

    @raise RemoteError: there is no service.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        connection.sendall(header.encode())
    except OSError as e:
        raise RemoteError(
            f"cannot connect to '{path}': {e.strerror or e}; is 'twistd nixserve' running, and with this --socket?"
        ) from e
    errors: queue.Queue[bytes] = queue.Queue(64)
    writer = threading.Thread(target=_writeErrors, args=(errors,), daemon=True)
    writer.start()
    threading.Thread(target=_sendInput, args=(connection,), daemon=True).start()
    status = _receive(connection, errors)
    with suppress(queue.Full):
        errors.put(b"", timeout=1)
    writer.join(timeout=1)
    # The thread that waits for standard input cannot be interrupted: leave it behind.
    os._exit(status)


def _sendInput(connection: socket.socket) -> None:
    with suppress(OSError):
        while data := os.read(0, MAX_FRAME):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def _receive(connection: socket.socket, errors: queue.Queue[bytes]) -> int:
    """Until the service says how it ended."""
    frames = FrameReader()
    try:
        while data := connection.recv(MAX_FRAME):
            for kind, payload in frames.feed(data):
                if kind is Frame.EXIT:
                    return payload[0] if payload else 1
                if kind is Frame.OUTPUT:
                    _writeAll(1, payload)
                else:
                    with suppress(queue.Full):
                        errors.put_nowait(payload)
    except (OSError, FormatError) as e:
        with suppress(queue.Full):
            errors.put_nowait(f"error: the connection to the service broke: {e}\n".encode())
    else:
        with suppress(queue.Full):
            errors.put_nowait(b"error: the service went away\n")
    return 1


def _writeErrors(errors: queue.Queue[bytes]) -> None:
    with suppress(OSError):
        while data := errors.get():
            _writeAll(2, data)


def _writeAll(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    sys.exit(main())

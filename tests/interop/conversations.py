"""
The serve protocol in raw bytes, written down a second time: nothing here uses the codec that is being tested.

The layouts are those of Nix 2.8 (src/libstore/serve-protocol.hh, legacy-ssh-store.cc; src/nix-store/nix-store.cc).
"""

import contextlib
import socket
from dataclasses import dataclass

from nixserve.codec.relay import Frame, FrameReader, RelayHeader

CLIENT_MAGIC = 0x390C9DEB
SERVER_MAGIC = 0x5452EECB
EXPORT_MAGIC = 0x4558494E


def u64(value):
    """An integer."""
    return value.to_bytes(8, "little")


def string(value):
    """A padded string."""
    data = value if isinstance(value, bytes) else value.encode()
    return u64(len(data)) + data + bytes(-len(data) % 8)


def strings(values):
    """A list or set, in the order given."""
    return u64(len(values)) + b"".join(map(string, values))


def hello(version=0x208):
    """What a client begins with."""
    return u64(CLIENT_MAGIC) + u64(version)


def queryValidPaths(paths, lock=False, substitute=False):
    """Command 1."""
    return u64(1) + u64(lock) + u64(substitute) + strings(paths)


def queryPathInfos(paths):
    """Command 2."""
    return u64(2) + strings(paths)


def dumpStorePath(path):
    """Command 3."""
    return u64(3) + string(path)


def exportItem(nar, path, references=(), deriver="", signature=None):
    """One object of an export stream, with the word that announces it."""
    tail = u64(0) if signature is None else u64(1) + string(signature)
    return u64(1) + nar + u64(EXPORT_MAGIC) + string(path) + strings(references) + string(deriver) + tail


def importPaths(*items):
    """Command 4."""
    return u64(4) + b"".join(items) + u64(0)


def exportPaths(paths, sign=0):
    """Command 5."""
    return u64(5) + u64(sign) + strings(paths)


def buildPaths(targets, options=bytes(48)):
    """Command 6."""
    return u64(6) + strings(targets) + options


def queryClosure(paths, includeOutputs=False):
    """Command 7."""
    return u64(7) + u64(includeOutputs) + strings(paths)


def addHeader(path, narHash, narSize, references=(), deriver="", time=1_600_000_000, ultimate=0, sigs=(), ca=""):
    """Command 9 without the NAR."""
    about = u64(9) + string(path) + string(deriver) + string(narHash) + strings(references)
    return about + u64(time) + u64(narSize) + u64(ultimate) + strings(sigs) + string(ca)


def addToStoreNar(info, nar, **fields):
    """
    Command 9 for what L{nixserve.testing.makeInfo} gives.

    @param fields: what is to be said otherwise.
    """
    said = {
        "path": info.path,
        "narHash": info.narHash.hex,
        "narSize": info.narSize,
        "references": sorted(info.references),
    }
    said |= {"time": info.registrationTime, "deriver": info.deriver or "", "sigs": sorted(info.sigs)} | fields
    return addHeader(**said) + nar


@dataclass(frozen=True)
class Outcome:
    """What came of a conversation."""

    stdout: bytes
    status: int
    stderr: str

    @property
    def reply(self):
        """Standard output without the server's greeting of two words."""
        return self.stdout[16:]

    @property
    def errors(self):
        """The lines of standard error that say that something is wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def converse(nix, arguments, data, timeout=60, **options):
    """Send everything at once, then the end of input; what the server made of it."""
    done = nix.run(*arguments, stdin=data, check=False, timeout=timeout, **options)
    return Outcome(done.stdout, done.returncode, done.stderr.decode(errors="replace"))


class Session:
    """
    A conversation, step by step, with a server behind two pipes or a relay's socket.

    Reading fails at the end of what the server says, and, by the timeout of the socket or the test, when it says
    nothing.
    """

    def __init__(self, read, write, close):
        self._read, self.write, self.close = read, write, close

    @classmethod
    def ofProcess(cls, process):
        """With the server that a C{Popen} with pipes leads to."""

        def write(data):
            process.stdin.write(data)
            process.stdin.flush()

        def close():
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(20)
            process.stdout.close()

        return cls(process.stdout.read1, write, close)

    @classmethod
    def ofSocket(cls, path, rights="read,write,build,trust", timeout=60):
        """With a running service, as C{nixserve-store --connect} does it, without a process."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        connection.connect(str(path))
        connection.sendall(RelayHeader(rights, "").encode())
        frames = FrameReader()

        def read(size):
            while data := connection.recv(65536):
                output = b"".join(payload for kind, payload in frames.feed(data) if kind is Frame.OUTPUT)
                if output:
                    return output
            return b""

        session = cls(read, connection.sendall, connection.close)
        session.connection = connection
        return session

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def greet(self, version=0x208):
        """Exchange versions; the server's."""
        self.write(hello(version))
        assert self.readU64() == SERVER_MAGIC
        return self.readU64()

    _unread = b""

    def read(self, size):
        """That many bytes."""
        parts, missing = [self._unread], size - len(self._unread)
        while missing > 0:
            data = self._read(min(missing, 1 << 20)) if missing else b""
            if not data:
                raise EOFError(f"the server ended {missing} bytes too early")
            parts.append(data)
            missing -= len(data)
        data = b"".join(parts)
        self._unread = data[size:]
        return data[:size]

    def readU64(self):
        """An integer."""
        return int.from_bytes(self.read(8), "little")

    def readString(self):
        """A string of text."""
        size = self.readU64()
        return self.read(size + -size % 8)[:size].decode()

    def readStrings(self):
        """A list or set."""
        return [self.readString() for _ in range(self.readU64())]

    def askValid(self, paths, lock=False):
        """Which of these paths are valid?"""
        self.write(queryValidPaths(paths, lock))
        return self.readStrings()

    def add(self, info, nar, **fields):
        """Add an object and wait for the server's word."""
        self.write(addToStoreNar(info, nar, **fields))
        assert self.readU64() == 1


def zeros(size, chunk=1 << 20):
    """Zeros in pieces."""
    block = bytes(chunk)
    while size:
        yield block[:size]
        size -= min(size, chunk)

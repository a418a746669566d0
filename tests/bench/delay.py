"""
A long link on loopback: a TCP proxy that delivers every byte half a round trip after it was sent, as fast as both ends
go, and counts what goes through.

    python -m tests.bench.delay --listen PORT --to PORT --rtt MILLISECONDS

prints the port it listens on, then, for each line that it reads from standard input, how many connections there were
and how many bytes have arrived at the server and at the client. Programs use L{link}, which runs it in a process of its
own.

A connection is made as over such a link: the server sees it one and a half round trips after the client began.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_PIECE = 256 * 1024
"""Bytes read at once, if there are as many."""

MAX_UNDER_WAY = 256 * 1024 * 1024
"""Bytes in one direction of a connection: 40 Gbit/s over 50 ms. Beyond that the sender waits, as for a full window."""

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Traffic:
    """
    What has arrived so far.

    @ivar toServer: bytes.
    @ivar toClient: bytes.
    """

    connections: int
    toServer: int
    toClient: int

    @property
    def total(self) -> int:
        """Bytes in both directions."""
        return self.toServer + self.toClient

    def since(self, earlier: Traffic) -> Traffic:
        """What has arrived after C{earlier}."""
        return Traffic(
            self.connections - earlier.connections,
            self.toServer - earlier.toServer,
            self.toClient - earlier.toClient,
        )


class _Direction:
    """
    One direction of a connection: a thread that reads and notes when each piece is due, and one that delivers it then.
    """

    def __init__(self, source: socket.socket, delay: float, notBefore: float) -> None:
        """
        @param delay: seconds.
        @param notBefore: what is read earlier counts as sent then.
        """
        self.arrived = 0
        self._source = source
        self._delay = delay
        self._notBefore = notBefore
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._underWay = 0
        self._changed = threading.Condition()

    def read(self) -> None:
        """Take what is sent until the end, which is a piece without bytes."""
        data = b"more"
        while data:
            try:
                data = self._source.recv(MAX_PIECE)
            except OSError:
                data = b""
            due = max(time.monotonic(), self._notBefore) + self._delay
            with self._changed:
                while self._underWay > MAX_UNDER_WAY:
                    self._changed.wait()
                self._pieces.append((due, data))
                self._underWay += len(data)
                self._changed.notify_all()

    def deliver(self, target: socket.socket) -> None:
        """Give it to C{target} when it is due."""
        broken = False
        while True:
            with self._changed:
                while not self._pieces:
                    self._changed.wait()
                due, data = self._pieces.popleft()
                self._underWay -= len(data)
                self._changed.notify_all()
            if (pause := due - time.monotonic()) > 0:
                time.sleep(pause)
            if not data:
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_WR)
                return
            if broken:
                continue
            try:
                target.sendall(data)
                self.arrived += len(data)
            except OSError:
                # Nobody takes it any more. Whoever sends is to hear of that too.
                broken = True
                with contextlib.suppress(OSError):
                    self._source.shutdown(socket.SHUT_RD)


class Proxy:
    """
    The proxy, in threads of this process: four for each connection.

    @ivar port: where it listens.
    """

    def __init__(self, listen: int, to: int, rtt: float) -> None:
        """
        @param listen: port, or 0 for any.
        @param to: port of the server.
        @param rtt: seconds.
        """
        self._listener = socket.create_server((LOOPBACK, listen))
        self.port = int(self._listener.getsockname()[1])
        self._to = to
        self._rtt = rtt
        self._directions: list[tuple[_Direction, _Direction]] = []

    def run(self) -> None:
        """Accept connections for ever."""
        while True:
            client, _ = self._listener.accept()
            _inBackground(self._connect, client, time.monotonic())

    @property
    def traffic(self) -> Traffic:
        """What has arrived so far."""
        directions = list(self._directions)
        toServer = sum(there.arrived for there, _ in directions)
        return Traffic(len(directions), toServer, sum(back.arrived for _, back in directions))

    def _connect(self, client: socket.socket, started: float) -> None:
        half = self._rtt / 2
        # Over a long link the client would not know before a whole round trip that it is connected.
        there = _Direction(client, half, notBefore=started + self._rtt)
        _inBackground(there.read)
        time.sleep(max(0.0, started + 3 * half - time.monotonic()))
        try:
            server = socket.create_connection((LOOPBACK, self._to))
        except OSError:
            # Closing alone does nothing while somebody reads.
            client.shutdown(socket.SHUT_RDWR)
            client.close()
            return
        back = _Direction(server, half, notBefore=0.0)
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._directions.append((there, back))
        _inBackground(back.read)
        delivering = [_inBackground(there.deliver, server), _inBackground(back.deliver, client)]
        for thread in delivering:
            thread.join()
        client.close()
        server.close()


def _inBackground(function: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


class Link:
    """
    A proxy in a process of its own, so that it takes no time from what is measured here.

    @ivar port: where it listens.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.port = int(self._line())

    @property
    def traffic(self) -> Traffic:
        """What has arrived so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Traffic(*map(int, self._line().split()))

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the delaying proxy ended with status {self._process.wait()}")
        return line


@contextmanager
def link(to: int, rtt: float = 0.0) -> Iterator[Link]:
    """
    Run a proxy for the block.

    @param to: port of the server.
    @param rtt: milliseconds.
    """
    command = [sys.executable, "-m", "tests.bench.delay", "--listen=0", f"--to={to}", f"--rtt={rtt}", "--until-eof"]
    root = Path(__file__).parent.parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Link(process)
        finally:
            process.kill()


def main() -> None:
    """Run until killed."""
    parser = argparse.ArgumentParser(description="A TCP proxy on loopback that is as slow as a long link.")
    parser.add_argument("--listen", type=int, default=0, metavar="PORT", help="default: any that is free")
    parser.add_argument("--to", type=int, required=True, metavar="PORT")
    parser.add_argument("--rtt", type=float, default=50.0, metavar="MILLISECONDS")
    parser.add_argument("--until-eof", action="store_true", help="end when standard input does")
    options = parser.parse_args()
    proxy = Proxy(options.listen, options.to, options.rtt / 1000)
    print(proxy.port, flush=True)
    accepting = _inBackground(proxy.run)
    for _ in sys.stdin:
        traffic = proxy.traffic
        print(traffic.connections, traffic.toServer, traffic.toClient, flush=True)
    if not options.until_eof:
        accepting.join()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()

"""
Whole copies with our client beside the real pair, in turn, on tmpfs:

    python -m tests.bench.clients [--rounds N] [--only WORD] [--without NAME]

The time is that of the whole command, C{nix copy} or C{nixserve copy}, with starting it and logging in. The receiving
store is new each time. Needs Nix and OpenSSH (client and server).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.measuring import GIB, inTurn, printLoad, printTable, timed, workingDirectory
from tests.bench.peers import Keys, OurPeer, Peer, RealPeer
from tests.bench.workloads import makeStore

NEED = 5 * GIB
"""The large file in three stores, and while it is being made."""

NIXSERVE = Path(sys.executable).with_name("nixserve")


@dataclass(frozen=True)
class Pair:
    """
    A client and a server.

    @ivar client: nix, or nixserve.
    @ivar conch: nixserve's own SSH client in place of C{ssh}.
    """

    name: str
    client: str
    server: type[Peer]
    conch: bool = False

    def url(self, peer: Peer, port: int) -> str:
        """The store of C{peer}, reached on C{port}."""
        return peer.conchURL(port) if self.conch else peer.url

    def command(self, direction: str, store: Path, url: str, paths: Sequence[str]) -> list[str | Path]:
        """
        The words of a copy.

        @param direction: to or from.
        @param store: root of the store on this side.
        """
        program: list[str | Path] = ["nix", "copy", "--no-check-sigs"] if self.client == "nix" else [NIXSERVE, "copy"]
        return [*program, "--store", store, f"--{direction}", url, *paths]


REAL = Pair("nix to nix-store", "nix", RealPeer)
PAIRS = [
    REAL,
    Pair("nixserve to nixserve, ssh", "nixserve", OurPeer),
    Pair("nixserve to nixserve, conch", "nixserve", OurPeer, conch=True),
    Pair("nixserve to nix-store, ssh", "nixserve", RealPeer),
]


def copyBothWays(pair: Pair, directory: Path, keys: Keys, source: Path, path: str) -> tuple[float, float]:
    """
    One copy there and one back, on new stores.

    @return: seconds there, seconds back.
    """
    peer = pair.server(directory, keys)
    url = pair.url(peer, peer.port)
    back = directory / "back"
    try:
        # Makes the store and warms up what is loaded from disk.
        timed(["nix", "store", "ping", "--store", peer.url], peer.environment)
        taken = []
        for direction, store, arrival in (("to", source, peer.store), ("from", back, back)):
            taken.append(timed(pair.command(direction, store, url, [path]), peer.environment))
            if not (arrival / path.lstrip("/")).exists():
                raise RuntimeError(f"{pair.name} did not copy {path} {direction} the server")
        return taken[0], taken[1]
    finally:
        peer.stop()


def measure(rounds: int, only: str, pairs: Sequence[Pair]) -> list[tuple[str, list[list[float]]]]:
    """
    All workloads.

    @return: for each workload and direction its name, and for each pair the seconds of its rounds.
    """
    results = []
    with workingDirectory(NEED) as directory:
        keys = Keys(directory / "keys")
        source = directory / "source"
        for name, path in makeStore(source, directory / "scratch", only):
            times = inTurn(
                rounds, [partial(copyBothWays, pair, directory / "peer", keys, source, path) for pair in pairs]
            )
            for number, direction in enumerate(("to", "from")):
                results.append((f"{name}, {direction}", [[both[number] for both in one] for one in times]))
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare nixserve's client, on both servers, with the real pair.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only workloads whose name contains this")
    parser.add_argument("--without", default=[], action="append", help="no pairs whose name contains this")
    options = parser.parse_args()
    pairs = [pair for pair in PAIRS if pair is REAL or not any(word in pair.name for word in options.without)]
    head = ["copy", REAL.name]
    for pair in pairs[1:]:
        head += [pair.name, "ratio"]
    rows = [head]
    for name, times in measure(options.rounds, options.only, pairs):
        row = [name, f"{statistics.median(times[0]):.2f} s"]
        for one in times[1:]:
            ratio = statistics.median(ours / real for ours, real in zip(one, times[0], strict=True))
            row += [f"{statistics.median(one):.2f} s", f"{ratio:.2f}"]
        rows.append(row)
    printLoad()
    printTable(rows)


if __name__ == "__main__":
    main()

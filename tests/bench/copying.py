"""
Copies with the real Nix as the client, to and from the real pair and to and from nixserve, in turn, on tmpfs:

    python -m tests.bench.copying [--rounds N] [--only WORD]

The time is that of the whole command, with starting Nix and logging in. Needs Nix and OpenSSH (client and server).
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

from tests.bench.measuring import GIB, inTurn, printLoad, printTable, timed, workingDirectory
from tests.bench.peers import Keys, OurPeer, Peer, RealPeer
from tests.bench.workloads import makeStore

NEED = 5 * GIB
"""The large file in three stores, and while it is being made."""


def run(peer: Peer, *command: str | Path) -> float:
    """
    Run a Nix command.

    @return: how many seconds it took.
    """
    return timed(["nix", *command], peer.environment)


def round_(peerClass: type[Peer], directory: Path, keys: Keys, source: Path, path: str) -> tuple[float, float]:
    """
    One copy there and one back, on new stores.

    @return: seconds there, seconds back.
    """
    peer = peerClass(directory, keys)
    back = directory / "back"
    try:
        # Makes the store and warms up what is loaded from disk.
        run(peer, "store", "ping", "--store", peer.url)
        there = run(peer, "copy", "--no-check-sigs", "--store", source, "--to", peer.url, path)
        return there, run(peer, "copy", "--no-check-sigs", "--store", back, "--from", peer.url, path)
    finally:
        peer.stop()


def measure(rounds: int, only: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """
    All workloads.

    @return: for each workload and direction its name and pairs of seconds: the real pair, nixserve.
    """
    results = []
    with workingDirectory(NEED) as directory:
        keys = Keys(directory / "keys")
        source = directory / "source"
        for name, path in makeStore(source, directory / "scratch", only):
            servers: list[type[Peer]] = [RealPeer, OurPeer]
            real, ours = inTurn(
                rounds, [partial(round_, server, directory / "peer", keys, source, path) for server in servers]
            )
            for number, direction in enumerate(("to", "from")):
                times = [(one[number], other[number]) for one, other in zip(real, ours, strict=True)]
                results.append((f"{name}, {direction}", times))
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare nixserve with nix-store behind sshd, real Nix as client.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only workloads whose name contains this")
    options = parser.parse_args()
    rows = [["copy", RealPeer.name, OurPeer.name, "ratio"]]
    for name, times in measure(options.rounds, options.only):
        real = statistics.median(pair[0] for pair in times)
        ours = statistics.median(pair[1] for pair in times)
        ratio = statistics.median(pair[1] / pair[0] for pair in times)
        rows.append([name, f"{real:.2f} s", f"{ours:.2f} s", f"{ratio:.2f}"])
    printLoad()
    printTable(rows)


if __name__ == "__main__":
    main()

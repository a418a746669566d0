"""
Copies with the real Nix as the client, to and from the real pair and to and from nixserve, in turn, on tmpfs:

    python -m tests.bench.copying [--rounds N] [--only WORD]

The time is that of the whole command, with starting Nix and logging in. Needs Nix and OpenSSH (client and server).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tests.bench.peers import Keys, OurPeer, Peer, RealPeer
from tests.bench.workloads import makeStore

TMPFS = Path("/dev/shm")


def run(peer: Peer, *command: str | Path) -> float:
    """
    Run a Nix command.

    @return: how many seconds it took.
    """
    started = time.monotonic()
    done = subprocess.run(
        ["nix", *command], env=peer.environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=300
    )
    took = time.monotonic() - started
    if done.returncode:
        raise RuntimeError(f"nix {command}: {done.stderr.decode()}")
    return took


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
    directory = Path(tempfile.mkdtemp(prefix="nixserve-bench-", dir=TMPFS if TMPFS.is_dir() else None))
    try:
        keys = Keys(directory / "keys")
        source = directory / "source"
        for name, path in makeStore(source, directory / "scratch"):
            shutil.rmtree(directory / "scratch")
            if only not in name:
                continue
            times = []
            for number in range(rounds):
                # In turn, and not always the same one first: the speed of a shared machine drifts.
                order: list[type[Peer]] = [RealPeer, OurPeer] if number % 2 == 0 else [OurPeer, RealPeer]
                taken = {peer: round_(peer, directory / "peer", keys, source, path) for peer in order}
                times.append((taken[RealPeer], taken[OurPeer]))
            results.append((f"{name}, to", [(real[0], ours[0]) for real, ours in times]))
            results.append((f"{name}, from", [(real[1], ours[1]) for real, ours in times]))
    finally:
        subprocess.run(["chmod", "-R", "u+w", directory], check=False)
        shutil.rmtree(directory, ignore_errors=True)
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare nixserve with nix-store behind sshd, real Nix as client.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only workloads whose name contains this")
    options = parser.parse_args()
    print("| copy | nix-store behind sshd | nixserve | ratio |")
    print("|---|---|---|---|")
    for name, times in measure(options.rounds, options.only):
        real = statistics.median(pair[0] for pair in times)
        ours = statistics.median(pair[1] for pair in times)
        ratio = statistics.median(pair[1] / pair[0] for pair in times)
        print(f"| {name} | {real:.2f} s | {ours:.2f} s | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()

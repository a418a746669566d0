"""
2,001 tiny paths over a link with a long round trip, with our client and with the real one:

    python -m tests.bench.latency [--rtt MILLISECONDS] [--rounds N] [--part PATHS | --whole]

The time is that of the whole command, through the proxy of L{tests.bench.delay}. What it takes to connect and to find
one path there already is measured as well, with a second command, and subtracted. The real pair needs a round trip or
more for each path, so by default it copies a part only, and what the whole would take is computed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.clients import PAIRS, REAL, Pair
from tests.bench.delay import link
from tests.bench.measuring import GIB, inTurn, printLoad, printTable, timed, workingDirectory
from tests.bench.peers import Keys
from tests.bench.workloads import TINY_PATHS, makeStore, referencesOf

NEED = GIB // 2


@dataclass(frozen=True)
class Trip:
    """
    Seconds of one copy in one direction.

    @ivar copy: of the copy.
    @ivar setUp: of a command that finds a path that is there already.
    """

    copy: float
    setUp: float

    @property
    def beyond(self) -> float:
        """What the copy itself took."""
        return self.copy - self.setUp


def trips(
    pair: Pair, directory: Path, keys: Keys, source: Path, paths: Sequence[str], one: str, rtt: float
) -> tuple[Trip, Trip]:
    """
    One copy there and one back, on new stores.

    @param one: among those that C{paths} copies.
    @param rtt: milliseconds.
    """
    peer = pair.server(directory, keys)
    back = directory / "back"
    try:
        timed(["nix", "store", "ping", "--store", peer.url], peer.environment)
        with link(peer.port, rtt) as slow:
            environment = peer.environmentFor(slow.port)
            url = pair.url(peer, slow.port)
            both = []
            for direction, store in (("to", source), ("from", back)):
                commands = [pair.command(direction, store, url, wanted) for wanted in (paths, [one])]
                both.append(Trip(*(timed(command, environment) for command in commands)))
        return both[0], both[1]
    finally:
        peer.stop()


def measure(rounds: int, rtt: float, part: int) -> list[list[str]]:
    """
    Ours, which copy everything, and the real pair, which copies C{part} paths.

    @return: rows of a table.
    """
    with workingDirectory(NEED) as directory:
        keys = Keys(directory / "keys")
        source = directory / "source"
        [(_, top)] = makeStore(source, directory / "scratch", "tiny")
        tiny = sorted(referencesOf(source, top))
        rows = [["copy", "paths", "whole command", "set-up", "beyond set-up", f"for {TINY_PATHS:,} paths"]]
        measurements = []
        counts = []
        for pair in PAIRS:
            counts.append(part if pair is REAL else TINY_PATHS)
            # The closure of the top is everything.
            paths = [top] if counts[-1] == TINY_PATHS else tiny[: counts[-1]]
            measurements.append(partial(trips, pair, directory / "peer", keys, source, paths, tiny[0], rtt))
        results = inTurn(rounds, measurements)
        for direction, name in enumerate(("to", "from")):
            for pair, count, taken in zip(PAIRS, counts, results, strict=True):
                chosen = [both[direction] for both in taken]
                beyond = statistics.median(trip.beyond for trip in chosen)
                whole = beyond * TINY_PATHS / count
                rows.append(
                    [
                        f"{pair.name}, {name}",
                        f"{count:,}",
                        f"{statistics.median(trip.copy for trip in chosen):.2f} s",
                        f"{statistics.median(trip.setUp for trip in chosen):.2f} s",
                        f"{beyond:.2f} s",
                        f"{whole:.2f} s" + ("" if count == TINY_PATHS else " (computed)"),
                    ]
                )
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Copy many tiny paths over a link with a long round trip.")
    parser.add_argument("--rtt", type=float, default=50.0, metavar="MILLISECONDS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", type=int, default=201, help="how many paths the real pair copies; default: 201")
    parser.add_argument("--whole", action="store_true", help=f"it copies all {TINY_PATHS:,}, for minutes")
    options = parser.parse_args()
    rows = measure(options.rounds, options.rtt, TINY_PATHS if options.whole else options.part)
    printLoad()
    print(f"round trip: {options.rtt:g} ms, medians of {options.rounds}\n")
    printTable(rows)


if __name__ == "__main__":
    main()

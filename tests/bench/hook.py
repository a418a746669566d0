"""
What a build hook costs: many small builds by real Nix through its own hook and through ours, one after the other:

    python -m tests.bench.hook [--builds N] [--rounds N] [--jobs N]

The machine is a stock nix-store --serve --write behind OpenSSH's server, or our service, on loopback, with empty stores
on both sides each time. Every build is asked about, sent, built and fetched by itself, so nearly all of the time is the
hook's. The time is that of the whole nix-build. Needs Nix, OpenSSH (sshd, as root) and a static busybox.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from tests.bench.measuring import GIB, printLoad, printTable, workingDirectory
from tests.interop.endpoint import Keys
from tests.interop.hooking import MANY, Farm
from tests.interop.nix import Nix

HOOKS = ("real", "ours")
KINDS = {"stock": "nix-store behind sshd", "endpoint": "our service"}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--builds", type=int, default=200, help="in each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, in turn")
    parser.add_argument("--jobs", type=int, default=4, help="slots of the machine")
    options = parser.parse_args()
    with workingDirectory(GIB) as directory:
        (directory / "home").mkdir()
        nix, keys = Nix(directory / "home"), Keys(directory / "keys")
        seconds: dict[tuple[str, str], list[float]] = {}
        for number in range(options.rounds):
            for kind in KINDS:
                for hook in HOOKS:
                    place = directory / f"{kind[0]}{hook[0]}{number}"
                    seconds.setdefault((kind, hook), []).append(run(nix, keys, place, kind, hook, options))
        rows = [["machine", "original, s", "ours, s", "ratio"]]
        for kind, name in KINDS.items():
            medians = {hook: statistics.median(seconds[kind, hook]) for hook in HOOKS}
            ratio = medians["ours"] / medians["real"]
            rows.append([name, *(f"{medians[hook]:.2f}" for hook in HOOKS), f"{ratio:.2f}"])
        printTable(rows)
        printLoad()


def run(nix: Nix, keys: Keys, place: Path, kind: str, hook: str, options: argparse.Namespace) -> float:
    """
    One C{nix-build} with new stores.

    @param place: a directory to be made.
    @return: seconds.
    """
    place.mkdir()
    expression = place / "many.nix"
    expression.write_text(MANY)
    with Farm(nix, keys, place) as farm:
        getattr(farm, kind)(f"x86_64-linux - {options.jobs} 1")
        done = farm.build(expression, "--argstr", "count", str(options.builds), hook=hook, timeout=600)
    assert done.status == 0 and len(done.outputs) == options.builds, done.said[-2000:]
    return done.seconds


if __name__ == "__main__":
    main()

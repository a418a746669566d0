"""
What a remote build moves: our client, which sends the derivation, beside the old way, which copies the closure of the
.drv and has it built from there:

    python -m tests.bench.building [--rounds N] [--only WORD] [--rtt MILLISECONDS]

The .drv, made by C{nix-instantiate}, has a closure of 2,000 paths, among them a source of 1 GiB that only a derivation
far below it needs. The ten outputs that its builder reads, 1 MiB together, are valid here, as after fetching them from
a cache. Every way begins with an empty store on the other side and ends with the output in the store here. Bytes are
those of the TCP connections in both directions, counted by L{tests.bench.delay}, which everything passes through; the
time is that of the whole commands. Needs Nix, OpenSSH and a static busybox.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nixserve.builder.sandbox import findShell
from nixserve.codec.hashes import Hash
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.store.files import dumpPath
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from tests.bench.clients import NIXSERVE
from tests.bench.delay import Traffic, link
from tests.bench.measuring import GIB, inTurn, printLoad, printTable, timed, workingDirectory
from tests.bench.peers import Keys, OurPeer, Peer, RealPeer
from tests.bench.workloads import writeBigFile

NEED = 4 * GIB
"""The source here, twice while it is added, and there."""

CLOSURE = 2000
"""Paths in the closure of the .drv: the tree, the derivation at its ends, and the source."""

INPUT_SIZE = 100 * 1024
"""Bytes in each output that the builder reads."""

SYSTEM = f"{os.uname().machine}-linux"
EXPRESSION = Path(__file__).with_name("closure.nix")


@dataclass(frozen=True)
class Work:
    """
    What is to be built.

    @ivar store: root of the store here.
    @ivar inputs: the outputs that its builder reads.
    """

    store: Path
    drv: StorePath
    inputs: tuple[StorePath, ...]
    output: StorePath


@dataclass(frozen=True)
class Way:
    """
    A way to have it built.

    @ivar commands: gives the words of commands, from what is to be built and the URL of the other store.
    """

    name: str
    server: type[Peer]
    commands: Callable[[Work, str], list[list[str | Path]]]


def byDerivation(work: Work, url: str) -> list[list[str | Path]]:
    """C{nixserve build}."""
    return [[NIXSERVE, "build", "--store", work.store, "--no-out-link", "--on", url, work.drv]]


def byHook(work: Work, url: str) -> list[list[str | Path]]:
    """C{nix-build} with its own build hook."""
    builders = ["--max-jobs", "0", "--builders", f"{url} {SYSTEM} - 4 1"]
    return [["nix-store", "--store", work.store, *builders, "--realise", work.drv]]


def byClosure(work: Work, url: str) -> list[list[str | Path]]:
    """The old way, with our client."""
    return [[sys.executable, "-m", "tests.bench.oldway", work.store, url, work.drv, *work.inputs]]


def byNixCopyClosure(work: Work, url: str) -> list[list[str | Path]]:
    """The old way, with Nix's tool; Nix 2 has no command that sends BuildPaths for a .drv, so our client does."""
    host = url.removeprefix("ssh://")
    copy: list[str | Path] = ["nix-copy-closure", "--store", work.store, "--to", host, work.drv, *work.inputs]
    return [copy, *byClosure(work, url)]


WAYS = [
    Way("nixserve build", OurPeer, byDerivation),
    Way("nixserve build", RealPeer, byDerivation),
    Way("Nix's build hook", RealPeer, byHook),
    Way("closure of the .drv (our client), BuildPaths", OurPeer, byClosure),
    Way("closure of the .drv (our client), BuildPaths", RealPeer, byClosure),
    Way("closure of the .drv (nix-copy-closure), BuildPaths", RealPeer, byNixCopyClosure),
]


@dataclass(frozen=True)
class Cost:
    """What one build took."""

    seconds: float
    traffic: Traffic


def prepare(directory: Path, environment: Mapping[str, str]) -> Work:
    """Make the derivation, its closure, and its inputs' outputs in a new store."""
    root, big = directory / "here", directory / "big"
    writeBigFile(big)
    arguments = ["--arg", "big", big, "--arg", "count", str(CLOSURE - 2), "--argstr", "system", SYSTEM]
    run = partial(_lines, environment)
    [text] = run("nix-instantiate", "--store", root, *arguments, EXPRESSION)
    big.unlink()
    closure = run("nix-store", "--store", root, "--query", "--requisites", text)
    if len(closure) != CLOSURE:
        raise RuntimeError(f"the closure of {text} has {len(closure)} paths, not {CLOSURE}")
    store = LocalStore(StoreLayout.underRoot(str(root)))
    try:
        session = store.openSession()
        drvPath = store.storeDir.parse(text)
        drv = session.readDerivation(drvPath)
        inputs = []
        for number, inputDrv in enumerate(drv.inputDrvs):
            made = session.readDerivation(inputDrv).outputs["out"].path
            assert made is not None, "its path follows from its derivation"
            (directory / "output").write_bytes(random.Random(number).randbytes(INPUT_SIZE))
            nar = b"".join(dumpPath(str(directory / "output")))
            writer = session.addToStore(ValidPathInfo(made, Hash("sha256", hashlib.sha256(nar).digest()), len(nar)))
            writer.feed(nar)
            writer.finish()
            inputs.append(made)
        output = drv.outputs["out"].path
        assert output is not None, "its path follows from its derivation"
        return Work(root, drvPath, tuple(inputs), output)
    finally:
        store.close()


def build(way: Way, work: Work, directory: Path, keys: Keys, rtt: float) -> Cost:
    """
    Have it built on a new store.

    @param rtt: milliseconds.
    """
    peer = way.server(directory, keys)
    try:
        timed(["nix", "store", "ping", "--store", peer.url], peer.environment)
        with link(peer.port, rtt) as counting:
            environment = peer.environmentFor(counting.port)
            seconds = sum(timed(command, environment) for command in way.commands(work, peer.url))
            traffic = counting.traffic
    finally:
        peer.stop()
    output = work.store / work.output.lstrip("/")
    if output.stat().st_size != INPUT_SIZE * len(work.inputs):
        raise RuntimeError(f"{way.name} built something else")
    _lines(peer.environment, "nix-store", "--store", work.store, "--delete", work.output)
    return Cost(seconds, traffic)


def measure(rounds: int, only: str, rtt: float) -> list[list[str]]:
    """
    All ways.

    @return: rows of a table.
    """
    ways = [way for way in WAYS if only in way.name]
    with workingDirectory(NEED) as directory:
        keys = Keys(directory / "keys")
        work = prepare(directory, keys.environment(directory, 0))
        results = inTurn(rounds, [partial(build, way, work, directory / "peer", keys, rtt) for way in ways])
    sizes = [statistics.median(cost.traffic.total for cost in costs) for costs in results]
    rows = [["way", "server", "bytes", "times the first", "time"]]
    for way, costs, size in zip(ways, results, sizes, strict=True):
        seconds = statistics.median(cost.seconds for cost in costs)
        rows.append([way.name, way.server.name, f"{size:,.0f}", f"{size / sizes[0]:,.1f}", f"{seconds:.2f} s"])
    return rows


def _lines(environment: Mapping[str, str], *command: str | Path) -> list[str]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr}")
    return done.stdout.splitlines()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare ways to have a derivation built on another machine.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only ways whose name contains this")
    parser.add_argument("--rtt", type=float, default=0.0, metavar="MILLISECONDS", help="of the link; default: 0")
    options = parser.parse_args()
    if findShell() is None:
        parser.error("there is no static busybox here; install busybox-static")
    rows = measure(options.rounds, options.only, options.rtt)
    printLoad()
    print(f"round trip: {options.rtt:g} ms, medians of {options.rounds}\n")
    printTable(rows)


if __name__ == "__main__":
    main()

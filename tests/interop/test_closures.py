"""
Closures that are large in some direction, through the service's SSH server, with real Nix at the other end.
"""

import subprocess
import time

import pytest

from nixserve.testing import makeNar
from tests.interop.oddstore import place
from tests.interop.stores import (
    add,
    addChain,
    addSmallFiles,
    addSparse,
    assertSame,
    assertVerified,
    infos,
    named,
    opened,
    physical,
)
from tests.interop.watching import MIB, Peak, residentSize

GIB = 1024 * MIB


def copyThereAndBack(nix, server, source, back, path, timeout=120):
    """Real Nix copies a closure to a server of ours, and from there into another store."""
    nix.run("nix", "copy", "--to", server.url, path, store=source, environment=server.environment(), timeout=timeout)
    nix.run(
        *("nix", "copy", "--no-check-sigs", "--from", server.url, path),
        store=back,
        environment=server.environment(),
        timeout=timeout,
    )


def test_smallFiles(nix, directory, makeEndpoint):
    """30,000 small files in one object."""
    path = addSmallFiles(directory / "source", 30_000, "small")
    server = makeEndpoint(directory / "target")
    copyThereAndBack(nix, server, directory / "source", directory / "back", path)
    for root in (server.root, directory / "back"):
        assertVerified(nix, root)
        assertSame(nix, directory / "source", root, [path])


def test_longChain(nix, directory, makeEndpoint):
    """2,000 objects each of which refers to the one before: the last one brings all of them."""
    chain = addChain(directory / "source", 2000, "chain")
    server = makeEndpoint(directory / "target")
    copyThereAndBack(nix, server, directory / "source", directory / "back", chain[-1])
    for root in (server.root, directory / "back"):
        assertVerified(nix, root)
        assertSame(nix, directory / "source", root, chain, one=[chain[0], chain[1000], chain[-1]])
    assert nix.lines("nix-store", "-qR", chain[-1], store=server.root) == chain


def test_manyReferences(nix, directory, makeEndpoint):
    """One object that refers to 1,000 others."""
    with opened(directory / "source") as session:
        leaves = [add(session, f"leaf-{number}", makeNar(b"%d" % number)) for number in range(1000)]
        top = add(session, "top", makeNar("\n".join(leaves).encode()), leaves)
    server = makeEndpoint(directory / "target")
    copyThereAndBack(nix, server, directory / "source", directory / "back", top)
    assertVerified(nix, server.root)
    assertSame(nix, directory / "source", server.root, [*leaves, top], one=[top, leaves[0]])


def test_bigFile(nix, directory, makeEndpoint):
    """3 GiB in one file pass both ways within 90 s, and the server does not grow."""
    begun = time.monotonic()
    path, _, _ = addSparse(nix, directory / "source", "big", 3 * GIB)
    server = makeEndpoint(directory / "target")
    idle = residentSize(server.process.pid)
    with Peak(server.process.pid) as peak:
        nix.run("nix", "copy", "--to", server.url, path, store=directory / "source",
                environment=server.environment(), timeout=90)  # fmt: skip
        uploaded = time.monotonic()
        dumping = nix.start("nix", "store", "dump-path", "--store", server.url, path,
                            environment=server.environment(), stdout=subprocess.PIPE)  # fmt: skip
        size = sum(map(len, iter(lambda: dumping.stdout.read(MIB), b"")))
        assert dumping.wait(10) == 0
    assert size == infos(nix, server.root)[path]["narSize"] == infos(nix, directory / "source")[path]["narSize"]
    assert infos(nix, server.root)[path]["narHash"] == infos(nix, directory / "source")[path]["narHash"]
    assert physical(server.root, path).stat().st_size == 3 * GIB
    assert peak.size < idle + 100 * MIB
    taken = time.monotonic() - begun
    print(f"3 GiB: up to {uploaded - begun:.1f} s, up and down {taken:.1f} s, peak {(peak.size - idle) / MIB:.0f} MiB")
    assert taken < 90


@pytest.mark.parametrize("direction", ["to", "from"])
def test_madeByNix(nix, directory, makeEndpoint, direction):
    """
    A store that only real Nix has ever opened is served by us, and one that only we have written is served by real
    Nix, through the same commands and with the same result.
    """
    file = directory / "file"
    file.write_text("a file")
    made = nix.lines("nix-store", "--add", file, store=directory / "source")[0]
    referrer = named("referrer")
    place(nix, directory / "source", referrer, f"see {made}", [made])
    server = makeEndpoint(directory / "source" if direction == "from" else directory / "target")
    arguments = {
        "to": ["nix-copy-closure", "--to", server.login, referrer],
        "from": ["nix-copy-closure", "--from", server.login, referrer],
    }[direction]
    client = directory / ("source" if direction == "to" else "target")
    nix.run(*arguments, store=client, environment=server.environment())
    assertSame(nix, directory / "source", directory / "target", [made, referrer], one=[made, referrer])
    assertVerified(nix, directory / "target")
    url = f"ssh://localhost?remote-store={directory / 'target'}"
    nix.run("nix-copy-closure", "--from", url.removeprefix("ssh://"), referrer, store=directory / "third")
    assertSame(nix, directory / "source", directory / "third", [made, referrer])

"""
Several writers on one store: sessions of ours, and real Nix beside us.
"""

import itertools

import pytest

from nixserve.testing import makeInfo, makeNar
from tests.interop.conversations import Session, addHeader
from tests.interop.stores import (
    add,
    addChain,
    assertSame,
    assertVerified,
    infos,
    isSent,
    opened,
    physical,
    temporaryRoots,
)
from tests.interop.watching import until

TREES = 60


@pytest.fixture
def source(directory):
    """A store with two closures that have their greater half in common; the tops of both."""
    root = directory / "source"
    common = addChain(root, 60, "common")
    with opened(root) as session:
        tops = []
        for side in "ab":
            chain = [common[-1]]
            for number in range(30):
                chain.append(add(session, f"{side}-{number}", makeNar(f"{side} {number}".encode() * 5000), chain[-1:]))
            tops.append(chain[-1])
    return root, tops


def test_overlappingCopies(nix, directory, source, makeEndpoint):
    """Two clients copy closures that overlap, at once and several times over, and all end well."""
    root, tops = source
    server = makeEndpoint(directory / "served")
    copies = [
        nix.start("nix", "copy", "--to", server.url, top, store=root, environment=server.environment())
        for top in (*tops, *reversed(tops), *tops)
    ]
    assert [copy.wait(120) for copy in copies] == [0] * len(copies)
    assertVerified(nix, server.root)
    assertSame(nix, root, server.root, list(infos(nix, root)), one=tops)
    until(lambda: temporaryRoots(server.root) == [])
    assert not list(physical(server.root, "/nix/store").glob("*.lock"))


def test_besideRealNix(nix, directory, source, makeEndpoint):
    """Real C{nix-store --add} and C{--import} write what our server writes at the same time."""
    root, tops = source
    server = makeEndpoint(directory / "served")
    trees = []
    for number in range(TREES):
        trees.append(directory / f"tree-{number}")
        trees[-1].write_text(f"tree {number}\n")
    added = nix.lines("nix-store", "--add", *trees, store=root)
    exported = nix.run("nix-store", "--export", *nix.lines("nix-store", "-qR", tops[0], store=root), store=root).stdout
    (directory / "exported").write_bytes(exported)
    (directory / "import").write_text(f"#!/bin/sh\nexec nix-store --import < {directory / 'exported'}\n")
    environment = server.environment()
    working = []
    for tree, path in itertools.zip_longest(trees[::6], added[::6]):
        working.append(nix.start("nix-store", "--add", tree, *trees, store=server.root, stdout=-3))
        working.append(nix.start("nix", "copy", "--to", server.url, path, *added, store=root, environment=environment))
    working.append(nix.start("sh", directory / "import", store=server.root, stdout=-3))
    for top in tops:
        working.append(nix.start("nix-copy-closure", "--to", server.login, top, store=root, environment=environment))
    assert [process.wait(120) for process in working] == [0] * len(working)
    assertVerified(nix, server.root)
    assert {path: info["narHash"] for path, info in infos(nix, server.root).items()} == {
        path: info["narHash"] for path, info in infos(nix, root).items()
    }
    assert not list(physical(server.root, "/nix/store").glob("*.lock"))


def test_pastADribble(nix, directory, makeEndpoint):
    """
    Whoever sends a path a little at a time keeps nobody from it, neither real Nix nor our own clients. When he comes to
    the end after all he finds it there, and that is all right too.
    """
    server = makeEndpoint(directory / "served")
    # A small one would be kept until it is complete.
    nar = makeNar({"file": bytes(100_000)})
    info = makeInfo("contested", nar)
    other = makeInfo("contested-too", nar)
    root = server.root
    with Session.ofSocket(server.socket) as first, Session.ofSocket(server.socket) as another:
        for session, sent in ((first, info), (another, other)):
            session.greet()
            session.write(addHeader(sent.path, sent.narHash.hex, sent.narSize) + nar[:40])
            until(lambda sent=sent: isSent(root, sent.path))
        second = nix.start("nix-store", "--serve", "--write", "--store", root, stdin=-1, stdout=-1)
        with Session.ofProcess(second) as real, Session.ofSocket(server.socket, timeout=60) as third:
            for session, sent in ((real, info), (third, other)):
                session.greet(0x207)
                session.write(addHeader(sent.path, sent.narHash.hex, sent.narSize) + nar)
                assert session.readU64() == 1
                assert session.askValid([sent.path]) == [sent.path]
        for session in (first, another):
            session.write(nar[40:])
            assert session.readU64() == 1
        assert sorted(first.askValid([info.path, other.path])) == sorted([info.path, other.path])
    assertVerified(nix, root)
    assert not list(physical(root, "/nix/store").glob("*.lock"))

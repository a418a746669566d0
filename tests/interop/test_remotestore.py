"""
Our service on a store behind another C{--serve}, real Nix's or our own, with real Nix as the client: two servers in a
row are as good as one.
"""

import shlex

import pytest

from nixserve.testing import makeNar
from tests.interop.building import FEATURE, TREE, builders, requireSandbox
from tests.interop.conversations import Session
from tests.interop.nix import NIX_CONFIG, ourProgram
from tests.interop.stores import (
    add,
    addChain,
    addSmallFiles,
    assertSame,
    assertVerified,
    isLocked,
    named,
    opened,
    physical,
    temporaryRoots,
)
from tests.interop.watching import until

BEHIND = ["real", "ours"]

#: Names of L{TREE} with several outputs, dependencies, and references between outputs.
SOME = ["structured"]


@pytest.fixture(params=BEHIND)
def behind(request, directory, makeEndpoint):
    """
    Starts a service in front of another server, which is run on this machine: the endpoint, and the root of the store
    far behind.
    """

    def start(config=NIX_CONFIG):
        root = directory / "far"
        if request.param == "real":
            program = directory / "nix-store"
            program.write_text(f'#!/bin/sh\nNIX_CONFIG={shlex.quote(config)} exec nix-store "$@"\n')
            program.chmod(0o755)
            url = f"ssh://localhost?remote-program={program}&remote-store={root}"
        else:
            store = f"{root}?system-features={FEATURE}"
            url = f"ssh://localhost?remote-program={ourProgram('nixserve-store')}&remote-store={store}"
        return makeEndpoint(url), root

    return start


def assertFreed(root):
    """Nothing of a session is left in a store."""
    until(lambda: temporaryRoots(root) == [], message="temporary roots are not gone")
    locks = [path for path in physical(root, "/nix/store").iterdir() if path.suffix == ".lock"]
    assert not any(map(isLocked, locks))


def test_copies(nix, directory, behind):
    """A closure of small and large objects goes there and comes back, and is the same in all stores."""
    endpoint, far = behind()
    source, back = directory / "source", directory / "back"
    chain = addChain(source, 40, "chain")
    with opened(source) as session:
        large = add(session, "large", makeNar({"a": bytes(range(256)) * 20_000, "b": b"x" * 3_000_000}), chain[-1:])
    files = addSmallFiles(source, 500, "files")
    paths = [*chain, large, files]
    nix.run("nix", "copy", "--to", endpoint.url, large, files, store=source, environment=endpoint.environment())
    assertVerified(nix, far)
    assertSame(nix, source, far, paths, one=paths[:2])
    nix.run(
        *("nix", "copy", "--no-check-sigs", "--from", endpoint.url, large, files),
        store=back,
        environment=endpoint.environment(),
    )
    assertVerified(nix, back)
    assertSame(nix, source, back, paths)
    assertFreed(far)


def test_roots(nix, directory, behind):
    """What a session has been told to be there stays there while real Nix collects garbage; afterwards it goes."""
    endpoint, far = behind()
    chain = addChain(far, 2, "chain")
    with Session.ofSocket(endpoint.socket) as session:
        session.greet()
        assert session.askValid(chain) == sorted(chain)
        nix.run("nix-store", "--gc", store=far)
        assert session.askValid(chain) == sorted(chain)
    assertFreed(far)
    nix.run("nix-store", "--gc", store=far)
    assert not physical(far, chain[0]).exists()


def test_refusal(nix, directory, behind):
    """What is wrong is said as if the store were here."""
    endpoint, _ = behind()
    missing = named("missing")
    done = nix.run(
        *("nix-copy-closure", "--from", endpoint.login, missing),
        store=directory / "back",
        environment=endpoint.environment(),
        check=False,
    )
    assert done.returncode == 1 and f"path '{missing}' is not valid" in done.stderr.decode()


def test_noRemote(nix, directory, makeEndpoint):
    """
    A store that cannot be reached is an error of the session that wanted it, which is not told where the service looks
    for its programs; the service goes on.
    """
    endpoint = makeEndpoint(f"ssh://localhost?remote-program={directory}/nothing")
    for _ in range(2):
        done = nix.run(
            *("nix", "path-info", "--store", endpoint.url, named("x")),
            environment=endpoint.environment(),
            check=False,
        )
        assert done.returncode == 1 and b"there is no program '[a path of the server]' on this machine" in done.stderr


def test_builds(nix, directory, behind):
    """What real Nix has built through it is what real Nix builds alone."""
    sandbox = requireSandbox()
    endpoint, far = behind(sandbox["NIX_CONFIG"])
    alone, client = directory / "alone", directory / "client"
    chosen = [TREE, *[word for name in SOME for word in ("-A", name)], "--no-out-link"]
    outputs = nix.lines("nix-build", *chosen, store=alone, environment=sandbox)
    built = nix.lines(
        *("nix-build", *builders(endpoint.url), *chosen),
        store=client,
        environment=sandbox | endpoint.environment(),
        timeout=120,
    )
    assert built == outputs
    assertSame(nix, alone, client, nix.lines("nix-store", "--query", "--requisites", *outputs, store=alone))
    assertVerified(nix, far)
    assertFreed(far)

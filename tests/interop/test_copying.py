"""
Nix as the client, whatever it can do over C{ssh://}: to the service, to C{nixserve-store} without SSH, and to
C{nixserve-store} behind OpenSSH's server. Afterwards real Nix looks at the store that the server wrote.
"""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.interop.conversations import Session, hello
from tests.interop.nix import ourProgram
from tests.interop.stores import assertSame, assertVerified, infos, opened, physical, temporaryRoots
from tests.interop.watching import until


@dataclass(frozen=True)
class Route:
    """
    A way to a store.

    @ivar url: for C{nix copy}.
    @ivar host: for C{nix-copy-closure}.
    @ivar root: of the store that the server serves.
    """

    url: str
    host: str
    root: Path
    environment: dict = field(default_factory=dict)


class Routes:
    """Gives the way to a store served by us; each of its methods is one kind of way."""

    def __init__(self, request, directory):
        self._request, self._directory = request, directory

    def conch(self, root):
        """Through the service's own SSH server."""
        makeEndpoint = self._request.getfixturevalue("makeEndpoint")
        server = makeEndpoint(root)
        return Route(server.url, server.login, root, server.environment())

    def stdio(self, root):
        """Without SSH: Nix runs the program itself if the host is localhost."""
        host = f"localhost?remote-program={ourProgram('nixserve-store')}&remote-store={root}"
        return Route(f"ssh://{host}", host, root)

    def sshd(self, root):
        """Through OpenSSH's server, the program being the forced command of the key."""
        server = self._request.getfixturevalue("sshd")
        server.force(f"{ourProgram('nixserve-store')} --serve --write --store {root}")
        return Route(server.url, server.login, root, server.environment())


KINDS = ["conch", "stdio", "sshd"]


@pytest.fixture(params=KINDS)
def way(request, directory):
    """Each way in turn: called with the root of the store to serve."""
    return getattr(Routes(request, directory), request.param)


COPY_TO = {
    "nix copy": lambda route, path: ["nix", "copy", "--to", route.url, path],
    "nix-copy-closure": lambda route, path: ["nix-copy-closure", "--to", route.host, path],
    "nix-copy-closure, compressed": lambda route, path: ["nix-copy-closure", "--gzip", "--to", route.host, path],
}
COPY_FROM = {
    "nix copy": lambda route, path: ["nix", "copy", "--no-check-sigs", "--from", route.url, path],
    "nix-copy-closure": lambda route, path: ["nix-copy-closure", "--from", route.host, path],
    "nix-copy-closure, compressed": lambda route, path: ["nix-copy-closure", "--gzip", "--from", route.host, path],
}


def ways(commands):
    """Every way with every command. Without SSH there is nothing to compress."""
    return [
        (kind, command) for kind in KINDS for command in commands if not ("compressed" in command and kind == "stdio")
    ]


@pytest.mark.parametrize(("way", "command"), ways(COPY_TO), indirect=["way"])
def test_copyTo(nix, way, directory, oddStore, command):
    """A closure arrives as it was, and real Nix is content with the store; a second copy moves nothing."""
    route = way(directory / "target")
    arguments = COPY_TO[command](route, oddStore.top)
    nix.run(*arguments, store=oddStore.root, environment=route.environment)
    assertVerified(nix, route.root)
    assertSame(nix, oddStore.root, route.root, oddStore.paths, one=oddStore.paths)
    again = nix.run(*arguments, store=oddStore.root, environment=route.environment)
    assert b"copying path" not in again.stderr
    until(lambda: not [name for name in route.root.rglob("*.lock") if name.name not in ("gc.lock",)])


@pytest.mark.parametrize(("way", "command"), ways(COPY_FROM), indirect=["way"])
def test_copyFrom(nix, way, directory, oddStore, command):
    """A closure out of a store that real Nix made arrives in another that real Nix makes."""
    route = way(oddStore.root)
    target = directory / "client"
    nix.run(*COPY_FROM[command](route, oddStore.top), store=target, environment=route.environment)
    assertVerified(nix, target)
    assertSame(nix, oddStore.root, target, oddStore.paths, one=oddStore.paths[:3])


def test_queries(nix, way, oddStore):
    """What Nix asks a remote store about is answered as real Nix answers about the same store."""
    route = way(oddStore.root)

    def lines(*arguments):
        return nix.lines(*arguments, "--store", route.url, environment=route.environment)

    def local(*arguments):
        return nix.lines(*arguments, "--store", oddStore.root)

    nix.run("nix", "store", "ping", "--store", route.url, environment=route.environment)
    for question in (
        ["nix", "path-info", "-r", oddStore.top],
        ["nix", "path-info", "-rsSh", oddStore.top],
        ["nix-store", "-qR", oddStore.top],
        ["nix-store", "-q", "--references", oddStore.top],
        ["nix-store", "-q", "--hash", oddStore.top],
    ):
        assert sorted(lines(*question)) == sorted(local(*question)), question
    there, here = (json.loads("".join(ask("nix", "path-info", "--json", "-r", oddStore.top))) for ask in (lines, local))
    for info in here:
        # The protocol has no word for these.
        for name in ("registrationTime", "ultimate"):
            info.pop(name, None)
    for info in there:
        info.pop("registrationTime", None)
        info.pop("downloadSize", None)
    assert sorted(there, key=lambda info: info["path"]) == sorted(here, key=lambda info: info["path"])


def test_missingPath(nix, way, directory, oddStore):
    """A path that the server does not have is reported as Nix reports it, and the exit status says so."""
    route = way(directory / "empty")
    with opened(route.root):
        pass
    done = nix.run(
        *("nix", "copy", "--from", route.url, oddStore.top),
        store=directory / "client",
        environment=route.environment,
        check=False,
    )
    assert done.returncode == 1
    assert b"'%s' is required, but there is no substituter" % oddStore.top.encode() in done.stderr


def endsWith(master):
    """
    Ask a master to end.

    @return: whether it has. OpenSSH's client (9.2) misses a signal that comes between its look for one and its poll.
    """
    master.terminate()
    return master.poll() is not None


def test_master(nix, endpoint, directory, oddStore):
    """Several sessions at once go through one connection of OpenSSH's client."""
    control = directory / "ctl"
    options = ["-o", f"ControlPath={control}"]
    master = nix.start(*endpoint.ssh("-M", "-N", *options)[:-2], stderr=subprocess.PIPE)
    try:
        until(control.exists, 20, "no master came up")
        sessions = [nix.start(*endpoint.ssh(*options), stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(8)]
        talks = [Session.ofProcess(session) for session in sessions]
        for talk in talks:
            talk.write(hello())
        for talk in talks:
            talk.readU64(), talk.readU64()
            assert talk.askValid([oddStore.top]) in ([], [oddStore.top])
        environment = endpoint.environment(*options)
        copies = [
            nix.start("nix", "copy", "--to", endpoint.url, path, store=oddStore.root, environment=environment)
            for path in [*oddStore.paths[:3], oddStore.top]
        ]
        assert [copy.wait(60) for copy in copies] == [0, 0, 0, 0]
        for talk, session in zip(talks, sessions, strict=True):
            assert talk.askValid([oddStore.top]) == [oddStore.top]
            talk.close()
            assert session.returncode == 0
    finally:
        until(lambda: endsWith(master), 20, "the master has not ended")
        master.stderr.close()
    assertVerified(nix, endpoint.root)
    assertSame(nix, oddStore.root, endpoint.root, oddStore.paths)
    until(lambda: temporaryRoots(endpoint.root) == [])


def test_relay(nix, endpoint, oddStore, directory):
    """C{nixserve-store --connect} is a C{remote-program} too: the running service answers."""
    program = directory / "relay"
    program.write_text(f'#!/bin/sh\nexec {ourProgram("nixserve-store")} "$@" --connect {endpoint.socket}\n')
    program.chmod(0o755)
    url = f"ssh://localhost?remote-program={program}"
    nix.run("nix", "copy", "--to", url, oddStore.top, store=oddStore.root)
    assertSame(nix, oddStore.root, endpoint.root, oddStore.paths)
    nix.run("nix", "copy", "--no-check-sigs", "--from", url, oddStore.top, store=directory / "client")
    assertSame(nix, oddStore.root, directory / "client", oddStore.paths)


@pytest.mark.parametrize("kind", ["conch", "stdio"])
def test_signatures(nix, request, directory, oddStore, kind):
    """Signatures travel: what is signed is accepted from us by a client that insists on them, all else is not."""
    route = getattr(Routes(request, directory), kind)(oddStore.root)
    public = nix.run("nix", "key", "convert-secret-to-public", stdin=oddStore.secretKey.read_bytes()).stdout.decode()
    signed = [path for path, info in infos(nix, oddStore.root).items() if info["signatures"]]
    unsigned = next(path for path in oddStore.paths if "refers-to-itself" not in path and path.endswith("-odd"))
    target = directory / "client"
    options = ["--option", "trusted-public-keys", public.strip()]
    for path in signed:
        nix.run("nix", "copy", *options, "--from", route.url, path, store=target, environment=route.environment)
    arguments = ["nix", "copy", *options, "--from", route.url, unsigned]
    refused = nix.run(*arguments, store=target, environment=route.environment, check=False)
    assert refused.returncode == 1 and b"signature" in refused.stderr
    assert physical(target, signed[0]).exists() and not physical(target, unsigned).exists()

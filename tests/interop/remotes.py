"""
Real C{nix-store --serve --write} and our own servers, each reached in every way that our client knows; and what the
tests of the client ask of a store afterwards.
"""

import contextlib
import os
import sys
from dataclasses import fields
from pathlib import Path
from urllib.parse import quote

from twisted.conch.ssh.keys import Key
from twisted.internet import reactor
from twisted.internet.protocol import Factory

from nixserve.codec.derivation import BasicDerivation, derivationName, parseDerivation
from nixserve.codec.storepath import StoreDir
from nixserve.protocol.childprocess import ProcessTransport
from nixserve.protocol.client import ServeClient
from nixserve.protocol.deferredsession import DeferredSession
from nixserve.ssh.client import SSHCommandEndpoint
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from tests.interop.building import FEATURE
from tests.interop.nix import NIX_CONFIG, ourProgram, requireProgram
from tests.interop.stores import isLocked, physical

STORE_DIR = StoreDir()
VERSION_RELAY = Path(__file__).with_name("versionrelay.py")
ROOTLESS = Path(__file__).with_name("rootless.py")

#: What is spoken: real Nix 2.8 announces 2.7.
VERSIONS = {"real": 0x207, "ours": 0x208}

#: Every server in every way. Our service speaks SSH itself; our program also runs behind OpenSSH's server.
WAYS = [("real", "child"), ("real", "ssh"), ("real", "conch"),
        ("ours", "child"), ("ours", "ssh"), ("ours", "conch"), ("ours", "sshd")]  # fmt: skip


def wayName(way):
    """What pytest calls one of L{WAYS}."""
    return "-".join(way)


class Remote:
    """
    A server on a store of its own.

    @ivar who: C{real} or C{ours}.
    @ivar way: C{child}, C{ssh} (the program, to OpenSSH's server or our service), C{conch} (in-process, to the same),
        or C{sshd} (ssh to OpenSSH's server, which runs our program).
    @ivar root: of the store.
    @ivar service: our service, if it is that.
    """

    def __init__(self, request, who, way, root, config=NIX_CONFIG, features=FEATURE):
        """
        @param request: gives the fixtures that the way needs.
        @param config: of real Nix.
        @param features: of ours as a child, with blanks between.
        """
        self.who, self.way, self.root = who, way, root
        self.features = quote(features)
        self.nix = request.getfixturevalue("nix")
        self.service = self.server = None
        self.environment = {**self.nix.environment, "NIX_CONFIG": config}
        if who == "ours" and way in ("ssh", "conch"):
            makeEndpoint = request.getfixturevalue("makeEndpoint")
            self.server = self.service = makeEndpoint(root, options=["--system-features", FEATURE])
        elif way != "child":
            self.server = request.getfixturevalue("sshd")
            # OpenSSH's server gives the command an environment of its own.
            settings = root.parent / f"{root.name}-conf"
            settings.mkdir(exist_ok=True)
            (settings / "nix.conf").write_text(config)
            self.server.force(f"env NIX_CONF_DIR={settings} {' '.join(self.command)}")

    @property
    def name(self):
        """What errors call it."""
        return f"{self.who} by {self.way}"

    @property
    def command(self):
        """The server as a child process."""
        if self.who == "real":
            return [requireProgram("nix-store"), "--serve", "--write", "--store", str(self.root)]
        store = f"{self.root}?system-features={self.features}"
        return [ourProgram("nixserve-store"), "--serve", "--write", "--store", store]

    def attach(self, onError=lambda data: None, port=None, options=(), command=None):
        """
        Begin a session by way of a child process: the server or C{ssh}.

        @param port: of the SSH server, if not its own: of a proxy.
        @param options: more words for ssh.
        @param command: instead of the server, where it is a child.
        @return: the client, which may not be ready, and its child's transport.
        """
        client = ServeClient(STORE_DIR, onError, name=self.name, clock=reactor)
        argv = command or self.command
        if self.way != "child":
            words = [*self.server.keys.sshOptions(port or self.server.port), *options]
            argv = ["ssh", "-x", "-T", *words, self.server.login, "--", "nix-store --serve --write"]
        return client, ProcessTransport.spawn(client, reactor, argv, self.environment)

    async def connect(self, onError=lambda data: None, port=None, options=()):
        """A session that is ready. See L{attach}."""
        if self.way == "conch":
            client = ServeClient(STORE_DIR, onError, name=self.name, clock=reactor)
            await conchEndpoint(self.server, port).connect(Factory.forProtocol(lambda: client))
        else:
            client, _ = self.attach(onError, port, options)
        assert await client.ready == VERSIONS[self.who]
        return client

    def serverPids(self):
        """The processes that serve the store, but for our service."""
        return [pid for pid in pidsWith(str(self.root)) if commandLine(pid)[0] != b"ssh"]


def conchEndpoint(server, port=None):
    """The way to a session on an SSH server without a process."""
    user, host = server.login.split("@")
    keys, hostKeys = [Key.fromFile(str(server.keys.user))], [Key.fromFile(str(server.keys.host)).public()]
    command = "nix-store --serve --write"
    return SSHCommandEndpoint(reactor, host, port or server.port, user, command, keys=keys, hostKeys=hostKeys)


def speaking(version, command):
    """A command whose server and client believe that the other one speaks an old version."""
    return [sys.executable, str(VERSION_RELAY), str(version), *command]


def commandLine(pid):
    """The words of a process, none if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return [b""]


def pidsWith(word):
    """Of the processes that have this in their command line and run a server."""
    pids = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        words = commandLine(int(name))
        if b"--serve" in words and any(word.encode() in one for one in words):
            pids.append(int(name))
    return pids


def builderPids(output):
    """The processes of builders that make an output."""
    pids = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"out={output}".encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                pids.append(int(name))
    return pids


@contextlib.asynccontextmanager
async def here(workers, root):
    """A session on a store on this side, which is made if need be."""
    os.makedirs(root, exist_ok=True)
    store = LocalStore(StoreLayout.underRoot(str(root)))
    try:
        async with await DeferredSession.open(store, workers) as session:
            yield session
    finally:
        await workers.call(store.close)


def readDerivation(root, drvPath):
    """A derivation that lies in a store."""
    return parseDerivation(physical(root, drvPath).read_bytes(), derivationName(drvPath), STORE_DIR)


def basic(drv, inputs=()):
    """A derivation as BuildDerivation has it: paths in place of other derivations."""
    known = {field.name: getattr(drv, field.name) for field in fields(BasicDerivation)}
    return BasicDerivation(**known | {"inputSrcs": drv.inputSrcs | frozenset(inputs)})


def outputsOf(drv):
    """The paths of the outputs of a derivation, by name."""
    return {name: output.path for name, output in drv.outputs.items()}


def locks(root):
    """The files below a store that somebody has locked."""
    files = [*physical(root, "/nix/store").glob("*.lock"), *Path(f"{root}/nix/var/nix").glob("*.lock")]
    files += Path(f"{root}/nix/var/nix/temproots").glob("*")
    return [file.name for file in files if isLocked(file)]


#: A derivation that fails, one that works, and one that needs that.
EXPRESSION = """
let
  make = name: script: more: derivation ({
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-ec" script ];
  } // more);
in rec {
  multi = make "multi" "mkdir $out; echo text > $dev; ln -s $dev $out/dev; echo said" { outputs = [ "out" "dev" ]; };
  user = make "user" "echo ${multi.dev} > $out" { };
  failing = make "failing" "echo on standard error >&2; exit 3" { };
  slow = make "slow" "echo begun; sleep 100" { };
}
"""


def instantiate(nix, directory, root):
    """Have real Nix make the derivations; their paths by name."""
    file = directory / "builds.nix"
    file.write_text(EXPRESSION)
    names = ("multi", "user", "failing", "slow")
    return {
        name: STORE_DIR.parse(nix.lines("nix-instantiate", file, "-A", name, store=root)[0].split("!")[0])
        for name in names
    }

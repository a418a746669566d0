"""
Machines for build hooks, all of them on loopback and each behind an SSH server of its own; and builds sent there by
real Nix, through its own hook or ours.
"""

import contextlib
import os
import pwd
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.interop.building import requireSandbox, withoutEscapes
from tests.interop.endpoint import Endpoint, Sshd
from tests.interop.nix import ourProgram, requireProgram
from tests.interop.remotes import commandLine

#: What other platforms stock machines say that they run.
PLATFORMS = "i686-linux riscv64-linux"

#: What builds here require of machines.
FEATURES = "foo big special"


@dataclass(frozen=True)
class Machine:
    """
    @ivar name: of the host.
    @ivar root: of its store; C{None} if it has none.
    @ivar columns: of its line in the machines file, behind the host.
    """

    name: str
    root: Path | None
    columns: str

    @property
    def line(self):
        """Of the machines file."""
        return f"ssh://{self.name} {self.columns}"


class Farm:
    """
    A client with a store, and machines. C{with} ends all servers, and whatever hooks have left running.

    @ivar root: of the client's store.
    @ivar state: the directory of our hooks.
    """

    def __init__(self, nix, keys, directory):
        self.nix, self.keys, self.directory = nix, keys, directory
        self.root, self.state = directory / "here", directory / "s"
        self.machines = []
        self.sandbox = requireSandbox()["NIX_CONFIG"].replace("system-features = foo", f"system-features = {FEATURES}")
        self._config, self._sshConfig = directory / "nix-conf", directory / "ssh_config"
        self._config.mkdir()
        server = self.sandbox.replace(FEATURES, f"{FEATURES} ca-derivations")
        experimental = "experimental-features = nix-command ca-derivations"
        (self._config / "nix.conf").write_text(f"{server}extra-platforms = {PLATFORMS}\n{experimental}\n")
        self._sshConfig.touch()
        self._servers = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for path in self.state.glob("masters/*"):
            if path.is_socket():
                subprocess.run(["ssh", "-F", "none", "-S", path, "-O", "exit", "x"], capture_output=True, timeout=20)
        self._servers.close()

    # --- machines -----------------------------------------------------------------------------------------

    def endpoint(self, columns):
        """Our service."""
        name = f"m{len(self.machines)}"
        root = self.directory / f"{name}-root"
        features = ["--system-features", f"{FEATURES} ca-derivations".replace(" ", ",")]
        server = Endpoint(self.directory / name, self.nix, self.keys, root, options=features)
        self._servers.callback(server.stop)
        return self._add(name, server.port, columns, root)

    def stock(self, columns, before=""):
        """
        Real Nix behind OpenSSH's server.

        @param before: words before the command.
        """
        name = f"m{len(self.machines)}"
        root = self.directory / f"{name}-root"
        server = Sshd(requireProgram("sshd"), self.directory / name, self.keys)
        server.force(f"env NIX_CONF_DIR={self._config} {before} nix-store --serve --write --store {root}")
        assert server.start()
        self._servers.callback(server.stop)
        return self._add(name, server.port, columns, root)

    def refusing(self, columns):
        """Nobody listens."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return self._add(f"m{len(self.machines)}", probe.getsockname()[1], columns)

    def silent(self, columns):
        """Connections are accepted, and that is all."""
        listening = self._servers.enter_context(socket.create_server(("127.0.0.1", 0)))
        return self._add(f"m{len(self.machines)}", listening.getsockname()[1], columns)

    def metered(self, machine):
        """
        Another name for a machine, whose connections are measured.

        @return: the L{Meter}; from now on it stands for the machine in the machines file.
        """
        words = self._sshConfig.read_text().partition(f"Host {machine.name}\n")[2].split()
        meter = self._servers.enter_context(Meter(int(words[words.index("Port") + 1])))
        self.machines.remove(machine)
        self._add(f"{machine.name}-metered", meter.port, machine.columns, machine.root)
        return meter

    def _add(self, name, port, columns, root=None):
        kind, key = self.keys.host.with_suffix(".pub").read_text().split()[:2]
        known = self.directory / "known_hosts"
        known.write_text(f"* {kind} {key}\n")
        settings = {
            "HostName": "127.0.0.1",
            "Port": port,
            "User": pwd.getpwuid(os.geteuid()).pw_name,
            "IdentityFile": self.keys.user,
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": known,
            "GlobalKnownHostsFile": "none",
        }
        with self._sshConfig.open("a") as stream:
            stream.write(f"Host {name}\n" + "".join(f"  {key} {value}\n" for key, value in settings.items()))
        self.machines.append(Machine(name, root, columns))
        return self.machines[-1]

    @property
    def file(self):
        """The machines file."""
        return "\n".join(machine.line for machine in self.machines)

    # --- builds -------------------------------------------------------------------------------------------

    def command(self, expression, *options, hook="ours", maxJobs=0):
        """
        The words of a C{nix-build}.

        @param hook: C{ours} or C{real}.
        """
        chosen = ["--option", "build-hook", ourProgram("nixserve-hook")] if hook == "ours" else []
        machines = self.directory / "machines"
        machines.write_text(self.file)
        words = ["nix-build", *chosen, "--max-jobs", str(maxJobs), "--builders", f"@{machines}"]
        words += [] if "--out-link" in options else ["--no-out-link"]
        return [*words, expression, *options]

    def environment(self, **more):
        """Of Nix, and so of hooks."""
        return {
            "NIX_CONFIG": f"{self.sandbox}extra-platforms = {PLATFORMS}\n",
            "NIX_SSHOPTS": f"-F {self._sshConfig}",
            "NIXSERVE_HOOK_STATE": str(self.state),
            **more,
        }

    def build(self, expression, *options, hook="ours", root=None, maxJobs=0, timeout=100, environment=()):
        """
        Have something built.

        @return: a L{Done}.
        """
        begun = time.monotonic()
        done = self.nix.run(
            *self.command(expression, *options, hook=hook, maxJobs=maxJobs),
            store=root or self.root,
            check=False,
            environment=self.environment(**dict(environment)),
            timeout=timeout,
        )
        said = withoutEscapes(done.stderr.decode(errors="replace"))
        return Done(done.returncode, done.stdout.decode().split(), said, time.monotonic() - begun)

    def alone(self, expression, root, *options):
        """Have something built without machines."""
        words = ["nix-build", "--builders", "", "--max-jobs", "4", "--no-out-link", expression, *options]
        return self.nix.lines(*words, store=root, environment=self.environment(), timeout=100)


@dataclass(frozen=True)
class Done:
    """
    What came of a C{nix-build}.

    @ivar seconds: that it took.
    """

    status: int
    outputs: list
    said: str
    seconds: float


class Meter:
    """
    Passes connections on, and counts.

    @ivar port: where it listens.
    @ivar sent: bytes from clients.
    """

    def __init__(self, target):
        """@param target: a port."""
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.sent = 0
        self._mutex = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._listening.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                for source, sink, counts in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass, args=(source, sink, counts), daemon=True).start()

    def _pass(self, source, sink, counts):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                if counts:
                    with self._mutex:
                        self.sent += len(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def processes(word):
    """Of those that run now, the command lines that have this in them, but for our own."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        words = commandLine(int(name))
        if int(name) != os.getpid() and any(word.encode() in one for one in words):
            found[int(name)] = b" ".join(words).decode(errors="replace")
    return found


def hookProcesses(state):
    """The hook processes that run now and share this directory."""
    found = []
    for pid, line in processes("nixserve-hook").items():
        with contextlib.suppress(OSError):
            if f"NIXSERVE_HOOK_STATE={state}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(line)
    return found


#: A graph: each node refers to those before it, and requires what its number says.
GRAPH = """
let
  systems = [ "x86_64-linux" "riscv64-linux" "i686-linux" ];
  features = [ [ ] [ "foo" ] [ ] [ "special" ] [ "big" "foo" ] ];
  rem = a: b: a - b * (a / b);
  node = n: derivation {
    name = "node-${toString n}";
    system = builtins.elemAt systems (rem n 3);
    requiredSystemFeatures = builtins.elemAt features (rem n 5);
    builder = "/bin/sh";
    outputs = if rem n 7 == 0 then [ "out" "dev" ] else [ "out" ];
    args = [ "-ec" ''
      echo "building node ${toString n}"
      echo ${toString n} $below > $out
      if [ -n "''${dev-}" ]; then mkdir $dev; ln -s $out $dev/out; fi
    '' ];
    below = builtins.filter (x: x != null) (map (d: if n - d >= 0 then nodes n d else null) [ 4 9 ]);
  };
  nodes = n: d: builtins.elemAt all (n - d);
  all = builtins.genList node 60;
in all
"""

#: Small builds that need nothing.
MANY = """
{ count, sleep ? "0", salt ? "", source ? "", features ? "" }:
builtins.genList (n: derivation {
  name = "small-${toString n}";
  system = "x86_64-linux";
  builder = "/bin/sh";
  requiredSystemFeatures = builtins.filter (x: x != "") [ features ];
  source = if source == "" then "" else "${/. + source}";
  args = [ "-ec" "echo ${toString n} ${salt} > $out; echo building; sleep ${sleep}" ];
}) (builtins.fromJSON count)
"""

"""
The servers that benchmarks compare, each on a store of its own on a loopback port of its own.
"""

from __future__ import annotations

import base64
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nixserve.builder.sandbox import findShell

BASE_ENVIRONMENT = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    "NIX_CONFIG": "substituters =\nextra-experimental-features = nix-command\nsandbox = false\nbuild-users-group =\n",
    "LANG": "C.UTF-8",
}


def freePort() -> int:
    """A port of the loopback interface that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Keys:
    """A key pair for the client and a host key, made anew."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.user = directory / "user"
        self.host = directory / "host"
        for path in (self.user, self.host):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)

    def environment(self, home: Path, port: int) -> dict[str, str]:
        """What a client needs to reach the server on C{port} with C{ssh}."""
        options = f"-F /dev/null -p {port} -i {self.user} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        return {**BASE_ENVIRONMENT, "HOME": str(home), "NIX_SSHOPTS": f"{options} -o LogLevel=ERROR"}


class Peer:
    """
    A server process.

    @ivar url: of its store, for who uses C{ssh}.
    @ivar store: the root of its store.
    @ivar environment: for the client.
    """

    name = ""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Of its URL, each C{name=value}."""
        return ()

    def __init__(self, directory: Path, keys: Keys) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.home = directory / "home"
        self.home.mkdir(parents=True)
        self.port = freePort()
        self.keys = keys
        self.environment = self.environmentFor(self.port)
        self.log = open(directory / "log", "wb")  # noqa: SIM115 - closed in stop
        self.process = self._start(keys)
        try:
            self._waitForPort()
        except BaseException:
            self.stop()
            raise

    def _start(self, keys: Keys) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    @property
    def url(self) -> str:
        """Its store, for who uses C{ssh}; the port stands in the environment."""
        return _url("ssh://127.0.0.1", self.parameters)

    def environmentFor(self, port: int) -> Mapping[str, str]:
        """The environment of a client that reaches it on another port."""
        return self.keys.environment(self.home, port)

    def conchURL(self, port: int) -> str:
        """Its store, for nixserve's own SSH client."""
        hostKey = base64.b64encode(self.keys.host.with_suffix(".pub").read_bytes()).decode()
        ours = ("ssh-client=conch", f"ssh-key={self.keys.user}", f"base64-ssh-public-host-key={hostKey}")
        return _url(f"ssh://{getpass.getuser()}@127.0.0.1:{port}", (*self.parameters, *ours))

    def _waitForPort(self) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"{self.name} does not listen: {(self.directory / 'log').read_text()}")

    def stop(self) -> None:
        """End the server and remove its store."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)
        self.log.close()
        subprocess.run(["chmod", "-R", "u+w", self.directory], check=True)
        shutil.rmtree(self.directory)


class RealPeer(Peer):
    """OpenSSH's sshd and the real C{nix-store --serve --write}."""

    name = "nix-store behind sshd"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Where its store is."""
        return (f"remote-store={self.store}",)

    def _start(self, keys: Keys) -> subprocess.Popen[bytes]:
        authorized = self.directory / "authorized_keys"
        authorized.write_text(keys.user.with_suffix(".pub").read_text())
        settings = self.directory / "nix.conf"
        settings.write_text(_settings())
        config = self.directory / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {keys.host}\nAuthorizedKeysFile {authorized}\n"
            "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nPermitUserEnvironment no\n"
            f"SetEnv NIX_USER_CONF_FILES={settings}\n"
        )
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        return subprocess.Popen([shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", config], stderr=self.log)


class OurPeer(Peer):
    """C{twistd nixserve}."""

    name = "nixserve"

    def _start(self, keys: Keys) -> subprocess.Popen[bytes]:
        state = self.directory / "state"
        state.mkdir(mode=0o700)
        authorized = state / "authorized_keys"
        authorized.write_text(f'command="nix-store --serve --write" {keys.user.with_suffix(".pub").read_text()}')
        authorized.chmod(0o600)
        twistd = Path(sys.executable).with_name("twistd")
        listen = f"tcp:{self.port}:interface=127.0.0.1"
        arguments = ["--state", state, "--store", self.store, "--listen", listen, "--host-key", keys.host]
        return subprocess.Popen(
            [twistd, "-n", "--pidfile=", "nixserve", *arguments],
            env={**BASE_ENVIRONMENT, "HOME": str(self.home)},
            cwd=self.directory,
            stdout=self.log,
            stderr=self.log,
        )

    def peakMemory(self) -> int:
        """The most memory that the server has had resident, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(match[1]) * 1024 if match else 0


def _settings() -> str:
    """
    Of real Nix: as on a machine of its own, with builds confined, as they are with nixserve, since the store does not
    lie where its paths say.
    """
    shell = findShell()
    sandboxPaths = f"sandbox-paths = /bin/sh={shell.source}\n" if shell else ""
    return f"substituters =\nbuild-users-group =\nsandbox = true\nsandbox-fallback = false\n{sandboxPaths}"


def _url(place: str, parameters: Sequence[str]) -> str:
    return f"{place}?{'&'.join(parameters)}" if parameters else place

"""
SSH servers to talk to, ours and OpenSSH's, each a process that the test starts and ends.
"""

import os
import pwd
import re
import socket
import subprocess
import sys
import threading
import time

#: Seconds that a server has to come up or to end.
PATIENCE = 30

TWISTD = "from twisted.scripts.twistd import run; run()"


class Keys:
    """
    Keys made for the tests.

    @ivar user: private key of the client; its public one lies beside it.
    @ivar host: private key of the servers.
    """

    def __init__(self, directory):
        directory.mkdir(mode=0o700)
        self.directory = directory
        self.user, self.host = directory / "user", directory / "host"
        for path in (self.user, self.host):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)]
            subprocess.run(command, check=True, timeout=PATIENCE)

    def userLine(self, options=""):
        """The user's line of authorized_keys."""
        return f"{options} {self.user.with_suffix('.pub').read_text()}".lstrip()

    def sshOptions(self, port):
        """Words for ssh that make it use these keys and this port and nothing of the user's; no word has a blank."""
        known = self.directory / f"known-hosts-{port}"
        if not known.exists():
            kind, key = self.host.with_suffix(".pub").read_text().split()[:2]
            # Complete at once: other threads have the file read already.
            partial = known.with_suffix(f".{threading.get_ident()}")
            partial.write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
            partial.rename(known)
        settings = [
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            f"UserKnownHostsFile={known}",
            "GlobalKnownHostsFile=none",
            "ConnectTimeout=20",
        ]
        words = ["-F", "none", "-p", str(port), "-i", str(self.user)]
        return words + [word for setting in settings for word in ("-o", setting)]


class Server:
    """What both kinds of server have in common: a port, and how Nix and ssh reach it."""

    host = "127.0.0.1"
    port = 0

    @property
    def url(self):
        """The store as Nix names it."""
        return f"ssh://{self.login}"

    @property
    def login(self):
        """What stands before the command in ssh's arguments."""
        return f"{pwd.getpwuid(os.geteuid()).pw_name}@{self.host}"

    def environment(self, *options):
        """
        What Nix needs in its environment to reach this server.

        @param options: more words for ssh.
        """
        return {"NIX_SSHOPTS": " ".join([*self.keys.sshOptions(self.port), *options])}

    def ssh(self, *options, command="nix-store --serve --write"):
        """The arguments of an ssh that talks to a session."""
        return ["ssh", "-x", "-T", *self.keys.sshOptions(self.port), *options, self.login, "--", command]

    def stop(self):
        """End the process, politely if it listens to that."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(PATIENCE)


class Endpoint(Server):
    """
    C{twistd nixserve} on a store of its own.

    @ivar root: of the store.
    @ivar socket: for relays.
    @ivar authorized: the file of authorized keys.
    @ivar process: of the server.
    @ivar log: what it has to say.
    """

    def __init__(self, directory, nix, keys, root=None, rights="nix-store --serve --write", options=()):
        """
        @param root: of the store to serve; one in C{directory} if not given.
        @param rights: the forced command of the user's key.
        @param options: more of them for the service.
        """
        directory.mkdir()
        self.keys = keys
        self.root = root or directory / "root"
        self.state = directory / "state"
        self.socket = self.state / "serve.sock"
        self.log = directory / "log"
        self.state.mkdir(mode=0o700)
        self.authorized = authorized = directory / "authorized_keys"
        authorized.write_text(keys.userLine(f'restrict,command="{rights}"'))
        authorized.chmod(0o600)
        arguments = [
            *(sys.executable, "-c", TWISTD, "--nodaemon", "--pidfile=", "nixserve"),
            *("--listen", "tcp:0:interface=127.0.0.1", "--store", str(self.root), "--state", str(self.state)),
            *("--authorized-keys", str(authorized), "--host-key", str(keys.host)),
            *options,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory, env=nix.environment
            )
        self.port = self._awaitPort()

    def _awaitPort(self):
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"listening on tcp:.*IPv4Address\(.*port=(\d+)\)", self.log.read_text())
            # The socket for relays comes after the port, and is the last thing to come.
            if found and self.socket.exists():
                return int(found[1])
            time.sleep(0.02)
        self.stop()
        raise AssertionError(f"the service does not start: {self.log.read_text()[-2000:]}")


class Sshd(Server):
    """
    OpenSSH's server. Whatever the client asks for, the forced command runs.

    @ivar log: what it has to say.
    """

    #: Where Debian's sshd confines its unprivileged child.
    SEPARATION = "/run/sshd"

    def __init__(self, program, directory, keys):
        directory.mkdir()
        self.keys = keys
        self.log = directory / "log"
        self._program = program
        self._authorized = directory / "authorized_keys"
        self._config = directory / "sshd_config"
        self._madeSeparation = False
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port = probe.getsockname()[1]
        settings = {
            "ListenAddress": f"{self.host}:{self.port}",
            "HostKey": keys.host,
            "AuthorizedKeysFile": self._authorized,
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "forced-commands-only",
        }
        self._config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        self.force("false")

    def start(self):
        """@return: whether it listens."""
        if not os.path.exists(self.SEPARATION):
            os.mkdir(self.SEPARATION, 0o755)
            self._madeSeparation = True
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [self._program, "-D", "-e", "-f", str(self._config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((self.host, self.port)) == 0:
                    return True
            time.sleep(0.05)
        self.stop()
        return False

    def force(self, command):
        """Have every session run this command."""
        self._authorized.write_text(self.keys.userLine(f'restrict,command="{command}"'))

    def stop(self):
        """End it and remove what was made for it."""
        super().stop()
        if self._madeSeparation:
            os.rmdir(self.SEPARATION)

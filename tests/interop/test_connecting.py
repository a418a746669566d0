"""Connecting to what a URL names: OpenSSH's sshd with real Nix behind it, our own service, a child, a socket."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, gatherResults
from twisted.internet.task import deferLater

from nixserve.codec.storepath import StoreDir
from nixserve.errors import RemoteError, UsageError
from nixserve.remote import master
from nixserve.remote.address import RemoteAddress
from nixserve.remote.connecting import connect
from nixserve.remote.failures import CannotConnect
from nixserve.remote.master import SSHMaster
from nixserve.remote.several import connectSeveral
from tests.interop.nix import requireProgram

ABSENT = StoreDir().parse(f"/nix/store/{'0' * 32}-absent")

#: Seconds within which every failure must be reported.
PROMPT = 5


def sleep(seconds):
    """Let the reactor run."""
    return deferLater(reactor, seconds, lambda: None)


async def until(condition, seconds=PROMPT):
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await sleep(0.02)


def childrenOfOurs():
    """The command lines of this process's children, zombies included."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            words = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == os.getpid():
            found.append(b" ".join(words).decode())
    return found


class Side:
    """
    An SSH server, and how this test reaches it.

    @ivar environ: of the client; its C{HOME} and C{TMPDIR} are the test's own.
    """

    def __init__(self, server, nix, directory):
        self.server = server
        self.home = directory / "home"
        self.temporary = Path(tempfile.mkdtemp(prefix="nxs-"))
        for made in (self.home, self.home / ".ssh"):
            made.mkdir(mode=0o700)
        self.environ = {
            **nix.environment,
            **server.environment(),
            "HOME": str(self.home),
            "USER": server.login.partition("@")[0],
            "TMPDIR": str(self.temporary),
        }
        self.identity = self.home / ".ssh/id_ed25519"
        self.identity.write_bytes(server.keys.user.read_bytes())
        self.identity.chmod(0o600)
        kind, key = server.keys.host.with_suffix(".pub").read_text().split()[:2]
        self.knownHosts = self.home / ".ssh/known_hosts"
        self.knownHosts.write_text(f"[127.0.0.1]:{server.port} {kind} {key}\n")

    def url(self, *parameters, port=None):
        """The server's URL."""
        return f"ssh://{self.server.login}:{port or self.server.port}?{'&'.join(parameters)}"

    def connect(self, url, **options):
        """L{connect} with this environment."""
        return connect(reactor, url, environ=options.pop("environ", self.environ), **options)

    async def fails(self, url, **options):
        """@return: the line of the error, which comes promptly."""
        began = time.monotonic()
        with pytest.raises((CannotConnect, UsageError)) as caught:
            await self.connect(url, **options)
        assert time.monotonic() - began < PROMPT
        text = str(caught.value)
        assert "\n" not in text and text.startswith("ssh://") and ": " in text and "; " in text
        self.leavesNothing()
        return text

    def leavesNothing(self):
        """No process, no file."""
        started = [line for line in childrenOfOurs() if line.partition(" ")[0].endswith(("/ssh", "/nix-store"))]
        assert started == []
        assert list(self.temporary.iterdir()) == []

    def close(self):
        """Nothing is left."""
        self.leavesNothing()
        self.temporary.rmdir()

    def masters(self):
        """The processes of masters of this test."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                words = (directory / "cmdline").read_text().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            ours = any(word.startswith((f"{self.temporary}/", f"{self.home}/")) for word in words)
            if "-oControlMaster=yes" in words and ours:
                found.append(int(directory.name))
        return found

    def logins(self):
        """How many there have been."""
        return self.server.log.read_text().count("Accepted publickey")


@pytest.fixture
def side(sshd, nix, directory):
    """OpenSSH's server, with a real nix-store behind it."""
    sshd.force(f"{requireProgram('nix-store')} --serve --write --store {directory}/remote")
    one = Side(sshd, nix, directory)
    yield one
    one.close()


async def talk(client):
    """A question and its answer, then the end."""
    async with client:
        assert await client.queryValidPaths([ABSENT]) == frozenset()


CLIENTS = pytest.mark.parametrize("parameters", [[], ["ssh-client=conch"]], ids=["openssh", "conch"])


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_realNix(side, parameters):
    """Both clients of SSH reach a real C{nix-store} behind a real sshd; nothing is left behind."""
    client = await side.connect(side.url(*parameters))
    assert client.version == 0x207 and client.name == side.url().rstrip("?")
    await talk(client)


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_ourService(endpoint, nix, directory, parameters):
    """And our own service."""
    side = Side(endpoint, nix, directory)
    await talk(await side.connect(side.url(*parameters)))
    side.close()


@pytest_twisted.ensureDeferred
async def test_localhost(nix, directory):
    """C{ssh://localhost} runs the command here; several words and a store of its own are understood."""
    root = directory / "a remote;store"
    url = f"ssh://localhost?remote-program=env%20X=1%20nix-store&remote-store=local?root={quote(str(root))}"
    await talk(await connect(reactor, url, environ=nix.environment))
    assert (root / "nix/var/nix/db/db.sqlite").exists()


@pytest_twisted.ensureDeferred
async def test_readOnly(nix, directory):
    """Without C{write} the session has no right to change anything."""
    url = f"ssh://localhost?remote-store={directory / 'remote'}"
    client = await connect(reactor, url, environ=nix.environment, write=False)
    with pytest.raises(RemoteError, match="not allowed"):
        await client.buildPaths([f"{ABSENT}.drv"])
    await client.ended


@pytest_twisted.ensureDeferred
async def test_socket(endpoint, nix):
    """The socket of a service."""
    client = await connect(reactor, f"unix://{endpoint.socket}", environ=nix.environment)
    assert client.version == 0x207 or client.version == 0x208
    await talk(client)
    with pytest.raises(CannotConnect, match="'/elsewhere' is not served here"):
        await connect(reactor, f"unix://{endpoint.socket}?remote-store=/elsewhere", environ=nix.environment)


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_hostKeyOfTheURL(side, parameters):
    """A host key in the URL is enough, and nothing in ssh's configuration or NIX_SSHOPTS can undo it."""
    side.knownHosts.unlink()
    encoded = b64encode(side.server.keys.host.with_suffix(".pub").read_bytes()).decode()
    good = f"base64-ssh-public-host-key={encoded}"
    await talk(await side.connect(side.url(good, *parameters)))
    other = b64encode(side.server.keys.user.with_suffix(".pub").read_bytes()).decode()
    lax = {**side.environ, "NIX_SSHOPTS": side.environ["NIX_SSHOPTS"] + " -oStrictHostKeyChecking=no"}
    text = await side.fails(side.url(f"base64-ssh-public-host-key={other}", *parameters), environ=lax)
    assert "base64-ssh-public-host-key" in text and "host key" in text


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_hostUnknown(side, parameters):
    """A name that is none."""
    text = await side.fails("ssh://nobody.invalid?" + "&".join(parameters))
    assert text.startswith("ssh://nobody.invalid: the host is unknown (") and "correct its name" in text


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_connectionRefused(side, parameters):
    """Nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
        environ = {**side.environ, "NIX_SSHOPTS": "-F none"}
        text = await side.fails(side.url(*parameters, port=free), environ=environ)
    assert ": the connection was refused (" in text and "start its SSH server" in text


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_refusedKey(side, parameters, directory):
    """A key that is not among the authorized ones."""
    stranger = directory / "stranger"
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(stranger)]
    subprocess.run(command, check=True, timeout=30)
    words = side.environ["NIX_SSHOPTS"].replace(str(side.server.keys.user), str(stranger))
    environ = {**side.environ, "NIX_SSHOPTS": words}
    text = await side.fails(side.url(f"ssh-key={stranger}", *parameters), environ=environ)
    assert "refused all keys" in text and "authorized_keys" in text


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_changedHostKey(side, parameters):
    """A host that shows another key than the known one; its line must go first."""
    other = side.server.keys.user.with_suffix(".pub").read_text().split()[1]
    side.knownHosts.write_text(f"[127.0.0.1]:{side.server.port} ssh-ed25519 {other}\n")
    words = f"-F none -oBatchMode=yes -oUserKnownHostsFile={side.knownHosts} -i {side.identity}"
    text = await side.fails(side.url(*parameters), environ={**side.environ, "NIX_SSHOPTS": words})
    assert "ssh-keygen -R '[127.0.0.1]:" in text and "if it really has a new one" in text


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_unknownHostKey(side, parameters):
    """A host whose key nobody knows. In this process the line to add is given, and adding it helps."""
    side.knownHosts.write_text("")
    words = f"-F none -oBatchMode=yes -oUserKnownHostsFile={side.knownHosts} -i {side.identity}"
    environ = {**side.environ, "NIX_SSHOPTS": words}
    text = await side.fails(side.url(*parameters), environ=environ)
    assert "host key" in text and "is not known" in text
    if parameters:
        assert "SHA256:" in text
        side.knownHosts.write_text(text.partition(f"{side.knownHosts}: ")[2] + "\n")
        await talk(await side.connect(side.url(*parameters)))


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_programNotFound(side, parameters):
    """The remote command does not exist."""
    side.server.force("/nonexistent/nix-store --serve")
    text = await side.fails(side.url(*parameters))
    assert "the remote program 'nix-store' was not found" in text and "/nonexistent/nix-store" in text
    assert "remote-program=" in text


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_textInPlaceOfTheProtocol(side, parameters):
    """A login shell that prints something, and one that lets nobody in."""
    for command in ("echo This account is currently not available.; exit 1", "echo Welcome to this host; cat"):
        side.server.force(command)
        text = await side.fails(side.url(*parameters))
        assert "text came in place of the protocol: '" in text and command[5:25] in text


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_messageAndExit(side, parameters):
    """The remote says why it does not want to."""
    side.server.force("echo error: cannot open the store >&2; exit 1")
    text = await side.fails(side.url(*parameters))
    assert "exited with status 1 (error: cannot open the store); try it by hand: ssh" in text


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_noAnswer(side, parameters):
    """The command takes everything and says nothing; or the host does."""
    side.server.force("cat > /dev/null")
    text = await side.fails(side.url(*parameters), timeoutSeconds=1)
    assert ": no answer within 1 s" in text
    with socket.create_server(("127.0.0.1", 0)) as silent:
        text = await side.fails(side.url(*parameters, port=silent.getsockname()[1]), timeoutSeconds=1)
    assert ": no answer within 1 s" in text


@CLIENTS
@pytest_twisted.ensureDeferred
async def test_cancel(side, parameters):
    """A cancelled attempt leaves nothing, whenever it is cancelled."""
    side.server.force("cat > /dev/null")
    encoded = b64encode(side.server.keys.host.with_suffix(".pub").read_bytes()).decode()
    for delay in (0, 0.001, 0.01, 0.3):
        attempt = side.connect(side.url(f"base64-ssh-public-host-key={encoded}", *parameters))
        reactor.callLater(delay, attempt.cancel)
        with pytest.raises(CancelledError):
            await attempt
        side.leavesNothing()


@pytest_twisted.ensureDeferred
async def test_noSSH(side):
    """This machine has no ssh."""
    text = await side.fails(side.url(), environ={**side.environ, "PATH": str(side.home)})
    assert "there is no program 'ssh' on this machine; " in text and "ssh-client=conch" in text


@pytest_twisted.ensureDeferred
async def test_configForPersons(side):
    """What ssh_config says for the same host does not stand in the way of a session: ports, and another command."""
    config = side.home / "config"
    config.write_text(
        f"Host *\n  LocalForward 127.0.0.1:{side.server.port} 127.0.0.1:1\n  ExitOnForwardFailure yes\n"
        "  RemoteCommand false\n  RequestTTY force\n  ForwardAgent yes\n"
    )
    config.chmod(0o600)
    environ = {**side.environ, "NIX_SSHOPTS": side.environ["NIX_SSHOPTS"].replace("-F none", f"-F {config}")}
    await talk(await side.connect(side.url(), environ=environ))


@pytest_twisted.ensureDeferred
async def test_master(side):
    """Several sessions share one connection; the user's own master is neither used nor made."""
    control = side.home / "control"
    config = side.home / "config"
    config.write_text(f"Host *\n  ControlMaster auto\n  ControlPath {control}\n  ControlPersist 60\n")
    config.chmod(0o600)
    environ = {**side.environ, "NIX_SSHOPTS": side.environ["NIX_SSHOPTS"].replace("-F none", f"-F {config}")}
    before = side.logins()
    async with SSHMaster(reactor, RemoteAddress.parse(side.url()), environ) as shared:
        assert not side.masters()
        clients = await gatherResults(
            [side.connect(side.url(), environ=environ, master=shared) for _ in range(3)], consumeErrors=True
        )
        assert side.logins() == before + 1 and side.masters()
        for client in clients:
            await talk(client)
        await talk(await side.connect(side.url(), environ=environ))
        assert side.logins() == before + 2 and not control.exists()
    await until(lambda: not side.masters())


@pytest_twisted.ensureDeferred
async def test_deadMaster(side):
    """A master that was killed is replaced, and its socket with it."""
    encoded = b64encode(side.server.keys.host.with_suffix(".pub").read_bytes()).decode()
    address = RemoteAddress.parse(side.url(f"base64-ssh-public-host-key={encoded}"))
    async with SSHMaster(reactor, address, side.environ) as shared:
        await talk(await side.connect(address, master=shared))
        (first,) = side.masters()
        os.kill(first, signal.SIGKILL)
        await until(lambda: first not in side.masters())
        assert os.path.exists(shared.controlPath)
        before = side.logins()
        await talk(await side.connect(address, master=shared))
        await talk(await side.connect(address, master=shared))
        assert side.logins() == before + 1
    await until(lambda: not side.masters())


@pytest_twisted.ensureDeferred
async def test_hangingMaster(side, monkeypatch):
    """One that does not answer is replaced as well."""
    monkeypatch.setattr(master, "ANSWER_SECONDS", 0.5)
    address = RemoteAddress.parse(side.url())
    async with SSHMaster(reactor, address, side.environ) as shared:
        await shared.start()
        (first,) = side.masters()
        os.kill(first, signal.SIGSTOP)
        try:
            await talk(await side.connect(address, master=shared))
            assert len(side.masters()) == 2
        finally:
            os.kill(first, signal.SIGKILL)
    await until(lambda: not side.masters())


@pytest_twisted.ensureDeferred
async def test_sharedDirectory(side):
    """Whoever uses the same directory uses the same connection; without sessions it ends by itself."""
    address = RemoteAddress.parse(side.url())
    directory = side.home / "s"
    before = side.logins()
    both = [SSHMaster(reactor, address, side.environ, str(directory), persistSeconds=1) for _ in range(2)]
    clients = await gatherResults([side.connect(address, master=shared) for shared in both], consumeErrors=True)
    assert side.logins() == before + 1 and directory.stat().st_mode & 0o777 == 0o700
    for client in clients:
        await talk(client)
    await until(lambda: not side.masters())


@pytest_twisted.ensureDeferred
async def test_masterFails(side):
    """A connection that cannot be shared because there is none fails as a session's own does, and leaves nothing."""
    side.knownHosts.write_text("")
    words = f"-F none -oBatchMode=yes -oUserKnownHostsFile={side.knownHosts} -i {side.identity}"
    environ = {**side.environ, "NIX_SSHOPTS": words}
    shared = SSHMaster(reactor, RemoteAddress.parse(side.url()), environ, str(side.home / "s"))
    text = await side.fails(side.url(), environ=environ, master=shared)
    assert "its host key is not known" in text
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = side.url(port=silent.getsockname()[1])
        async with SSHMaster(reactor, RemoteAddress.parse(url), environ) as shared:
            attempt = connect(reactor, url, environ=environ, master=shared, timeoutSeconds=0.5)
            with pytest.raises(CannotConnect, match=r"no answer within 0\.5 s"):
                await attempt
    side.leavesNothing()
    assert not side.masters()


@pytest.mark.parametrize("parameters", [[], ["ssh-client=conch"]], ids=["openssh", "conch"])
@pytest_twisted.ensureDeferred
async def test_several(side, parameters):
    """Several sessions at once; ssh logs in once for all of them."""
    before = side.logins()
    async with connectSeveral(reactor, side.url(*parameters), 3, environ=side.environ) as clients:
        answers = await gatherResults([client.queryValidPaths([ABSENT]) for client in clients])
        assert answers == [frozenset()] * 3
    assert side.logins() == before + (3 if parameters else 1)
    await until(lambda: not side.masters())

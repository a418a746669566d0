"""Connecting without OpenSSH: a child, SSH within this process, a socket; and what cannot be reached."""

import os
import re
from base64 import b64encode

import pytest
import pytest_twisted
from cryptography.hazmat.primitives.asymmetric import ed25519
from twisted.conch.ssh.keys import Key
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.protocol import Factory, Protocol

from nixserve.codec.relay import Frame, RelayHeader, encodeFrame
from nixserve.errors import UsageError
from nixserve.remote import connecting
from nixserve.remote.address import RemoteAddress
from nixserve.remote.connecting import connect
from nixserve.remote.failures import CannotConnect
from tests.remote.children import ANSWER, ENVIRON, HELLO, child
from tests.ssh.loopback import Server
from tests.waiting import sleep, until, within


async def failing(url, environ=ENVIRON, **options):
    """@return: the error, of one line."""
    with pytest.raises((CannotConnect, UsageError)) as caught:
        await within(reactor, 10, connect(reactor, url, environ=environ, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A child


@pytest_twisted.ensureDeferred
async def test_child():
    """A child that answers is a session; its errors are delivered as they come, its arguments are the command's."""
    heard = []
    script = "os.write(2, ' '.join(sys.argv[1:]).encode())\n" + ANSWER
    client = await connect(reactor, child(script, "remote-store=/x"), environ=ENVIRON, onError=heard.append)
    assert client.version == 0x207
    await until(reactor, lambda: b"".join(heard) == b"--serve --write --store /x")
    await client.close()


@pytest_twisted.ensureDeferred
async def test_storeDirOfTheURL():
    """The logical store directory of the other side is the session's."""
    async with await connect(reactor, child(ANSWER, "store=/gnu/store"), environ=ENVIRON) as client:
        assert client.storeDir.path == "/gnu/store"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("os._exit(127)", "the remote program '"),
        ("os._exit(126)", "was not found or cannot be run there; install Nix there"),
        (
            "os.write(2, b'error: no\\n\\nwhy\\n'); os._exit(1)",
            "exited with status 1 (error: no why); try it by hand: ",
        ),
        ("os.kill(os.getpid(), 9)", "was killed by signal 9; try it by hand"),
        ("pass", "ended without an answer; try it by hand"),
        (f"os.write(1, {HELLO[:9]!r}); os._exit(3)", "exited with status 3; "),
        ("os.write(1, b'hi\\n')", "text came in place of the protocol: 'hi'; silence"),
        ("os.write(1, b'last login: never\\nmotd\\n'); time.sleep(60)", "protocol: 'last login: never motd'; silence"),
        (
            "os.write(2, b'oh'); os.write(1, b'a \\x1b[31mlong line of text'); os._exit(1)",
            "protocol: 'a \N{REPLACEMENT CHARACTER}[31mlong line of text' and, as an error, 'oh'; ",
        ),
        (
            f"os.write(1, {HELLO[:8]!r} + bytes([0, 3] + [0] * 6)); time.sleep(60)",
            "protocol version 3.0; try it by hand",
        ),
        ("time.sleep(60)", "no answer within 0.5 s; see whether the host is up"),
        ("os.write(2, b'waiting'); time.sleep(60)", "no answer within 4 s (waiting); see"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_childFails(script, expected):
    """Whatever a child does instead of answering."""
    announced = re.search(r"no answer within (\S+) s", expected)
    text = await failing(child(script), timeoutSeconds=float(announced[1]) if announced else 10)
    assert text.startswith("ssh://localhost: ") and expected in text


@pytest_twisted.ensureDeferred
async def test_muchOutput():
    """Of what comes in place of the protocol the beginning is enough."""
    text = await failing(child(f"os.write(1, b'a' * {connecting.MAX_EVIDENCE} + b'b' * 99); time.sleep(60)"))
    assert "aaaa'" in text and "bbb" not in text


@pytest_twisted.ensureDeferred
async def test_noProgram():
    """A program that this machine lacks."""
    text = await failing("ssh://localhost?remote-program=no-such-nix-store")
    assert text == (
        "ssh://localhost: there is no program 'no-such-nix-store' on this machine; "
        "install Nix, or add ?remote-program=/path/to/nix-store to the URL"
    )


@pytest_twisted.ensureDeferred
async def test_badURL():
    """A URL that is none fails as the others do, not at the call."""
    assert "unknown parameter" in await failing("ssh://localhost?x=y")


@pytest_twisted.ensureDeferred
async def test_cancel(tmp_path):
    """Cancelling ends the child before it is over."""
    mark = tmp_path / "pid"
    script = f"open({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    attempt = connect(reactor, child(script), environ=ENVIRON)
    await until(reactor, lambda: mark.exists() and mark.read_text())
    attempt.cancel()
    with pytest.raises(CancelledError):
        await within(reactor, 10, attempt)
    assert not os.path.exists(f"/proc/{mark.read_text()}")


# SSH within this process


class Home:
    """
    A server on loopback, and the files of a user who can reach it.

    @ivar environ: of the user.
    """

    def __init__(self, directory):
        (directory / "server").mkdir()
        self.server = Server(reactor, directory / "server")
        self.ssh = directory / ".ssh"
        self.ssh.mkdir(mode=0o700)
        self.identity = self.ssh / "id_ed25519"
        self.knownHosts = self.ssh / "known_hosts"
        self.write(self.identity, self.server.userKey.toString("OPENSSH"))
        self.knownHosts.write_bytes((directory / "server/known_hosts").read_bytes())
        self.environ = {"HOME": str(directory), "USER": "someone"}

    def write(self, path, content):
        """A file as ssh wants private keys to be."""
        path.write_bytes(content)
        path.chmod(0o600)

    def url(self, *parameters):
        """The server's URL."""
        return f"ssh://127.0.0.1:{self.server.number}?" + "&".join(["ssh-client=conch", *parameters])

    async def connect(self, *parameters):
        """A session, up to the point where the server, which is none of Nix's, would answer."""
        attempt = connect(reactor, self.url(*parameters), environ=self.environ)
        await until(reactor, lambda: self.server.sessions.all or attempt.called)
        if not attempt.called:
            self.server.sessions.all.pop().transport.write(HELLO)
        client = await within(reactor, 10, attempt)
        client.cut()
        await within(reactor, 10, client.ended)
        await until(reactor, lambda: not self.server.factory.connections)

    async def refuses(self, *parameters):
        """@return: the line that says why there is no session."""
        return await failing(self.url(*parameters), self.environ)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's home."""
    monkeypatch.setattr("nixserve.remote.conch.GLOBAL_KNOWN_HOSTS", str(tmp_path / "global"))
    one = Home(tmp_path)
    yield one
    pytest_twisted.blockon(Deferred.fromCoroutine(one.server.stop()))


def newKey():
    """A private key."""
    return Key(ed25519.Ed25519PrivateKey.generate())


@pytest_twisted.ensureDeferred
async def test_conch(home):
    """The user's own key and known_hosts are enough; the user name is the environment's if the URL has none."""
    await home.connect()
    home.environ = {"HOME": home.environ["HOME"]}
    assert "nothing says who logs in; write ssh://USER@127.0.0.1" in await home.refuses()
    home.environ["LOGNAME"] = "me"
    await home.connect()


@pytest_twisted.ensureDeferred
async def test_globalKnownHosts(home, tmp_path):
    """What the administrator vouches for counts as well."""
    home.knownHosts.rename(tmp_path / "global")
    await home.connect()


@pytest_twisted.ensureDeferred
async def test_keyOfTheURL(home, tmp_path):
    """A key file in the URL is the only one offered."""
    home.identity.rename(tmp_path / "key")
    await home.connect(f"ssh-key={tmp_path}/key")
    home.write(home.identity, newKey().toString("OPENSSH"))
    text = await home.refuses()
    assert f"it refused all keys for user 'someone' (tried: {home.identity}); add a public key" in text


@pytest_twisted.ensureDeferred
async def test_hostKeyOfTheURL(home):
    """A host key in the URL takes the place of all files, and a wrong one is answered with the right one."""
    right = b64encode(home.server.hostKey.public().toString("OPENSSH")).decode()
    wrong = b64encode(newKey().public().toString("OPENSSH")).decode()
    home.knownHosts.unlink()
    await home.connect(f"base64-ssh-public-host-key={right}")
    text = await home.refuses(f"base64-ssh-public-host-key={wrong}")
    assert "it shows the host key SHA256:" in text and text.endswith(f"base64-ssh-public-host-key={right}")


@pytest_twisted.ensureDeferred
async def test_identities(home):
    """A key that is protected or open to others is passed over if another will do, and named if none does."""
    protected = newKey().toString("OPENSSH", passphrase=b"secret", subtype="v1")
    home.write(home.ssh / "id_rsa", home.identity.read_bytes())
    home.write(home.identity, protected)
    await home.connect()
    (home.ssh / "id_rsa").unlink()
    text = await home.refuses()
    assert f"key '{home.identity}' is protected by a passphrase" in text and "leave ssh-client=conch out" in text
    home.identity.unlink()
    assert "there is no key to log in with in" in await home.refuses()
    assert "cannot read the key '/nonexistent/key'" in await home.refuses("ssh-key=/nonexistent/key")


@pytest_twisted.ensureDeferred
async def test_compression(home):
    """This side of SSH does not compress."""
    assert "compress=true needs ssh" in await home.refuses("compress=true")


@pytest_twisted.ensureDeferred
async def test_revokedHostKey(home):
    """A key that the user's file calls revoked is none that the host may show."""
    known = home.knownHosts.read_text()
    home.knownHosts.write_text(f"@revoked * {known.partition(' ')[2]}{known}")
    assert "is not known; if that is its own" in await home.refuses()


# A socket


class Other(Protocol):
    """The other side of a socket: says something when it has heard something."""

    def __init__(self, answer, lose):
        self.answer, self.lose, self.heard = answer, lose, b""

    def dataReceived(self, data):
        self.heard += data
        self.transport.write(self.answer)
        if self.lose:
            self.transport.loseConnection()


@pytest.fixture
def listen(tmp_path):
    """Listens on a socket: called with what is answered, and whether that is the end. Its URL."""
    ports = []

    async def start(answer, lose=True):
        factory = Factory.forProtocol(lambda: Other(answer, lose))
        ports.append(await UNIXServerEndpoint(reactor, str(tmp_path / "s")).listen(factory))
        return f"unix://{tmp_path}/s"

    yield start
    for port in ports:
        pytest_twisted.blockon(port.stopListening())


@pytest.mark.parametrize(
    ("answer", "lose", "expected"),
    [
        (b"", True, "the other side of the socket is no nixserve service"),
        (b"error: protocol mismatch\n", True, "the other side of the socket is no nixserve service"),
        (b"", False, "no answer within 0.5 s; see whether 'twistd nixserve' listens there"),
        (
            encodeFrame(Frame.ERROR, b"error: no\n") + encodeFrame(Frame.EXIT, b"\1"),
            True,
            "exited with status 1 (error: no); ",
        ),
        (encodeFrame(Frame.OUTPUT, b"hello there, this is text"), True, "protocol: 'hello there, this is text'"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_otherSockets(listen, answer, lose, expected):
    """Sockets behind which no service of ours is, and one that refuses."""
    url = await listen(answer, lose)
    text = await failing(url, timeoutSeconds=5 if lose else 0.5)
    assert text.startswith("unix:///") and expected in text


@pytest.mark.parametrize(("write", "rights"), [(True, "read,write,build,trust"), (False, "read")])
@pytest_twisted.ensureDeferred
async def test_rightsAskedFor(tmp_path, write, rights):
    """A service is asked for no more rights than are needed."""
    other = Other(b"", True)
    port = await UNIXServerEndpoint(reactor, str(tmp_path / "s")).listen(Factory.forProtocol(lambda: other))
    await failing(f"unix://{tmp_path}/s", write=write)
    assert other.heard.startswith(RelayHeader(rights).encode())
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_noSocket(tmp_path):
    """A socket that is not there, or to which nobody listens."""
    text = await failing(f"unix://{tmp_path}/none")
    assert "cannot connect to the socket (No such file or directory); start 'twistd nixserve'" in text


@pytest_twisted.ensureDeferred
async def test_parsedAddress():
    """An address that has been parsed already will do."""
    async with await connect(reactor, RemoteAddress.parse(child(ANSWER)), environ=ENVIRON) as client:
        assert client.name == "ssh://localhost"
    await sleep(reactor, 0)
    assert connecting.SETUP_SECONDS == 30

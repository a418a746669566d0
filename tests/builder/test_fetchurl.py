"""
C{builtin:fetchurl}: files from a server of ours, and what is refused.
"""

import datetime
import gzip
import ipaddress
import json
import lzma
import os
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nixserve.builder.builtinjob import BuiltinFailed, BuiltinJob
from nixserve.builder.process import Ending
from nixserve.errors import NixServeError
from nixserve.store.files import dumpPath
from tests.builder.builtinruns import fetch, run, tree
from tests.builder.workplace import OUT, needsSandbox, workplace


@pytest.mark.parametrize("path", ["hello", "redirect", "hello/é", "hello/a%20b?c=d&e"])
def test_fetch(server, out, path):
    """The file as the server has it, behind redirections too."""
    fetch(f"{server.url}/{path}", out)
    assert out.read_bytes() == b"hello"
    assert not out.stat().st_mode & 0o111


def test_requests(server, out):
    """What is asked for: quoted where that is needed, never twice, and in no encoding."""
    fetch(f"{server.url}/hello/é%20 x", out)
    [(path, headers)] = server.requests
    assert path == "/hello/%C3%A9%20%20x"
    assert headers["User-Agent"].startswith("nixserve/")
    assert headers["Accept-Encoding"] == "identity"


def test_notDecoded(server, out):
    """An encoding that the server chose all the same is not undone: hashes are of what travels."""
    fetch(f"{server.url}/compressed", out)
    assert gzip.decompress(out.read_bytes()) == b"hello"


def test_large(server, out, capfd):
    """More than one chunk; what it says on the way is for Nix's log readers."""
    server.served = os.urandom(3_000_000)
    fetch(f"{server.url}/served", out)
    assert out.read_bytes() == server.served
    lines = capfd.readouterr().err.splitlines()
    records = [json.loads(line.removeprefix("@nix ")) for line in lines]
    assert (records[0]["action"], records[0]["type"], records[0]["fields"]) == ("start", 101, [f"{server.url}/served"])
    assert records[-1] == {"action": "stop", "id": records[0]["id"]}


def test_executable(server, out):
    """C{executable} = C{1} makes it executable."""
    fetch(f"{server.url}/hello", out, executable="1")
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    fetch(f"{server.url}/hello", out.with_name("other"), executable="")
    assert not out.with_name("other").stat().st_mode & 0o111


@pytest.mark.parametrize("compress", [None, lzma.compress])
def test_unpack(server, out, tmp_path, compress):
    """C{unpack} = C{1} restores a NAR, if its name says so a compressed one."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(os.urandom(1_000_000) + bytes(1_000_000))
    (source / "link").symlink_to("file")
    nar = b"".join(dumpPath(str(source)))
    server.served = compress(nar) if compress else nar
    fetch(f"{server.url}/served/{'x.xz' if compress else 'x'}", out, unpack="1")
    assert tree(out) == tree(source)


@pytest.mark.parametrize("name", ["x", "x.xz"])
def test_unpackOther(server, out, name):
    """What is no NAR, or not compressed, cannot be unpacked, and leaves nothing."""
    server.served = b"hello"
    with pytest.raises(NixServeError):
        fetch(f"{server.url}/served/{name}", out, unpack="1")
    assert not out.exists()


def test_unpackTruncated(server, out, tmp_path):
    """A compressed NAR that ends early is no NAR."""
    (tmp_path / "file").write_bytes(os.urandom(10_000))
    server.served = lzma.compress(b"".join(dumpPath(str(tmp_path / "file"))))[:-5_000]
    with pytest.raises(NixServeError, match="ends early"):
        fetch(f"{server.url}/served/x.xz", out, unpack="1")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("404", r"HTTP error 404 \('Not Found'\)"),
        ("403", "HTTP error 403"),
        ("501", "HTTP error 501"),
        ("elsewhere", "HTTP error 302|file"),
        ("loop", "HTTP error 302"),
    ],
)
def test_refused(server, out, path, message):
    """Answers that will be the same next time are not asked for again."""
    with pytest.raises(BuiltinFailed, match=f"^unable to download '{server.url}/{path}': .*({message})"):
        fetch(f"{server.url}/{path}", out, attempts=3)
    assert server.count(f"/{path}") == (1 if path != "loop" else server.count("/loop"))
    assert not out.exists()


@pytest.mark.parametrize("path", ["once", "partial", "closed"])
def test_triesAgain(server, out, path, capfd, monkeypatch):
    """A failure that may pass is tried again, with a warning."""
    monkeypatch.setattr("nixserve.builder.fetchurl._RETRY_DELAY", 0.01)
    fetch(f"{server.url}/{path}", out, attempts=2)
    assert out.read_bytes() == b"hello"
    assert server.count(f"/{path}") == 2
    warnings = [line for line in capfd.readouterr().err.splitlines() if '"msg"' in line]
    assert len(warnings) == 1
    assert "retrying in" in json.loads(warnings[0].removeprefix("@nix "))["msg"]


@pytest.mark.parametrize(
    ("path", "message"), [("500", "HTTP error 500"), ("429", "HTTP error 429"), ("partial", "3 of 5 bytes")]
)
def test_givesUp(server, out, path, message):
    """After the last attempt the failure stands, and no part of a file."""
    with pytest.raises(BuiltinFailed, match=f"^unable to download '{server.url}/{path}': .*{message}"):
        fetch(f"{server.url}/{path}", out)
    assert not out.exists()


def test_noServer(out):
    """Nobody listens there."""
    with pytest.raises(BuiltinFailed, match=r"unable to download 'http://127.0.0.1:1/x': .*Connection refused"):
        fetch("http://127.0.0.1:1/x", out)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://127.0.0.1/x", "scheme 'ftp' is not supported"),
        ("nonsense", "scheme '' is not supported"),
        ("http://", "no host given"),
        ("http://[1/", "Invalid IPv6"),
        ("http://127.0.0.1:x/", "nonnumeric port"),
        ("file:///nonexistent/x", "No such file"),
        ("file://other/etc/passwd", "on another host"),
        ("file:///a%00b", "null byte"),
    ],
)
def test_badURLs(out, url, message):
    """What cannot be downloaded from says why."""
    with pytest.raises(BuiltinFailed, match=f"unable to download '.*{message}"):
        fetch(url, out, attempts=2)


def test_file(tmp_path, out):
    """Files of this machine, or what the build sees of it."""
    (tmp_path / "a b").write_bytes(b"x")
    fetch(f"file://{tmp_path}/a%20b", out)
    assert out.read_bytes() == b"x"


def test_needsNetwork(server, out):
    """Only if the output has a fixed hash, or is impure."""
    with pytest.raises(BuiltinFailed, match="must be a fixed-output or impure derivation"):
        run("fetchurl", out, url=f"{server.url}/hello")
    assert server.requests == []


@pytest.fixture
def certificate(tmp_path):
    """A certificate for 127.0.0.1 that signs itself; file and PEM text."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path / "certificate.pem"
    file.write_bytes(pem + private)
    return file, pem.decode()


def test_certificates(server, out, certificate):
    """Over TLS only from whom a known authority vouches for."""
    file, pem = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://127.0.0.1:{server.server_port}/hello"
    with pytest.raises(BuiltinFailed, match="certificate verify failed"):
        fetch(url, out, attempts=3)
    with pytest.raises(BuiltinFailed, match="certificate verify failed"):
        fetch(url.replace("127.0.0.1", "localhost"), out, caCertificates=pem)
    fetch(url, out, caCertificates=f"# Größe\n{pem}# more\n{pem}")
    assert out.read_bytes() == b"hello"
    with pytest.raises(BuiltinFailed, match="cannot be read"):
        fetch(url, out, caCertificates="nonsense")


@needsSandbox
def test_inSandbox(server):
    """As the builder of a build, in its sandbox and under its user, it sees the network but no files of the host."""
    with workplace() as place:
        sandbox = place.sandbox(network=True)
        for url, status in ((f"{server.url}/hello", 0), ("file:///etc/fstab", 1)):
            job = BuiltinJob("builtin:fetchurl", {"url": url}, OUT, network=True)
            options = {"builder": job.builder, "args": [], "stdin": job.encode()}
            outcome = place.run("", sandbox, module="nixserve.builder.builtins", **options)
            assert (outcome.ending, outcome.code) == (Ending.EXIT, status), place.text
        assert "error: unable to download 'file:///etc/fstab': No such file or directory" in place.text
        assert Path(sandbox.realPath(OUT)).read_bytes() == b"hello"
        assert os.stat(sandbox.realPath(OUT)).st_uid == place.user.uid

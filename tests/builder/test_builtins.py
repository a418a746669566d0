"""The builders that are part of Nix, alone and beside those of the real one."""

import datetime
import gzip
import http.server
import inspect
import io
import ipaddress
import json
import lzma
import os
import shutil
import ssl
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nixserve.builder.builtinjob import BuiltinFailed, BuiltinJob
from nixserve.builder.builtins import isBuiltin, runBuiltin
from nixserve.builder.process import Ending
from nixserve.codec.derivation import parseDerivation
from nixserve.codec.storepath import StoreDir
from nixserve.errors import NixServeError
from nixserve.store.files import dumpPath
from tests.builder.workplace import OUT, needsSandbox, workplace


@pytest.fixture(autouse=True)
def noProxies(monkeypatch):
    """Downloads of tests go nowhere but to this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def run(name, out, network=False, attempts=1, caCertificates="", **env):
    """Run a builtin builder here."""
    runBuiltin(BuiltinJob(f"builtin:{name}", env, str(out), network, caCertificates, attempts))


def tree(top):
    """By path: the target of a link, the contents of a file and whether it is executable; C{None}: a directory."""
    found = {}
    for path in sorted(Path(top).rglob("*")):
        name = str(path.relative_to(top))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = None
        else:
            found[name] = (path.read_bytes(), bool(path.stat().st_mode & 0o100))
    return found


# All of them.


def test_unknown(tmp_path):
    """There are no others."""
    with pytest.raises(BuiltinFailed, match=r"^unsupported builtin builder 'nope'$"):
        run("nope", tmp_path / "out")


def test_isBuiltin():
    """They are known by the beginning of their names."""
    assert isBuiltin("builtin:nope")
    assert not isBuiltin("/bin/builtin:fetchurl")


def test_jobTravels():
    """What one process writes another reads, whatever bytes derivations hold."""
    job = BuiltinJob("builtin:x", {"a": "é\udcff\n"}, "/out", True, "PEM", 3)
    assert BuiltinJob.decode(job.encode()) == job
    assert BuiltinJob.decode(job.encode().decode("ascii")) == job


def runProcess(job):
    """Run a job in a process of its own."""
    command = [sys.executable, "-m", "nixserve.builder.builtins"]
    return subprocess.run(
        command, input=job.encode(), capture_output=True, cwd=Path(__file__).parents[2], timeout=60, check=False
    )


def test_ownProcess(tmp_path):
    """In a process: nothing on success, on failure a line that begins with C{error:} and status 1."""
    (tmp_path / "file").write_text("hello")
    job = BuiltinJob("builtin:fetchurl", {"url": f"file://{tmp_path}/file"}, str(tmp_path / "out"), network=True)
    done = runProcess(job)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "hello"
    assert all(line.startswith(b"@nix {") for line in done.stderr.splitlines())
    done = runProcess(BuiltinJob("builtin:fetchurl", {}, str(tmp_path / "out"), network=True))
    assert (done.returncode, done.stderr) == (1, b"error: attribute 'url' missing\n")


def test_nothingIsImportedLate(tmp_path, server):
    """In a sandbox no Python file can be read, so all that is ever needed is imported before."""
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("é/x"))
    code = f"""
import sys
from nixserve.builder.builtins import BuiltinJob, runBuiltin
from nixserve.errors import NixServeError
sys.meta_path.clear(); sys.path.clear(); sys.path_importer_cache.clear()
known = set(sys.modules)
out = {str(tmp_path)!r}
runBuiltin(BuiltinJob("builtin:unpack-channel", {{"src": out + "/a.tar.xz", "channelName": "c"}}, out + "/1"))
runBuiltin(BuiltinJob("builtin:buildenv", {{"derivations": "", "manifest": "/m"}}, out + "/2"))
runBuiltin(BuiltinJob("builtin:fetchurl", {{"url": "{server.url}/redirect"}}, out + "/3", True))
for url in ("http://bücher.invalid/", "{server.url}/404", "{server.url}/partial", "https://127.0.0.1:1/", "file:///dev/null"):
    try:
        runBuiltin(BuiltinJob("builtin:fetchurl", {{"url": url}}, out + "/3", True, attempts=1))
    except NixServeError as error:
        assert "No module" not in str(error), error
assert set(sys.modules) == known, set(sys.modules) - known
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parents[2], timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


# fetchurl.


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the name of the file says."""

    def do_GET(self):
        """Answer a request."""
        self.server.requests.append((self.path, self.headers))
        again = len([path for path, _ in self.server.requests if path == self.path]) > 1
        match self.path.split("/")[1]:
            case "hello":
                self.reply(200, b"hello")
            case "compressed":
                self.reply(200, gzip.compress(b"hello", mtime=0), ("Content-Encoding", "gzip"))
            case "redirect":
                self.reply(302, b"", ("Location", "/hello"))
            case "elsewhere":
                self.reply(302, b"", ("Location", "file:///etc/passwd"))
            case "loop":
                self.reply(302, b"", ("Location", "/loop"))
            case "once":
                self.reply(200 if again else 503, b"hello")
            case "partial":
                self.reply(200, b"hello" if again else b"hel", ("Content-Length", "5"))
            case "closed":
                self.close_connection = True
                if again:
                    self.reply(200, b"hello")
            case "served":
                self.reply(200, self.server.served)
            case code:
                self.reply(int(code), b"nope")

    def reply(self, code, body, *headers):
        """Send an answer."""
        self.send_response(code)
        if not any(name == "Content-Length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments):
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Runs in a thread, on loopback."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.served = b""
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})

    def count(self, path):
        """How often C{path} was asked for."""
        return [asked for asked, _ in self.requests].count(path)

    def handle_error(self, *arguments):
        """Clients that hang up are no news."""


@pytest.fixture
def server():
    """A server of files."""
    server = Server()
    server.thread.start()
    yield server
    server.shutdown()
    server.thread.join()
    server.server_close()


@pytest.fixture
def out(tmp_path):
    """Where an output goes."""
    return tmp_path / "out"


def fetch(url, out, **more):
    """Download a file."""
    run("fetchurl", out, network=True, url=url, **more)


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


# buildenv.


def makeTree(top, described):
    """Make a tree as L{tree} describes it; files are text."""
    for name, value in described.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if value is None:
            path.mkdir(exist_ok=True)
        elif value.startswith("-> "):
            path.symlink_to(value.removeprefix("-> "))
        else:
            path.write_text(value)
    return top


PACKAGES = {
    "p1": {
        "bin/one": "1",
        "bin/both": "from p1",
        "share/doc/one": "1",
        "share/only1/x": "1",
        ".hidden": "x",
        "nix-support/propagated-user-env-packages": "@p3@ @p4@\n@p1@",
        "nix-support/propagated-build-inputs": "x",
        "info/dir": "x",
        "info/other": "x",
        "log": "x",
        "lib/perllocal.pod": "x",
        "lib/log/x": "x",
        "manifest.nix": "x",
        "manifest.json": "x",
        "dangling": "-> nowhere",
        "tofile": "-> bin/one",
        "todir": "-> share",
        "etc": "-> share",
    },
    "p2": {
        "bin/two": "2",
        "bin/both": "from p2",
        "share/doc/two": "2",
        "etc/x": "2",
        "info/third": "x",
        "todir/two": "2",
        "lib/log/y": "x",
    },
    "p3": {"bin/both": "from p3", "bin/three": "3", "nix-support/propagated-user-env-packages": "@p5@"},
    "p4": {"share/doc/four": "4", "bin/three": "from p4"},
    "p5": {"five": "5", "share/deep/er/five": "5"},
    "p6": {"inactive": "6"},
    "notdir": None,
}


@pytest.fixture
def packages(tmp_path):
    """Directories to merge, by name."""
    places = {name: tmp_path / "packages" / name for name in PACKAGES}

    def fill(text):
        for name, place in places.items():
            text = text.replace(f"@{name}@", str(place))
        return text

    for name, described in PACKAGES.items():
        if described is None:
            places[name].write_text("x")
        else:
            places[name].mkdir(parents=True)
            makeTree(places[name], {path: value and fill(value) for path, value in described.items()})
    return places


def derivations(packages, *described):
    """The attribute of that name, from triples of whether it is active, priority and name."""
    return " ".join(f"{active} {priority} 1 {packages[name]}" for active, priority, name in described)


CHOICE = (("true", "5", "p1"), ("true", "6", "p2"), ("false", "1", "p6"), ("1", "-7", "notdir"))


def test_environment(packages, out, capfd):
    """Many packages, one tree: links to what only one has, merged directories, the better of two files."""
    run("buildenv", out, derivations=derivations(packages, *CHOICE), manifest="/manifest")
    found = {path: target for path, target in tree(out).items() if target is not None}
    p1, p2, p3, p4, p5 = (packages[name] for name in ("p1", "p2", "p3", "p4", "p5"))
    assert found == {
        "bin/both": f"{p1}/bin/both",
        "bin/one": f"{p1}/bin/one",
        "bin/two": f"{p2}/bin/two",
        "bin/three": f"{p3}/bin/three",
        "etc/doc": f"{p1}/share/doc",
        "etc/only1": f"{p1}/share/only1",
        "etc/x": f"{p2}/etc/x",
        "five": f"{p5}/five",
        "info/other": f"{p1}/info/other",
        "info/third": f"{p2}/info/third",
        "manifest.nix": "/manifest",
        "share/deep": f"{p5}/share/deep",
        "share/doc/four": f"{p4}/share/doc/four",
        "share/doc/one": f"{p1}/share/doc/one",
        "share/doc/two": f"{p2}/share/doc/two",
        "share/only1": f"{p1}/share/only1",
        "todir/doc": f"{p1}/share/doc",
        "todir/only1": f"{p1}/share/only1",
        "todir/two": f"{p2}/todir/two",
        "tofile": f"{p1}/tofile",
    }
    log = capfd.readouterr().err
    assert f"not including '{packages['notdir']}'" in log
    assert f"skipping dangling symlink '{out}/dangling'" in log


def test_oneOfSeveralOutputs(packages, out):
    """A package may have several outputs, each with its priority."""
    paths = f"{packages['p4']} {packages['p5']}"
    run("buildenv", out, derivations=f"true 5 2 {paths}", manifest="/manifest")
    assert {"bin", "five", "share"} <= tree(out).keys()


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (
            (("true", "5", "p1"), ("true", "5", "p2")),
            "packages '.*/p2/bin/both' and '.*/p1/bin/both' have the same",
        ),
        ((("true", "5", "fileBin"), ("true", "6", "p2")), "collision between '.*/p2/bin' and non-directory '.*/bin'"),
        (
            (("true", "5", "p1"), ("true", "6", "p2"), ("true", "7", "fileBin")),
            "collision between non-directory '.*/fileBin/bin' and directory '.*/out/bin'",
        ),
    ],
)
def test_collisions(packages, tmp_path, out, described, message):
    """Neither of two files wins; a file and a directory cannot be merged."""
    packages["fileBin"] = makeTree(tmp_path / "fileBin", {"bin": "x"})
    with pytest.raises(BuiltinFailed, match=message):
        run("buildenv", out, derivations=derivations(packages, *described), manifest="/manifest")


@pytest.mark.parametrize("text", ["true", "true x 1 /a", "true 5 2 /a", "true 5"])
def test_malformedDerivations(out, text):
    """The list of packages must be complete; real Nix crashes."""
    with pytest.raises(BuiltinFailed, match="attribute 'derivations' is malformed"):
        run("buildenv", out, derivations=text, manifest="/manifest")


def test_missingPackage(tmp_path, out):
    """A package that is not there is an error."""
    with pytest.raises(FileNotFoundError):
        run("buildenv", out, derivations=f"true 5 1 {tmp_path}/nowhere", manifest="/manifest")


def test_deepPackages(tmp_path, out):
    """Trees may be deeper than Python's stack."""
    deep = "/".join(150 * ["d"])
    a, b = (makeTree(tmp_path / name, {f"{deep}/{name}": "x"}) for name in ("a", "b"))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        run("buildenv", out, derivations=f"1 5 1 {a} 1 6 1 {b}", manifest="/m")
    finally:
        sys.setrecursionlimit(limit)
    assert os.readlink(out / deep / "a") == f"{a}/{deep}/a"
    assert os.readlink(out / deep / "b") == f"{b}/{deep}/b"


# unpack-channel.


def makeArchive(path, *members, mode="w"):
    """
    Write a tar file.

    @param members: (name, type, text or target).
    """
    with tarfile.open(path, mode) as archive:
        for name, kind, *rest in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            member.mode = 0o755 if "exec" in name or kind == tarfile.DIRTYPE else 0o644
            contents = b""
            if kind == tarfile.REGTYPE:
                contents = rest[0].encode()
            elif rest:
                member.linkname = rest[0]
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return path


FILE, DIR, LINK, HARD = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE

CHANNEL = [
    ("top-1.0", DIR),
    ("top-1.0/default.nix", FILE, "nix"),
    ("./top-1.0/exec", FILE, "#!"),
    ("/top-1.0//abs", FILE, "abs"),
    ("top-1.0/no/directory/entry", FILE, "x"),
    ("top-1.0/link", LINK, "../../../etc"),
    ("top-1.0/absLink", LINK, "/etc/passwd"),
    ("top-1.0/hard", HARD, "top-1.0/exec"),
    ("top-1.0/é", FILE, "é"),
    ("top-1.0/again", FILE, "first"),
    ("top-1.0/again", FILE, "second"),
    ("top-1.0/empty", DIR),
]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_unpackChannel(tmp_path, out, mode):
    """The one directory in the archive, under the name of the channel, however it is compressed."""
    source = makeArchive(tmp_path / "archive", *CHANNEL, mode=mode)
    run("unpack-channel", out, src=str(source), channelName="foo")
    assert tree(out) == {
        "foo": None,
        "foo/default.nix": (b"nix", False),
        "foo/exec": (b"#!", True),
        "foo/abs": (b"abs", False),
        "foo/no": None,
        "foo/no/directory": None,
        "foo/no/directory/entry": (b"x", False),
        "foo/link": "../../../etc",
        "foo/absLink": "/etc/passwd",
        "foo/hard": (b"#!", True),
        "foo/é": ("é".encode(), False),
        "foo/again": (b"second", False),
        "foo/empty": None,
    }


def test_oneFile(tmp_path, out):
    """A file alone is as good as a directory, and may have the name already."""
    run("unpack-channel", out, src=str(makeArchive(tmp_path / "a", ("foo", FILE, "x"))), channelName="foo")
    assert tree(out) == {"foo": (b"x", False)}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../evil", FILE, "x")], "contains '..'"),
        ([("a/../../evil", FILE, "x")], "contains '..'"),
        ([("a", LINK, ".."), ("a/evil", FILE, "x")], "Not a directory|Too many levels"),
        ([("a", LINK, "/"), ("a/tmp", DIR)], "Not a directory|Too many levels|exists"),
        ([("a/b", LINK, "@dir@"), ("a/b/evil", FILE, "x")], "Not a directory|Too many levels"),
        ([("a", HARD, "../secret")], "contains '..'"),
        ([("a", LINK, "@dir@"), ("b", HARD, "a/secret")], "Not a directory|Too many levels"),
        ([("a", LINK, "@dir@/secret"), ("b", HARD, "a")], "no regular file"),
        ([("a", HARD, "/")], "to a directory"),
        ([("a", HARD, "nowhere")], "No such file"),
        ([("a", tarfile.FIFOTYPE)], "unsupported type"),
        ([("a", tarfile.CHRTYPE)], "unsupported type"),
        ([("/".join(5000 * "a"), FILE, "x")], "more than 4096 components"),
    ],
)
def test_hostileArchives(tmp_path, out, members, message):
    """Nothing in an archive leads outside of the output, to write there or to read."""
    (tmp_path / "secret").write_text("secret")
    before = tree(tmp_path)
    members = [(name, kind, *(text.replace("@dir@", str(tmp_path)) for text in rest)) for name, kind, *rest in members]
    with pytest.raises((BuiltinFailed, OSError), match=message):
        run("unpack-channel", out, src=str(makeArchive(tmp_path / "archive", *members)), channelName="foo")
    shutil.rmtree(out)
    (tmp_path / "archive").unlink()
    assert tree(tmp_path) == before


def test_linkIsReplaced(tmp_path, out):
    """A file in the place of an earlier link replaces the link, not what it leads to."""
    (tmp_path / "secret").write_text("secret")
    source = makeArchive(tmp_path / "archive", ("a", LINK, str(tmp_path / "secret")), ("a", FILE, "x"))
    run("unpack-channel", out, src=str(source), channelName="foo")
    assert (tmp_path / "secret").read_text() == "secret"
    assert tree(out) == {"foo": (b"x", False)}


@pytest.mark.parametrize(
    ("members", "message"),
    [([], "is empty"), ([(".", DIR)], "is empty"), ([("a", DIR), ("b", FILE, "x")], "contains more than one file")],
)
def test_notOneEntry(tmp_path, out, members, message):
    """A channel is one directory."""
    source = makeArchive(tmp_path / "archive", *members)
    with pytest.raises(BuiltinFailed, match=f"channel tarball '{source}' {message}"):
        run("unpack-channel", out, src=str(source), channelName="foo")


@pytest.mark.parametrize("name", ["a/b", "/", "", ".", ".."])
def test_badChannelName(tmp_path, out, name):
    """The name of the channel is that of a file."""
    source = makeArchive(tmp_path / "archive", ("a", FILE, "x"))
    with pytest.raises(BuiltinFailed, match="channelName is not allowed to contain filesystem separators"):
        run("unpack-channel", out, src=str(source), channelName=name)


@pytest.mark.parametrize("cut", [0, 5, 700, -700])
@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_damagedArchives(tmp_path, out, mode, cut):
    """What is no archive, or a part of one, is an error."""
    source = makeArchive(tmp_path / "archive", ("a", FILE, os.urandom(3000).hex()), mode=mode)
    source.write_bytes(source.read_bytes()[:cut])
    with pytest.raises((BuiltinFailed, OSError)):
        run("unpack-channel", out, src=str(source), channelName="foo")


# Beside the real ones.


@pytest.fixture
def nixBuild(tmp_path):
    """Builds an expression with the real Nix in a store of its own; gives the derivation and its output there."""
    if shutil.which("nix-build") is None:
        pytest.skip("no nix-build on PATH")
    root = tmp_path / "nix"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "nix.conf").write_text("sandbox = false\nbuild-users-group =\nsubstituters =\n")
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(root),
        "NIX_STORE_DIR": str(root / "store"),
        "NIX_STATE_DIR": str(root / "state"),
        "NIX_LOG_DIR": str(root / "log"),
        "NIX_CONF_DIR": str(root / "etc"),
    }

    def build(expression):
        outputs = []
        for program in ("nix-instantiate", "nix-build"):
            options = ["--no-out-link"] if program == "nix-build" else []
            done = subprocess.run(
                [program, *options, "--expr", expression], env=env, capture_output=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr.decode()
            outputs.append(done.stdout.decode().strip())
        drvPath, out = outputs
        name = drvPath.split("-", 1)[1].removesuffix(".drv")
        drv = parseDerivation(Path(drvPath).read_bytes(), name, StoreDir(str(root / "store")))
        return drv, out

    yield build
    subprocess.run(["chmod", "-R", "u+w", root], check=False)


@pytest.mark.interop
def test_environmentAsNix(packages, out, nixBuild):
    """The tree is the one that Nix makes of the same packages."""
    choice = f'''"{" ".join(f"{active} {priority} 1 ${{{packages[name]}}}" for active, priority, name in CHOICE)}"'''
    drv, theirs = nixBuild(
        'derivation { name = "env"; system = "builtin"; builder = "builtin:buildenv"; '
        f'manifest = builtins.toFile "m" ""; derivations = {choice}; }}'
    )
    runBuiltin(BuiltinJob(drv.builder, drv.env, str(out)))
    assert tree(out) == tree(theirs)


@pytest.mark.interop
def test_channelAsNix(tmp_path, out, nixBuild):
    """The tree is the one that Nix unpacks from the same archive."""
    source = makeArchive(tmp_path / "archive.tar.xz", *CHANNEL, mode="w:xz")
    drv, theirs = nixBuild(
        'derivation { name = "c"; system = "builtin"; builder = "builtin:unpack-channel"; '
        f'channelName = "foo"; src = {source}; }}'
    )
    runBuiltin(BuiltinJob(drv.builder, drv.env, str(out)))
    assert tree(out) == tree(theirs)

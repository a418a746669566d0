"""Store paths: what is one, and how Nix computes them."""

import dataclasses

import pytest
from hypothesis import given

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.hashes import Hash, hashBytes
from nixserve.codec.storepath import BadStorePath, StoreDir, StorePath, checkName, outputPathName
from nixserve.errors import FormatError
from tests import strategies

STORE = StoreDir()
H = "i9pmrzmpshapij2kin22pff6fc2adavx"
BASE = f"{H}-hello.txt"
PATH = f"/nix/store/{BASE}"

HELLO = b"hello\n"
HELLO_NAR = Hash("sha256", bytes.fromhex("1c37d01af40be2e80691de3cc3df44377a699afbb17c68f080964b2fd071fc13"))

NAMES = [".a", "..a", "a..", "...", ".x-y", "-a", "--", "a.lock", "a?b=c+d_e-f.G", "a" * 211]
BAD_NAMES = [
    ("", "has an empty name"),
    ("a" * 212, "has a name longer than 211 characters"),
    ("é", "contains illegal character 'é'"),
    ("a\n", "contains illegal character"),
    ("a\0", "contains illegal character"),
    *[(f"a{c}b", f"contains illegal character '{c}'") for c in " ~:%,#"],
    *[(name, "first component is '.' or '..'") for name in (".", "..", ".-a", "..-a", ".-", "..-x-y")],
]


def test_parts():
    """A store path is text that knows its parts."""
    path = STORE.parse(PATH)
    assert isinstance(path, StorePath)
    assert (path, path.storeDir, path.baseName) == (PATH, "/nix/store", BASE)
    assert (path.hashPart, path.name, path.isDerivation) == (H, "hello.txt", False)
    assert STORE.parse(f"/nix/store/{H}-x.drv").isDerivation


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    """Names that every Nix accepts, by each way in."""
    checkName(name)
    path = STORE.parse(f"/nix/store/{H}-{name}")
    assert path.name == name
    assert STORE.parseBaseName(path.baseName) == path
    assert STORE.parseMany([path]) == [path]
    assert STORE.makeStorePath("source", HELLO_NAR, name).name == name


@pytest.mark.parametrize(("name", "message"), BAD_NAMES)
def test_badNames(name, message):
    """Names that some Nix refuses, by each way in."""
    with pytest.raises(BadStorePath, match=message):
        checkName(name)
    with pytest.raises(BadStorePath, match=message):
        STORE.parseBaseName(f"{H}-{name}")
    with pytest.raises(BadStorePath):
        STORE.parse(f"/nix/store/{H}-{name}")
    with pytest.raises(BadStorePath):
        STORE.parseMany([PATH, f"/nix/store/{H}-{name}"])
    with pytest.raises(BadStorePath, match=message):
        STORE.makeStorePath("source", HELLO_NAR, name)


@pytest.mark.parametrize(
    "text",
    [
        f"//nix/store/{BASE}",
        f"/nix//store///{BASE}",
        f"/nix/./store/./{BASE}",
        f"{PATH}/",
        f"{PATH}/.",
        f"/nix/store/../store/{BASE}",
        f"/../nix/store/{BASE}",
    ],
)
def test_normalises(text):
    """A path is normalised by text alone before it is judged, as real Nix does."""
    assert STORE.parse(text) == PATH
    assert STORE.parseMany([PATH, text]) == [PATH, PATH]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an absolute path: ''"),
        (BASE, "not an absolute path"),
        (f"nix/store/{BASE}", "not an absolute path"),
        ("/", "path '/' is not in the Nix store"),
        ("/nix/store", "path '/nix/store' is not in the Nix store"),
        ("/nix/store/", "path '/nix/store/' is not in the Nix store"),
        (f"/nix/stor/{BASE}", "is not in the Nix store"),
        (f"/nix/store2/{BASE}", "is not in the Nix store"),
        (f"{PATH}/bin", "is not in the Nix store"),
        (f"{PATH}/../../{BASE}", "is not in the Nix store"),
        ("/nix/store/abc", "'abc' is too short to be a valid store path"),
        (f"/nix/store/{H}", f"'{H}' is too short to be a valid store path"),
        (f"/nix/store/{H.replace('i', 'e')}-x", "contains illegal base-32 character 'e'"),
        (f"/nix/store/{H.upper()}-x", "contains illegal base-32 character 'I'"),
        (f"/nix/store/{H}xabc", "has no dash after its hash part"),
        (f"{PATH}\n", "contains illegal character"),
        ("/nix/store/" + "a" * 5000, "is too long: found 5011 characters"),
    ],
)
def test_rejects(text, message):
    """What is no store path is refused, in Nix's words where Nix refuses it too."""
    with pytest.raises(BadStorePath, match=message):
        STORE.parse(text)
    with pytest.raises(BadStorePath, match=message):
        STORE.parseMany([PATH, text])


def test_errorTextIsBounded():
    """A peer's megabytes do not come back in the error."""
    for parse in (STORE.parse, STORE.parseBaseName, STORE.toStorePath, checkName):
        with pytest.raises(BadStorePath) as caught:
            parse("/nix/store/" + "a" * 10**6)
        assert len(str(caught.value)) < 5000


def test_toStorePath():
    """A path inside an object leads to the object."""
    for text in (PATH, f"{PATH}/", f"{PATH}/bin/x", f"{PATH}/../../x"):
        assert STORE.toStorePath(text) == PATH
    for text in ("/nix/store", "/nix/store/", f"/tmp/{BASE}", f"/nix/store/{H}/x", ""):
        with pytest.raises(BadStorePath):
            STORE.toStorePath(text)


def test_isInStore():
    """Anything below the store directory is in the store; the directory itself is not."""
    assert STORE.isInStore("/nix/store/x")
    assert STORE.isInStore(f"{PATH}/bin")
    for text in ("/nix/store", "/nix/store/", "/nix/store2/x", "nix/store/x"):
        assert not STORE.isInStore(text)


@given(strategies.longStorePaths())
def test_roundTrip(path):
    """Every store path reads back as itself, slow and fast."""
    assert STORE.parse(path) == path
    assert STORE.parse(path + "/") == path
    assert STORE.parseBaseName(path.baseName) == path
    assert path == f"{path.storeDir}/{path.hashPart}-{path.name}"


def test_storeDir():
    """Store directories are values; their paths do not mix."""
    other = StoreDir("/gnu/sto.re")
    assert other.parse(f"/gnu/sto.re/{BASE}").storeDir == "/gnu/sto.re"
    assert (StoreDir(), hash(StoreDir()), repr(StoreDir())) == (STORE, hash(STORE), "StoreDir(path='/nix/store')")
    assert other != STORE
    for text in (PATH, f"/gnu/stoxre/{BASE}"):
        with pytest.raises(BadStorePath):
            other.parse(text)
    with pytest.raises(dataclasses.FrozenInstanceError):
        other.path = "/"
    assert other.makeStorePath("source", HELLO_NAR, "x") != STORE.makeStorePath("source", HELLO_NAR, "x")


@pytest.mark.parametrize("path", ["", "/", "nix/store", "/nix/store/", "//nix/store", "/nix/../store", "/nix/./store"])
def test_badStoreDir(path):
    """A store directory is given in its canonical form."""
    with pytest.raises(FormatError, match="cannot be a store directory"):
        StoreDir(path)


@pytest.mark.parametrize(
    ("method", "hash", "path"),
    [
        (ContentAddressMethod.NAR, HELLO_NAR, "i9pmrzmpshapij2kin22pff6fc2adavx-hello.txt"),
        (ContentAddressMethod.FLAT, hashBytes("sha256", HELLO), "gy454w1cxaq731grqwylhzf4pp9r5izh-hello.txt"),
        (
            ContentAddressMethod.NAR,
            Hash.parse("sha1:0deb52c2735eb38d360f976b7b3823c4ad05cce7"),
            "hzq8n5jpi3g2d0xhlvqd8q1gx5c9s6i3-hello.txt",
        ),
        (ContentAddressMethod.FLAT, hashBytes("sha1", HELLO), "svdva85yi507g9vncgsaxvnd1r808h4w-hello.txt"),
        (ContentAddressMethod.FLAT, hashBytes("md5", HELLO), "dra1cz5vbrhclpv4y1q0psnbkxz581bk-hello.txt"),
        (ContentAddressMethod.FLAT, hashBytes("sha512", HELLO), "9a8mxachqmcv8x2cfijdps9dyxgyyrzm-hello.txt"),
        (
            ContentAddressMethod.GIT,
            Hash.parse("sha1:b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"),
            "ab1s0w0r0bbalbdsjjs0sw315z6v5skd-gitf",
        ),
    ],
)
def test_fixedOutputPaths(method, hash, path):
    """Paths that real Nix gave to what was added by its contents."""
    name = path[33:]
    assert STORE.makeFixedOutputPath(method, hash, name) == f"/nix/store/{path}"
    assert STORE.makeContentAddressedPath(ContentAddress(method, hash), name) == f"/nix/store/{path}"


def test_textPaths():
    """Text objects, without and with a reference, from real Nix."""
    plain = STORE.makeTextPath("t.txt", hashBytes("sha256", HELLO))
    assert plain == "/nix/store/nj4j70xcnmcdh9y4yfs0ddw3hhli4880-t.txt"
    hash = hashBytes("sha256", f"see {plain}\n".encode())
    path = "/nix/store/a6v4xzwyn229x9d54hnvfiq9dwvid2jk-u.txt"
    assert STORE.makeTextPath("u.txt", hash, [plain, plain]) == path
    ca = ContentAddress(ContentAddressMethod.TEXT, hash)
    assert STORE.makeContentAddressedPath(ca, "u.txt", {plain}) == path


def test_selfReference():
    """A self-referring object from real Nix."""
    hash = Hash.parse("sha256:668b33344838bfcd0e9fbd6a9c16a59faffe102527543e929756b5ee30b4427b")
    path = STORE.makeFixedOutputPath(ContentAddressMethod.NAR, hash, "self", selfReference=True)
    assert path == "/nix/store/c0s0sinnjqcd858h2lnk879jcixgh3h0-self"


def test_outputPaths():
    """The outputs of a derivation, from real Nix."""
    masked = Hash.parse("sha256:5fd53756f7f487f152c7ce206cf6dd3ba176735aaecd56312925c1c79077fd7c")
    assert STORE.makeOutputPath("out", masked, "foo") == "/nix/store/1f5018jnvzb10jsijwrp0hyklh9hmmsg-foo"
    assert STORE.makeOutputPath("dev", masked, "foo") == "/nix/store/7zhc9sliq14lz2f1yc1d68fi9njpfhr1-foo-dev"
    assert (outputPathName("foo", "out"), outputPathName("foo", "dev")) == ("foo", "foo-dev")


def test_referencesAreSorted():
    """The order in which references are given does not matter."""
    a, b = (STORE.makeStorePath("source", HELLO_NAR, name) for name in "ab")
    paths = {STORE.makeFixedOutputPath(ContentAddressMethod.NAR, HELLO_NAR, "x", refs) for refs in ([a, b], [b, a, b])}
    assert len(paths) == 1
    assert paths != {STORE.makeFixedOutputPath(ContentAddressMethod.NAR, HELLO_NAR, "x", [a])}


@pytest.mark.parametrize(
    ("method", "hash"),
    [
        (ContentAddressMethod.FLAT, hashBytes("sha256", b"")),
        (ContentAddressMethod.NAR, hashBytes("sha1", b"")),
        (ContentAddressMethod.GIT, hashBytes("sha256", b"")),
    ],
)
def test_noReferencesAllowed(method, hash):
    """Only text and SHA-256 NARs may have references."""
    for references, selfReference in (([STORE.parse(PATH)], False), ([], True)):
        with pytest.raises(FormatError, match="not allowed to refer to other store paths"):
            STORE.makeFixedOutputPath(method, hash, "x", references, selfReference)


def test_textRules():
    """Text is hashed with SHA-256 and cannot contain its own path."""
    with pytest.raises(FormatError, match="should use sha256"):
        STORE.makeTextPath("x", hashBytes("sha1", b""))
    ca = ContentAddress(ContentAddressMethod.TEXT, hashBytes("sha256", b""))
    with pytest.raises(FormatError, match="cannot refer to itself"):
        STORE.makeContentAddressedPath(ca, "x", selfReference=True)

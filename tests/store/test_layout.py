"""
L{nixserve.store.layout}: store URIs, and where everything lies.
"""

import pytest

from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import UsageError
from nixserve.store.layout import StoreDefaults, StoreLayout, chooseAutoRoot, parseStoreURI

DEFAULTS = StoreDefaults()

#: URI, then logical directory, physical directory, state, log; those of the first nine were checked with real Nix.
CASES = [
    ("/R", "/nix/store", "/R/nix/store", "/R/nix/var/nix", "/R/nix/var/log/nix"),
    ("local?root=/R", "/nix/store", "/R/nix/store", "/R/nix/var/nix", "/R/nix/var/log/nix"),
    ("/R?store=/foo/store", "/foo/store", "/R/nix/store", "/R/nix/var/nix", "/R/nix/var/log/nix"),
    ("/R?state=/S", "/nix/store", "/R/nix/store", "/S", "/R/nix/var/log/nix"),
    ("/R?real=/D", "/nix/store", "/D", "/R/nix/var/nix", "/R/nix/var/log/nix"),
    ("local?store=/L/s&real=/D/s&state=/D/st&log=/D/lg", "/L/s", "/D/s", "/D/st", "/D/lg"),
    ("local?store=/L/s", "/L/s", "/L/s", "/nix/var/nix", "/nix/var/log/nix"),
    ("local:///R", "/nix/store", "/R/nix/store", "/R/nix/var/nix", "/R/nix/var/log/nix"),
    ("local", "/nix/store", "/nix/store", "/nix/var/nix", "/nix/var/log/nix"),
    ("auto", "/nix/store", "/nix/store", "/nix/var/nix", "/nix/var/log/nix"),
    ("", "/nix/store", "/nix/store", "/nix/var/nix", "/nix/var/log/nix"),
    ("auto?root=/R", "/nix/store", "/R/nix/store", "/R/nix/var/nix", "/R/nix/var/log/nix"),
    ("local://", "/nix/store", "/nix/store", "/nix/var/nix", "/nix/var/log/nix"),
    ("/", "/nix/store", "/nix/store", "/nix/var/nix", "/nix/var/log/nix"),
    ("//R//x/./y/../", "/nix/store", "/R/x/nix/store", "/R/x/nix/var/nix", "/R/x/nix/var/log/nix"),
    ("local?root=/with%20blank%26%3D", "/nix/store", "/with blank&=/nix/store", None, None),
]


@pytest.mark.parametrize(("uri", "store", "real", "state", "log"), CASES)
def test_uris(uri, store, real, state, log):
    """Each spelling of Nix's means the places that Nix gives it."""
    layout = parseStoreURI(uri, DEFAULTS)
    assert (layout.storeDir.path, layout.realStoreDir) == (store, real)
    if state:
        assert (layout.stateDir, layout.logDir) == (state, log)
    assert not layout.readOnly
    assert layout.systemFeatures is None


def test_defaults():
    """What the environment said holds where the URI says nothing; below a root only the store directory does."""
    defaults = StoreDefaults(StoreDir("/a/store"), "/b", "/c")
    assert parseStoreURI("local", defaults) == StoreLayout(StoreDir("/a/store"), "/a/store", "/b", "/c")
    assert parseStoreURI("/R", defaults) == StoreLayout.underRoot("/R", StoreDir("/a/store"))


def test_auto():
    """C{auto} means the user's own store where the defaults say so, unless it has parameters."""
    defaults = StoreDefaults(autoRoot="/home/me/root")
    assert parseStoreURI("auto", defaults) == StoreLayout.underRoot("/home/me/root")
    assert parseStoreURI("", defaults) == StoreLayout.underRoot("/home/me/root")
    assert parseStoreURI("local", defaults).stateDir == "/nix/var/nix"
    assert parseStoreURI("auto?log=/l", defaults).stateDir == "/nix/var/nix"


def test_chooseAutoRoot(tmp_path, monkeypatch):
    """The user's own store is chosen only by an ordinary user where the machine has no store."""
    missing = str(tmp_path / "missing")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert chooseAutoRoot(missing, "/mine") == "/mine"
    assert chooseAutoRoot(str(tmp_path), "/mine") is None
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert chooseAutoRoot(missing, "/mine") is None


def test_otherParameters():
    """Reading only, and system features, percent-encoded with blanks between."""
    layout = parseStoreURI("/R?read-only=true&system-features=kvm%20big-parallel", DEFAULTS)
    assert layout.readOnly
    assert layout.systemFeatures == {"kvm", "big-parallel"}
    assert parseStoreURI("/R?system-features=", DEFAULTS).systemFeatures == frozenset()
    assert not parseStoreURI("/R?read-only=false", DEFAULTS).readOnly


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("daemon", "cannot open store 'daemon': supported are 'auto', 'local'"),
        ("ssh://host", "cannot open store 'ssh://host': supported are"),
        ("https://cache.nixos.org", "supported are"),
        ("./here", "write the root as an absolute path"),
        ("/R?colour=red", "unknown parameter 'colour'; known are log, read-only, real, root, "),
        ("/R?root=/S", "names two roots"),
        ("/R?state", "parameter 'state' has no value"),
        ("/R?state=/a&state=/b", "parameter 'state' is given twice"),
        ("/R?state=a", "'a', the value of 'state', is not an absolute path"),
        ("/R?state=/a%00", "is not an absolute path"),
        ("/R?state=/100%", "is not percent-encoded"),
        ("/R?read-only=perhaps", "neither 'true' nor 'false'"),
        ("local?store=/", "cannot be a store directory"),
    ],
)
def test_refused(uri, text):
    """What cannot be opened is refused in words that name it."""
    with pytest.raises(UsageError) as caught:
        parseStoreURI(uri, DEFAULTS)
    assert text in str(caught.value)


def test_places():
    """State and objects lie where Nix has them."""
    layout = StoreLayout.underRoot("/R")
    assert [
        layout.dbPath,
        layout.schemaPath,
        layout.bigLockPath,
        layout.reservedPath,
        layout.tempRootsDir,
        layout.gcLockPath,
        layout.gcSocketPath,
        layout.gcRootsDir,
        layout.profilesDir,
    ] == [
        f"/R/nix/var/nix/{name}"
        for name in (
            "db/db.sqlite",
            "db/schema",
            "db/big-lock",
            "db/reserved",
            "temproots",
            "gc.lock",
            "gc-socket/socket",
            "gcroots",
            "profiles",
        )
    ]
    assert layout.linksDir == "/R/nix/store/.links"
    assert layout.realPath(StorePath("/nix/store/abc-x")) == "/R/nix/store/abc-x"

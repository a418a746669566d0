"""Which store a URI means."""

import pytest

from nixserve.app.storechoice import chooseServedStore, parseStore
from nixserve.errors import UsageError
from nixserve.remote.address import RemoteAddress
from nixserve.store.layout import StoreLayout


@pytest.mark.parametrize("uri", ["ssh://me@host:22?remote-store=/x", "unix:///run/serve.sock"])
def test_remote(uri):
    """A store may be elsewhere."""
    assert parseStore(uri, {}) == RemoteAddress.parse(uri)


def test_local(tmp_path):
    """Everything else is on this machine."""
    assert parseStore(str(tmp_path), {}) == StoreLayout.underRoot(str(tmp_path))
    with pytest.raises(UsageError, match="cannot open store 'https://host'"):
        parseStore("https://host", {})


def test_served(tmp_path):
    """What a session on standard streams serves: its own argument, else C{NIX_REMOTE}."""
    environ = {"NIX_REMOTE": "ssh://host"}
    assert chooseServedStore(None, environ) == RemoteAddress.parse("ssh://host")
    assert chooseServedStore(str(tmp_path), environ) == StoreLayout.underRoot(str(tmp_path))

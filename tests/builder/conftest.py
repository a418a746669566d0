"""
What the tests of several parts of the builder are given.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nixserve.codec.derivation import parseDerivation
from nixserve.codec.storepath import StoreDir
from tests.builder.builtinruns import Server
from tests.builder.stores import divertedStore, plainStore, temporaryRoot


@pytest.fixture(autouse=True)
def noProxies(monkeypatch):
    """Downloads of tests go nowhere but to this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


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


@pytest.fixture
def root():
    """A directory for a store, removed afterwards."""
    with temporaryRoot() as root:
        yield root


@pytest.fixture
def diverted(root):
    """An open store whose objects lie elsewhere than their paths say."""
    store = divertedStore(root)
    yield store
    store.close()


@pytest.fixture
def plain(root):
    """An open store whose objects lie where their paths say, so that builds need no sandbox."""
    store = plainStore(root)
    yield store
    store.close()

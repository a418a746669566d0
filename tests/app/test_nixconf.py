"""Nix's own settings, read as Nix reads them."""

import shutil
import subprocess

import pytest
from twisted.python import usage

from nixserve.app.nixconf import NixConf
from nixserve.app.service import Options
from nixserve.app.settings import ServiceSettings
from nixserve.app.storechoice import chooseServedStore, chooseStore
from nixserve.errors import UsageError
from nixserve.store.durability import Durability

NAMES = ("fsync-metadata", "sync-before-registering")


@pytest.fixture
def environ(tmp_path):
    """Directories for files of the machine and of the user."""
    for name in ("machine", "home/.config/nix", "other/nix"):
        (tmp_path / name).mkdir(parents=True)
    return {
        "NIX_CONF_DIR": str(tmp_path / "machine"),
        "HOME": str(tmp_path / "home"),
        "XDG_CONFIG_DIRS": str(tmp_path / "other"),
    }


@pytest.fixture
def write(tmp_path, environ):
    """Writes a file of settings."""
    places = {"machine": "machine/nix.conf", "user": "home/.config/nix/nix.conf", "other": "other/nix/nix.conf"}
    return lambda place, text: (tmp_path / places.get(place, place)).write_text(text)


CASES = [
    ({}, [True, False]),
    ({"machine": "fsync-metadata = false\nsync-before-registering = true\n"}, [False, True]),
    ({"machine": "fsync-metadata = no # really\n\n# sync-before-registering = 1"}, [False, False]),
    ({"machine": "fsync-metadata = false", "user": "fsync-metadata = 1"}, [True, False]),
    ({"other": "fsync-metadata = false", "user": "sync-before-registering = yes"}, [False, True]),
    ({"other": "fsync-metadata = false", "user": "fsync-metadata = true"}, [True, False]),
    ({"machine": "include more.conf", "machine/more.conf": "fsync-metadata = false"}, [False, False]),
    ({"machine": "!include nowhere.conf\n  fsync-metadata   =   false  "}, [False, False]),
    ({"user": "fsync-metadata = false", "NIX_CONFIG": "fsync-metadata = true\nsync-before-registering = true"}, [1, 1]),
    ({"user": "fsync-metadata = false", "NIX_USER_CONF_FILES": "nowhere"}, [True, False]),
    ({"a.conf": "fsync-metadata = false", "b.conf": "fsync-metadata = true", "NIX_USER_CONF_FILES": "a:b"}, [False, 0]),
]


def prepare(case, environ, write, tmp_path):
    for place, text in case.items():
        if not place.startswith("NIX_"):
            write(place, text)
        elif place == "NIX_USER_CONF_FILES":
            environ[place] = ":".join(f"{tmp_path}/{name}.conf" for name in text.split(":"))
        else:
            environ[place] = text


@pytest.mark.parametrize(("case", "expected"), CASES)
def test_precedence(case, expected, environ, write, tmp_path):
    """Machine, user and environment; comments, blanks, includes."""
    prepare(case, environ, write, tmp_path)
    conf = NixConf.read(environ)
    assert [conf.boolean(name, name == "fsync-metadata") for name in NAMES] == expected


@pytest.mark.parametrize(("case", "expected"), CASES)
def test_asNix(case, expected, environ, write, tmp_path):
    """Real Nix sees the same."""
    if shutil.which("nix") is None:
        pytest.skip("no nix on PATH")
    prepare(case, environ, write, tmp_path)
    command = ["nix", "--extra-experimental-features", "nix-command", "show-config"]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin", **environ}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" = ") for line in done.stdout.splitlines() if line.startswith(NAMES))
    assert [found[name] == "true" for name in NAMES] == expected


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"machine": "fsync-metadata = maybe"}, "nix.conf: the value of 'fsync-metadata' is 'maybe'; it must be"),
        ({"NIX_CONFIG": "fsync-metadata ="}, "NIX_CONFIG: the value of 'fsync-metadata' is ''; it must be"),
        ({"machine": "include nowhere"}, "nix.conf: the included file '.*nowhere' cannot be read"),
        ({"machine": "include nix.conf"}, "nested too deep"),
    ],
)
def test_mistakes(case, message, environ, write, tmp_path):
    """What cannot be is said in one line, with its place."""
    prepare(case, environ, write, tmp_path)
    with pytest.raises(UsageError, match=message):
        NixConf.read(environ).boolean("fsync-metadata", True)


def test_whoHeedsThem(environ, write, tmp_path):
    """Commands and the service heed them; what the service itself is told comes before."""
    write("machine", "fsync-metadata = false\nfsync-store-paths = true")
    said = Durability(fsyncMetadata=False, fsyncStorePaths=True)
    assert chooseStore(str(tmp_path), environ).durability == said
    assert chooseServedStore(str(tmp_path), environ).durability == said
    assert ServiceSettings.complete({}, environ).durability == said
    given = {"fsync-metadata": True, "sync-before-registering": "true"}
    expected = Durability(fsyncMetadata=True, fsyncStorePaths=True, syncBeforeRegistering=True)
    assert ServiceSettings.complete(given, environ).durability == expected


def test_ofTheService(tmp_path, monkeypatch, environ):
    """They are options, and keys of its file; one that is neither true nor false is refused."""
    monkeypatch.setattr("os.environ", environ)
    (tmp_path / "config.toml").write_text('fsync-metadata = false\nfsync-store-paths = "true"\n')
    options = Options()
    options.parseOptions(["--config", str(tmp_path / "config.toml"), "--sync-before-registering", "true"])
    assert options.settings.durability == Durability(False, True, True)
    for wrong in ('fsync-metadata = "perhaps"', "fsync-metadata = 1"):
        (tmp_path / "config.toml").write_text(wrong)
        with pytest.raises(usage.UsageError, match="must be"):
            Options().parseOptions(["--config", str(tmp_path / "config.toml")])

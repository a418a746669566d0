"""
C{nixserve demo}: what it says, what it leaves behind, and that what it recommends works.
"""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from nixserve.app.cmd_demo import realUse
from nixserve.app.recipe import makeRecipe
from nixserve.app.sample import makeSample
from nixserve.codec.derivation import (
    checkDerivationOutputs,
    derivationName,
    drvPathOf,
    outputPaths,
    parseDerivation,
)
from tests.app.box import BIN, TIMEOUT, waitUntil
from tests.builder.workplace import needsSandbox
from tests.interop.nix import requireProgram


@pytest.fixture
def demo(box):
    """Runs the demo; afterwards nothing of it is left, however it ended."""
    yield lambda *options, **kwargs: box.run("nixserve", "demo", *options, **kwargs)
    assert os.listdir(box.path / "tmp") == []
    assert os.listdir(box.home) == [".ssh"]
    assert os.listdir(box.home / ".ssh") == []


def row(output, what):
    """One row of the table, by columns."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"  {what}  "))
    return re.split(r"\s{2,}", line.strip())


@pytest.mark.parametrize("options", [[], ["--no-ssh"]])
def test_shows(ssh, demo, options):
    """It says what it made, who connected, what moved how fast in each direction, and that every hash is right."""
    begun = time.monotonic()
    done = demo(*options)
    assert (done.returncode, done.stderr) == (0, "")
    paths, size = re.search(r"closure +(\d+) store paths .*, ([0-9.]+ MB)", done.stdout).groups()
    assert int(paths) > 10
    client = "Conch" if options else "ssh"
    assert re.search(rf"client +{client}, logged in after [0-9.]+ s; protocol 2\.8", done.stdout)
    for way in ("upload", "download"):
        _, count, moved, seconds, rate = row(done.stdout, way)
        assert (count, moved) == (paths, size)
        shown = float(size.split()[0]) / float(seconds.split()[0])
        assert float(rate.split()[0]) == pytest.approx(shown, rel=0.05)
    assert row(done.stdout, "upload again")[1:3] == ["0", "0 B"]
    assert f"hashed all {paths} paths in the last store" in done.stdout
    assert time.monotonic() - begun < 20
    # Not a terminal: no bars, no colours.
    assert "\r" not in done.stdout and "\x1b" not in done.stdout


@pytest.mark.parametrize("confined", [pytest.param(True, marks=needsSandbox), False])
def test_builds(ssh, box, demo, confined):
    """It builds something, confined where that can be, shows its log, and says what moved beside what need not."""
    # Without a sandbox, root's builders have another uid, which has to get to the store.
    box.path.chmod(0o711)
    (box.path / "tmp").chmod(0o711)
    done = demo(*([] if confined else ["--no-sandbox"]))
    assert (done.returncode, done.stderr) == (0, "")
    # An archive, 40 stages, four downloads and the program itself.
    assert re.search(r"recipe +index\.drv .*, 46 paths of 4\.\d MB, stay here", done.stdout)
    log = re.findall(r"^ +│ (.*)$", done.stdout, re.M)
    assert len(log) == 6
    assert ("7 entries in the root directory" in log) == ("4 paths in the store" in log) == confined
    files = [name for name in os.listdir(os.path.dirname(json.__file__)) if name.endswith(".py")]
    assert [line for line in log if line.startswith(f"python-json: {len(files)} files, ")]
    assert f"  built     {'in' if confined else 'without'} a sandbox, in " in done.stdout
    moved, factor = re.search(r"moved +([0-9.]+) kB, .* takes ([0-9,]+) times as much", done.stdout).groups()
    assert 1 < float(moved) < 20
    assert 4_100_000 < float(moved) * 1000 * int(factor.replace(",", "")) < 4_600_000
    assert "its contents and references are right" in done.stdout


def test_recipe(box):
    """
    The recipe is a real one: every .drv file is at the path that it gives and states outputs that follow from it, and
    what is built from it needs nothing of its closure.
    """
    _, store = box.store()
    (box.path / "work").mkdir()
    session = store.openSession()
    sample = makeSample(session, str(box.path / "work"))
    packages = {name: sample.packages[name] for name in ("json", "xml")}
    recipe = makeRecipe(session, str(box.path / "work"), packages)
    closure = session.queryClosure([recipe.drvPath])
    derivations = {path for path in closure if path.isDerivation}
    assert (len(closure), len(derivations)) == (44, 43)
    assert not closure & recipe.basic.inputSrcs
    assert recipe.basic.inputSrcs == {info.path for info in packages.values()} <= session.queryClosure([sample.root])

    def lookup(path):
        return parseDerivation(Path(store.layout.realPath(path)).read_bytes(), derivationName(path), session.storeDir)

    for path in derivations:
        assert drvPathOf(lookup(path), session.storeDir) == path
        checkDerivationOutputs(path, lookup(path), lookup, session.storeDir)
    whole = lookup(recipe.drvPath)
    assert outputPaths(whole, lookup, session.storeDir, {}) == {"out": recipe.output}
    assert {path.name for path in whole.inputDrvs} == {"python-json.drv", "python-xml.drv"}
    for path in whole.inputDrvs:
        assert lookup(path).outputs["out"].path in recipe.basic.inputSrcs
    session.close()
    store.close()


def test_withoutSSHProgram(box, demo):
    """Where there is no ssh program it connects by itself."""
    (box.path / "bin").mkdir()
    done = demo(env={"PATH": str(box.path / "bin")})
    assert done.returncode == 0, done.stderr
    assert "client    Conch" in done.stdout


def test_terminal(box, demo):
    """On a terminal there is a bar for each direction, which is gone in the end."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 25, 100, 0, 0))
    process = box.spawn("nixserve", "demo", "--no-ssh", stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(controller, 4096):
            shown += data
    except OSError:
        pass  # The other end is closed.
    os.close(controller)
    assert process.wait(TIMEOUT) == 0
    for what in (b"upload", b"download"):
        assert re.search(what + rb": +[0-9]+%\|.*MB?/", shown) or re.search(what + rb": +0%", shown), shown
    assert shown.endswith(b"\r")


@pytest.mark.parametrize("signalNumber", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["closure", "client", "upload again", "entries"])
def test_interrupted(ssh, box, demo, signalNumber, moment):
    """Ctrl-C ends it at any time, with no traceback; no process, no file is left."""
    out, err = box.path / "out", box.path / "err"
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        process = box.spawn("nixserve", "demo", stdout=stdout, stderr=stderr, env={"PYTHONUNBUFFERED": "1"})
    waitUntil(lambda: moment in out.read_text() or process.poll() is not None)
    process.send_signal(signalNumber)
    process.wait(10)
    assert process.returncode != 0
    assert "Traceback" not in err.read_text()
    assert "Aborted!" in err.read_text()
    assert not [line for line in processes() if str(box.path) in line]


def processes():
    """The command lines of everything that runs."""
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/cmdline", "rb") as stream:
                yield stream.read().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


def test_failure(box):
    """What keeps it from working is one line; nothing is left."""
    deep = box.path / ("x" * 100)
    deep.mkdir()
    done = box.run("nixserve", "demo", env={"TMPDIR": str(deep)})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: cannot listen on 'unix:")
    assert "Traceback" not in done.stderr
    assert os.listdir(deep) == []


@pytest.mark.interop
class TestRealUse:
    """The lines that it ends with, with another port, state directory and user's keys."""

    @pytest.fixture(autouse=True)
    def programs(self, ssh):
        """Needs real Nix."""
        for program in ("nix", "nix-store", "nix-build"):
            requireProgram(program)

    @needsSandbox
    def test_linesWork(self, box, demo):
        """They are printed; the first serves, the next copy a path there and back, the last builds there."""
        serve, up, down, build = (line for _, line in realUse(str(BIN / "nixserve")))
        said = demo().stdout
        assert all(line in said for line in (serve, up, down, build))
        key = box.makeKey()
        known = box.home / ".ssh" / "known_hosts"
        (box.path / "file").write_text("contents\n")
        environment = nixEnvironment(box)
        path = box.run("nix-store", "--add", "file", env=environment).stdout.strip()
        (box.path / "result").symlink_to(path)
        with open(box.path / "log", "wb") as log:
            words = [*serve.split(), "--state", str(box.path / "state"), "--listen", "tcp:0:interface=127.0.0.1"]
            words.insert(1, "--pidfile=")
            process = box.spawn(*words, stdout=log, stderr=log)
        waitUntil(lambda: "serving" in (box.path / "log").read_text() or process.poll() is not None)
        port = re.search(r"listening on tcp.*port=(\d+)", (box.path / "log").read_text())[1]
        options = f"-F none -i {key} -o UserKnownHostsFile={known}"
        adapt = lambda line: line.replace("-p 2222", f"-p {port} {options}")  # noqa: E731
        assert adapt(up) != up and adapt(down) != down
        done = shell(box, adapt(up), environment)
        assert done.returncode == 0, done.stderr
        assert box.run("nixserve", "path-info", "--store", box.path / "state/store", path).stdout == f"{path}\n"
        environment = nixEnvironment(box, "other")
        done = shell(box, adapt(down), environment)
        assert done.returncode == 0, done.stderr
        assert box.run("nix-store", "-q", "--hash", path, env=environment).returncode == 0
        done = shell(box, adapt(build), environment)
        assert done.returncode == 0, done.stderr
        assert re.search("building '.*-hello.drv' on 'ssh://127.0.0.1'", done.stderr)
        hello = box.path / "other" / os.readlink(box.path / "result")[1:]
        assert hello.read_text() == "hello\n"
        for name in os.listdir(box.home / ".ssh"):
            os.unlink(box.home / ".ssh" / name)
        shutil.rmtree(box.home / ".cache", ignore_errors=True)


def nixEnvironment(box, name="nix"):
    """Makes Nix's commands use a store of the box's own."""
    (box.path / name).mkdir(exist_ok=True)
    return {
        "NIX_REMOTE": str(box.path / name),
        "NIX_CONF_DIR": str(box.path),
        "NIX_CONFIG": "substituters =\nbuild-users-group =",
        "XDG_CACHE_HOME": str(box.path / "cache"),
    }


def shell(box, line, environment):
    """Run a line as somebody types it."""
    return box.run("bash", "-c", line, env=environment)

"""
C{nixserve}: mistakes and exit statuses.
"""

import os
import subprocess
import sys

import pytest

from nixserve.testing import addObject, makeInfo, makeNar
from tests.app.box import BIN, TIMEOUT, refused


class TestMistakes:
    """None of these shows a traceback."""

    def test_nothing(self, box):
        """Without arguments the help is shown."""
        done = box.run("nixserve")
        assert done.returncode == 2
        assert "Usage: nixserve [OPTIONS] COMMAND" in done.stdout + done.stderr
        assert "path-info" in done.stdout + done.stderr

    @pytest.mark.parametrize("option", ["-h", "--help"])
    def test_help(self, box, option):
        """Each command has a help."""
        for command in ([], ["demo"], ["path-info"], ["copy"], ["build"]):
            done = box.run("nixserve", *command, option)
            assert done.returncode == 0
            assert "Usage: nixserve" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "status", "complaint"),
        [
            (["bogus"], 2, "No such command"),
            (["path-info"], 2, "Missing argument"),
            (["path-info", "--bogus", "x"], 2, "No such option"),
            (["path-info", "--store", "{}", "x"], 1, "path 'x' is not in the Nix store"),
            (["path-info", "--store", "{}", "/nix/store/x"], 1, "'x' is too short to be a valid store path"),
            (["path-info", "--store", "{}", "/nix/store/" + "0" * 32 + "-x"], 1, "-x' is not valid"),
            (["path-info", "--store", "{}", "-r", "/nix/store/" + "0" * 32 + "-x"], 1, "-x' is not valid"),
            (["path-info", "--store", "ssh://host", "x"], 2, "cannot open store 'ssh://host'"),
            (["path-info", "--store", "{}?colour=red", "x"], 2, "unknown parameter 'colour'; known are"),
            (["path-info", "--store", "/nonexistent", "x"], 1, "'/nonexistent/nix/store': No such file"),
        ],
    )
    def test_mistake(self, box, arguments, status, complaint):
        """Each is said on standard error, with its exit status."""
        root, store = box.store()
        store.close()
        done = box.run("nixserve", *(argument.replace("{}", str(root)) for argument in arguments))
        assert complaint in refused(done)
        assert (done.returncode, done.stdout) == (status, "")
        assert status == 2 or len(done.stderr.splitlines()) == 1

    def test_makesNoStore(self, box):
        """Looking into a store that is not there makes none."""
        refused(box.run("nixserve", "path-info", "--store", box.path / "new", "x"))
        assert not (box.path / "new").exists()

    def test_noPermission(self, box):
        """A store that this user may not even read is named."""
        root, store = box.store()
        store.close()
        os.chmod(root / "nix/var/nix/db", 0o700)
        os.chmod(box.path, 0o755)
        if os.geteuid() == 0:
            leave = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        else:
            os.chmod(root / "nix/var/nix/db", 0)
            leave = ""
        code = f"from nixserve.app import cli, cmd_pathinfo; import importlib.resources\n{leave}cli.main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "path-info", "--store", str(root), "/nix/store/" + "0" * 32 + "-x"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            env=box.environ,
            check=False,
        )
        assert f"cannot read '{root}/nix/var/nix/db/schema': Permission denied" in refused(done)
        assert done.returncode == 1

    def test_fullDisk(self, box):
        """Output that cannot be written is an error, not a traceback."""
        with open("/dev/full", "w") as full:
            done = box.run("nixserve", "--help", stdout=full, stderr=subprocess.PIPE, capture_output=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr

    def test_poorTerminal(self, box):
        """A terminal that lacks a character is no reason to fail."""
        done = box.run("nixserve", "demo", "--no-ssh", env={"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0, done.stderr


class TestStart:
    """What a command imports: people wait for it."""

    def imported(self, box, *arguments):
        """Run C{nixserve}; the top-level names of what it has imported."""
        code = (
            "import sys, nixserve.app.cli as cli\n"
            "try: cli.main()\n"
            "finally: print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
        )
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=box.environ, cwd=box.path, check=False
        )
        assert done.returncode == 0, done.stderr
        return set(done.stderr.split())

    def test_withoutTwisted(self, box):
        """Help and C{path-info} need no Twisted, nor does the version SQLite."""
        root, store = box.store()
        nar = makeNar(b"x")
        addObject(store.openSession(), makeInfo("x", nar), nar)
        store.close()
        for arguments in (["--help"], ["copy", "--help"], ["build", "--help"]):
            assert "twisted" not in self.imported(box, *arguments)
        assert "twisted" not in self.imported(box, "path-info", "--store", root, makeInfo("x", nar).path)
        assert "sqlite3" not in self.imported(box, "--version")

    def test_withoutBar(self, box):
        """A copy that nobody watches needs no bar."""
        root, store = box.store()
        nar = makeNar(b"x")
        addObject(store.openSession(), makeInfo("x", nar), nar)
        store.close()
        there = f"ssh://localhost?remote-program={BIN / 'nixserve-store'}&remote-store={box.path / 'there'}"
        imported = self.imported(box, "copy", "--store", root, "--to", there, makeInfo("x", nar).path)
        assert "twisted" in imported and "tqdm" not in imported

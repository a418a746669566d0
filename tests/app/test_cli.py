"""
C{nixserve}: mistakes, exit statuses, and C{path-info} beside real Nix.
"""

import json
import os
import subprocess
import sys

import pytest

from nixserve.app.sample import addTree
from nixserve.app.text import formatBytes
from nixserve.codec.pathinfo import topoSort
from nixserve.testing import addObject, makeInfo, makeNar
from tests.app.box import BIN, TIMEOUT, refused
from tests.interop.nix import requireProgram


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


class TestPathInfo:
    """What it prints."""

    def test_columns(self, box):
        """Paths alone; sizes, closure sizes and signatures on demand, separated by tabs; references first."""
        root, store = box.store()
        session = store.openSession()
        nar = makeNar(b"leaf")
        signed = "key:" + "A" * 86 + "=="
        leaf = makeInfo("leaf", nar, sigs=frozenset({signed}))
        addObject(session, leaf, nar)
        top = makeInfo("top", nar, [leaf.path])
        addObject(session, top, nar)
        session.close()
        store.close()
        done = box.run("nixserve", "path-info", "--store", root, "-r", "-s", "-S", "--sigs", top.path)
        size = len(nar)
        assert [line.split("\t") for line in done.stdout.splitlines()] == [
            [leaf.path, str(size), str(size), signed],
            [top.path, str(size), str(2 * size), ""],
        ]
        assert box.run("nixserve", "path-info", "--store", root, top.path).stdout == f"{top.path}\n"

    def test_links(self, box):
        """A file inside an object, or a symbolic link that leads there, stands for the object."""
        root, store = box.store()
        nar = makeNar({"bin": {"tool": b""}})
        info = makeInfo("tool", nar)
        addObject(store.openSession(), info, nar)
        store.close()
        (box.path / "result").symlink_to(info.path)
        for name in ("result", f"{info.path}/bin/tool"):
            assert box.run("nixserve", "path-info", "--store", root, name).stdout == f"{info.path}\n"

    @pytest.mark.interop
    def test_realNix(self, box):
        """It says the same as Nix of a store that Nix has made."""
        requireProgram("nix")
        root = box.path / "nix-store"
        environment = {"NIX_REMOTE": str(root), "NIX_CONFIG": "substituters ="}
        (box.path / "expression.nix").write_text(
            'let a = builtins.toFile "a" "text"; b = builtins.toFile "b" "refers to ${a}";'
            ' in builtins.toFile "c" "refers to ${a} and ${b}"'
        )
        evaluate = ["nix-instantiate", "--eval", "--read-write-mode", "--json", "expression.nix"]
        top = json.loads(box.run(*evaluate, env=environment).stdout)
        (box.path / "tree").mkdir()
        (box.path / "tree/file").write_text("x" * 1000)
        tree = box.run("nix-store", "--add", "tree", env=environment).stdout.strip()
        flags = ["-r", "-s", "-S", "--sigs", top, tree]
        nix = ["nix", "--extra-experimental-features", "nix-command", "path-info"]
        theirs = box.run(*nix, *flags, env=environment)
        assert theirs.returncode == 0, theirs.stderr
        ours = box.run("nixserve", "path-info", "--store", root, *flags)
        assert ours.returncode == 0, ours.stderr
        words = lambda text: sorted(line.split() for line in text.splitlines())  # noqa: E731
        assert words(ours.stdout) == words(theirs.stdout)
        theirs = json.loads(box.run(*nix, "--json", "-r", "-S", top, tree, env=environment).stdout)
        ours = box.run("nixserve", "path-info", "--store", root, "--json", "-r", "-S", top, tree).stdout
        byPath = lambda infos: {info["path"]: info for info in infos}  # noqa: E731
        assert byPath(map(json.loads, ours.splitlines())) == byPath(theirs)

    @pytest.mark.interop
    def test_addTree(self, box):
        """Files added under a computed path get the path, hash and content address that Nix gives them."""
        requireProgram("nix-store")
        tree = box.path / "tree"
        tree.mkdir()
        (tree / "file").write_text("x" * 1000)
        (tree / "link").symlink_to("file")
        root, store = box.store()
        info = addTree(store.openSession(), "tree", str(tree))
        store.close()
        environment = {"NIX_REMOTE": str(root), "NIX_CONFIG": "substituters ="}
        assert box.run("nix-store", "--add", "tree", env=environment).stdout.strip() == info.path
        done = box.run("nix-store", "--verify", "--check-contents", env=environment)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (28_880_464, "28.9 MB")],
)
def test_formatBytes(size, text):
    """Sizes are in powers of ten, with one digit, and never four digits before the point."""
    assert formatBytes(size) == text


def test_sampleIsAClosure(box):
    """The demo's closure is what it says: objects that refer to each other, files, executables and links."""
    from nixserve.app.sample import makeSample

    _, store = box.store()
    (box.path / "work").mkdir()
    session = store.openSession()
    sample = makeSample(session, str(box.path / "work"))
    infos = session.queryPathInfos(session.queryClosure([sample.root]))
    assert len(infos) == sample.paths
    assert topoSort({path: info.references for path, info in infos.items()})[-1] == sample.root
    assert sum(info.narSize for info in infos.values()) == sample.narBytes
    assert sample.files > 200 and sample.executables and sample.links
    for path, info in infos.items():
        assert info.isContentAddressed(session.storeDir)
        contents = b"".join(session.narFromPath(path))
        assert all(reference.encode() in contents for reference in info.references)
    store.close()

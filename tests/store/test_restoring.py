"""
L{nixserve.store.restoring}: trees from NARs, on a file system that others write to as well.
"""

import os
import stat
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from nixserve.codec.hashes import hashBytes
from nixserve.codec.nar import BadArchive, Contents, Directory, Regular, Symlink
from nixserve.codec.narwriter import encodeNar
from nixserve.errors import FormatError, StoreError
from nixserve.store import files
from nixserve.store.files import deletePath
from nixserve.store.restoring import PathRestorer, restoreNar
from tests.store.objectfiles import assertCanonical, encode, needsRoot, openFiles, restore, walk
from tests.vectors.nar import trees
from tests.vectors.nar.trees import TREES, File, Link

SOURCES = Path(files.__file__).parents[2]


class TestRestore:
    """PathRestorer and restorePath"""

    @pytest.mark.parametrize("size", [1, 100, 1 << 20])
    @pytest.mark.parametrize("name", TREES)
    def test_golden(self, place, name, size):
        """Real Nix's NAR becomes its tree in canonical form, however it is cut."""
        data = trees.nar(name)
        before = openFiles()
        result = restore(place + "/x", data, size)
        assert result == (hashBytes("sha256", data), len(data))
        assert openFiles() == before
        assert trees.read(os.fsencode(place) + b"/x") == TREES[name]
        assertCanonical(place + "/x")

    @pytest.mark.parametrize("umask", [0, 0o22, 0o77, 0o777])
    def test_umask(self, place, umask):
        """The umask has no influence."""
        old = os.umask(umask)
        try:
            restore(place + "/x", trees.nar("nested"))
            restore(place + "/y", trees.nar("executable"))
            restoreNar(place + "/z", trees.nar("executable"))
        finally:
            os.umask(old)
        assert trees.read(os.fsencode(place) + b"/x") == TREES["nested"]
        for name in "xyz":
            assertCanonical(f"{place}/{name}")

    @needsRoot
    @pytest.mark.parametrize("umask", ["0o777", "0o300", "0o400"])
    def test_umaskAgainstOurselves(self, umask):
        """Nor has one that would lock an ordinary user out of his own directories; and he can delete them again."""
        with tempfile.TemporaryDirectory() as home:
            os.chmod(home, 0o777)
            code = (
                "import os, sys; from nixserve.store.files import *; from nixserve.store.restoring import *\n"
                "os.setgid(65534); os.setuid(65534)\n"
                f"os.umask({umask})\n"
                f"restorePath({home + '/x'!r}, [sys.stdin.buffer.read()])\n"
                f"sys.stdout.buffer.write(b''.join(dumpPath({home + '/x'!r})))\n"
                f"os.mkdir({home + '/y'!r}); deletePath({home + '/x'!r}); deletePath({home + '/y'!r})\n"
            )
            data = trees.nar("nested")
            done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, cwd=SOURCES)
            assert (done.stderr, done.stdout) == (b"", data)
            assert os.listdir(home) == []

    def test_inheritedAcl(self, place):
        """An access control list that the store hands down does not stay."""
        # Version 2; user::rwx, user:65534:rwx, group::r-x, mask::rwx, other::r-x.
        entries = [(1, 7, -1), (2, 7, 65534), (4, 5, -1), (16, 7, -1), (32, 5, -1)]
        acl = (2).to_bytes(4, "little") + b"".join(
            tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + who.to_bytes(4, "little", signed=True)
            for tag, bits, who in entries
        ).replace((65534).to_bytes(4, "little", signed=True), (65534).to_bytes(4, "little"))
        try:
            os.setxattr(place, "system.posix_acl_default", acl)
        except OSError:
            pytest.skip("no access control lists here")
        restore(place + "/x", trees.nar("nested"))
        restoreNar(place + "/y", trees.nar("executable"))
        for name in "xy":
            assertCanonical(f"{place}/{name}")
            for path, _ in walk(f"{place}/{name}"):
                assert os.listxattr(path, follow_symlinks=False) == []

    @pytest.mark.parametrize("name", TREES)
    def test_targetExists(self, place, name):
        """Whatever lies at the target, nothing of it is touched."""
        for existing in (File(b"old"), Link(os.fsencode(place) + b"/elsewhere"), Link(b"/etc"), {}):
            trees.write(existing, os.fsencode(place) + b"/x")
            before = openFiles()
            with pytest.raises(StoreError, match=f"cannot write '{place}/x': File exists"):
                restore(place + "/x", trees.nar(name))
            assert openFiles() == before
            assert trees.read(os.fsencode(place) + b"/x") == existing
            assert os.listdir(place) == ["x"]
            deletePath(place + "/x")

    def test_noParent(self, place):
        """The directory around the target must exist."""
        with pytest.raises(StoreError, match=f"cannot write '{place}/a/x': No such file or directory"):
            PathRestorer(place + "/a/x")

    @pytest.mark.parametrize(
        "hostile",
        [
            [Directory(b""), Symlink(b"a", b"../out"), Directory(b"a"), Regular(b"f", False, 1), Contents(b"!")],
            [Directory(b""), Symlink(b"a", b"../out/f"), Regular(b"a", False, 1), Contents(b"!")],
            [Directory(b""), Regular(b"../out/f", False, 1), Contents(b"!")],
            [Directory(b""), Regular(b"/tmp/f", False, 1), Contents(b"!")],
            [Directory(b""), Directory(b".."), Directory(b"out"), Regular(b"f", False, 1), Contents(b"!")],
            [Directory(b""), Symlink(b"a", b"../out"), Regular(b"a/f", False, 1), Contents(b"!")],
        ],
    )
    @pytest.mark.parametrize("size", [1, 1 << 20])
    def test_nothingOutside(self, place, hostile, size):
        """An archive that tries to write elsewhere is refused; nothing appears there."""
        os.mkdir(place + "/out")
        data = b"".join(encodeNar(hostile))
        with pytest.raises(BadArchive):
            restore(place + "/x", data, size)
        assert os.listdir(place + "/out") == []
        assert set(os.listdir(place)) <= {"out", "x"}

    def test_existingIsNeverEntered(self, place):
        """Even if a parser let a second entry of one name pass, nothing would be written through the first."""
        os.mkdir(place + "/out")
        trees.write(File(b"old"), os.fsencode(place) + b"/out/f")
        for target, second in ((b"../out", Directory(b"a")), (b"../out/f", Regular(b"a", False, 1))):
            restorer = PathRestorer(place + "/x")
            with pytest.raises(FileExistsError):
                restorer._apply([Directory(b""), Symlink(b"a", target), second, Contents(b"!")])
            restorer.abort()
            deletePath(place + "/x")
        assert trees.read(os.fsencode(place) + b"/out") == {b"f": File(b"old")}

    def test_linksAreNotFollowed(self, place):
        """Legal links to elsewhere are created and left alone."""
        trees.write({b"f": File(b"old")}, os.fsencode(place) + b"/out")
        restore(place + "/x", encode({b"a": Link(b"../out"), b"b": Link(b"../out/f"), b"c": Link(b"/nowhere")}))
        assert os.readlink(place + "/x/a") == "../out"
        assert os.lstat(place + "/out/f").st_mtime_ns != 1_000_000_000
        assert stat.S_IMODE(os.lstat(place + "/out/f").st_mode) == 0o644

    @pytest.mark.parametrize("size", [1, 33, 1 << 20])
    def test_truncated(self, place, size):
        """An archive that ends too early fails in the end, with all closed and the debris still there."""
        before = openFiles()
        with pytest.raises(BadArchive, match="unexpected end"):
            restore(place + "/x", trees.nar("nested")[:-20], size)
        assert openFiles() == before
        assert os.path.exists(place + "/x/a/b/c/d")

    def test_surplus(self, place):
        """More than the archive is an error, with whatever it comes, and not counted."""
        data = trees.nar("directory")
        with pytest.raises(BadArchive, match="data after its end at offset 840"):
            restore(place + "/x", data + b"more")
        restorer = PathRestorer(place + "/y")
        restorer.feed(data)
        assert restorer.finished
        restorer.feed(b"more")
        with pytest.raises(BadArchive, match="data after its end at offset 840"):
            restorer.finish()

    def test_maxSize(self, place):
        """A NAR larger than announced is refused."""
        data = encode(File(bytes(10_000)))
        restorer = PathRestorer(place + "/x", maxSize=9000)
        with pytest.raises(BadArchive, match="file too large"):
            restorer.feed(data[:200])

    def test_ended(self, place):
        """After an error, the end or giving up nothing more is taken, and nothing is open."""
        before = openFiles()
        for end, error in (
            (lambda restorer: restorer.abort(), None),
            (lambda restorer: restorer.feed(bytes(100)), FormatError),
            (lambda restorer: restorer.finish(), FormatError),
        ):
            restorer = PathRestorer(place + "/x")
            restorer.feed(trees.nar("nested")[:600])
            with pytest.raises(error) if error else nullcontext():
                end(restorer)
            assert openFiles() == before
            restorer.abort()
            with pytest.raises(StoreError, match="has ended already"):
                restorer.finish()
            with pytest.raises(StoreError, match="has ended already"):
                restorer.feed(b"x")
            deletePath(place + "/x")

    def test_diskFull(self, place, monkeypatch):
        """What the file system refuses is an error with the name of the file."""

        def refuse(fd, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", refuse)
        before = openFiles()
        with pytest.raises(StoreError, match=f"cannot write '{place}/x/a/b/c/d': No space left on device"):
            restore(place + "/x", trees.nar("nested"))
        assert openFiles() == before

    def test_shortWrites(self, place, monkeypatch):
        """The kernel may take less than it is given."""
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:3000]))
        tree = {b"a": File(os.urandom(100_000)), b"b": File(os.urandom(20_001))}
        restore(place + "/x", encode(tree), 1 << 16)
        monkeypatch.undo()
        assert trees.read(os.fsencode(place) + b"/x") == tree


class TestRestoreNar:
    """restoreNar: a NAR that is at hand whole"""

    @pytest.mark.parametrize("name", TREES)
    def test_golden(self, place, name):
        """The result is that of a NAR in pieces."""
        before = openFiles()
        restoreNar(place + "/x", trees.nar(name))
        assert openFiles() == before
        assert trees.read(os.fsencode(place) + b"/x") == TREES[name]
        assertCanonical(place + "/x")

    @pytest.mark.parametrize("name", TREES)
    def test_targetExists(self, place, name):
        """Whatever lies at the target, nothing of it is touched."""
        for existing in (File(b"old"), Link(os.fsencode(place) + b"/elsewhere"), Link(b"/etc"), {}):
            trees.write(existing, os.fsencode(place) + b"/x")
            with pytest.raises(StoreError, match=f"cannot write '{place}/x': File exists"):
                restoreNar(place + "/x", trees.nar(name))
            assert trees.read(os.fsencode(place) + b"/x") == existing
            assert os.listdir(place) == ["x"]
            deletePath(place + "/x")

    def test_noNar(self, place):
        """Whatever is not byte for byte the NAR of a file is read with all care, and refused."""
        data = trees.nar("executable")
        bad = [data[:end] for end in range(len(data))]
        bad += [data + b"\0", data + bytes(8), data[:-8] + b"\1" + data[-7:]]
        contents = data.index(TREES["executable"].data)
        bad += [data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :] for at in range(contents)]
        for one in bad:
            with pytest.raises(FormatError):
                restoreNar(place + "/x", one)
            deletePath(place + "/x")

    def test_diskFull(self, place, monkeypatch):
        """What the file system refuses is an error with the name of the file; nothing stays open."""

        def refuse(fd, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", refuse)
        before = openFiles()
        with pytest.raises(StoreError, match=f"cannot write '{place}/x': No space left on device"):
            restoreNar(place + "/x", trees.nar("executable"))
        assert openFiles() == before

    def test_shortWrites(self, place, monkeypatch):
        """The kernel may take less than it is given."""
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:3000]))
        contents = os.urandom(20_001)
        restoreNar(place + "/x", encode(File(contents)))
        monkeypatch.undo()
        assert trees.read(os.fsencode(place) + b"/x") == File(contents)

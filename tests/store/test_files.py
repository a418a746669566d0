"""Files of store objects: dumped, canonicalised, deleted; deep ones, and next to real Nix."""

import hashlib
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixserve.codec.hashes import hashBytes
from nixserve.codec.nar import MAX_CHUNK, Contents, Directory, EndDirectory, Regular, Symlink
from nixserve.codec.narwriter import encodeNar
from nixserve.errors import StoreError
from nixserve.store import files
from nixserve.store.files import (
    canonicalisePathMetaData,
    deletePath,
    dumpPath,
    hashPath,
)
from nixserve.store.restoring import PathRestorer
from tests.store.objectfiles import (
    assertCanonical,
    dump,
    encode,
    fewDescriptors,
    needsRoot,
    openFiles,
    restore,
    walk,
)
from tests.vectors.nar import trees
from tests.vectors.nar.trees import TREES, File, Link

needsNix = pytest.mark.skipif(shutil.which("nix-store") is None, reason="no nix-store to compare with")


class TestDump:
    """dumpPath"""

    @pytest.mark.parametrize("name", TREES)
    def test_golden(self, place, name):
        """A NAR is byte for byte what real Nix makes of the same tree."""
        trees.write(TREES[name], os.fsencode(place) + b"/x")
        assert dump(place + "/x") == trees.nar(name)
        assert dump(place + "/x/") == trees.nar(name)

    def test_relative(self, place, monkeypatch):
        """A relative path means what it means elsewhere."""
        trees.write(TREES["directory"], os.fsencode(place) + b"/x")
        monkeypatch.chdir(place)
        assert dump("x") == trees.nar("directory")

    def test_onlyTheOwnersExecutableBit(self, place):
        """Execute permission of group and others alone is none."""
        path = place + "/x"
        trees.write(File(b"#!/bin/sh\n"), os.fsencode(path))
        os.chmod(path, 0o655)
        assert dump(path) == encode(File(b"#!/bin/sh\n"))

    @pytest.mark.parametrize("chunkSize", [8192, 10_000, MAX_CHUNK])
    def test_chunks(self, place, chunkSize):
        """Chunks are full, but for the beginning of a node that does not fit any more."""
        sizes = [0, 1, 7, 3000, 5000, 8000, 8192, 9999, 65_536, 65_537, 262_144, 262_145, 700_000]
        tree = {b"%07d-%d" % (size, turn): File(os.urandom(size)) for size in sizes for turn in range(8)}
        tree |= {b"link%d" % turn: Link(b"t" * 4095) for turn in range(20)}
        trees.write(tree, os.fsencode(place) + b"/x")
        chunks = list(dumpPath(place + "/x", chunkSize))
        assert b"".join(chunks) == encode(tree)
        assert max(map(len, chunks)) <= chunkSize
        assert min(map(len, chunks[:-1])) >= chunkSize - files.MAX_NODE_HEADER

    def test_manyEntries(self, place):
        """A directory with many entries of every sort, and others after it."""
        sorts = [File(b"x"), Link(b"t"), {}, {b"a": File()}]
        many = {b"%d\xff\n" % number: sorts[number % 4] for number in range(3000)}
        trees.write({b"a": File(), b"b": many, b"c": {b"d": File()}}, os.fsencode(place) + b"/x")
        assert dump(place + "/x") == encode({b"a": File(), b"b": many, b"c": {b"d": File()}})

    def test_waitingCostsLittle(self, place):
        """Whoever is slow to read a directory with many entries does not make us keep an object for each."""
        os.mkdir(place + "/x")
        Path(place, "x", "0").touch()
        for number in range(1, 8000):
            os.link(place + "/x/0", f"{place}/x/{number}")
        tracemalloc.start()
        try:
            stream = dumpPath(place + "/x", 8192)
            next(stream)
            kept = tracemalloc.get_traced_memory()[0]
            stream.close()
        finally:
            tracemalloc.stop()
        assert kept < 30 * 8000

    @pytest.mark.parametrize("where", ["{}/x", "{}/dir/x"])
    @pytest.mark.parametrize("make", [os.mkfifo, lambda path: socket.socket(socket.AF_UNIX).bind(path)])
    def test_unsupportedType(self, place, where, make):
        """A FIFO or socket is an error with its name."""
        os.mkdir(place + "/dir")
        path = where.format(place)
        make(path)
        with pytest.raises(StoreError, match=f"file '{path}' has an unsupported type"):
            dump(place + "/x" if where == "{}/x" else place + "/dir")

    def test_missing(self, place):
        """What is not there is an error with its name."""
        for path in (place + "/x", place + "/x/y/z"):
            with pytest.raises(StoreError, match=f"cannot read '{path}': No such file or directory"):
                dump(path)

    @pytest.mark.parametrize("change", [-1, 1])
    @pytest.mark.parametrize("size", [100, 1_000_000])
    def test_sizeChanges(self, place, monkeypatch, size, change):
        """A file that is not as long as it said is an error, not a damaged NAR."""
        path = place + "/x"
        trees.write(File(bytes(size)), os.fsencode(path))
        fstat = os.fstat

        def changing(fd):
            status = fstat(fd)
            os.truncate(path, size + change)
            return status

        monkeypatch.setattr(os, "fstat", changing)
        with pytest.raises(StoreError, match=f"file '{path}' changed its size while it was being read"):
            dump(path)

    def test_replacedByLink(self, place, monkeypatch):
        """A file that turns into a symbolic link is an error, not followed."""
        trees.write({b"a": File(b"a")}, os.fsencode(place) + b"/x")
        real = files.sortedEntries

        def swapping(fd):
            entries = real(fd)
            os.unlink(place + "/x/a")
            os.symlink("/etc/passwd", place + "/x/a")
            return entries

        monkeypatch.setattr(files, "sortedEntries", swapping)
        with pytest.raises(StoreError, match=f"cannot read '{place}/x/a'"):
            dump(place + "/x")

    def test_closes(self, place):
        """Closing the generator early closes all descriptors."""
        trees.write({b"a": {b"b": File(bytes(1_000_000))}}, os.fsencode(place) + b"/x")
        before = openFiles()
        chunks = dumpPath(place + "/x")
        next(chunks)
        assert openFiles() > before
        chunks.close()
        assert openFiles() == before

    @pytest.mark.parametrize("name", TREES)
    def test_hashPath(self, place, name):
        """Hash and size are those of the NAR."""
        trees.write(TREES[name], os.fsencode(place) + b"/x")
        assert hashPath(place + "/x") == (hashBytes("sha256", trees.nar(name)), len(trees.nar(name)))

    def test_sortingLargeDirectories(self, monkeypatch):
        """The entries of large directories are sorted piece by piece: nothing else runs while a list is sorted."""
        sizes = []

        def sortedPiece(piece):
            sizes.append(len(piece))
            return sorted(piece)

        monkeypatch.setattr(files, "sorted", sortedPiece, raising=False)
        entries = [(b"%x" % (number * 7919 % 1_000_003), stat.S_IFREG) for number in range(25_000)]
        assert files._sorted(entries[:]) == sorted(entries)
        assert sum(sizes) == 25_000 and max(sizes) <= 10_000
        assert files._sorted(entries[:100]) == sorted(entries[:100])


LEVELS = 3000


def deepNar(name=b"d" * 60):
    """The NAR of a tree far deeper than the call stack, with files on the way back; paths far beyond C{PATH_MAX}."""
    start = [Directory(b""), *([Directory(name)] * (LEVELS - 1))]
    level = [Regular(b"z", False, 1), Contents(b"z"), EndDirectory()]
    return b"".join(encodeNar([*start, *(level * LEVELS)]))


def makeDeep(path, name="d" * 60):
    """Make the tree of L{deepNar} on disk, where the restorer would refuse it."""
    os.mkdir(path)
    fd = os.open(path, os.O_RDONLY)
    for level in range(LEVELS):
        os.close(os.open("z", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd))
        with open(os.open("z", os.O_WRONLY, dir_fd=fd), "wb") as stream:
            stream.write(b"z")
        if level < LEVELS - 1:
            os.mkdir(name, dir_fd=fd)
            deeper = os.open(name, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = deeper
    os.close(fd)


class TestDeep:
    """Deep trees, with few descriptors"""

    def test_everything(self, place):
        """Dumped, canonicalised and deleted, with no more than a few dozen descriptors."""
        data = deepNar()
        makeDeep(place + "/x")
        with fewDescriptors(45):
            before = openFiles()
            assert dump(place + "/x") == data
            canonicalisePathMetaData(place + "/x")
            assert dump(place + "/x") == data
            assert deletePath(place + "/x") == LEVELS
            assert openFiles() == before
        assert os.listdir(place) == []

    def test_deepestPath(self, place):
        """A tree whose longest path the kernel just takes is restored, with few descriptors."""
        room = 4095 - len(os.fsencode(place + "/x"))
        names = [b"d"] * (room // 2 - 1)
        last = b"z" * (room - 2 * len(names) - 1)
        nodes = [Directory(b""), *map(Directory, names), Regular(last, False, 0)]
        data = b"".join(encodeNar([*nodes, *([EndDirectory()] * (len(names) + 1))]))
        with fewDescriptors(45):
            assert restore(place + "/x", data, 1 << 16)[0] == hashBytes("sha256", data)
            assert dump(place + "/x") == data
        assert os.path.isfile(os.fsencode(place + "/x/") + b"/".join([*names, last]))

    @pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
    def test_pathTooLong(self, place, kind):
        """One byte more and it is refused: Nix's collector could never delete it."""
        room = 4095 - len(os.fsencode(place + "/x"))
        names = [b"d"] * (room // 2 - 1)
        last = b"z" * (room - 2 * len(names))
        node = {"file": Regular(last, False, 0), "directory": Directory(last), "symlink": Symlink(last, b"x")}[kind]
        ends = len(names) + (2 if kind == "directory" else 1)
        data = b"".join(encodeNar([Directory(b""), *map(Directory, names), node, *([EndDirectory()] * ends)]))
        with pytest.raises(StoreError, match="File name too long") as caught:
            restore(place + "/x", data)
        assert len(str(caught.value)) < 600
        assert os.listdir(os.fsencode(place + "/x/") + b"/".join(names)) == []
        deletePath(place + "/x")
        assert os.listdir(place) == []

    def test_movedAway(self, place):
        """A directory that is moved while we are below it does not take us elsewhere."""
        names = [f"d{level}" for level in range(60)]
        os.makedirs(place + "/x/" + "/".join(names))
        os.mkdir(place + "/elsewhere")
        restorer = PathRestorer(place + "/y")
        data = b"".join(encodeNar([Directory(b""), *(Directory(name.encode()) for name in names)]))
        restorer.feed(data)
        os.rename(place + "/y/" + "/".join(names[:20]), place + "/elsewhere/d19")
        with pytest.raises(StoreError, match="was moved away"):
            restorer.feed(encode({})[-16:] * 120)
        assert os.listdir(place + "/elsewhere") == ["d19"]


class TestCanonicalise:
    """canonicalisePathMetaData"""

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            (0o644, 0o444),
            (0o755, 0o555),
            (0o4777, 0o555),
            (0o2644, 0o444),
            (0o655, 0o444),
            (0o500, 0o555),
            (0o000, 0o444),
            (0o444, 0o444),
            (0o555, 0o555),
        ],
    )
    def test_modes(self, place, mode, expected):
        """Files keep the owner's execute bit and nothing else."""
        path = place + "/x"
        trees.write(File(b"x"), os.fsencode(path))
        os.chmod(path, mode)
        canonicalisePathMetaData(path)
        assert stat.S_IMODE(os.lstat(path).st_mode) == expected
        assertCanonical(path)

    @pytest.mark.parametrize("name", TREES)
    def test_trees(self, place, name):
        """Everything in a tree becomes canonical; its NAR stays."""
        path = place + "/x"
        trees.write(TREES[name], os.fsencode(path))
        canonicalisePathMetaData(path)
        assertCanonical(path)
        assert dump(path) == trees.nar(name)
        canonicalisePathMetaData(path)
        assertCanonical(path)

    def test_directoryModes(self, place):
        """A directory becomes 0555 whatever it was, and its sticky and set-id bits go."""
        for number, mode in enumerate((0o777, 0o1777, 0o2755, 0o444, 0o700)):
            path = f"{place}/{number}"
            trees.write({b"a": File()}, os.fsencode(path))
            os.chmod(path, mode)
            canonicalisePathMetaData(path)
            assertCanonical(path)

    def test_linksAreNotFollowed(self, place):
        """What a symbolic link points to stays as it is."""
        trees.write({b"f": File(b"old")}, os.fsencode(place) + b"/out")
        before = os.stat(place + "/out/f")
        trees.write({b"a": Link(b"../out"), b"b": Link(b"../out/f")}, os.fsencode(place) + b"/x")
        canonicalisePathMetaData(place + "/x")
        assertCanonical(place + "/x")
        assert os.stat(place + "/out/f") == before
        os.symlink("out/f", place + "/link")
        canonicalisePathMetaData(place + "/link")
        assert os.stat(place + "/out/f") == before

    def test_unsupportedType(self, place):
        """A FIFO has no place in a store."""
        os.mkdir(place + "/x")
        os.mkfifo(place + "/x/fifo")
        with pytest.raises(StoreError, match=f"file '{place}/x/fifo' has an unsupported type"):
            canonicalisePathMetaData(place + "/x")

    def test_xattrs(self, place):
        """Extended attributes go."""
        trees.write({b"f": File(b"x")}, os.fsencode(place) + b"/x")
        try:
            for path in (place + "/x", place + "/x/f"):
                os.setxattr(path, "user.note" if os.geteuid() else "trusted.note", b"1")
        except OSError:
            pytest.skip("no extended attributes here")
        canonicalisePathMetaData(place + "/x")
        for path in (place + "/x", place + "/x/f"):
            assert os.listxattr(path) == []

    @needsRoot
    def test_owner(self, place):
        """Files of others become ours, links themselves and not what they point to."""
        trees.write({b"f": File(b"x"), b"l": Link(b"../out"), b"d": {}}, os.fsencode(place) + b"/x")
        trees.write(File(), os.fsencode(place) + b"/out")
        for path, _ in [*walk(place + "/x"), (place + "/out", None)]:
            os.lchown(path, 65534, 65534)
        canonicalisePathMetaData(place + "/x")
        assertCanonical(place + "/x")
        assert os.stat(place + "/out").st_uid == 65534


class TestDelete:
    """deletePath"""

    @pytest.mark.parametrize("name", TREES)
    def test_trees(self, place, name):
        """All goes, and is counted."""
        path = place + "/x"
        restore(path, trees.nar(name))
        size = sum(status.st_size for _, status in walk(path) if not stat.S_ISDIR(status.st_mode))
        assert deletePath(path) == size
        assert os.listdir(place) == []

    def test_missing(self, place):
        """What is not there frees nothing."""
        assert deletePath(place + "/x") == 0
        assert deletePath(place + "/x/y") == 0

    def test_countsLinks(self, place):
        """A file with a second link counts, one with more does not."""
        os.mkdir(place + "/x")
        for name, links, size in (("a", 0, 1), ("b", 1, 10), ("c", 2, 100)):
            trees.write(File(bytes(size)), os.fsencode(f"{place}/x/{name}"))
            for number in range(links):
                os.link(f"{place}/x/{name}", f"{place}/{name}{number}")
        assert deletePath(place + "/x") == 11

    def test_linksAreNotFollowed(self, place):
        """Only the link goes."""
        trees.write({b"f": File(b"old")}, os.fsencode(place) + b"/out")
        trees.write({b"a": Link(b"../out")}, os.fsencode(place) + b"/x")
        os.symlink("out", place + "/link")
        deletePath(place + "/x")
        deletePath(place + "/link")
        assert trees.read(os.fsencode(place) + b"/out") == {b"f": File(b"old")}
        assert os.listdir(place) == ["out"]

    def test_anyType(self, place):
        """FIFOs and sockets go as well."""
        os.mkdir(place + "/x")
        os.mkfifo(place + "/x/fifo")
        deletePath(place + "/x")
        assert os.listdir(place) == []

    def test_vanishing(self, place, monkeypatch):
        """What somebody else deletes meanwhile is fine."""
        trees.write({b"a": File(b"x"), b"b": {b"c": File(b"x")}}, os.fsencode(place) + b"/x")
        listdir = os.listdir
        monkeypatch.setattr(os, "listdir", lambda fd: [*listdir(fd), "ghost"])
        assert deletePath(place + "/x") == 2
        monkeypatch.undo()
        assert os.listdir(place) == []

    def test_failure(self, place, monkeypatch):
        """What cannot be deleted is an error with its name."""
        trees.write({b"a": File(b"x")}, os.fsencode(place) + b"/x")

        def refuse(name, dir_fd):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "unlink", refuse)
        with pytest.raises(StoreError, match=f"cannot delete '{place}/x/a': Operation not permitted"):
            deletePath(place + "/x")


names = st.binary(min_size=1, max_size=12).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
targets = st.binary(min_size=1, max_size=20).filter(lambda target: b"\0" not in target)
leaves = st.one_of(st.builds(File, st.binary(max_size=100), st.booleans()), st.builds(Link, targets))
anyTree = st.recursive(leaves, lambda children: st.dictionaries(names, children, max_size=5), max_leaves=15)


@settings(deadline=None)
@given(anyTree, st.integers(1, 2000))
def test_roundTrip(tree, size):
    """Any tree comes back from its NAR, and its NAR from the tree, in canonical form."""
    data = encode(tree)
    with tempfile.TemporaryDirectory() as place:
        assert restore(place + "/x", data, size) == (hashBytes("sha256", data), len(data))
        assert trees.read(os.fsencode(place) + b"/x") == tree
        assertCanonical(place + "/x")
        assert dump(place + "/x") == data
        deletePath(place + "/x")
        assert os.listdir(place) == []


@pytest.mark.interop
@needsNix
@settings(deadline=None, max_examples=15)
@given(anyTree)
def test_sameAsNix(tree):
    """Real Nix dumps the same bytes, and restores the same tree from ours."""
    with tempfile.TemporaryDirectory() as place:
        trees.write(tree, os.fsencode(place) + b"/x")
        data = dump(place + "/x")
        assert subprocess.run(["nix-store", "--dump", place + "/x"], capture_output=True, check=True).stdout == data
        subprocess.run(["nix-store", "--restore", place + "/y"], input=data, check=True)
        assert trees.read(os.fsencode(place) + b"/y") == tree
        assert hashPath(place + "/y") == hashPath(place + "/x")


@pytest.mark.interop
@needsNix
def test_canonicalAsNix(tmp_path):
    """What we restore has the metadata that real Nix gives to what it adds to a store."""
    tree = TREES["nested"] | {b"x": File(b"x", True), b"y": File(b"y")}
    trees.write(tree, os.fsencode(tmp_path) + b"/tree")
    root = f"{tmp_path}/root"
    added = subprocess.run(
        ["nix-store", "--store", root, "--add", f"{tmp_path}/tree"], capture_output=True, check=True, text=True
    )
    path = root + added.stdout.strip()
    restore(f"{tmp_path}/ours", dump(path))
    theirs = {name[len(path) :]: status for name, status in walk(path)}
    ours = {name[len(f"{tmp_path}/ours") :]: status for name, status in walk(f"{tmp_path}/ours")}
    assert theirs.keys() == ours.keys()
    for name, status in theirs.items():
        assert (status.st_mode, status.st_mtime_ns) == (ours[name].st_mode, ours[name].st_mtime_ns), name
    assert hashlib.sha256(dump(path)).digest() == hashPath(f"{tmp_path}/ours")[0].digest
    deletePath(root)

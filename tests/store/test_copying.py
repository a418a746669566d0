"""Copies of what builders leave: canonical, complete, on inodes of their own, of nobody else's files."""

import errno
import os
import stat
import tracemalloc

import pytest

from nixserve.errors import StoreError
from nixserve.store import copying
from nixserve.store.copying import TooLarge, TreeCopier
from nixserve.store.files import deletePath, dumpPath
from tests.vectors.nar import trees
from tests.vectors.nar.trees import TREES, File, Link

needsRoot = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")

BUILDER = 12345


@pytest.fixture
def place(tmp_path):
    """A directory, as text."""
    yield str(tmp_path)
    deletePath(str(tmp_path))


def proceed():
    """Nobody wants to give up."""


def copy(place, uids=None):
    """Copy C{x} to C{y}; its path."""
    TreeCopier(uids, proceed).copy(f"{place}/x", f"{place}/y", f"{place}/y")
    return f"{place}/y"


def write(place, tree):
    """Write C{tree} as C{x}; its path."""
    trees.write(tree, os.fsencode(place) + b"/x")
    return f"{place}/x"


def walk(path):
    """Path and status of everything in a tree."""
    yield path, os.lstat(path)
    if stat.S_ISDIR(os.lstat(path).st_mode):
        for name in os.listdir(path):
            yield from walk(os.path.join(path, name))


def give(path, uid=BUILDER):
    """Make everything in a tree somebody's."""
    for name, _ in [*walk(path)]:
        os.lchown(name, uid, uid)


def assertCanonical(path):
    """Everything in a tree has canonical metadata and no extended attributes."""
    for name, status in walk(path):
        assert status.st_mtime_ns == 1_000_000_000, name
        expected = {stat.S_IFDIR: {0o555}, stat.S_IFREG: {0o444, 0o555}}.get(stat.S_IFMT(status.st_mode))
        assert expected is None or stat.S_IMODE(status.st_mode) in expected, name
        assert status.st_uid == os.geteuid(), name
        assert os.listxattr(name, follow_symlinks=False) == [], name


@pytest.mark.parametrize("name", TREES)
def test_trees(place, name):
    """The copy has the contents of the original, canonical metadata, and none of its inodes."""
    source = write(place, TREES[name])
    target = copy(place)
    assert b"".join(dumpPath(target)) == trees.nar(name)
    assertCanonical(target)
    assert not {status.st_ino for _, status in walk(source)} & {status.st_ino for _, status in walk(target)}


@pytest.mark.parametrize("mode", [0o644, 0o755, 0o4777, 0o2644, 0o100, 0o000])
def test_modes(place, mode):
    """Files keep the owner's execute bit and nothing else; what the owner cannot read he can copy."""
    os.chmod(write(place, File(b"x")), mode)
    target = copy(place)
    assert stat.S_IMODE(os.lstat(target).st_mode) == (0o555 if mode & 0o100 else 0o444)


def test_umask(place):
    """The umask has no say in modes."""
    write(place, {b"d": {b"f": File(b"x", True)}})
    before = os.umask(0o777)
    try:
        assertCanonical(copy(place))
    finally:
        os.umask(before)


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3_000_001])
def test_sizes(place, size):
    """Files of all sizes, also where the kernel does not copy from file to file."""
    data = os.urandom(size)
    write(place, File(data))
    with open(copy(place), "rb") as stream:
        assert stream.read() == data


@pytest.mark.parametrize("answer", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, 0])
def test_noKernelCopy(place, monkeypatch, answer):
    """Where the kernel does not copy from file to file, or says that there is nothing, we do."""

    def refuse(*_):
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(os, "copy_file_range", refuse)
    test_sizes(place, 3_000_001)


def test_holes(place):
    """A disk image with little in it takes little room, whatever its size."""
    with open(write(place, File()), "r+b") as stream:
        stream.truncate(1 << 40)
        for offset in (0, 1 << 30, (1 << 39) + 5):
            stream.seek(offset)
            stream.write(b"data")
    status = os.stat(copy(place))
    assert status.st_size == 1 << 40
    assert status.st_blocks * 512 < 1 << 20
    with open(f"{place}/y", "rb") as stream:
        for offset in (0, 1 << 30, (1 << 39) + 5):
            stream.seek(offset)
            assert stream.read(6) == b"data\0\0"


def test_onlyHole(place):
    """A file may have no data at all."""
    with open(write(place, File()), "r+b") as stream:
        stream.truncate(1 << 20)
    assert os.stat(copy(place)).st_size == 1 << 20


def test_hardLinks(place):
    """Two names of a file are two names of its copy, also in the next output of the build."""
    write(place, {b"a": File(b"x"), b"d": {b"b": File(b"y")}})
    os.link(f"{place}/x/a", f"{place}/x/d/c")
    os.mkdir(f"{place}/x2")
    os.link(f"{place}/x/a", f"{place}/x2/e")
    copier = TreeCopier(None, proceed)
    copier.copy(f"{place}/x", f"{place}/y", f"{place}/y")
    # As an output is deleted when it has been copied.
    inode = os.stat(f"{place}/x/a").st_ino
    deletePath(f"{place}/x")
    copier.copy(f"{place}/x2", f"{place}/y2", f"{place}/y2")
    deletePath(f"{place}/links")
    copies = [os.stat(f"{place}/{name}") for name in ("y/a", "y/d/c", "y2/e")]
    assert len({status.st_ino for status in copies}) == 1 and copies[0].st_nlink == 3
    assert copies[0].st_ino != inode
    assert os.stat(f"{place}/y/d/b").st_nlink == 1
    assertCanonical(f"{place}/y")


def test_manyHardLinks(place):
    """However many files with several names there are, and however long these, nothing of them is kept in memory."""
    deep = {b"f%d" % number: File(b"x") for number in range(300)}
    for _ in range(13):
        deep = {250 * b"d": deep}
    # Copied first.
    write(place, {b"z": deep, b"two": {}})
    walk = f"{place}/x/z" + 13 * ("/" + 250 * "d")
    for number in range(300):
        os.link(f"{walk}/f{number}", f"{place}/x/two/g{number}")
    tracemalloc.start()
    try:
        copy(place)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500_000
    assert os.stat(f"{place}/y/two/g7").st_ino == os.stat(walk.replace("/x/", "/y/") + "/f7").st_ino


@pytest.mark.parametrize("case", ["sparse", "many", "links"])
def test_tooLarge(place, case):
    """What has more bytes than it may is not copied first: holes count, and hard links, since a NAR has them."""
    write(place, {b"a": File(b"x" * 400), b"b": File(b"y" * 400), b"c": File(b"z" * 400 if case == "many" else b"")})
    if case == "sparse":
        os.truncate(f"{place}/x/c", 1 << 40)
    if case == "links":
        os.link(f"{place}/x/b", f"{place}/x/d")
    TreeCopier(None, proceed, 2 << 40).copy(f"{place}/x", f"{place}/y", f"{place}/y")
    deletePath(f"{place}/y")
    deletePath(f"{place}/links")
    with pytest.raises(TooLarge, match="x' has more than 1000 bytes"):
        TreeCopier(None, proceed, 1000).copy(f"{place}/x", f"{place}/y", f"{place}/y")
    assert sum(os.stat(f"{place}/y/{name}").st_size for name in os.listdir(f"{place}/y")) <= 1000


def test_asManyNamesAsPossible(place, monkeypatch):
    """A file may have as many names as the file system lets it: copies may then be two files."""
    link = os.link
    refusals = [True]

    def refuse(source, target, **options):
        if target == b"b" and refusals:
            refusals.clear()
            raise OSError(errno.EMLINK, "too many links")
        link(source, target, **options)

    write(place, {b"a": File(b"x")})
    os.link(f"{place}/x/a", f"{place}/x/b")
    os.link(f"{place}/x/a", f"{place}/x/c")
    monkeypatch.setattr(os, "link", refuse)
    TreeCopier(None, proceed).copy(f"{place}/x", f"{place}/y", f"{place}/y")
    assert not refusals
    for name in "abc":
        with open(f"{place}/y/{name}") as file:
            assert file.read() == "x"


@pytest.mark.parametrize("way", ["descriptor", "mapping", "another link", "directory"])
def test_writerAfterwards(place, way):
    """Whoever kept something of the original open changes the original."""
    source = write(place, {b"f": File(b"good" * 50_000)})
    fd = os.open(f"{source}/f", os.O_RDWR)
    directory = os.open(source, os.O_RDONLY)
    os.link(f"{source}/f", f"{place}/link")
    before = b"".join(dumpPath(source))
    target = copy(place)
    if way == "directory":
        os.close(os.open("evil", os.O_WRONLY | os.O_CREAT, dir_fd=directory))
    else:
        path = {"descriptor": f"/proc/self/fd/{fd}", "another link": f"{place}/link"}.get(way, f"{source}/f")
        with open(path, "r+b") as stream:
            stream.write(b"evil")
    os.close(fd)
    os.close(directory)
    assert b"".join(dumpPath(source)) != before
    assert b"".join(dumpPath(target)) == before


@needsRoot
@pytest.mark.parametrize("mine", [File(b"secret"), {}, Link(b"x")])
def test_invalidOwnership(place, mine):
    """A file that is not the builder's is refused, of whatever kind."""
    write(place, {b"d": {b"f": mine}})
    give(f"{place}/x")
    os.lchown(f"{place}/x/d/f", 0, 0)
    with pytest.raises(StoreError, match=f"invalid ownership on file '{place}/x/d/f'"):
        copy(place, range(BUILDER, BUILDER + 1))


@needsRoot
def test_exchangedMeanwhile(place, monkeypatch):
    """What counts is the file that is copied, not the one that had its name before."""
    write(place, {b"f": File(b"own")})
    give(f"{place}/x")
    with open(f"{place}/secret", "w") as stream:
        stream.write("secret")
    entries = copying.sortedEntries

    def exchange(fd):
        found = entries(fd)
        os.rename(f"{place}/secret", f"{place}/x/f")
        return found

    monkeypatch.setattr(copying, "sortedEntries", exchange)
    with pytest.raises(StoreError, match="invalid ownership"):
        copy(place, range(BUILDER, BUILDER + 1))
    assert not os.path.exists(f"{place}/y/f")


def test_becomesLink(place, monkeypatch):
    """A file that becomes a symbolic link is not followed."""
    write(place, {b"f": File(b"own")})
    entries = copying.sortedEntries

    def exchange(fd):
        found = entries(fd)
        os.unlink(f"{place}/x/f")
        os.symlink("/etc/passwd", f"{place}/x/f")
        return found

    monkeypatch.setattr(copying, "sortedEntries", exchange)
    with pytest.raises(StoreError, match="cannot copy"):
        copy(place)


def test_unsupportedType(place):
    """A FIFO has no place in a store, and nobody waits for what comes out of it."""
    write(place, {})
    os.mkfifo(f"{place}/x/fifo")
    with pytest.raises(StoreError, match=f"file '{place}/x/fifo' has an unsupported type"):
        copy(place)


def test_missing(place):
    """What is not there cannot be copied."""
    with pytest.raises(StoreError, match=f"cannot copy '{place}/x': No such file"):
        copy(place)


def test_targetExists(place):
    """Nothing that exists is opened or changed."""
    write(place, File(b"new"))
    with open(f"{place}/y", "w") as stream:
        stream.write("old")
    with pytest.raises(StoreError, match="File exists"):
        copy(place)
    with open(f"{place}/y") as stream:
        assert stream.read() == "old"


def test_deep(place):
    """A tree may be deeper than the stack and the number of descriptors. What may be in a store is not decided here."""
    path = os.open(place, os.O_RDONLY)
    for name in ("x", *1_500 * ["d"]):
        os.mkdir(name, dir_fd=path)
        below = os.open(name, os.O_RDONLY, dir_fd=path)
        os.close(path)
        path = below
    os.close(path)
    copied = copy(place)
    assert sum(chunk.count(b"directory") for chunk in dumpPath(copied)) == 1_501


def test_givesUp(place):
    """A large file takes long to copy; nobody need wait for that who does not want it any more."""
    write(place, File(os.urandom(1000) * 40_000))
    asked = []

    def stop():
        asked.append(None)
        if len(asked) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TreeCopier(None, stop).copy(f"{place}/x", f"{place}/y", f"{place}/y")
    assert len(asked) == 3


def test_sharesNoDescriptors(place):
    """Nothing stays open, however it ends."""
    before = len(os.listdir("/proc/self/fd"))
    write(place, {b"a": File(b"x"), b"d": {b"f": File(b"y")}})
    copy(place)
    os.mkfifo(f"{place}/x/d/fifo")
    with pytest.raises(StoreError):
        TreeCopier(None, proceed).copy(f"{place}/x", f"{place}/z", f"{place}/z")
    assert len(os.listdir("/proc/self/fd")) == before

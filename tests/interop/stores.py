"""
Stores to copy from and to: how tests fill them, and how they compare what came of it with what real Nix says.

A store is known by its root: C{ROOT/nix/store} and C{ROOT/nix/var/nix}, as for C{NIX_REMOTE=ROOT}.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path

from nixserve.store.files import dumpPath
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.testing import addObject, makeInfo, makeNar
from tests.vectors.nar.trees import File, Link

STORE_DIR = "/nix/store"

#: A closure's worth of trees that have gone wrong somewhere before.
ODD_TREES = {
    "links": {
        b"absolute": Link(b"/etc/passwd"),
        b"dangling": Link(b"nowhere/at all"),
        b"up": Link(b"../../../../.."),
        b"to-itself": Link(b"to-itself"),
        b"long": Link(b"t" * 4095),
    },
    "modes": {b"script": File(b"#!/bin/sh\n", True), b"plain": File(b"#!/bin/sh\n"), b"empty-script": File(b"", True)},
    "empty-file": File(),
    "empty-directory": {},
    "empty-things": {b"directory": {b"directory": {}}, b"file": File()},
    "names": {
        name: File(name)
        for name in (
            *(b"with a blank", b"  ", b"...", b"-", b"a\nb", b"'\"\\$`*?", b"~nix~case~hack~1", b"\xff\xfe not text"),
            *("ümläut".encode(), "日本語".encode(), "e\u0301".encode(), "\u00e9".encode()),
            *(b"A", b"a", b"n" * 255),
        )
    },
    "paddings": {b"f%d" % n: File(b"12345678901234567"[:n]) for n in range(18)},
    "deep": {b"d" * n: {b"e" * n: {b"f" * n: File(b"%d" % n)}} for n in (1, 60, 80)},
}


def named(name):
    """A path that no content led to, as those of built outputs."""
    digits = hashlib.sha256(name.encode()).hexdigest()[:32]
    # Nix's base 32 has no "e".
    return f"{STORE_DIR}/{digits.replace('e', 'g')}-{name}"


def physical(root, path):
    """Where an object lies."""
    return Path(f"{root}{path}")


def temporaryRoots(root):
    """The names of the files of temporary roots."""
    return sorted(os.listdir(f"{root}/nix/var/nix/temproots"))


def isSent(root, path):
    """Is somebody sending this path, to real Nix, which locks it, or to our program, which locks another place?"""
    places = physical(root, "/nix/store").glob("*-nixserve-import-*.lock")
    return any(map(isLocked, [f"{physical(root, path)}.lock", *places]))


def isLocked(path):
    """Is a file locked by somebody? One that is not there is not."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def opened(root):
    """A session of our own on a store, which is made if need be."""
    os.makedirs(root, exist_ok=True)
    store = LocalStore(StoreLayout.underRoot(str(root)))
    try:
        yield store.openSession()
    finally:
        store.close()


def add(session, name, nar, references=(), **fields):
    """Add an object; its path."""
    info = makeInfo(name, nar, references, **fields)
    addObject(session, info, nar)
    return info.path


def addChain(root, length, tag):
    """
    Objects each of which refers to the one before.

    @return: their paths, the first first.
    """
    chain = []
    with opened(root) as session:
        for number in range(length):
            chain.append(add(session, f"{tag}-{number}", makeNar(b"%s %d" % (tag.encode(), number)), chain[-1:]))
    return chain


def addSmallFiles(root, count, tag):
    """One object of many small files in directories of 100."""
    tree = {}
    for number in range(count):
        contents = f"{tag} {number}\n".encode() * (number % 7)
        tree.setdefault(f"d{number // 100}", {})[f"f{number}"] = contents
    with opened(root) as session:
        return add(session, tag, makeNar(tree))


def addSparse(nix, root, name, size):
    """
    One object: a file of C{size} zeros that takes no room, registered by real Nix.

    @return: path, hash as 64 hexadecimal digits, size of the NAR.
    """
    with opened(root):
        pass
    path = named(name)
    place = physical(root, path)
    place.touch()
    os.truncate(place, size)
    place.chmod(0o444)
    os.utime(place, (1, 1))
    digest, narSize = hashlib.sha256(), 0
    for chunk in dumpPath(str(place)):
        digest.update(chunk)
        narSize += len(chunk)
    loadDatabase(nix, root, [(path, digest.hexdigest(), narSize, "", [])])
    return path, digest.hexdigest(), narSize


def loadDatabase(nix, root, records):
    """
    Have real Nix register objects that are there.

    @param records: path, hash in base 16, size of the NAR, deriver or nothing, references.
    """
    text = "".join(
        "\n".join([path, narHash, str(narSize), deriver, str(len(references)), *references, ""])
        for path, narHash, narSize, deriver, references in records
    )
    nix.run("nix-store", "--load-db", store=root, stdin=text.encode())


def infos(nix, root):
    """All that real Nix knows about every path of a store but when it came, by path."""
    known = json.loads(nix.run("nix", "path-info", "--json", "--all", "--store", root).stdout)
    for info in known:
        for field in ("registrationTime", "ultimate", "valid"):
            info.pop(field, None)
        for field in ("references", "signatures"):
            info[field] = sorted(info.get(field, ()))
    return {info["path"]: info for info in known}


def exportDigest(nix, root, paths):
    """SHA-256 of what C{nix-store --export} writes."""
    exporting = nix.start("nix-store", "--export", *paths, store=root, stdout=-1, stderr=-1)
    digest = hashlib.file_digest(exporting.stdout, "sha256")
    errors = exporting.communicate(timeout=120)[1]
    assert exporting.returncode == 0, errors
    return digest.hexdigest()


def assertVerified(nix, root, timeout=120):
    """Real Nix finds nothing wrong with a store, its contents included."""
    done = nix.run("nix-store", "--verify", "--check-contents", store=root, timeout=timeout)
    said = [line for line in done.stderr.decode().splitlines() if not line.startswith(("reading ", "checking "))]
    assert said == [] and done.stdout == b""


def assertSame(nix, source, target, paths, one=()):
    """
    Real Nix says of both stores the same about these paths, and exports them to the same bytes.

    @param paths: a closure.
    @param one: those of C{paths} that are also asked about one by one: C{nix-store --query} prints for several paths
        the union of the answers.
    """
    found, expected = infos(nix, target), infos(nix, source)
    assert {path: found.get(path) for path in paths} == {path: expected[path] for path in paths}
    for what in ("--hash", "--size", "--deriver"):
        query = ["nix-store", "--query", what, *paths]
        assert nix.lines(*query, store=target) == nix.lines(*query, store=source)
    for path in one:
        for what in ("--references", "--referrers"):
            query = ["nix-store", "--query", what, path]
            assert sorted(nix.lines(*query, store=target)) == sorted(nix.lines(*query, store=source)), (what, path)
    assert exportDigest(nix, target, paths) == exportDigest(nix, source, paths)

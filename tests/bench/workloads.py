"""
What benchmarks copy: stores made once, with our own store, on which the real Nix then works.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.hashes import Hash
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.store.api import StoreSession
from nixserve.store.files import dumpPath
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore

TINY_PATHS = 2001


def addTree(session: StoreSession, tree: Path, name: str, references: frozenset[StorePath] = frozenset()) -> StorePath:
    """Add files to a store as a source, with references that they need not contain."""
    digest, size = hashlib.sha256(), 0
    for chunk in dumpPath(str(tree)):
        digest.update(chunk)
        size += len(chunk)
    narHash = Hash("sha256", digest.digest())
    ca = ContentAddress(ContentAddressMethod.NAR, narHash)
    path = session.storeDir.makeContentAddressedPath(ca, name, references)
    writer = session.addToStore(ValidPathInfo(path, narHash, size, references, ca=ca))
    for chunk in dumpPath(str(tree)):
        writer.feed(chunk)
    writer.finish()
    return path


def writeBigFile(file: Path) -> None:
    """1 GiB that does not compress."""
    block = random.Random(1).randbytes(16 * 1024 * 1024)
    with open(file, "wb") as stream:
        for _ in range(64):
            stream.write(block)


def oneBigFile(session: StoreSession, scratch: Path) -> StorePath:
    """One file of 1 GiB that does not compress."""
    writeBigFile(scratch / "big")
    return addTree(session, scratch / "big", "big")


def manySmallFiles(session: StoreSession, scratch: Path) -> StorePath:
    """30,000 files of up to 200 bytes in 300 directories."""
    chance = random.Random(2)
    for number in range(300):
        directory = scratch / f"d{number:03}"
        directory.mkdir()
        for entry in range(100):
            (directory / f"f{entry:02}").write_bytes(chance.randbytes(chance.randrange(200)))
    return addTree(session, scratch, "small-files")


def manyTinyPaths(session: StoreSession, scratch: Path) -> StorePath:
    """2,000 paths of one small file each, and one that refers to them all."""
    paths = set()
    for number in range(TINY_PATHS - 1):
        file = scratch / f"t{number}"
        file.write_text(f"{number}\n")
        paths.add(addTree(session, file, f"tiny-{number}"))
    (scratch / "top").write_text("\n".join(sorted(paths)))
    return addTree(session, scratch / "top", "tiny-top", frozenset(paths))


def referencesOf(root: Path, path: StorePath) -> frozenset[StorePath]:
    """What a path in the store below C{root} refers to."""
    store = LocalStore(StoreLayout.underRoot(str(root)))
    try:
        return store.openSession().queryPathInfos([path])[path].references
    finally:
        store.close()


WORKLOADS: dict[str, Callable[[StoreSession, Path], StorePath]] = {
    "1 GiB in one file": oneBigFile,
    "30,000 small files": manySmallFiles,
    "2,001 tiny paths": manyTinyPaths,
}


def makeStore(root: Path, scratch: Path, only: str = "") -> Iterator[tuple[str, StorePath]]:
    """Make a store with all workloads whose name contains C{only}; gives the name and the top path of each."""
    store = LocalStore(StoreLayout.underRoot(str(root)))
    session = store.openSession()
    try:
        for name, make in WORKLOADS.items():
            if only in name:
                scratch.mkdir(parents=True)
                path = make(session, scratch)
                shutil.rmtree(scratch)
                yield name, path
    finally:
        store.close()

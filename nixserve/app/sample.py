"""
Something to show a store with: a closure made of files that are there wherever Python is.

Blocking, no Twisted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nixserve.codec.contentaddress import ContentAddress, ContentAddressMethod
from nixserve.codec.hashes import Hash
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.errors import StoreError
from nixserve.store.api import StoreSession
from nixserve.store.files import dumpPath

__all__ = ["Sample", "addNar", "addTree", "makeSample"]

PACKAGES: Final = ("asyncio", "email", "encodings", "http", "importlib", "json", "logging", "unittest", "urllib", "xml")
"""Packages of Python's library, each to be an object of its own: together some 300 small files."""

NOISE_FILES: Final = 3
NOISE_SIZE: Final = 8 * 1024 * 1024
"""Files of random bytes, so that the rates are about more than small files; nothing on the way can compress them."""

_SCRIPT: Final = """\
#!/bin/sh
# Refers to another object by its path, as programs in a store do.
exec python3 -m json.tool --help "{json}"
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """
    A closure.

    @ivar root: refers to everything else.
    @ivar files: how many regular files it has,
    @ivar executables: how many of them are executable,
    @ivar links: how many symbolic links.
    @ivar narBytes: the sizes of the NARs of all objects.
    @ivar packages: those of its objects that are packages of Python's library, by name.
    """

    root: StorePath
    paths: int
    files: int
    executables: int
    links: int
    narBytes: int
    packages: Mapping[str, ValidPathInfo]


def makeSample(session: StoreSession, directory: str) -> Sample:
    """
    Add a sample to a store.

    @param directory: an empty one to prepare it in; what is left there is of no use.
    """
    base = Path(directory)
    infos: dict[str, ValidPathInfo] = {}
    for name in PACKAGES:
        _copyPackage(name, base / name)
        infos[name] = addTree(session, f"python-{name}", str(base / name))
    (base / "noise").mkdir()
    for number in range(NOISE_FILES):
        (base / "noise" / f"{number}.bin").write_bytes(os.urandom(NOISE_SIZE))
    infos["noise"] = addTree(session, "noise", str(base / "noise"))
    _writeProgram(base / "program", infos)
    infos["program"] = addTree(session, "program", str(base / "program"), _paths(infos, "json", "noise"))
    _writeProfile(base / "profile", infos)
    profile = addTree(session, "profile", str(base / "profile"), _paths(infos, *infos))
    files, executables, links = _count(base)
    narBytes = sum(info.narSize for info in (*infos.values(), profile))
    packages = {name: infos[name] for name in PACKAGES}
    return Sample(profile.path, len(infos) + 1, files, executables, links, narBytes, packages)


def addTree(session: StoreSession, name: str, directory: str, references: Collection[StorePath] = ()) -> ValidPathInfo:
    """
    Add a directory, file or link under the path that follows from its contents, as C{nix store add-path} does.

    @param references: the objects whose paths occur in it.
    @raise StoreError: it cannot be read, or changes meanwhile.
    @raise nixserve.store.api.Busy: call again.
    """
    return addNar(session, name, lambda: dumpPath(directory), references)


def addNar(
    session: StoreSession,
    name: str,
    dump: Callable[[], Iterable[bytes]],
    references: Collection[StorePath] = (),
    textHash: Hash | None = None,
) -> ValidPathInfo:
    """
    As L{addTree}, from a NAR.

    @param dump: gives it, the same each time.
    @param textHash: if it is a text that refers to others, such as a .drv file: the hash of the text.
    """
    digest, size = hashlib.sha256(), 0
    for chunk in dump():
        digest.update(chunk)
        size += len(chunk)
    narHash = Hash("sha256", digest.digest())
    ca = (
        ContentAddress(ContentAddressMethod.TEXT, textHash)
        if textHash
        else ContentAddress(ContentAddressMethod.NAR, narHash)
    )
    path = session.storeDir.makeContentAddressedPath(ca, name, references)
    info = ValidPathInfo(path, narHash, size, frozenset(references), ca=ca)
    session.addTempRoots([path])
    writer = session.addToStore(info)
    try:
        for chunk in dump():
            writer.feed(chunk)
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    return info


def _copyPackage(name: str, target: Path) -> None:
    """The sources of a package of Python's library."""
    source = Path(sysconfig.get_path("stdlib")) / name
    if not source.is_dir():
        raise StoreError(f"cannot make a sample: '{source}', a part of Python's library, is not there")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "tests", "test"))


def _writeProgram(target: Path, infos: dict[str, ValidPathInfo]) -> None:
    """An executable, a link to it, and a link into another object."""
    (target / "bin").mkdir(parents=True)
    script = target / "bin" / "pretty"
    script.write_text(_SCRIPT.format(json=infos["json"].path))
    script.chmod(0o755)
    (target / "bin" / "tidy").symlink_to("pretty")
    (target / "noise").symlink_to(infos["noise"].path)


def _writeProfile(target: Path, infos: dict[str, ValidPathInfo]) -> None:
    """Links to everything, as a user's profile has them."""
    target.mkdir()
    for name, info in infos.items():
        (target / name).symlink_to(info.path)


def _paths(infos: dict[str, ValidPathInfo], *names: str) -> list[StorePath]:
    return [infos[name].path for name in names]


def _count(base: Path) -> tuple[int, int, int]:
    entries = [entry for entry in base.rglob("*") if entry.is_symlink() or entry.is_file()]
    links = sum(entry.is_symlink() for entry in entries)
    executables = sum(not entry.is_symlink() and os.access(entry, os.X_OK) for entry in entries)
    return len(entries) - links, executables, links

"""
The trees whose NARs lie beside this file, and what tests do with trees.

A tree is a L{File}, a L{Link}, or a C{dict} of names to trees, which is a directory. C{NAME.nar} is what real Nix
makes of C{TREES["NAME"]}. To make them again, from the top of the repository::

    python -m tests.vectors.nar.trees
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nixserve.codec.nar import Contents, Directory, EndDirectory, Event, Regular, Symlink

HERE = Path(__file__).parent


class File(NamedTuple):
    """A regular file."""

    data: bytes = b""
    executable: bool = False


class Link(NamedTuple):
    """A symbolic link."""

    target: bytes


Tree = File | Link | dict[bytes, "Tree"]

TREES: dict[str, Tree] = {
    "regular": File(b"hello\n"),
    "empty": File(),
    "executable": File(b"#!/bin/sh\n", True),
    "symlink": Link(b"/target"),
    "emptyDirectory": {},
    "directory": {b"B.txt": File(b"x"), b"b.txt": File(b"abc"), b"link": Link(b"b.txt"), b"sub": {}},
    # Every length of padding, for names, contents and targets.
    "paddings": {
        b"abcdefghi"[:n]: {b"file": File(b"123456789"[:n], n % 2 == 0), b"link": Link(b"987654321"[:n])}
        for n in range(1, 10)
    },
    # Order is that of unsigned bytes; names need be no text.
    "names": {
        name: File(name)
        for name in (
            b"..x",
            b"...",
            b"A",
            b"a",
            b"a b",
            b"a\nb",
            b"a\\b",
            b"a~nix~case~hack~1",
            b"\xff\xfe",
            b"\xc3\xa4",
        )
    }
    | {b"x" * 255: Link(b"t" * 4095)},
    "nested": {b"a": {b"b": {b"c": {b"d": File(b"deep")}}, b"e": {}}, b"f": Link(b"a/b/../../..")},
}


def nar(name: str) -> bytes:
    """The golden NAR of C{TREES[name]}."""
    return (HERE / f"{name}.nar").read_bytes()


def events(tree: Tree, name: bytes = b"") -> Iterator[Event]:
    """What a parser says of a tree, contents whole."""
    if isinstance(tree, dict):
        yield Directory(name)
        for child in sorted(tree):
            yield from events(tree[child], child)
        yield EndDirectory()
    elif isinstance(tree, Link):
        yield Symlink(name, tree.target)
    else:
        yield Regular(name, tree.executable, len(tree.data))
        if tree.data:
            yield Contents(tree.data)


def joined(parts: Iterable[Event]) -> list[Event]:
    """Events with pieces of contents that follow each other joined, so that no trace of the cuts is left."""
    result: list[Event] = []
    for event in parts:
        if isinstance(event, Contents) and result and isinstance(result[-1], Contents):
            result[-1] = Contents(bytes(result[-1].data) + bytes(event.data))
        else:
            result.append(event)
    return result


def write(tree: Tree, path: bytes) -> None:
    """Make a tree on disk."""
    if isinstance(tree, dict):
        os.mkdir(path)
        for name, child in tree.items():
            write(child, path + b"/" + name)
    elif isinstance(tree, Link):
        os.symlink(tree.target, path)
    else:
        Path(os.fsdecode(path)).write_bytes(tree.data)
        os.chmod(path, 0o755 if tree.executable else 0o644)


def read(path: bytes) -> Tree:
    """The tree that is on disk."""
    status = os.lstat(path)
    if stat.S_ISDIR(status.st_mode):
        return {name: read(path + b"/" + name) for name in os.listdir(path)}
    if stat.S_ISLNK(status.st_mode):
        return Link(os.readlink(path))
    return File(Path(os.fsdecode(path)).read_bytes(), bool(status.st_mode & stat.S_IXUSR))


def regenerate() -> None:
    """Have real Nix write the golden NARs."""
    with tempfile.TemporaryDirectory() as directory:
        for name, tree in TREES.items():
            path = os.path.join(directory, name)
            write(tree, os.fsencode(path))
            with (HERE / f"{name}.nar").open("wb") as output:
                subprocess.run(["nix-store", "--dump", path], stdout=output, check=True)


if __name__ == "__main__":
    regenerate()

"""
NARs that no writer makes: what somebody might send who wishes the server ill, and what merely went wrong.
"""

from tests.interop.conversations import string, u64


def words(*items):
    """Padded strings in a row."""
    return b"".join(map(string, items))


MAGIC = string("nix-archive-1")


def file(contents=b"x"):
    """A file."""
    return words("(", "type", "regular", "contents", contents, ")")


def link(target):
    """A symbolic link."""
    return words("(", "type", "symlink", "target", target, ")")


def entry(name, node):
    """An entry of a directory."""
    return words("entry", "(", "name", name, "node") + node + string(")")


def directory(*entries):
    """A directory."""
    return words("(", "type", "directory") + b"".join(entries) + string(")")


def regular(*items):
    """A file with other fields than it should have."""
    return words("(", "type", "regular", *items, ")")


def padded(text, padding):
    """A string whose padding is not zero."""
    return u64(len(text)) + text + padding


OUTSIDE = "../../../outside"

HOSTILE = {
    "name empty": directory(entry("", file())),
    "name dot": directory(entry(".", file())),
    "name dot dot": directory(entry("..", file())),
    "name dot dot, a directory": directory(entry("..", directory(entry("evil", file())))),
    "name with slash": directory(entry("a/b", file())),
    "name going up": directory(entry(f"{OUTSIDE}/evil", file())),
    "name absolute": directory(entry("/tmp/nixserve-interop-evil", file())),
    "name with NUL": directory(entry("a\0b", file())),
    "name of 256 bytes": directory(entry("n" * 256, file())),
    "unsorted": directory(entry("b", file()), entry("a", file())),
    "unsorted as signed bytes": directory(entry(b"\xff", file()), entry(b"a", file())),
    "file twice": directory(entry("a", file()), entry("a", file())),
    "directory twice": directory(entry("a", directory()), entry("a", directory())),
    "link, then directory through it": directory(
        entry("a", link(OUTSIDE)), entry("a", directory(entry("evil", file())))
    ),
    "link, then file through it": directory(entry("a", link(f"{OUTSIDE}/evil")), entry("a", file())),
    "link, then later directory through it": directory(
        entry("a", link(OUTSIDE)), entry("b", file()), entry("a", directory(entry("evil", file())))
    ),
    "entry below a link": directory(entry("a", link(OUTSIDE)), entry("a/evil", file())),
    "executable with a value": regular("executable", "yes", "contents", "x"),
    "executable after the contents": regular("contents", "x", "executable", ""),
    "executable twice": regular("executable", "", "executable", "", "contents", "x"),
    "no contents": regular(),
    "contents twice": regular("contents", "x", "contents", "y"),
    "padding of the contents": words("(", "type", "regular", "contents")
    + padded(b"x", b"\0\0\0\0\0\0\1")
    + string(")"),
    "padding of a tag": padded(b"(", b"\1" * 7) + words("type", "regular", "contents", "x", ")"),
    "padding of a name": words("(", "type", "directory", "entry", "(", "name")
    + padded(b"a", b"/../../")
    + string("node")
    + file()
    + words(")", ")"),
    "padding of a target": words("(", "type", "symlink", "target") + padded(b"a", b"\0\0\0x\0\0\0") + string(")"),
    "target empty": link(""),
    "target with NUL": link("a\0b"),
    "target of 4096 bytes": link("t" * 4096),
    "target of 1 MiB": link("t" * 2**20),
    "entry without a node": directory(words("entry", "(", "name", "a", ")")),
    "entry without a name": directory(words("entry", "(", "node") + file() + string(")")),
    "entry with two nodes": directory(
        words("entry", "(", "name", "a", "node") + file() + words("name", "b", "node") + file() + string(")")
    ),
    "node before the name": directory(words("entry", "(", "node") + file() + words("name", "a", ")")),
    "unknown type": words("(", "type", "fifo", ")"),
    "device": words("(", "type", "device", "major", "1", "minor", "3", ")"),
    "type twice": words("(", "type", "directory", "type", "regular", "contents", "x", ")"),
    "no type": words("(", ")"),
    "unknown tag": regular("setuid", "", "contents", "x"),
    "tag of 1 MiB": regular("t" * 2**20),
    "parenthesis missing": words("(", "type", "regular", "contents", "x"),
    "contents longer than there is": words("(", "type", "regular", "contents") + u64(1 << 62) + b"x" * 64,
    "contents of a negative length": words("(", "type", "regular", "contents") + u64((1 << 64) - 8) + b"x" * 64,
    "name longer than there is": words("(", "type", "directory", "entry", "(", "name") + u64(1 << 62) + b"x" * 64,
}
"""The root node of each."""

MALFORMED = {
    **{name: MAGIC + node for name, node in HOSTILE.items()},
    "nothing": b"",
    "bad magic": string("nix-archive-2") + file(),
    "no magic": file(),
    "text": b"#!/bin/sh\nrm -rf /\n".ljust(64),
    "surplus": MAGIC + file() + bytes(8),
    "two of them": (MAGIC + file()) * 2,
    "surplus that is a tag": MAGIC + file() + words("entry"),
    **{
        f"cut off after {size} bytes": (MAGIC + directory(entry("a", file())))[:size] for size in (8, 24, 100, 200, 280)
    },
}
"""Whole."""


def deep(levels):
    """Directories within directories, each with a name of one byte."""
    opening = words("(", "type", "directory")
    return (
        MAGIC
        + opening
        + (words("entry", "(", "name", "d", "node") + opening) * levels
        + words(")", ")") * levels
        + string(")")
    )

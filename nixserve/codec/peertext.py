"""
What a peer is told of an error: what went wrong and with which object, but nothing about where this machine keeps its
files. Its log has the whole text.

Our errors write paths of files between quotes, C{'/like/this'}. Of those that a peer may know, the logical paths of
objects, the whole is told, also where an object lies elsewhere in truth or an output is still in its sandbox; of any
other only that there is one. So what nobody has thought of is not told.
"""

from __future__ import annotations

import re

from nixserve.errors import RemoteError, StoreError, UsageError

__all__ = ["HIDDEN", "hidePaths", "peerText"]

HIDDEN = "[a path of the server]"
"""What stands for a path that is none of a peer's business."""

_FAMILIES = (StoreError, RemoteError, UsageError)
"""Errors about this machine and those behind it. The others are about what the peer has sent, and quote it."""

# What is in the path of an output that is still in its sandbox, or on its way from there.
_WORK_DIR = "-nixserve-build/"

# The hash part of the last object in a path, and what is behind it.
_OBJECT = re.compile(r".*/([0-9abcdfghijklmnpqrsvwxyz]{32}-.*)", re.DOTALL)


def peerText(error: BaseException, storeDir: str) -> str:
    """
    The text of an error for a peer.

    @param storeDir: the logical store directory.
    """
    if isinstance(error, OSError):
        return error.strerror or "the operating system refuses"
    return hidePaths(str(error), storeDir) if isinstance(error, _FAMILIES) else str(error)


def hidePaths(text: str, storeDir: str) -> str:
    """
    C{text} with the paths of files in it as a peer may know them.
    """

    def replace(match: re.Match[str]) -> str:
        path = match[1]
        if path.startswith(f"{storeDir}/") and _WORK_DIR not in path:
            return match[0]
        found = _OBJECT.fullmatch(path)
        return f"'{storeDir}/{found[1]}'" if found else f"'{HIDDEN}'"

    return re.sub(r"'(/[^']*)'", replace, text)

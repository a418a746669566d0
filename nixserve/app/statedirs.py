"""
Where the program keeps files of its own. Imports next to nothing, as L{nixserve.app.hookentry} needs it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["defaultStateDir", "hookStateDir", "socketDirectory"]

_HOOK_STATE = "NIXSERVE_HOOK_STATE"
"""The variable that names the directory for what hook processes share: machines put aside, claims, sockets."""

_MAX_SOCKET_DIRECTORY = 70
"""Bytes of a directory's path that leave room for ssh's sockets in it (unix(7): 107, less what ssh appends)."""


def defaultStateDir(environ: Mapping[str, str]) -> str:
    """Where the service keeps its own files if nobody says."""
    if os.geteuid() == 0:
        return "/var/lib/nixserve"
    base = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME") or "/", ".local/state")
    return f"{base}/nixserve"


def hookStateDir(environ: Mapping[str, str]) -> str:
    """The directory for what hook processes share."""
    return environ.get(_HOOK_STATE) or f"{defaultStateDir(environ)}/hook"


def socketDirectory(state: str, name: str) -> str:
    """
    A directory of sockets.

    @param state: see L{hookStateDir}. If its path is too long for sockets, a directory in C{/tmp} stands for it.
    @param name: of the directory in it.
    """
    directory = f"{state}/{name}"
    if len(os.fsencode(directory)) <= _MAX_SOCKET_DIRECTORY:
        return directory
    # Imported late: it loads OpenSSL.
    import hashlib

    return f"/tmp/nixserve-{os.geteuid()}-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}"

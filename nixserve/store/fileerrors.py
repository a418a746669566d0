"""
What the file system refuses, as errors that say what was tried.
"""

from __future__ import annotations

import contextlib

from nixserve.errors import StoreError

__all__ = ["fileSystemErrors", "refused", "shortened"]

#: Characters of each end of a long path that a message shows.
_SHOWN = 200


class fileSystemErrors(contextlib.AbstractContextManager[None]):
    """
    Turns an C{OSError} within the block into a L{StoreError} that says what was tried.

    @ivar doing: what is being tried, as the beginning of a sentence: C{"cannot open '/nix/var/nix/gc.lock'"}.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise refused(self.doing, error) from error


def refused(doing: str, error: OSError) -> StoreError:
    """
    @param doing: as that of L{fileSystemErrors}.
    @return: the error that tells of C{error}.
    """
    return StoreError(f"{doing}: {error.strerror or error}")


def shortened(path: str) -> str:
    """Of a path that would fill the screen, beginning and end."""
    return f"{path[:_SHOWN]}[...]{path[-_SHOWN:]}" if len(path) > 2 * _SHOWN else path

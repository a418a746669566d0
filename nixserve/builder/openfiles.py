"""
How many descriptors this process may have: as many as it is allowed to allow itself.

The soft limit is 1,024 by custom, for the sake of programs that call C{select(2)}; a server has no use for that. What
we start may be such a program: builders get back what we had (L{childLimit}).
"""

from __future__ import annotations

import contextlib
import resource

__all__ = ["childLimit", "raiseOpenFiles"]

_inherited: tuple[int, int] | None = None


def raiseOpenFiles() -> int:
    """
    Raise the soft limit to the hard one, for the whole process. Safe to call twice.

    @return: how many descriptors it may have now.
    """
    global _inherited
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _inherited is None:
        _inherited = soft, hard
    # Above what the kernel allows anybody it is refused, and what we have must do.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def childLimit() -> tuple[int, int]:
    """The soft and the hard limit that a builder is to have: what we were started with."""
    return _inherited or resource.getrlimit(resource.RLIMIT_NOFILE)

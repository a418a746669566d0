"""
Sizes in words.
"""

from __future__ import annotations

__all__ = ["formatBytes"]


def formatBytes(size: int) -> str:
    """A size as people say it: C{12.3 MB}."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"

"""
Sizes, as people read them.
"""

import pytest

from nixserve.app.text import formatBytes


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (28_880_464, "28.9 MB")],
)
def test_formatBytes(size, text):
    """Sizes are in powers of ten, with one digit, and never four digits before the point."""
    assert formatBytes(size) == text

"""
Words of others, as they are shown.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.text import MAX_SHOWN, shownText


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer", "plain, größer"),
        ("\x1b[31m\r\n\x07", r"\x1b[31m\r\n\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb\u2028", r"a\u202eb\u2028"),
        (b"\xff\x00", r"\udcff\x00"),
        ("x" * (MAX_SHOWN + 1), "x" * (MAX_SHOWN - 1) + "…"),
    ],
)
def test_shownText(text, shown):
    """What a terminal would obey is escaped, what is long is cut, and what is neither stays."""
    assert shownText(text) == shown


@given(st.text() | st.binary())
def test_shownTextIsPrintable(text):
    """Whatever it is, it ends printable and short, and twice does no more than once."""
    shown = shownText(text, 50)
    assert shown.isprintable()
    assert len(shown) <= 50
    assert shownText(shown, 50) == shown

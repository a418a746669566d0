"""
What cannot be reached, said in one line.
"""

from nixserve.remote.failures import MAX_SHOWN, oneLine


def test_oneLine():
    """Text of others is one line that no terminal obeys, and only so long."""
    assert (
        oneLine(b"@@@@\n@ WARNING! @\n@@@@\n\n a\tb \r\n\xff")
        == "WARNING! a\N{REPLACEMENT CHARACTER}b \N{REPLACEMENT CHARACTER}"
    )
    long = oneLine(b"x" * 5000 + b"end")
    assert len(long) == MAX_SHOWN + 1 and long.endswith("end")

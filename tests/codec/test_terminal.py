"""
What of a text of others may reach a terminal.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixserve.codec.terminal import onOneLine, printable, printableLines

RED, NORMAL = "\x1b[1;31m", "\x1b[0m"


@pytest.mark.parametrize(
    ("text", "plain", "coloured"),
    [
        ("a\tb ü", "a\tb ü", "a\tb ü"),
        ("\x1b[1;31mred\x1b[0m", "red", "\x1b[1;31mred\x1b[0m"),
        ("\x1b[2J\x1b[10;10Hx\x1b]0;title\x07y\x1b]2;t\x1b\\z\x1bc!", "xyz!", "xyz!"),
        ("a\rb\x07\x08\x00\x9b2J", "ab2J", "ab2J"),
        ("\x1b[31", "[31", "[31"),
        ("\x1b", "", ""),
    ],
)
def test_printable(text, plain, coloured):
    """Nothing that a terminal would obey is left but, if wanted, colours."""
    assert printable(text) == plain
    assert printable(text, colours=True) == coloured


@pytest.mark.parametrize(
    "sequence",
    [
        *("\x1b[>4;2m", "\x1b[>4m", "\x1b[?4m", "\x1b[<1m", "\x1b[=5m", "\x1b[1>m", "\x1b[?1;31m"),
        *("\x1b[1 m", '\x1b[1"m', "\x1b[ m", "\x1b[!m", "\x1b[" + "1;" * 100 + "m"),
        *("\x1b[6n", "\x1b[c", "\x1b[21t", "\x1b[2K", "\x1b[1A", "\x1b[?1049h", "\x1b[5i", "\x1b[1;31;m\x1b[s"[8:]),
    ],
)
def test_onlyPlainColours(sequence):
    """Only digits, semicolons and colons, and not many of them, make a colour; other things that end in C{m} do not."""
    assert printable(f"a{sequence}b", colours=True) == "ab"


@pytest.mark.parametrize(
    "sequence", ["\x1b[m", "\x1b[0m", "\x1b[31m", "\x1b[38;2;1;2;3m", "\x1b[38:2::1:2:3m", "\x1b[4:3m"]
)
def test_colours(sequence):
    """Colours of all kinds pass."""
    assert printable(f"{sequence}b{NORMAL}", colours=True) == f"{sequence}b{NORMAL}"


def test_coloursEndWithTheLine():
    """What a line leaves switched on is switched off at its end."""
    assert printable(f"{RED}a", colours=True) == f"{RED}a{NORMAL}"
    assert printable(f"{NORMAL}a{RED}", colours=True) == f"{NORMAL}a{RED}{NORMAL}"
    assert printable(f"{RED}a\x1b[m", colours=True) == f"{RED}a\x1b[m"
    assert printableLines(f"{RED}a\nb", colours=True) == f"{RED}a{NORMAL}\nb"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "\x1bP1$r0m\x1b\\",
            "\x1b_x\x1b\\",
            "\x1b^x\x1b\\",
            "\x1bXx\x1b\\",
            "\x1b]52;c;aGk=\x07",
            "\x1b]8;;http://x\x1b\\",
        ),
        *(
            "\x1b\x1b[31m",
            "\x1b\x1b]0;x\x07",
            "\x1b[3\x001m",
            "\x1b\n[31m",
            "\x1b[\x1b[31mm",
            "\x9b31m",
            "\x9d0;x\x9c",
            "\x90x",
        ),
        *(
            "\u202aa",
            "\u202eb",
            "\u2066c",
            "\u2069d",
            "\u200fe",
            "\u061cf",
            "\u200bg",
            "\u2028h",
            "\ufeffi",
            "\U000e0041j",
        ),
        *("\x7f", "a\rb", "a\x08b", "\x0b\x0c", "\x0e\x0f", "\x05", "\x85", "\udc9b31m", "\ud800"),
    ],
)
@pytest.mark.parametrize("colours", [False, True])
def test_nothingIsObeyed(text, colours):
    """No control character of any size passes, nor what turns text round or hides."""
    for shown in (printable(text, colours), onOneLine(text), printableLines(text, colours).replace("\n", "")):
        assert all(c.isprintable() for c in shown.replace("\x1b[31m", "").replace(NORMAL, ""))
        shown.encode()


@given(st.lists(st.sampled_from([*"\x1b[]mP;:>?!0 4\x07\x9b\\\r\n\u202ea", RED])).map("".join))
def test_anything(text):
    """Whatever the cut: an ESC that is left begins a plain colour, and doing it again changes nothing."""
    shown = printable(text, colours=True)
    for piece in shown.split("\x1b")[1:]:
        body, letter, _ = piece.partition("m")
        assert letter and body[0] == "[" and set(body[1:]) <= set("0123456789:;")
    assert printable(shown, colours=True) == shown and "\x1b" not in printable(text)


def test_onOneLine():
    """Lines become one."""
    assert onOneLine("a \n\n \x1b[31mb\x1b[0m\r\nc\n") == "a b c"

"""
The tables of docs/serve-protocol.md, from those of the connection objects:

    python -m tests.docs.states

writes them into the page.
"""

from pathlib import Path

from nixserve.codec import states

PAGE = Path(__file__).parents[2] / "docs" / "serve-protocol.md"
BEGIN, END = "<!-- states -->\n", "<!-- end of states -->\n"

TABLES = [
    ("The server", states.SERVER_STEPS),
    ("The server, postponed replies", states.SERVER_POSTPONED),
    ("The client, sending", states.CLIENT_SENDING),
    ("The client, receiving", states.CLIENT_RECEIVING),
]


def tables():
    """The tables as Markdown."""
    text = ""
    for title, steps in TABLES:
        text += f"\n### {title}\n\n| state | what happens | next state |\n|---|---|---|\n"
        text += "".join(f"| {state.value} | {step.value} | {after.value} |\n" for (state, step), after in steps.items())
    return text + "\n"


def parts():
    """The page before, between and behind the marks."""
    before, rest = PAGE.read_text().split(BEGIN)
    between, behind = rest.split(END)
    return before, between, behind


if __name__ == "__main__":
    before, _, behind = parts()
    PAGE.write_text(before + BEGIN + tables() + END + behind)

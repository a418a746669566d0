"""The pictures that code can draw are drawn from code."""

from tests.docs.states import parts, tables


def test_statesAreCurrent():
    """The tables of states in docs/serve-protocol.md are those of the code."""
    _, between, _ = parts()
    assert between == tables(), "run: python -m tests.docs.states"

"""
Machines, from the lines of a file of them.
"""

from nixserve.hook.machines import parseMachines


def machines(text):
    """The machines of a text, all of them usable."""
    parsed = parseMachines(text, {}.get, "x86_64-linux")
    assert parsed.unusable == ()
    return parsed.usable


def machine(line="ssh://h1"):
    """One machine."""
    (only,) = machines(line)
    return only

"""Several sessions at once, without SSH: all of them, or none."""

import os
import shlex
import sys
from urllib.parse import quote

import pytest
import pytest_twisted
from twisted.internet import reactor

from nixserve.remote.failures import CannotConnect
from nixserve.remote.several import connectSeveral
from tests.remote.children import ENVIRON, HELLO

CHILD = """
import os, sys
directory, refused = sys.argv[1:3]
number = 0
while True:
    try:
        os.mkdir(f"{directory}/{number}")
        break
    except FileExistsError:
        number += 1
open(f"{directory}/{number}/{os.getpid()}", "w").close()
if str(number) == refused:
    os.write(2, b"there is room for no more")
    os._exit(1)
os.write(1, bytes.fromhex(sys.argv[3]))
while os.read(0, 65536): pass
"""


class Children:
    """
    A program that refuses one of its starts.

    @ivar url: leads to it.
    """

    def __init__(self, directory, refused):
        self._directory = directory
        program = directory / "program"
        program.write_text(CHILD)
        words = [sys.executable, "-S", str(program), str(directory), str(refused), HELLO.hex()]
        self.url = f"ssh://localhost?remote-program={quote(shlex.join(words))}"

    @property
    def started(self):
        """The children, in the order of their starts."""
        return [int(path.name) for path in sorted(self._directory.glob("*/*"))]

    @property
    def alive(self):
        """Those that are left."""
        return [pid for pid in self.started if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize("refused", [0, 1, 2])
@pytest_twisted.ensureDeferred
async def test_oneRefused(tmp_path, refused):
    """If one of them cannot be had that is the error, and none is left; the block is not entered."""
    children = Children(tmp_path, refused)
    with pytest.raises(CannotConnect, match="there is room for no more"):
        async with connectSeveral(reactor, children.url, 3, environ=ENVIRON):
            pytest.fail("there are not enough sessions")
    assert len(children.started) == 3 and children.alive == []


@pytest_twisted.ensureDeferred
async def test_end(tmp_path):
    """They end with the block, also with one that fails."""
    children = Children(tmp_path, "none")
    with pytest.raises(ZeroDivisionError):
        async with connectSeveral(reactor, children.url, 2, environ=ENVIRON) as clients:
            assert len(clients) == len(children.alive) == 2
            raise ZeroDivisionError
    assert len(children.started) == 2 and children.alive == []

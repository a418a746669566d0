"""
A place of its own for each test of the commands: home, state and temporary directory, and an environment with nothing
else in it; the commands as they are installed; the service as a child process.
"""

import pytest

from tests.app.box import Service, temporaryBox
from tests.interop.nix import requireProgram


@pytest.fixture
def box():
    """A L{Box}."""
    with temporaryBox() as box:
        yield box


@pytest.fixture
def service(box):
    """Starts the service in the box, with more options."""
    return lambda *options, **kwargs: Service(box, *options, **kwargs)


@pytest.fixture
def ssh():
    """Skips without the programs of OpenSSH's client."""
    for program in ("ssh", "ssh-keygen"):
        requireProgram(program)

"""
A place of its own for each test of the commands: home, state and temporary directory, and an environment with nothing
else in it; the commands as they are installed; the service as a child process.
"""

import os
import tempfile

import pytest

from nixserve.store.files import deletePath
from tests.app.box import Box, Service
from tests.interop.nix import requireProgram


@pytest.fixture
def box():
    """A L{Box}, removed afterwards with everything that runs in it."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = os.path.realpath(tempfile.mkdtemp(prefix="nsa-", dir=base))
    box = Box(path)
    yield box
    box.close()
    deletePath(path)


@pytest.fixture
def service(box):
    """Starts the service in the box, with more options."""
    return lambda *options, **kwargs: Service(box, *options, **kwargs)


@pytest.fixture
def ssh():
    """Skips without the programs of OpenSSH's client."""
    for program in ("ssh", "ssh-keygen"):
        requireProgram(program)

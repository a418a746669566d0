"""
The documentation's commands run in the same kind of place as the tests of the commands.
"""

import pytest

from tests.app.box import temporaryBox


@pytest.fixture
def box():
    """A L{tests.app.box.Box}."""
    with temporaryBox() as box:
        yield box

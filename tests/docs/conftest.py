"""
The documentation's commands run in the same kind of place as the tests of the commands.
"""

from tests.app.conftest import box

__all__ = ["box"]

"""
What has become of a Deferred.
"""

import pytest
from twisted.internet.defer import Deferred, fail, succeed

from nixserve.testing import result


def test_result():
    """What it has fired with is returned or raised; one that has not fired is a mistake of the test."""
    assert result(succeed(1)) == 1
    with pytest.raises(KeyError):
        result(fail(KeyError()))
    with pytest.raises(AssertionError, match="there is no result"):
        result(Deferred())

"""
What holds for all tests of the protocol's classes.
"""

import pytest
from twisted.logger import globalLogPublisher


@pytest.fixture(autouse=True)
def logged():
    """The events of one test. A failure that nobody handled is in them too, and fails the test."""
    events = []
    globalLogPublisher.addObserver(events.append)
    yield events
    globalLogPublisher.removeObserver(events.append)
    assert not [event for event in events if "Unhandled error" in str(event.get("log_format"))]

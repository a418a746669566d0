"""
What has become of a Deferred, without a reactor.
"""

from __future__ import annotations

from typing import TypeVar, cast

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

__all__ = ["result"]

T = TypeVar("T")


def result(deferred: Deferred[T]) -> T:
    """
    @return: what it has fired with; a failure is raised.
    @raise AssertionError: it has not fired.
    """
    seen: list[object] = []
    deferred.addBoth(seen.append)
    assert seen, "nothing moves any more, and there is no result"
    if isinstance(seen[0], Failure):
        seen[0].raiseException()
    return cast(T, seen[0])

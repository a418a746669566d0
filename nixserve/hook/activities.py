"""
What Nix's user sees of a build hook's copying.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.hook.conversation import ActivityType, HookLog, ResultType, Verbosity
from nixserve.protocol.copying import CopyProgress

__all__ = ["CopyActivities"]


class CopyActivities(CopyProgress):
    """
    Copies as activities, one copy after the other: one for all, one for each path, as the original has them (Nix 2.8,
    src/libstore/store-api.cc, copyPaths).
    """

    def __init__(self, log: HookLog, write: Callable[[bytes], None], source: str, target: str) -> None:
        """
        @param write: called with lines.
        @param source: what the store is called that is copied from; empty for the one here.
        @param target: what the store is called that is copied to; empty for the one here.
        """
        self._log = log
        self._write = write
        self._source = source
        self._target = target
        self._left: deque[ValidPathInfo] = deque()
        self._expected = 0
        self._all = self._one = 0

    def planned(self, infos: Sequence[ValidPathInfo], present: int) -> None:
        """See L{CopyProgress.planned}."""
        self.end()
        if not infos:
            return
        self._left = deque(infos)
        self._expected = len(infos)
        self._all = self._start(Verbosity.INFO, f"copying {len(infos)} paths", ActivityType.COPY_PATHS)
        self._begin()

    def copied(self, info: ValidPathInfo) -> None:
        """See L{CopyProgress.copied}."""
        self._write(self._log.stop(self._one))
        self._left.popleft()
        done = self._expected - len(self._left)
        self._write(self._log.result(self._all, ResultType.PROGRESS, (done, self._expected, 1 if self._left else 0, 0)))
        self._begin()

    def end(self) -> None:
        """End the activity: the copy is over, complete or not."""
        for number in filter(None, (self._one, self._all)):
            self._write(self._log.stop(number))
        self._one = self._all = 0

    def _begin(self) -> None:
        """The next one: they arrive in the order in which they were planned."""
        self._one = 0
        if not self._left:
            return
        path = self._left[0].path
        where = f" to '{self._target}'" if self._target else f" from '{self._source}'"
        fields = (path, self._source or "local", self._target or "local")
        self._one = self._start(Verbosity.INFO, f"copying path '{path}'{where}", ActivityType.COPY_PATH, fields)

    def _start(self, level: Verbosity, text: str, kind: ActivityType, fields: Sequence[str] = ()) -> int:
        number, line = self._log.start(level, text, kind, fields)
        self._write(line)
        return number

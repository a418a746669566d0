"""
What goes to the log about a peer: nothing of its words but escaped and cut, and no more than its L{LogBudget}.

When that is spent one line says so, and the next one that is written says how many were not.
"""

from __future__ import annotations

import copy
from dataclasses import is_dataclass
from typing import Any

from twisted.logger import Logger, LogLevel, formatEvent
from twisted.python.failure import Failure

from nixserve.codec.text import shownText
from nixserve.protocol.logbudget import LogBudget

__all__ = ["PeerLog"]

# Of a traceback: about 2 kB.
_MAX_FRAMES = 16
# Time, level and name of the logger, as twistd writes them in front of each line.
_OVERHEAD = 80


class PeerLog:
    """
    A logger for what concerns one peer. What fields an event has is made L{shownText}; only numbers stay what they are,
    and dataclasses such as L{nixserve.protocol.policy.Peer}, whose makers see to that themselves.
    """

    def __init__(self, logger: Logger, budget: LogBudget | None = None) -> None:
        """
        @param budget: without, every line is written.
        """
        self._logger = logger
        self.budget = budget

    def info(self, text: str, **facts: Any) -> None:
        """As L{Logger.info}."""
        self._write(LogLevel.info, text, facts)

    def warn(self, text: str, **facts: Any) -> None:
        """As L{Logger.warn}."""
        self._write(LogLevel.warn, text, facts)

    def failure(self, text: str, failure: Failure | None = None, **facts: Any) -> None:
        """As L{Logger.failure}; the words of the error, which may be the peer's, are shown as any others."""
        shown = _shownFailure(Failure() if failure is None else failure)
        self._write(LogLevel.critical, text, facts, shown)

    def close(self) -> None:
        """Nothing more will be written: say what was not."""
        own = self.budget
        if own is not None and own.missed:
            # A connection's: it is spent, so this one is paid for above.
            self.budget = own.above
            self.info("{count} lines about {who} were not written", count=own.missed, who=own.who)

    def _write(self, level: Any, text: str, facts: dict[str, Any], failure: Failure | None = None) -> None:
        event = {name: _shown(value) for name, value in facts.items()}
        traceback = ""
        if failure is not None:
            event["log_failure"], traceback = failure, failure.getTraceback()
        budget = self.budget
        if budget is None:
            self._logger.emit(level, text, **event)
            return
        size = len(formatEvent({**event, "log_format": text})) + len(traceback) + _OVERHEAD
        spent = budget.spentAt(size)
        if spent is None:
            if missed := budget.takeMissed():
                text, event["missed"] = text + " ({missed} lines before this one were not written)", missed
            self._logger.emit(level, text, **event)
            return
        if not spent.missed:
            self._logger.warn("there is too much to say about {who}: for now nothing more is written", who=spent.who)
        spent.missed += 1


def _shown(value: Any) -> Any:
    if value is None or isinstance(value, int | float) or is_dataclass(value):
        return value
    return shownText(value if isinstance(value, str | bytes) else str(value))


class _ShownError(Exception):
    """Stands for an error in a log: its words, shown."""


def _shownFailure(failure: Failure) -> Failure:
    """The same failure, of the same type and with its innermost frames, but with no word of a peer's as it was."""
    shown = copy.copy(failure)
    shown.frames = failure.frames[-_MAX_FRAMES:]
    shown.value = _ShownError(shownText(failure.getErrorMessage()))
    return shown

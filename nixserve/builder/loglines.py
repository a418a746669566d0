"""
What a builder writes, on its way to somebody who watches: lines, and a buffer before a reader who may be slow.

The log on disk gets the bytes as they come and needs nothing of this.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable

from nixserve.codec.terminal import MAX_LINE

__all__ = ["LogDelivery", "LogLines"]

_MAX_WAITING = 1024 * 1024
"""Bytes that wait for a slow reader: some seconds of a talkative compiler."""

_JSON_PREFIX = b"@nix "


class LogLines:
    """
    Cuts the output of a builder into the lines that Nix shows of it (Nix 2.8, derivation-goal.cc:handleChildOutput):
    a carriage return goes back to the beginning of the line, and what follows overwrites; lines that begin with
    C{@nix } talk to a progress display, and only an error among them is shown.
    """

    __slots__ = ("_isCut", "_pending")

    def __init__(self) -> None:
        self._pending = b""
        self._isCut = False

    def feed(self, data: bytes) -> bytes:
        """
        Take output, cut anywhere.

        @return: the lines complete now, each with its LF.
        """
        whole, newline, rest = data.rpartition(b"\n")
        shown = b""
        if newline:
            first, _, others = whole.partition(b"\n")
            shown = self._endLine(first)
            if others or whole.endswith(b"\n"):
                shown += _show(others)
        self._extend(rest)
        return shown

    def finish(self) -> bytes:
        """The line that the output ends in the middle of, with an LF; or nothing."""
        return self._endLine(b"") if self._pending else b""

    def _endLine(self, last: bytes) -> bytes:
        """Show the line begun earlier, which ends with C{last}."""
        self._extend(last)
        line, self._pending, self._isCut = self._pending, b"", False
        return _show(line)

    def _extend(self, data: bytes) -> None:
        """Add to the line begun, up to the limit."""
        if not self._isCut:
            self._pending += data[: MAX_LINE - len(self._pending)]
            self._isCut = len(self._pending) == MAX_LINE


def _show(lines: bytes) -> bytes:
    """
    How lines look to a person.

    @param lines: one or several, without the last LF.
    """
    if len(lines) <= MAX_LINE and b"\r" not in lines and _JSON_PREFIX not in lines:
        return lines + b"\n"
    return b"".join(_showLine(line[:MAX_LINE]) for line in lines.split(b"\n"))


def _showLine(line: bytes) -> bytes:
    """What a terminal shows of one line of the builder's output, with what it overwrites left out."""
    if line.startswith(_JSON_PREFIX):
        message = _message(line.removeprefix(_JSON_PREFIX))
        if message is not None:
            return message
    if b"\r" in line:
        written = bytearray()
        for part in line.split(b"\r"):
            written[: len(part)] = part
        line = bytes(written)
    return line + b"\n"


def _message(text: bytes) -> bytes | None:
    """
    What a message for Nix shows.

    @param text: JSON, Nix says.
    @return: C{None} if it is not.
    """
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(message, dict):
        return None
    # lvlError: a server that serves shows no more.
    if message.get("action") == "msg" and message.get("level") == 0:
        return str(message.get("msg", "")).encode(errors="replace") + b"\n"
    return b""


class LogDelivery:
    """
    Calls somebody's function with lines, on a thread of its own, so that however long the function takes, the build
    goes on. When too much waits, lines are dropped, and a line says how many.

    C{write} and C{close} are for one thread; C{target} is called from another, one call at a time.

    @param target: takes whole lines.
    """

    def __init__(self, target: Callable[[bytes], None]) -> None:
        self._target = target
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def write(self, lines: bytes) -> None:
        """Pass on lines, or drop them."""
        if not lines:
            return
        with self._changed:
            if self._size + len(lines) > _MAX_WAITING:
                self._dropped += lines.count(b"\n")
                return
            self._noteDropped()
            self._append(lines)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="build log", daemon=True)
            self._thread.start()

    def close(self, timeout: float) -> None:
        """
        No more lines will come. Wait until all are taken, but no longer than C{timeout} seconds; what then waits
        is dropped, and a call that is under way may still end later.
        """
        if self._thread is None:
            return
        with self._changed:
            self._noteDropped()
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            self._waiting.clear()

    def _noteDropped(self) -> None:
        """Say what is missing, where it is missing."""
        if self._dropped:
            self._append(b"[%d lines of the log are not shown: they came faster than they were read]\n" % self._dropped)
            self._dropped = 0

    def _append(self, lines: bytes) -> None:
        """Add lines to those that the thread is to hand over."""
        self._waiting.append(lines)
        self._size += len(lines)
        self._changed.notify()

    def _run(self) -> None:
        """The thread: hands over all that waits in one piece."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                lines = b"".join(self._waiting)
                self._waiting.clear()
                self._size = 0
            self._target(lines)

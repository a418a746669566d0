"""
What the sessions of one store are being sent at the moment, so that a path is not sent to the disk twice without need.

Nothing is excluded here: locks do that, and no session holds one while its peer has to act. This is but a courtesy of
the second who sends a large path to the first, as when many builders push the same toolchain, and it has an end:
whoever sends little or takes long is not waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from nixserve.codec.storepath import StorePath
from nixserve.store.api import Busy

__all__ = ["UploadWait", "Uploads"]

WORTHWHILE: Final = 1024 * 1024
"""Bytes in a second, below which the first is not waited for: as long as a link is slower than a disk by so much, to
write twice costs less than to wait."""

LOOK_SECONDS: Final = 2.0
"""Seconds between two looks at how far the first has come. A link may rest for a moment."""

LONGEST_WAIT: Final = 60.0
"""Seconds to wait at most for all who send one path, however fast they are: they may announce as much as they like."""


class Upload(Protocol):
    """
    An object that is being sent.

    @ivar received: bytes that have come.
    """

    @property
    def received(self) -> int: ...


class Uploads:
    """
    The objects that are being sent to one store. Safe from any thread; nothing blocks.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._uploads: dict[StorePath, Upload] = {}

    def begin(self, path: StorePath, upload: Upload) -> None:
        """Somebody sends a path. Whoever comes later looks at the last one."""
        with self._mutex:
            self._uploads[path] = upload

    def end(self, path: StorePath, upload: Upload) -> None:
        """It is there, or will not be. Safe to call twice."""
        with self._mutex:
            if self._uploads.get(path) is upload:
                del self._uploads[path]

    def of(self, path: StorePath) -> Upload | None:
        """The upload of a path, if anybody sends it."""
        with self._mutex:
            return self._uploads.get(path)


class UploadWait:
    """
    The waiting of one session, for one path after the other.
    """

    def __init__(self, uploads: Uploads, clock: Callable[[], float] = time.monotonic) -> None:
        self._uploads = uploads
        self._clock = clock
        self._path: StorePath | None = None
        self._began = 0.0
        # Who was looked at last, when, and what had come then.
        self._upload: Upload | None = None
        self._lookedAt = 0.0
        self._received = 0

    def wait(self, path: StorePath) -> None:
        """
        To be called before a path is taken in, again and again until it returns.

        @raise Busy: somebody else gets the same, and that is worth waiting for.
        """
        now = self._clock()
        if path != self._path:
            self._path, self._began = path, now
        upload = self._uploads.of(path)
        if upload is not None and now < self._began + LONGEST_WAIT and self._isWorthwhile(upload, now):
            raise Busy(f"another upload of '{path}'")
        self._path = self._upload = None

    def _isWorthwhile(self, upload: Upload, now: float) -> bool:
        """
        @return: whether enough has come since the last look, if that is long enough ago to say so.
        """
        passed = now - self._lookedAt
        if upload is self._upload and passed < LOOK_SECONDS:
            return True
        came = upload.received - self._received
        slow = upload is self._upload and came < WORTHWHILE * passed
        self._upload, self._lookedAt, self._received = upload, now, upload.received
        return not slow

"""
Build logs on disk, where C{nix-store --read-log} finds them: C{drvs/<two digits>/<rest of the name>.bz2} in the log
directory.

A log is all that the builder wrote, byte for byte, compressed with bzip2. Source: Nix 2.8,
src/libstore/build/local-derivation-goal.cc (C{openLogFile}) and local-fs-store.cc (C{getBuildLog}).
"""

from __future__ import annotations

import bz2
import contextlib
import os

from nixserve.codec.storepath import StorePath
from nixserve.store.fileerrors import fileSystemErrors
from nixserve.store.layout import StoreLayout
from nixserve.store.ownpaths import makeOwnDirectory

__all__ = ["BuildLogFile", "buildLogPath"]


def buildLogPath(layout: StoreLayout, drvPath: StorePath) -> str:
    """Where the log of the last build of C{drvPath} is, if there is one."""
    baseName = drvPath.baseName
    return f"{layout.logDir}/drvs/{baseName[:2]}/{baseName[2:]}.bz2"


class BuildLogFile:
    """
    A log being written: fed by one thread at a time, then closed.

    The file is a whole bzip2 stream only after L{close}; until then it lacks up to 900 kB, which is how much bzip2
    compresses at once.
    """

    def __init__(self, layout: StoreLayout, drvPath: StorePath) -> None:
        """
        Begin a log; the one of an earlier build is gone.

        @raise nixserve.errors.StoreError: it cannot be created.
        """
        self.path = buildLogPath(layout, drvPath)
        self._compressor = bz2.BZ2Compressor()
        with fileSystemErrors(f"creating build log '{self.path}'"):
            makeOwnDirectory(os.path.dirname(self.path), 0o755)
            # A build under the same name may be writing to the file that is there.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            # Unbuffered, since the compressor buffers already.
            self._file = open(os.open(self.path, flags, 0o666), "wb", buffering=0)  # noqa: SIM115 - closed by close

    def write(self, data: bytes) -> None:
        """
        Append C{data}.

        @raise nixserve.errors.StoreError: the disk is full, or the like. The log can still be closed.
        """
        self._writeOut(self._compressor.compress(data))

    def close(self) -> None:
        """
        Complete the file. Safe to call twice.

        @raise nixserve.errors.StoreError: the disk is full, or the like. The file is closed all the same.
        """
        if self._file.closed:
            return
        try:
            self._writeOut(self._compressor.flush())
        finally:
            self._file.close()

    def _writeOut(self, data: bytes) -> None:
        with fileSystemErrors(f"writing build log '{self.path}'"):
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

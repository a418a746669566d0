"""
The builders that are part of Nix: C{builtin:fetchurl}, C{builtin:buildenv} and C{builtin:unpack-channel}.

L{main} runs in the process of the build, in the sandbox and with the rights of the builder, which can read no Python
files there. So importing this module imports everything that any of them needs, later as well: nothing below may
import inside a function, and what the standard library imports late is imported here.
"""

from __future__ import annotations

import bz2
import encodings.idna
import encodings.punycode
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Final

from nixserve.builder.buildenv import buildEnvironment
from nixserve.builder.builtinjob import BuiltinFailed, BuiltinJob
from nixserve.builder.fetchurl import fetchURL
from nixserve.builder.unpackchannel import unpackChannel
from nixserve.errors import NixServeError

__all__ = ["BUILTIN_PREFIX", "isBuiltin", "main", "runBuiltin"]

BUILTIN_PREFIX: Final = "builtin:"

# The standard library imports these when it meets a compressed archive or a host's name.
_IMPORTED_EARLY = (bz2, encodings.idna, encodings.punycode, gzip, lzma, zlib)

_BUILTINS: Mapping[str, Callable[[BuiltinJob], None]] = {
    "builtin:buildenv": buildEnvironment,
    "builtin:fetchurl": fetchURL,
    "builtin:unpack-channel": unpackChannel,
}


def isBuiltin(builder: str) -> bool:
    """Whether a derivation with this builder needs no program, and no particular platform."""
    return builder.startswith(BUILTIN_PREFIX)


def runBuiltin(job: BuiltinJob) -> None:
    """
    Do C{job}. Leaves its output as a builder leaves it, to be checked and put into canonical form.

    @raise nixserve.errors.NixServeError: it cannot be done.
    @raise OSError: as well.
    """
    builtin = _BUILTINS.get(job.builder)
    if builtin is None:
        raise BuiltinFailed(f"unsupported builtin builder '{job.builder.removeprefix(BUILTIN_PREFIX)}'")
    builtin(job)


def main() -> int:
    """
    Do the job on standard input. What goes wrong is said on standard error, in a line that begins with C{error:}.

    @return: the exit status.
    """
    try:
        runBuiltin(BuiltinJob.decode(sys.stdin.read()))
    except (NixServeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""
Where C{nixserve-hook} begins: it has a process that is loaded already do the work, if there is one.

Nix starts a hook process for each build, and to load Python's modules takes longer than a small build. So this imports
next to nothing. It hands its work to a child of a process that has everything loaded (L{nixserve.app.handover}), and
remains for Nix to wait for and to kill. If that fails, for whatever reason, this process does the work itself; and if
that is a build, it starts a preloaded process for the next.
"""

from __future__ import annotations

import os
import sys

from nixserve.app.handover import Preloaded

__all__ = ["answerNix", "main"]

_NO_SHARE = "--no-share"
"""The option that lets every hook process do everything by itself."""


def main() -> None:
    """The program C{nixserve-hook}. Ends the process."""
    words = sys.argv[1:]
    numbers = [word for word in words if word != _NO_SHARE]
    if len(numbers) != 1 or not numbers[0].isdecimal():
        print("error: this is run by Nix: write 'build-hook = /path/to/nixserve-hook' in nix.conf; "
              "'nixserve hook --check' looks at the machines", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    status = answerNix(numbers[0], _NO_SHARE not in words)
    sys.stderr.flush()
    # Nix waits for the end of this process, of whose time Python's tidying up would be a fifth. All that is held here
    # are descriptors.
    os._exit(status)


def answerNix(verbosity: str, share: bool) -> int:
    """
    Answer the Nix that has started this process. Ends the process if another one has done it.

    @param verbosity: the argument from Nix, a number.
    @param share: have all hook processes share a loaded process, and one SSH connection to each machine.
    @return: the exit status.
    """
    preloaded = Preloaded.find(os.environ) if share else None
    if preloaded is not None:
        preloaded.hand(verbosity)
    from nixserve.app.hookcommand import HookOptions, answer

    def prepareNext() -> None:
        if preloaded is not None:
            preloaded.start(_serve)

    return answer(HookOptions(int(verbosity), share), os.environ, os.getppid(), prepareNext)


def _serve(listening: int, path: str, parent: int, seconds: float) -> None:
    """Be the preloaded process, which loads everything."""
    from nixserve.app.preloaded import serve

    serve(listening, path, parent, seconds)

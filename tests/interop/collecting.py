"""
Real C{nix-store --gc} beside a copy: once, exactly then; or again and again without pause.
"""

import subprocess
import threading

from nixserve.protocol.copying import CopyProgress
from tests.interop.watching import until


class Between(CopyProgress):
    """
    Collects garbage exactly between question and copy: it is known what is there, and nothing has been sent.

    @ivar infos: what was going to be copied.
    @ivar moment: called once, at that time.
    """

    def __init__(self, moment):
        self.moment = moment
        self.infos = None

    def planned(self, infos, present):
        """See L{CopyProgress}."""
        self.infos = infos
        self.moment()


class Collector:
    """
    Collections of a store, one straight behind the other until the block ends.

    @ivar runs: how many have ended, successfully.
    @ivar failures: what those said that did not.
    """

    def __init__(self, nix, *roots):
        self._nix, self._roots = nix, roots
        self.runs = 0
        self.failures = []
        self._begun = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)

    def _collect(self):
        while not self._end.is_set():
            self._begun += 1
            for root in self._roots:
                try:
                    done = self._nix.run("nix-store", "--gc", store=root, check=False)
                except subprocess.TimeoutExpired as error:
                    self.failures.append(str(error))
                    return
                if done.returncode:
                    self.failures.append(done.stderr.decode())
            self.runs += 1

    def awaitWholeRun(self):
        """Until a collection has ended that began after this was called."""
        wanted = self._begun + 1
        until(lambda: self.runs >= wanted or self.failures, 30, "the collector has not come round")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join(60)

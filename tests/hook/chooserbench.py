"""
What all hook processes share, and what Nix asks them.
"""

from nixserve.codec.wire import Writer
from nixserve.hook.aside import Aside
from nixserve.hook.conversation import BuildQuestion, HookSettings
from nixserve.hook.lastseen import LastSeen
from nixserve.hook.machines import parseMachines
from nixserve.hook.negotiation import Chooser
from nixserve.hook.queue import Queue
from nixserve.hook.slots import Slots

QUESTION = BuildQuestion(False, "x86_64-linux", "/nix/store/00000000000000000000000000000000-x.drv")
LOCAL = {"system": "x86_64-linux", "max-jobs": "1"}


class Bench:
    """
    All that hook processes share, with a clock that stands still.

    @ivar now: by the clock.
    """

    def __init__(self, directory):
        self._directory = directory
        self.now = 1000.0

    def chooser(self, text, since=900.0, run="1", **settings):
        """One hook process."""
        return Chooser(
            parseMachines(text, {}.get, "x86_64-linux"),
            HookSettings({name.replace("_", "-"): value for name, value in settings.items()}),
            Slots(str(self._directory)),
            Aside(f"{self._directory}/aside", run, lambda: self.now),
            LastSeen(f"{self._directory}/seen", lambda: self.now),
            Queue(f"{self._directory}/queue", str(self._directory)),
            since,
            lambda: self.now,
        )


def asks(question=QUESTION):
    """What Nix sends when it asks."""
    writer = Writer().text("try").u64(question.amWilling).text(question.system).text(question.drvPath)
    return bytes(writer.textSet(question.requiredFeatures))

"""
Which machine takes a build, and what Nix is told if none does. Pure.

The rules are those of the original (Nix 2.8 to 2.36, src/build-remote/build-remote.cc), load being divided by the
speed factor in fractions, as from Nix 2.20 on.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

from nixserve.hook.conversation import BuildQuestion, HookSettings, Verbosity
from nixserve.hook.machines import Machine

__all__ = ["ANY_SYSTEM", "Refusal", "canBuildLocally", "isSuitable", "preference", "refusalText", "refuse"]

ANY_SYSTEM = "builtin"
"""The platform of Nix's own builders: every machine has them."""


class Refusal(enum.Enum):
    """Why no machine takes a build now: the answers to Nix, named as the methods that give them."""

    DECLINE_PERMANENTLY = "declinePermanently"
    DECLINE = "decline"
    POSTPONE = "postpone"


def isSuitable(machine: Machine, question: BuildQuestion) -> bool:
    """Is the machine made for this build? Slots aside."""
    required = question.requiredFeatures
    return (
        (question.system == ANY_SYSTEM or question.system in machine.systems)
        and required <= machine.supportedFeatures | machine.mandatoryFeatures
        and machine.mandatoryFeatures <= required
    )


def preference(machine: Machine, load: int) -> tuple[float, float]:
    """
    The key to sort machines by that have a free slot; the best comes first, and of equals the first in the file.

    @param load: how many of its slots are busy.
    """
    # The original goes on with the smaller load, which follows from these two unless the division drops a remainder.
    return load / machine.speedFactor, -machine.speedFactor


def canBuildLocally(question: BuildQuestion, settings: HookSettings) -> bool:
    """
    Can Nix build it itself, at once? What is for C{builtin} does not count, although it could.
    """
    return (
        question.amWilling
        and question.system in settings.localSystems
        and question.requiredFeatures <= settings.words("system-features")
    )


def refuse(machines: Sequence[Machine], suitable: Sequence[Machine], local: bool) -> Refusal:
    """
    What to answer when no machine takes a build.

    @param machines: all that the file has.
    @param suitable: those that would have taken it, but are busy. Such that cannot be reached do not belong here, for
        who waits for them may wait for ever.
    @param local: see L{canBuildLocally}.
    """
    if not machines:
        return Refusal.DECLINE_PERMANENTLY
    return Refusal.POSTPONE if suitable and not local else Refusal.DECLINE


def refusalText(question: BuildQuestion, machines: Iterable[Machine], local: bool) -> tuple[Verbosity, str]:
    """
    What to say beside L{Refusal.DECLINE}.

    @return: on which level, and the text.
    """
    required = ", ".join(sorted(question.requiredFeatures)) or "none"
    lines = [
        f"no machine of the setting 'builders' can build '{question.drvPath}'",
        f"it needs system {question.system}, features: {required}",
        *map(_describe, machines),
    ]
    return Verbosity.CHATTY if local else Verbosity.WARN, "\n".join(lines)


def _describe(machine: Machine) -> str:
    """A machine, as far as it matters for L{isSuitable}."""
    text = f"{machine.uri} has system {', '.join(sorted(machine.systems))}"
    if machine.supportedFeatures:
        text += f", features: {', '.join(sorted(machine.supportedFeatures))}"
    if machine.mandatoryFeatures:
        text += f", only for builds that need: {', '.join(sorted(machine.mandatoryFeatures))}"
    return text

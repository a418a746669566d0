"""
L{nixserve.hook.choice}: which machine takes a build.
"""

import pytest

from nixserve.hook.choice import Refusal, canBuildLocally, isSuitable, preference, refusalText, refuse
from nixserve.hook.conversation import BuildQuestion, HookSettings
from tests.hook.machinelist import machine, machines

DRV = "/nix/store/00000000000000000000000000000000-x.drv"


def question(system="x86_64-linux", features="", amWilling=False):
    """A question of Nix's."""
    return BuildQuestion(amWilling, system, DRV, frozenset(features.split()))


@pytest.mark.parametrize(
    ("line", "system", "features", "expected"),
    [
        ("h", "x86_64-linux", "", True),
        ("h", "i686-linux", "", False),
        ("h i686-linux,x86_64-linux", "i686-linux", "", True),
        ("h i686-linux", "x86_64-linux", "", False),
        ("h i686-linux", "builtin", "", True),
        ("h builtin", "builtin", "", True),
        ("h", "x86_64-linux", "kvm", False),
        ("h", "builtin", "kvm", False),
        ("h - - 1 1 kvm", "x86_64-linux", "kvm", True),
        ("h - - 1 1 kvm", "x86_64-linux", "", True),
        ("h - - 1 1 kvm", "x86_64-linux", "kvm big", False),
        ("h - - 1 1 kvm big", "x86_64-linux", "kvm big", True),
        ("h - - 1 1 kvm big", "x86_64-linux", "kvm", False),
        ("h - - 1 1 - big", "x86_64-linux", "big", True),
        ("h - - 1 1 - big", "x86_64-linux", "", False),
        ("h - - 1 1 - big,huge", "x86_64-linux", "big", False),
        ("h - - 0", "x86_64-linux", "", True),
    ],
)
def test_suitable(line, system, features, expected):
    """System listed, features supported, mandatory features required; slots do not matter."""
    assert isSuitable(machine(line), question(system, features)) is expected


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        # Speed factor and load of each machine.
        ([(1, 0)], 0),
        ([(1, 1), (1, 0)], 1),
        ([(1, 0), (1, 0)], 0),
        ([(1, 0), (2, 0)], 1),
        ([(2, 1), (1, 0)], 1),
        ([(1, 1), (2, 1)], 1),
        ([(1, 2), (4, 4)], 1),
        ([(1, 1), (2, 2)], 1),
        ([(2, 2), (1, 1), (2, 2)], 0),
        ([(0.5, 1), (0.25, 0)], 1),
        ([(0.5, 1), (1, 1)], 1),
        ([(3, 2), (2, 1)], 1),
    ],
)
def test_preference(rows, best):
    """Least load for its speed; then the fastest; then the least loaded; then the first."""
    made = machines("\n".join(f"h{number} - - 9 {speed}" for number, (speed, _) in enumerate(rows)))
    loads = [load for _, load in rows]
    chosen = min(range(len(rows)), key=lambda number: preference(made[number], loads[number]))
    assert chosen == best


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (question(), False),
        (question(amWilling=True), True),
        (question("i686-linux", amWilling=True), True),
        (question("aarch64-linux", amWilling=True), False),
        (question("builtin", amWilling=True), False),
        (question(features="here", amWilling=True), True),
        (question(features="here elsewhere", amWilling=True), False),
    ],
)
def test_canBuildLocally(asked, expected):
    """Nix needs a free slot, a system of its own, and all features."""
    settings = HookSettings(
        {"system": "x86_64-linux", "extra-platforms": "i686-linux i586-linux", "system-features": "here big"}
    )
    assert canBuildLocally(asked, settings) is expected


def test_refuse():
    """Nix waits only for machines that will take the build one day, and only if it cannot help itself."""
    one = machines("h")
    assert refuse((), (), True) is Refusal.DECLINE_PERMANENTLY
    assert refuse(one, (), False) is refuse(one, (), True) is refuse(one, one, True) is Refusal.DECLINE
    assert refuse(one, one, False) is Refusal.POSTPONE


def test_refusalText():
    """The user reads what is needed and what there is; only if Nix cannot build it itself."""
    level, text = refusalText(question(features="kvm"), machines("a; b i686-linux - 1 1 f,g m"), False)
    assert level == 1
    assert text.splitlines() == [
        f"no machine of the setting 'builders' can build '{DRV}'",
        "it needs system x86_64-linux, features: kvm",
        "ssh://a has system x86_64-linux",
        "ssh://b has system i686-linux, features: f, g, only for builds that need: m",
    ]
    assert refusalText(question(), (), True)[0] == 5

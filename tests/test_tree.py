"""The tests' tree: files, and tests of modules, are found by their names, and can be moved: nothing imports them."""

import re
import sys
from pathlib import Path

import pytest

from tests.importgraph import MODULES, NAMES, graph, moduleName

TESTS = Path(__file__).parent
PACKAGES = TESTS.parent / "nixserve"

IMPORT = re.compile(
    r"""^[^#\n]*\b(?:
        (?:from|import)\s+tests\.(?:\w+\.)*(?:test_\w+|conftest)\b |
        from\s+tests[.\w]*\s+import\s+(?:\([^)]*|[^(\n]*)\b(?:test_\w+|conftest)\b
    )""",
    re.M | re.X,
)
"""An import of tests, in programs that a test has in a text as well."""

NAMELESS = re.compile(r"support|fake|double|util|helper|common|misc|shared")

ACROSS = {
    "app": {"building", "clock", "foreigntext", "hookprocess", "manysessions", "owndirectories"},
    "protocol": {"busydatabase", "hostilebuilds", "hostilereplies"},
    "ssh": {"descriptors", "logs", "loopback", "openssh"},
}
"""By package, the files of tests that are about no single module of it."""

ELSEWHERE = {
    "app/arguments": "app/test_cmd_build",
    "app/cmd_hook": "interop/test_hook",
    "app/demonstration": "app/test_cmd_demo",
    "app/facts": "app/test_cmd_copy",
    "app/handover": "app/test_hookprocess",
    "app/hookcheck": "interop/test_hook",
    "app/hookcommand": "app/test_hookprocess",
    "app/hookentry": "app/test_hookprocess",
    "app/localside": "app/test_cmd_copy",
    "app/narration": "app/test_cmd_demo",
    "app/outlinks": "app/test_cmd_build",
    "app/preloaded": "app/test_hookprocess",
    "app/react": "app/test_clock",
    "app/recipe": "app/test_cmd_demo",
    "app/statedirs": "app/test_owndirectories",
    "app/stdiosession": "app/test_storecommand",
    "builder/builtinjob": "builder/test_builtins",
    "builder/child": "builder/test_sandbox",
    "builder/execution": "builder/test_local",
    "builder/openfiles": "builder/test_local",
    "builder/outputchecks": "builder/test_outputs",
    "builder/settings": "builder/test_local",
    "builder/spawn": "builder/test_process",
    "builder/workspace": "builder/test_local",
    "codec/events": "codec/test_connection",
    "codec/messages": "codec/test_serve",
    "codec/nar": "codec/test_narparser",
    "codec/states": "codec/test_connection",
    "hook/checking": "interop/test_hook",
    "protocol/building": "protocol/test_builds",
    "protocol/commands": "protocol/test_server",
    "protocol/interfaces": "testing/test_transports",
    "protocol/limits": "protocol/test_memory",
    "protocol/logbudget": "protocol/test_peerlog",
    "protocol/sessions": "protocol/test_server",
    "protocol/transfers": "protocol/test_copying",
    "remote/adding": "remote/test_store",
    "remote/clients": "remote/test_store",
    "remote/conch": "remote/test_connecting",
    "remote/link": "remote/test_store",
    "ssh/client": "ssh/test_loopback",
    "ssh/connection": "ssh/test_channel",
    "ssh/server": "ssh/test_loopback",
    "ssh/transport": "ssh/test_loopback",
    "store/adding": "store/test_local",
    "store/uploads": "store/test_local",
    "testing/contract": "store/test_memory",
    "testing/contractbase": "store/test_memory",
    "testing/contractobjects": "store/test_memory",
    "testing/contractsmall": "store/test_memory",
    "testing/objects": "store/test_memory",
}
"""Where most of the tests of a module are that has no file of tests of its own."""

PROGRAMS = {"nixserve": "nixserve.app.cli", "nixserve-hook": "nixserve.app.hookentry"}
"""What tests start by its name."""

UNTESTED = {"protocol/reactors"}
"""Modules without code, which type checkers read."""


def modulesOf(package):
    """The names of the modules of a package."""
    return {file.stem for file in (PACKAGES / package).glob("*.py")} - {"__init__"}


def strays(package):
    """The files of tests of a package that are called neither after a module, or a part of one, nor in L{ACROSS}."""
    names = {file.stem.removeprefix("test_") for file in (TESTS / package).glob("test_*.py")}
    modules = tuple(modulesOf(package))
    return {name for name in names - ACROSS.get(package, set()) if not name.startswith(modules)}


def untested():
    """The modules of packages, C{package/module}, without a file of tests that is called after them."""
    found = set()
    for package in {file.parent.name for file in PACKAGES.glob("*/__init__.py")}:
        modules = modulesOf(package)
        names = {file.stem.removeprefix("test_") for file in (TESTS / package).glob("test_*.py")}
        # A file belongs to the longest name that it begins with: test_narparser.py is not about nar.py.
        owners = {max((m for m in modules if name.startswith(m)), key=len, default=None) for name in names}
        found |= {f"{package}/{module}" for module in modules - owners}
    return found


def named(source):
    """The modules that stand in a text: a test's program imports them, or a lazy command is looked up there."""
    words = re.findall(r"nixserve(?:\.\w+)+", source)
    programs = [f"nixserve.app.{module}" for module in re.findall(r'"(cmd_\w+)"', source)]
    programs += [module for name, module in PROGRAMS.items() if f'"{name}"' in source]
    return NAMES & {*words, *(word.rpartition(".")[0] for word in words), *programs}


def used():
    """Which module imports which others, in the package and in tests, or has them in a text."""
    sources = {moduleName(file): file.read_text() for file in [*MODULES, *TESTS.rglob("*.py")]}
    found = graph(sources)
    for name, source in sources.items():
        if name.startswith("tests."):
            package, _, module = name.removeprefix("tests.").partition(".test_")
            found[name] |= named(source) | NAMES & {f"nixserve.{package}.{module}"}
    found["nixserve.app.cli"] |= named((PACKAGES / "app/cli.py").read_text())
    return found


USED = used()


def reachedFrom(module):
    """All modules that one comes to."""
    reached, left = set(), [module]
    while left:
        found = USED[left.pop()] - reached
        reached |= found
        left += found
    return reached


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_nothingImportsTests(file):
    """What several files of tests need is in a file of its own."""
    assert file == Path(__file__) or not IMPORT.search(file.read_text())


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from tests.a.test_b import c", True),
        ("from tests.test_b import c", True),
        ("import tests.a.test_b", True),
        ("from tests.a import b, test_c", True),
        ("from tests.a import (\n    b,\n    test_c,\n)", True),
        ("from tests.a.conftest import box", True),
        ('code = "import sys; from tests.a.test_b import c"', True),
        ("from tests.a.testing import c", False),
        ("from tests.a import contest", False),
        ("from tests.a import b\n\n\ndef test_c(): pass", False),
        ("from tests.a import (b)\n\n\ndef test_c(): pass", False),
        ("# from tests.a.test_b import c", False),
        ("def test_b(): pass", False),
    ],
)
def test_importsAreSeen(line, found):
    """An import of tests is found in each of its forms."""
    assert bool(IMPORT.search(f"import os\n{line}\n")) == found


def test_eachFileIsOneModule():
    """A file has one name, that of its path, however it is imported: its classes are the same for everybody."""
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    ours = {name: Path(file) for name, file in files.items() if file and TESTS in Path(file).parents}
    assert __name__ in ours
    for name, file in ours.items():
        assert name == ".".join(file.relative_to(TESTS.parent).with_suffix("").parts)


def test_sharedFilesSayWhatTheyHold():
    """What is no file of tests is called after what it holds, not after whom it serves."""
    assert [str(file) for file in TESTS.rglob("*.py") if NAMELESS.search(file.stem.partition("test_")[0])] == []


@pytest.mark.parametrize("package", sorted(file.parent.name for file in PACKAGES.glob("*/__init__.py")))
def test_filesAreCalledAfterModules(package):
    """The tests of a module are in the file of its name, or in files whose names begin with it."""
    assert strays(package) == set()
    found = {file.stem.removeprefix("test_") for file in (TESTS / package).glob("test_*.py")}
    assert ACROSS.get(package, set()) <= found, "names files that are gone"


def test_eachModuleHasTests():
    """A module has a file of tests of its own name, or a row that says where its tests are; not both."""
    rows = ELSEWHERE.keys() | UNTESTED
    assert sorted(untested() - rows) == []
    assert sorted(rows - untested()) == [], "rows that are not needed"


@pytest.mark.parametrize(("module", "file"), ELSEWHERE.items())
def test_testsElsewhereReachTheModule(module, file):
    """The file that a row names is there, and comes to the module."""
    assert f"nixserve.{module.replace('/', '.')}" in reachedFrom(f"tests.{file.replace('/', '.')}")

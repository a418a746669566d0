"""The tests' tree: a file is found by its name, and tests can be moved, since nothing imports them."""

import re
import sys
from pathlib import Path

import pytest

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


def modulesOf(package):
    """The names of the modules of a package."""
    return {file.stem for file in (PACKAGES / package).glob("*.py")} - {"__init__"}


def strays(package):
    """The files of tests of a package that are called neither after a module, or a part of one, nor in L{ACROSS}."""
    names = {file.stem.removeprefix("test_") for file in (TESTS / package).glob("test_*.py")}
    modules = tuple(modulesOf(package))
    return {name for name in names - ACROSS.get(package, set()) if not name.startswith(modules)}


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

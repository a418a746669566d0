"""The layers: who may import whom, read from the import statements of every module."""

import ast
import re
import sys

import pytest

from tests.importgraph import ANYTHING, LAYERS, MODULES, ROOT, circle, graph, imports, layerOf, moduleName, sourceGraph

WITHOUT_TWISTED = {"errors", "codec", "store", "builder"}
FORBIDDEN_IN_CODEC = {
    "asyncio", "fcntl", "glob", "io", "multiprocessing", "os", "pathlib", "pwd", "select", "selectors", "shutil",
    "signal", "socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading", "time", "urllib", "_thread",
}  # fmt: skip
"""What reaches files, sockets, clocks, the environment or threads."""

FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "common", "misc"}


def breaches(module, source):
    """
    The rules that a module breaks, as texts.

    @param module: its dotted name.
    """
    found = []
    isPlugin = module.startswith("twisted.plugins")
    layer = "app" if isPlugin else layerOf(module)
    if FORBIDDEN_NAMES & set(module.split(".")):
        found.append("is called after nothing that it holds")
    if layer in ANYTHING:
        return found
    if re.search(r"\b(reactor|clock): Any\b", source):
        found.append("says nothing of what a reactor must provide")
    for name, inFunction in imports(module, source):
        top = name.partition(".")[0]
        if inFunction and layer != "app":
            found.append(f"imports {name} in a function")
        if top == "nixserve":
            target = layerOf(name)
            if target is None:
                continue
            if target in ANYTHING:
                found.append(f"imports {name}")
            elif layer is None or target not in LAYERS or LAYERS.index(target) > LAYERS.index(layer):
                found.append(f"imports {name} of a later layer")
        elif (layer in WITHOUT_TWISTED and top in ("twisted", "zope")) or (
            layer in ("errors", "codec") and (top not in sys.stdlib_module_names or top in FORBIDDEN_IN_CODEC)
        ):
            found.append(f"imports {name}")
    if layer in ("errors", "codec") and re.search(r"(?<![\w.])(open|input|print)\(", source):
        found.append("opens files or talks to the terminal")
    return found


def test_noCircles():
    """No module imports itself by way of others, be it for a type checker or within a function."""
    assert circle(sourceGraph()) == []


@pytest.mark.parametrize("module", ["nixserve.app.hookcommand", "nixserve.app.cmd_build"])
def test_whoBuildsElsewhereNeedsNoBuilder(module):
    """The build hook, a process for each build, and C{nixserve build} load nothing of how to build here."""
    modules = sourceGraph()
    found, waiting = set(), {module}
    while waiting:
        found |= waiting
        waiting = set().union(*(modules[name] for name in waiting)) - found
    assert [name for name in sorted(found) if layerOf(name) == "builder"] == []


@pytest.mark.parametrize(
    ("b", "c", "expected"),
    [
        ("import nixserve.c", "", []),
        ("import nixserve.c", "import nixserve.b", ["nixserve.b", "nixserve.c", "nixserve.b"]),
        ("from nixserve.c import x", "def f():\n    import nixserve.b", ["nixserve.b", "nixserve.c", "nixserve.b"]),
        (
            "if TYPE_CHECKING:\n    from nixserve.c import x",
            "from nixserve.a import y",
            ["nixserve.a", "nixserve.b", "nixserve.c", "nixserve.a"],
        ),
    ],
)
def test_circlesAreSeen(b, c, expected):
    """A circle is found wherever it begins and wherever the imports stand, and only where there is one."""
    sources = {"nixserve.a": "import nixserve.b, os", "nixserve.b": b, "nixserve.c": c}
    assert circle(graph(sources)) == expected


@pytest.mark.parametrize("file", MODULES, ids=[moduleName(file) for file in MODULES])
def test_layers(file):
    """The module keeps to its layer."""
    assert breaches(moduleName(file), file.read_text()) == []


def test_versionsAreComparedInOnePlace():
    """Only one module takes a version of the protocol apart: what a version has others ask it."""
    apart = {moduleName(file) for file in MODULES if re.search(r"\bminorOf\b|ersion & 0xFF", file.read_text())}
    assert apart == {"nixserve.codec.serve"}


def defined(source):
    """The names that a module makes itself, rather than import them."""
    names = set()
    for statement in ast.parse(source).body:
        for node in ast.walk(statement) if isinstance(statement, ast.If | ast.Try) else [statement]:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def detours(source, homes):
    """
    The names in the C{source} of a module that it does not take from where they are made.

    @param homes: the names that each module makes, by its dotted name; without packages, which offer those of others.
    """
    return [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module in homes
        for alias in node.names
        if alias.name not in homes[node.module]
    ]


def test_oneAddress():
    """Each name is imported from the module that defines it, and from no other."""
    homes = {moduleName(file): defined(file.read_text()) for file in MODULES if file.name != "__init__.py"}
    found = {file: detours(file.read_text(), homes) for file in [*MODULES, *ROOT.glob("tests/**/*.py")]}
    assert {file: names for file, names in found.items() if names} == {}


def test_detoursAreSeen():
    """A name that is passed on is no name of the module that passes it on."""
    homes = {
        "nixserve.a": defined("x, y = 1, 2\nclass C: ...\ntry:\n    z = 3\nfinally:\n    pass"),
        "nixserve.b": set(),
    }
    assert detours("from nixserve.a import C, x, y, z\nfrom nixserve.c import v", homes) == []
    assert detours("def f():\n    from nixserve.b import C, x", homes) == ["nixserve.b.C", "nixserve.b.x"]


def test_modulesAreFound():
    """The test above looks at the modules there are, and every package is a layer."""
    names = {moduleName(file) for file in MODULES}
    assert {"nixserve.errors", "nixserve.codec.serve", "nixserve.protocol.server"} <= names
    assert {layerOf(name) for name in names if name.startswith("nixserve.")} <= {*LAYERS, *ANYTHING}


def test_onlyThePluginLivesInTwisted():
    """Twisted's namespace packages get no C{__init__.py} from us."""
    assert not list(ROOT.glob("twisted/__init__.py")) + list(ROOT.glob("twisted/plugins/__init__.py"))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nixserve.codec.x", "import os"),
        ("nixserve.codec.x", "from time import time"),
        ("nixserve.codec.x", "import zope.interface"),
        ("nixserve.codec.x", "import cryptography"),
        ("nixserve.codec.x", "from nixserve.store.api import Busy"),
        ("nixserve.codec.x", "from nixserve import store"),
        ("nixserve.codec.x", "data = open('x')"),
        ("nixserve.store.x", "from twisted.internet import defer"),
        ("nixserve.store.x", "import nixserve.protocol.server"),
        ("nixserve.store.x", "def f():\n    import os"),
        ("nixserve.store.x", "async def f():\n    import os"),
        ("nixserve.store.x", "import nixserve.testing"),
        ("nixserve.protocol.x", "from nixserve.ssh.keys import x"),
        ("nixserve.ssh.x", "def f():\n    def g():\n        from nixserve.errors import x"),
        ("nixserve.protocol.x", "def f(reactor: Any): ..."),
        ("nixserve.utils", ""),
        ("nixserve.store.common", ""),
        ("twisted.plugins.x", "from nixserve import testing"),
        ("nixserve", "from nixserve.errors import x"),
        ("nixserve.errors", "if TYPE_CHECKING:\n    from nixserve.codec.wire import x"),
    ],
)
def test_breachesAreSeen(module, source):
    """Each rule can be broken."""
    assert breaches(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nixserve.codec.x", "import json\nfrom nixserve.errors import x\nfrom nixserve.codec.y import z"),
        ("nixserve.store.x", "import os, threading\nfrom nixserve.codec.y import z"),
        ("nixserve.app.x", "def f():\n    import twisted"),
        ("nixserve.testing", "from nixserve.app.x import y"),
        ("nixserve", "if TYPE_CHECKING:\n    from nixserve.errors import x"),
        ("twisted.plugins.x", "from nixserve.app.x import y"),
    ],
)
def test_whatIsAllowed(module, source):
    """What keeps to the rules is no breach."""
    assert breaches(module, source) == []

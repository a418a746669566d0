"""Which module imports which, read from the import statements."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ["errors", "codec", "store", "builder", "protocol", "ssh", "remote", "hook", "app"]
ANYTHING = {"testing"}
"""Modules above all layers, which nothing imports."""

MODULES = sorted([*ROOT.glob("nixserve/**/*.py"), *ROOT.glob("twisted/plugins/*.py")])


def moduleName(file):
    """The dotted name of a file."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {moduleName(file) for file in MODULES}


def layerOf(module):
    """The layer of a dotted name in nixserve; C{None} for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(module, source):
    """
    The imports in the C{source} of a module.

    @return: for each, the dotted name, and whether it stands in a function.
    """
    found = []

    def visit(node, inFunction):
        if module == "nixserve" and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            # The package names what it offers for type checkers; at run time it loads that when it is first used.
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, inFunction) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert all(alias.name != "*" for alias in node.names), "no star imports"
            if node.module == "nixserve":
                # What is no subpackage is a name of the package's own, such as its version.
                packages = {alias.name for alias in node.names} & {*LAYERS, *ANYTHING}
                found.extend((f"nixserve.{name}", inFunction) for name in packages)
            else:
                found.append((node.module, inFunction))
                found.extend(
                    (submodule, inFunction)
                    for alias in node.names
                    if (submodule := f"{node.module}.{alias.name}") in NAMES and submodule != node.module
                )
        inside = inFunction or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def graph(sources):
    """
    Which of the modules imports which others of them, wherever the statement stands.

    @param sources: the source of each, by dotted name.
    @return: the same modules, each with a set.
    """
    return {
        module: {name for name, _ in imports(module, source)} & sources.keys() - {module}
        for module, source in sources.items()
    }


def circle(graph):
    """
    One way by which a module imports itself, with the module at both ends; empty if there is none.

    @param graph: of L{graph}.
    """
    done, way = set(), []

    def follow(module):
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        way.append(module)
        found = next(filter(None, map(follow, sorted(graph[module]))), [])
        way.pop()
        done.add(module)
        return found

    return next(filter(None, map(follow, sorted(graph))), [])


def sourceGraph():
    """L{graph} of the modules that there are."""
    return graph({moduleName(file): file.read_text() for file in MODULES})

"""
What a builder gets to see: its environment, its arguments, and the files that lie in its directory when it starts.

Nothing of our own environment gets through, but for the variables that a derivation whose output is checked by its
hash asks for. Source: Nix 2.8, src/libstore/build/local-derivation-goal.cc (C{startBuilder}, C{initEnv},
C{writeStructuredAttrs}); files are byte for byte the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, Protocol

from nixserve.builder.drvoptions import DerivationOptions
from nixserve.builder.structuredattrs import JSON, writeJSON, writeShell
from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.derivation import BasicDerivation, OutputKind
from nixserve.codec.hashes import hashBytes
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.resolution import outputPlaceholder
from nixserve.codec.storepath import BadStorePath, StoreDir, StorePath
from nixserve.codec.text import encodeText
from nixserve.errors import BuildError
from nixserve.store.api import InvalidPath

__all__ = [
    "BuilderFiles",
    "ReferenceGraphSource",
    "builderEnvironment",
    "outputRewrites",
]

_JSON_FILE: Final = ".attrs.json"
_SHELL_FILE: Final = ".attrs.sh"

#: Bytes of all descriptions of references that one build gets. They are in memory for a while, and a kilobyte of a
#: derivation can ask for that of a large closure a dozen times. That of a whole NixOS has some 5 MB.
_MAX_DESCRIBED: Final = 64 * 1024 * 1024
#: What a description counts at least, since it asks the store: bytes.
_DESCRIPTION_COST: Final = 1024

_BUILD_TOP_NAMES: Final = ("NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD")


class ReferenceGraphSource(Protocol):
    """Knows the references of the inputs: a session of the store."""

    def queryPathInfos(self, paths: Collection[StorePath]) -> dict[StorePath, ValidPathInfo]:
        """As L{nixserve.store.api.StoreSession.queryPathInfos}."""

    def queryClosure(self, paths: Collection[StorePath], includeOutputs: bool = False) -> set[StorePath]:
        """As L{nixserve.store.api.StoreSession.queryClosure}."""


@dataclass(frozen=True, slots=True)
class BuilderFiles:
    """
    What a builder gets to see.

    @ivar env: the environment, all of it.
    @ivar args: the arguments after the name of the program.
    @ivar files: by name, to be created in the build directory, owned by the builder, with mode 0644.
    """

    env: dict[str, str]
    args: tuple[str, ...]
    files: dict[str, bytes]


def outputRewrites(drv: BasicDerivation, outputPaths: Mapping[str, str]) -> dict[str, str]:
    """
    What must be replaced in all that the builder sees, so that it writes its outputs where they are expected.

    @param outputPaths: where the builder is to write, by output name; may differ from the paths in C{drv}.
    @return: the placeholders of the outputs; and the hash parts of those outputs that go elsewhere than C{drv} says.
    """
    rewrites: dict[str, str] = {}
    for name, output in drv.outputs.items():
        rewrites[outputPlaceholder(name)] = outputPaths[name]
        if output.path is not None and output.path != outputPaths[name]:
            rewrites[output.path.hashPart] = StorePath(outputPaths[name]).hashPart
    return rewrites


def builderEnvironment(
    drv: BasicDerivation,
    buildTop: str,
    storeDir: StoreDir,
    cores: int,
    outputPaths: Mapping[str, str],
    inputs: ReferenceGraphSource,
    impure: Mapping[str, str],
    *,
    inputClosure: AbstractSet[StorePath],
    options: DerivationOptions,
    proceed: Callable[[], None] = lambda: None,
) -> BuilderFiles:
    """
    Work out what the builder of C{drv} gets to see.

    @param buildTop: the build directory, as the builder sees it.
    @param cores: how many it may use; 0 for all that this process may.
    @param outputPaths: where it is to write, by output name.
    @param inputs: asked only if the derivation wants to know about references.
    @param impure: the variables that C{impureEnvVars} may ask for. Looked at only where the build has the network.
    @param inputClosure: what the build may use.
    @param options: those of C{drv}.
    @param proceed: called again and again where it may take long; raises to give up.
    @raise BuildError: the derivation asks for something that cannot be.
    """
    graphs = _Graphs(storeDir, inputs, inputClosure, proceed)
    files: dict[str, str] = {}
    env = {
        "PATH": "/path-not-set",
        "HOME": "/homeless-shelter",
        "NIX_STORE": storeDir.path,
        "NIX_BUILD_CORES": str(cores or len(os.sched_getaffinity(0))),
    }
    if options.structuredAttrs is None:
        _addVariables(drv.env, options.passAsFile, buildTop, env, files)
        for fileName, paths in options.exportReferencesGraph.items():
            files[fileName] = graphs.describe(paths)
    env |= dict.fromkeys(_BUILD_TOP_NAMES, buildTop)
    kind = drv.kind()
    if kind is OutputKind.FIXED:
        env["NIX_OUTPUT_CHECKED"] = "1"
    if kind in (OutputKind.FIXED, OutputKind.IMPURE):
        env |= {name: impure.get(name, "") for name in options.impureEnvVars}
    # The log is standard error, on a terminal with colours.
    env |= {"NIX_LOG_FD": "2", "TERM": "xterm-256color"}
    if options.structuredAttrs is not None:
        attrs = _completeAttrs(options, outputPaths, graphs)
        files[_JSON_FILE] = writeJSON(attrs)
        files[_SHELL_FILE] = writeShell(attrs)
        env |= {"NIX_ATTRS_JSON_FILE": f"{buildTop}/{_JSON_FILE}", "NIX_ATTRS_SH_FILE": f"{buildTop}/{_SHELL_FILE}"}
    rewrites = outputRewrites(drv, outputPaths)
    return BuilderFiles(
        env=_rewriteEnv(env, rewrites),
        args=tuple(_cString(_rewrite(arg, rewrites)) for arg in drv.args),
        files={name: encodeText(_rewrite(text, rewrites)) for name, text in files.items()},
    )


def _addVariables(
    variables: Mapping[str, str], passAsFile: Collection[str], buildTop: str, env: dict[str, str], files: dict[str, str]
) -> None:
    """Put the derivation's variables into the environment or into files."""
    # Nix has them sorted. Of C{x} passed as a file and C{xPath}, the latter wins.
    for name in sorted(variables, key=encodeText):
        if name in passAsFile:
            fileName = f".attr-{hashBytes('sha256', encodeText(name)).nix32}"
            files[fileName] = variables[name]
            env[f"{name}Path"] = f"{buildTop}/{fileName}"
        else:
            env[name] = variables[name]


def _completeAttrs(options: DerivationOptions, outputPaths: Mapping[str, str], graphs: _Graphs) -> dict[str, JSON]:
    """The structured attributes with what is known only now: where outputs go, and what inputs refer to."""
    attrs = dict(options.structuredAttrs or {})
    attrs["outputs"] = dict(outputPaths)
    for key, paths in options.exportReferencesGraph.items():
        attrs[key] = graphs.describeAsJSON(paths)
    return attrs


def _rewrite(text: str, rewrites: Mapping[str, str]) -> str:
    for old, new in rewrites.items():
        text = text.replace(old, new)
    return text


def _rewriteEnv(env: Mapping[str, str], rewrites: Mapping[str, str]) -> dict[str, str]:
    """Rewrite names and values. What the kernel would be given but nobody could read from it is left out."""
    rewritten: dict[str, str] = {}
    for variable in sorted((f"{name}={value}" for name, value in env.items()), key=encodeText):
        name, equals, value = _cString(_rewrite(variable, rewrites)).partition("=")
        if name and equals:
            rewritten[name] = value
    return rewritten


def _cString(text: str) -> str:
    """Derivations can hold NUL; environments and arguments end there."""
    return text.partition("\0")[0]


class _Graphs:
    """
    Tells builders about references among their inputs.

    @ivar storeDir: the store directory.
    """

    def __init__(
        self,
        storeDir: StoreDir,
        inputs: ReferenceGraphSource,
        inputClosure: AbstractSet[StorePath],
        proceed: Callable[[], None],
    ) -> None:
        self.storeDir = storeDir
        self._inputs = inputs
        self._inputClosure = inputClosure
        self._proceed = proceed
        self._left = _MAX_DESCRIBED

    def describe(self, paths: Iterable[str]) -> str:
        """
        For each object: path, deriver (always empty), number of references, references; a line each.

        @param paths: of store objects or files in them; they and all that they refer to are described.
        @raise BuildError: one is not among the inputs.
        """
        lines: list[str] = []
        for path in paths:
            if not self.storeDir.isInStore(path):
                raise BuildError(
                    BuildStatus.INPUT_REJECTED, f"'exportReferencesGraph' contains a non-store path '{path:.1000}'"
                )
        for info in self._infos(paths):
            described = [info.path, "", str(len(info.references)), *sorted(info.references)]
            self._count(sum(map(len, described)))
            lines += described
        return "".join(f"{line}\n" for line in lines)

    def describeAsJSON(self, paths: Iterable[str]) -> list[JSON]:
        """
        The same, with hashes and sizes. Nix from 2.26 on adds C{"valid": true}.

        @raise BuildError: as L{describe}.
        """
        infos = {info.path: info for info in self._infos(paths)}
        described: list[JSON] = []
        for path, info in infos.items():
            self._count(_DESCRIPTION_COST + sum(map(len, info.references)))
            item: dict[str, JSON] = {
                "closureSize": _closureSize(path, infos),
                "narHash": str(info.narHash),
                "narSize": info.narSize,
                "path": path,
                "references": [*sorted(info.references)],
            }
            if info.ca is not None:
                item["ca"] = str(info.ca)
            described.append(item)
        return described

    def _count(self, size: int) -> None:
        """
        So much more is described.

        @raise BuildError: that is too much.
        """
        self._proceed()
        self._left -= size
        if self._left < 0:
            raise BuildError(
                BuildStatus.INPUT_REJECTED,
                f"'exportReferencesGraph' asks for more than {_MAX_DESCRIBED // 1024 // 1024} MiB of descriptions",
            )

    def _infos(self, paths: Iterable[str]) -> list[ValidPathInfo]:
        """What is known about C{paths} and all that they refer to, sorted."""
        self._count(_DESCRIPTION_COST)
        roots = [self._rootOf(path) for path in paths]
        try:
            closure = self._inputs.queryClosure(roots)
            if any(path.isDerivation for path in closure):
                # Outputs that are not there are left out, where Nix fails.
                closure = self._inputs.queryClosure(roots, includeOutputs=True)
        except InvalidPath as error:
            raise BuildError(BuildStatus.MISC_FAILURE, str(error)) from error
        infos = self._inputs.queryPathInfos(closure)
        return [infos[path] for path in sorted(infos)]

    def _rootOf(self, text: str) -> StorePath:
        try:
            path = self.storeDir.toStorePath(text)
        except BadStorePath as error:
            raise BuildError(BuildStatus.MISC_FAILURE, str(error)) from error
        if path not in self._inputClosure:
            raise BuildError(
                BuildStatus.INPUT_REJECTED,
                f"cannot export references of path '{path}' because it is not in the input closure of the derivation",
            )
        return path


def _closureSize(path: StorePath, infos: Mapping[StorePath, ValidPathInfo]) -> int:
    """The bytes of the NARs of C{path} and of all that it refers to."""
    closure = {path}
    new = [path]
    while new:
        references = infos[new.pop()].references - closure
        closure |= references
        new += references
    return sum(infos[member].narSize for member in closure)

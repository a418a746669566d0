"""
Something to build: a derivation whose recipe is much larger than what its build needs, as they are in nixpkgs.

There most of a recipe says how compilers and downloaders were built, with which one was done long ago. Here the program
is an index of packages; each package counts as downloaded, with tools from the end of a chain of stages, the first of
which was made from an archive. None of that is ever built: what the index needs is the packages, and these are there.

Blocking, no Twisted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from nixserve.app.sample import addNar, addTree
from nixserve.builder.settings import hostPlatforms
from nixserve.codec.contentaddress import ContentAddressMethod
from nixserve.codec.derivation import (
    BasicDerivation,
    Derivation,
    DerivationOutput,
    Memo,
    drvPathOf,
    outputPaths,
    unparse,
)
from nixserve.codec.hashes import hashBytes
from nixserve.codec.nar import Contents, Regular
from nixserve.codec.narwriter import encodeNar
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath
from nixserve.store.api import StoreSession

__all__ = ["Recipe", "makeRecipe"]

STAGES: Final = 40
"""Derivations between the archive and the tools. The recipe of GNU hello has some 200."""

ARCHIVE_SIZE: Final = 4 * 1024 * 1024
"""Bytes of the archive. The seed from which nixpkgs builds its first compiler has 20 MB and more."""

_SHELL: Final = "/bin/sh"

# What a shell can do by itself: a sandbox has nothing else. What it prints is the log.
_SCRIPT: Final = """\
set -- /*
echo "$# entries in the root directory"
set -- "${out%/*}"/*
echo "$# paths in the store"
for package in $packages; do
  name=${package##*/}
  files=0 lines=0
  for file in "$package"/*.py; do
    while IFS= read -r line; do lines=$((lines + 1)); done <"$file"
    files=$((files + 1))
  done
  echo "${name#*-}: $files files, $lines lines"
  echo "$package $files $lines" >>"$out"
done
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """
    A derivation that is in a store with all that it depends on, and whose inputs are built.

    @ivar drvPath: where its .drv file is.
    @ivar basic: what is left of it when its inputs are there.
    @ivar output: where the result belongs, as follows from the whole recipe.
    @ivar expected: what the result must contain.
    """

    drvPath: StorePath
    basic: BasicDerivation
    output: StorePath
    expected: str


def makeRecipe(session: StoreSession, directory: str, packages: Mapping[str, ValidPathInfo]) -> Recipe:
    """
    Add the .drv files and sources of a recipe to a store.

    @param directory: to prepare it in; what is left there is of no use.
    @param packages: what the program is about, by name: directories that are in the store and were added under the
        path that follows from their contents, with no references.
    """
    kitchen = _Kitchen(session)
    archive = Path(directory) / "seed.tar"
    archive.write_bytes(os.urandom(ARCHIVE_SIZE))
    tools = kitchen.addStage(0, [addTree(session, archive.name, str(archive)).path], {})
    for number in range(1, STAGES):
        tools = kitchen.addStage(number, [], {tools: frozenset({"out"})})
    inputs = {kitchen.addDownload(info, tools): frozenset({"out"}) for info in packages.values()}
    paths = [info.path for info in packages.values()]
    drvPath = kitchen.addBuild("index", ("-c", _SCRIPT), {"packages": " ".join(paths)}, [], inputs)
    whole = kitchen.derivations[drvPath]
    basic = BasicDerivation(
        name=whole.name,
        outputs=whole.outputs,
        inputSrcs=whole.inputSrcs | frozenset(paths),
        platform=whole.platform,
        builder=whole.builder,
        args=whole.args,
        env=whole.env,
    )
    expected = "".join(_expectedLine(info.path, Path(directory) / name) for name, info in packages.items())
    return Recipe(drvPath, basic, _outputPath(whole), expected)


class _Kitchen:
    """
    Makes derivations and puts them into a store.

    @ivar derivations: those made, by path.
    """

    def __init__(self, session: StoreSession) -> None:
        self.derivations: dict[StorePath, Derivation] = {}
        self._session = session
        self._memo: Memo = {}

    def addStage(
        self, number: int, sources: Iterable[StorePath], inputs: Mapping[StorePath, frozenset[str]]
    ) -> StorePath:
        """One step on the way to the tools."""
        before = [_outputPath(self.derivations[drvPath]) for drvPath in inputs]
        env = {"PATH": ":".join(f"{path}/bin" for path in before), "src": " ".join(sources)}
        return self.addBuild(f"bootstrap-stage-{number}", ("-e", "build.sh"), env, sources, inputs)

    def addDownload(self, package: ValidPathInfo, tools: StorePath) -> StorePath:
        """What says where a package came from: its output is known by its hash, and so is not a matter of trust."""
        output = DerivationOutput(package.path, f"{ContentAddressMethod.NAR.value}sha256", package.narHash.hex)
        env = {
            "out": str(package.path),
            "PATH": f"{_outputPath(self.derivations[tools])}/bin",
            "outputHash": str(package.narHash),
            "outputHashMode": "recursive",
            "url": f"https://example.org/{package.path.name}.tar.gz",
        }
        return self._add(self._derivation(package.path.name, output, ("-e", "fetch.sh"), env, (), {tools: {"out"}}))

    def addBuild(
        self,
        name: str,
        args: tuple[str, ...],
        env: Mapping[str, str],
        sources: Iterable[StorePath],
        inputs: Mapping[StorePath, Collection[str]],
    ) -> StorePath:
        """A derivation whose output path follows from everything that it depends on."""
        storeDir = self._session.storeDir
        # Stands where the path will be; the hash that gives the path does not cover it.
        unknown = storeDir.makeOutputPath("out", hashBytes("sha256", b""), name)
        unfinished = self._derivation(name, DerivationOutput(unknown), args, {**env, "out": ""}, sources, inputs)
        path = outputPaths(unfinished, self.derivations.__getitem__, storeDir, self._memo)["out"]
        return self._add(
            replace(unfinished, outputs={"out": DerivationOutput(path)}, env={**unfinished.env, "out": str(path)})
        )

    def _derivation(
        self,
        name: str,
        output: DerivationOutput,
        args: tuple[str, ...],
        env: Mapping[str, str],
        sources: Iterable[StorePath],
        inputs: Mapping[StorePath, Collection[str]],
    ) -> Derivation:
        platform, _ = hostPlatforms()
        return Derivation(
            name=name,
            outputs={"out": output},
            inputSrcs=frozenset(sources),
            platform=platform,
            builder=_SHELL,
            args=args,
            env={"name": name, "system": platform, "builder": _SHELL, **env},
            inputDrvs={drvPath: frozenset(names) for drvPath, names in inputs.items()},
        )

    def _add(self, drv: Derivation) -> StorePath:
        storeDir = self._session.storeDir
        path = drvPathOf(drv, storeDir)
        text = unparse(drv)
        nar = b"".join(encodeNar([Regular(b"", False, len(text)), Contents(text)]))
        addNar(self._session, path.name, lambda: [nar], [*drv.inputSrcs, *drv.inputDrvs], hashBytes("sha256", text))
        self.derivations[path] = drv
        return path


def _outputPath(drv: Derivation) -> StorePath:
    path = drv.outputs["out"].path
    assert path is not None, "no output here is unknown before the build"
    return path


def _expectedLine(package: StorePath, directory: Path) -> str:
    """What the index must say of a package."""
    files = [path.read_bytes() for path in directory.glob("*.py")]
    lines = sum(text.count(b"\n") for text in files)
    return f"{package} {len(files)} {lines}\n"

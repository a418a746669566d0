"""
What a derivation demands of its own outputs: what they may refer to, and how large they may be.

Source: Nix 2.8, src/libstore/build/local-derivation-goal.cc (C{checkOutputs}).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nixserve.builder.drvoptions import DerivationOptions, OutputChecks
from nixserve.codec.buildresult import BuildStatus
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StoreDir, StorePath
from nixserve.errors import BuildError, FormatError
from nixserve.store.validpaths import ValidPaths

__all__ = ["checkOutputs"]


def checkOutputs(
    options: DerivationOptions,
    infos: Mapping[str, ValidPathInfo],
    outputs: Mapping[str, StorePath],
    validPaths: ValidPaths,
    storeDir: StoreDir,
) -> None:
    """
    @param options: hold the demands.
    @param infos: the new outputs, by name; not registered yet.
    @param outputs: where all outputs are, by name, those that were valid before among them.
    @param validPaths: knows everything that the outputs refer to.
    @raise BuildError: a demand is not met, or names what is neither a store path nor an output.
    """
    closures = _Closures(infos.values(), validPaths)
    for name, info in infos.items():
        checks = options.outputChecks.get(name)
        if checks is not None:
            _Check(info, checks, closures, outputs, storeDir).run()


class _Closures:
    """Finds closures of outputs that are not registered yet."""

    def __init__(self, infos: Collection[ValidPathInfo], validPaths: ValidPaths) -> None:
        self._new = {info.path: info for info in infos}
        self._validPaths = validPaths

    def closure(self, path: StorePath) -> set[StorePath]:
        """C{path} and all that it refers to."""
        found = {path}
        old: set[StorePath] = set()
        unseen = [path]
        while unseen:
            for reference in self._new[unseen.pop()].references - found:
                found.add(reference)
                if reference in self._new:
                    unseen.append(reference)
                else:
                    old.add(reference)
        return found | self._validPaths.queryClosure(old)

    def size(self, paths: Collection[StorePath]) -> int:
        """The bytes of the NARs of C{paths}."""
        old = self._validPaths.queryPathInfos([path for path in paths if path not in self._new])
        new = [self._new[path] for path in paths if path in self._new]
        return sum(info.narSize for info in [*old.values(), *new])


class _Check:
    """The demands on one output."""

    def __init__(
        self,
        info: ValidPathInfo,
        checks: OutputChecks,
        closures: _Closures,
        outputs: Mapping[str, StorePath],
        storeDir: StoreDir,
    ) -> None:
        self._info = info
        self._checks = checks
        self._closures = closures
        self._outputs = outputs
        self._storeDir = storeDir

    def run(self) -> None:
        """
        @raise BuildError: one is not met.
        """
        checks, info = self._checks, self._info
        if checks.maxSize is not None and info.narSize > checks.maxSize:
            raise _rejected(f"path '{info.path}' is too large at {info.narSize} bytes; limit is {checks.maxSize} bytes")
        if checks.maxClosureSize is not None:
            size = self._closures.size(self._closures.closure(info.path))
            if size > checks.maxClosureSize:
                raise _rejected(
                    f"closure of path '{info.path}' is too large at {size} bytes; "
                    f"limit is {checks.maxClosureSize} bytes"
                )
        if checks.allowedReferences is not None:
            self._refuse(info.references - self._paths(checks.allowedReferences))
        if checks.allowedRequisites is not None:
            self._refuse(self._requisites() - self._paths(checks.allowedRequisites))
        if checks.disallowedReferences:
            self._refuse(info.references & self._paths(checks.disallowedReferences))
        if checks.disallowedRequisites:
            self._refuse(self._requisites() & self._paths(checks.disallowedRequisites))

    def _requisites(self) -> set[StorePath]:
        closure = self._closures.closure(self._info.path)
        return closure - {self._info.path} if self._checks.ignoreSelfRefs else closure

    def _paths(self, specifiers: Collection[str]) -> set[StorePath]:
        """What is meant by store paths and names of outputs."""
        paths: set[StorePath] = set()
        for text in specifiers:
            if text in self._outputs:
                paths.add(self._outputs[text])
                continue
            try:
                paths.add(self._storeDir.parse(text))
            except FormatError:
                raise _rejected(f"derivation contains an illegal reference specifier '{text:.1000}'") from None
        return paths

    def _refuse(self, bad: Collection[StorePath]) -> None:
        if bad:
            listed = "".join(f"\n  {path}" for path in sorted(bad))
            raise _rejected(f"output '{self._info.path}' is not allowed to refer to the following paths:{listed}")


def _rejected(message: str) -> BuildError:
    return BuildError(BuildStatus.OUTPUT_REJECTED, message)

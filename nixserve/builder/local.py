"""
Building on this machine: the one way in.

L{LocalBuilder.prepare} does what may have to wait for somebody else and says at once what needs no builder; a
L{PreparedBuild} then runs in a thread of its own. In between it holds the locks that keep others, real Nix among them,
from building the same: for each output C{<path>.lock}, or C{<derivation>.<output>.lock} if the path is not known before
the build; and those of the places in the store directory that it works in. Source: Nix 2.8,
src/libstore/build/derivation-goal.cc (C{tryToBuild}) and local-derivation-goal.cc; what is said when a build fails is
what that version says, without its colours.

What goes wrong with a build is a L{BuildResult}, never an exception.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from nixserve.builder.builtins import isBuiltin
from nixserve.builder.drvoptions import DerivationOptions
from nixserve.builder.execution import BuildSetup, Execution, failed
from nixserve.builder.outputs import OutputPlace
from nixserve.builder.plan import missingDependency
from nixserve.builder.process import CancelToken
from nixserve.builder.sandbox import Sandbox, sandboxProblem
from nixserve.builder.settings import BuildSettings, SandboxMode
from nixserve.codec import base32
from nixserve.codec.buildresult import BuildResult, BuildStatus
from nixserve.codec.derivation import BasicDerivation, OutputKind, derivationName, drvPathOf
from nixserve.codec.hashes import Hash
from nixserve.codec.messages import BuildDerivation
from nixserve.codec.realisation import realisations
from nixserve.codec.storepath import StorePath, checkName, outputPathName
from nixserve.errors import BuildError, FormatError, StoreError
from nixserve.store.api import Busy
from nixserve.store.files import deletePath
from nixserve.store.local import LocalSession, LocalStore
from nixserve.store.pathlocks import LOCK_SUFFIX, PathLocks

__all__ = ["LocalBuilder", "PreparedBuild", "removeAbandoned"]

#: Of a directory that must not exist, because C{HOME} names it.
_HOMELESS: Final = "/homeless-shelter"

#: The name of the place in the store directory that a build works in. A random hash part stands before it.
_WORK_NAME: Final = "nixserve-build"

#: Outputs of a derivation. Each has a lock, which is an open file, and is looked for in all that the builder sees. Real
#: ones have up to a dozen or two.
_MAX_OUTPUTS: Final = 64

_ZERO_HASH: Final = Hash("sha256", bytes(32))


class LocalBuilder:
    """
    Builds for one store. Safe from any thread.

    @ivar settings: the operator's.
    """

    def __init__(self, store: LocalStore, settings: BuildSettings | None = None) -> None:
        self.settings = settings or BuildSettings()
        self._store = store

    def prepare(
        self,
        session: LocalSession,
        request: BuildDerivation,
        mustSandbox: bool = False,
    ) -> BuildResult | PreparedBuild:
        """
        Do everything up to the locks.

        @param session: keeps what the build needs from the collector. Nobody else may use it before the build has
            ended.
        @param request: its C{drvPath} need not be in the store. The derivation's C{inputSrcs} must be valid, and be all
            that it may use, but for their closures.
        @param mustSandbox: fail rather than build outside a sandbox.
        @return: the result, if there is nothing to build or it cannot be done.
        @raise Busy: a collector is at work, or somebody is building this; call again with the same arguments.
        """
        try:
            return self._prepare(session, request, mustSandbox)
        except Busy:
            raise
        except (BuildError, FormatError, StoreError) as error:
            return failed(error)

    def _prepare(
        self, session: LocalSession, request: BuildDerivation, mustSandbox: bool
    ) -> BuildResult | PreparedBuild:
        drvPath, drv = request.drvPath, request.drv
        known = self._knownPaths(drvPath, drv)
        if request.options.refusal:
            raise _miscFailure(request.options.refusal)
        session.addTempRoots(request.mentioned.union(known.values()))
        if valid := self._ifValid(session, drv, known):
            return valid
        if missing := missingDependency(drvPath, drv, session.queryValidPaths(drv.inputSrcs)):
            raise _miscFailure(missing)
        drvOptions = DerivationOptions.of(drv)
        self._requireFeatures(drvPath, drv, drvOptions)
        sandboxed = self._decideSandbox(drvPath, drvOptions, mustSandbox)
        # What a client calls a derivation need not be its name. Were anything here named after that, whoever builds for
        # ever under the name of another's derivation would keep that one from being built.
        ownPath = drvPathOf(drv, self._store.storeDir)
        locks = self._lock(session, ownPath, drv, known)
        try:
            # Whoever had the locks before may have built it.
            if valid := self._ifValid(session, drv, known):
                locks.unlock()
                return valid
            workPath = self._workPath()
            workDir = self._store.layout.realPath(workPath)
            places = self._places(session, ownPath, drv, known, Sandbox(workDir, "").root if sandboxed else None)
            inputs = session.queryClosure(drv.inputSrcs)
            lent = [place.scratch for place in places.values() if not sandboxed and place.scratch != place.known]
            scratch = session.lockScratch([workPath, *lent])
        except BaseException:
            locks.abandon()
            raise
        request = replace(request, options=self.settings.limit(request.options))
        build = BuildSetup(request, drvOptions, frozenset(inputs), places, sandboxed, workDir)
        return PreparedBuild(Execution(self._store, self.settings, session, build), locks, scratch)

    def _knownPaths(self, drvPath: StorePath, drv: BasicDerivation) -> dict[str, StorePath]:
        """
        The outputs whose paths are known before the build. That of a fixed one follows from its hash, whatever the
        derivation says.

        @raise BuildError: it cannot be built, by anybody.
        @raise FormatError: a name is none. Directories and locks are named after them.
        """
        if len(drv.outputs) > _MAX_OUTPUTS:
            raise _miscFailure(f"cannot build '{drvPath}': it has more than {_MAX_OUTPUTS} outputs")
        for name in (derivationName(drvPath), drv.name, *drv.outputs):
            checkName(name)
        kind = drv.kind()
        if kind in (OutputKind.DEFERRED, OutputKind.IMPURE):
            raise _miscFailure(f"cannot build '{drvPath}': its outputs are {kind.value}")
        known = drv.knownOutputPaths
        for name, output in drv.outputs.items():
            ca = output.contentAddress
            if ca is not None:
                known[name] = self._store.storeDir.makeContentAddressedPath(ca, outputPathName(drv.name, name))
        for path in known.values():
            if StorePath(path + LOCK_SUFFIX) in known.values():
                raise _miscFailure(f"cannot build '{drvPath}': one output is called like the lock file of '{path}'")
        return known

    def _ifValid(
        self, session: LocalSession, drv: BasicDerivation, known: Mapping[str, StorePath]
    ) -> BuildResult | None:
        """The result of a build that is not needed, if all outputs are valid."""
        if len(known) < len(drv.outputs) or len(session.queryValidPaths(known.values())) < len(set(known.values())):
            return None
        outputs = realisations(drv, known, self._store.storeDir)
        return BuildResult(BuildStatus.ALREADY_VALID, builtOutputs=outputs)

    def _requireFeatures(self, drvPath: StorePath, drv: BasicDerivation, options: DerivationOptions) -> None:
        settings = self.settings
        features = self._store.layout.systemFeatures
        features = settings.systemFeatures if features is None else features
        platforms = {settings.system, *settings.extraPlatforms}
        runnable = drv.platform in platforms or isBuiltin(drv.builder)
        if not runnable or not options.requiredSystemFeatures <= features:
            raise _miscFailure(
                f"a '{drv.platform}' with features {{{', '.join(sorted(options.requiredSystemFeatures))}}} is required "
                f"to build '{drvPath}', but I am a '{settings.system}' with features {{{', '.join(sorted(features))}}}",
            )

    def _decideSandbox(self, drvPath: StorePath, options: DerivationOptions, mustSandbox: bool) -> bool:
        """
        @return: whether to build in a sandbox.
        @raise BuildError: it has to be, and cannot.
        """
        layout, mode = self._store.layout, self.settings.sandbox
        diverted = layout.realStoreDir != layout.storeDir.path
        required = mustSandbox or diverted or mode is SandboxMode.ON
        if not required and mode is SandboxMode.OFF:
            return _unsandboxed()
        problem = sandboxProblem()
        if problem and not required:
            return _unsandboxed()
        if problem:
            raise _miscFailure(
                f"cannot build '{drvPath}' in a sandbox, as it has to be: this system does not support the kernel "
                f"namespaces that are required for sandboxing: {problem}",
            )
        if options.noChroot:
            raise _miscFailure(
                f"derivation '{drvPath}' has '__noChroot' set, but that's not allowed when 'sandbox' is 'true'",
            )
        return True

    def _lock(
        self, session: LocalSession, ownPath: StorePath, drv: BasicDerivation, known: Mapping[str, StorePath]
    ) -> PathLocks:
        """
        The locks of the outputs, as Nix takes them.

        @param ownPath: the derivation, by its true name.
        """
        if len(known) < len(drv.outputs):
            # It keeps the lock files that are named after it from a collector.
            session.addTempRoots([ownPath])
        return session.lockPaths([known.get(name) or StorePath(f"{ownPath}.{name}") for name in drv.outputs])

    def _places(
        self,
        session: LocalSession,
        ownPath: StorePath,
        drv: BasicDerivation,
        known: Mapping[str, StorePath],
        root: str | None,
    ) -> dict[str, OutputPlace]:
        """
        Where the builder is to put its outputs.

        @param root: of its sandbox; C{None} if it has none.
        """
        valid = session.queryValidPaths(known.values())
        places: dict[str, OutputPlace] = {}
        for name in drv.outputs:
            path = known.get(name)
            if path is None:
                scratch = self._scratchPath(ownPath, drv, name, f"name:{name}")
            elif path in valid and root is None:
                scratch = self._scratchPath(ownPath, drv, name, path.baseName)
            else:
                scratch = path
            real = self._store.layout.realPath(scratch) if root is None else root + scratch
            places[name] = OutputPlace(scratch, real, path, path in valid)
        session.addTempRoots([place.scratch for place in places.values()])
        return places

    def _scratchPath(self, ownPath: StorePath, drv: BasicDerivation, outputName: str, what: str) -> StorePath:
        """A path that nothing hashes to, for an output that goes elsewhere in the end. The same as Nix's."""
        return self._store.storeDir.makeStorePath(
            f"rewrite:{ownPath.baseName}:{what}", _ZERO_HASH, outputPathName(drv.name, outputName)
        )

    def _workPath(self) -> StorePath:
        """
        A place in the store directory for the sandbox, and for outputs on their way. Not C{<derivation>.chroot} as in
        Nix: that could be an object's, and what a client calls a derivation need not be its name, so two builds could
        come with the same one.
        """
        return StorePath(f"{self._store.storeDir.path}/{base32.encode(os.urandom(20))}-{_WORK_NAME}")


class PreparedBuild:
    """
    A build that can begin. Either L{run} or L{abandon} it, once.
    """

    def __init__(self, execution: Execution, locks: PathLocks, scratch: PathLocks) -> None:
        """
        @param locks: of the outputs.
        @param scratch: of the places in the store directory that the build works in.
        """
        self._execution = execution
        self._locks = locks
        self._scratch = scratch

    def abandon(self) -> None:
        """Do not build. Safe to call twice, and after L{run}."""
        self._scratch.unlock()
        self._locks.abandon()

    def run(self, log: Callable[[bytes], None], cancel: CancelToken) -> BuildResult:
        """
        Build. Blocks until the build has ended and everything that it held is free.

        @param log: called with lines of the builder's output, from another thread. May take its time.
        @param cancel: stops the build from any thread.
        """
        result = BuildResult(BuildStatus.MISC_FAILURE)
        try:
            result = self._execution.run(log, cancel)
        finally:
            if result.success:
                self._locks.unlock()
            self.abandon()
        return result


def removeAbandoned(store: LocalStore) -> None:
    """
    Remove from the store directory what builds worked in whose process was killed. Real Nix's collector would try, and
    fail there for good: a builder may make trees deeper than it can delete. Blocks for as long as deleting takes. What
    cannot be deleted stays.

    @raise OSError: the store directory cannot be read.
    """
    layout = store.layout
    for name in os.listdir(layout.realStoreDir):
        if not name.endswith(f"-{_WORK_NAME}"):
            continue
        # The lock is that of a build that runs, or it is valid, which it may be called, or a collector is at work.
        with contextlib.suppress(Busy, StoreError, FormatError), contextlib.closing(store.openSession()) as session:
            locks = session.lockScratch([layout.storeDir.parse(f"{layout.storeDir.path}/{name}")])
            try:
                deletePath(f"{layout.realStoreDir}/{name}")
            finally:
                locks.unlock()


def _miscFailure(message: str) -> BuildError:
    return BuildError(BuildStatus.MISC_FAILURE, message)


def _unsandboxed() -> bool:
    """
    @return: that there is no sandbox.
    @raise BuildError: there is something that builders could find only outside of one.
    """
    if os.path.lexists(_HOMELESS):
        raise _miscFailure(
            f"home directory '{_HOMELESS}' exists; please remove it to assure purity of builds without sandboxing",
        )
    return False

"""
One build from its first directory to its result, after L{nixserve.builder.local} has taken the locks.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from nixserve.builder import builtins
from nixserve.builder.builtinjob import BuiltinJob
from nixserve.builder.builtins import isBuiltin
from nixserve.builder.drvoptions import DerivationOptions
from nixserve.builder.environment import builderEnvironment, outputRewrites
from nixserve.builder.outputs import BuiltOutputs, HashMismatch, OutputPlace, proceed, registerOutputs
from nixserve.builder.process import CancelToken, Ending, Outcome, ProcessLimits, ProcessSpec, runBuilder
from nixserve.builder.sandbox import Sandbox, SandboxPath
from nixserve.builder.settings import BuildSettings
from nixserve.builder.users import BuildUser
from nixserve.builder.workspace import Workspace, makeBuildDir
from nixserve.codec.buildresult import BuildResult, BuildStatus, Realisation
from nixserve.codec.derivation import OutputKind
from nixserve.codec.messages import BuildDerivation
from nixserve.codec.realisation import realisations
from nixserve.codec.storepath import StorePath
from nixserve.errors import BuildError, FormatError, StoreError
from nixserve.store.api import Busy
from nixserve.store.files import deletePath
from nixserve.store.local import LocalSession, LocalStore
from nixserve.store.logs import BuildLogFile
from nixserve.store.pathlocks import vacate

__all__ = ["BuildSetup", "Execution", "failed"]

#: A failure with less than this free, in bytes, may be nobody's fault but the disk's. Nix's figure.
_DISK_FULL: Final = 8 * 1024 * 1024

_INTERRUPTED: Final = (BuildStatus.MISC_FAILURE, "interrupted by the user")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class BuildSetup:
    """
    A build as it is set up, before it runs.

    @ivar request: what was asked for, with options within the operator's limits.
    @ivar drvOptions: what the derivation says of how to build it.
    @ivar inputs: the closure of all that may be used.
    @ivar places: where the outputs go, by name.
    @ivar sandboxed: whether the builder is confined.
    @ivar workDir: the physical place of the directory that only the server can enter: the root of the sandbox is in
        it, and the outputs before they are in their place.
    """

    request: BuildDerivation
    drvOptions: DerivationOptions
    inputs: frozenset[StorePath]
    places: Mapping[str, OutputPlace]
    sandboxed: bool
    workDir: str

    @property
    def hasNetwork(self) -> bool:
        """Its outputs are checked, so it may talk to the world; and if it fails, that may be the world's fault."""
        return self.request.drv.kind() is OutputKind.FIXED


class Execution:
    """One build while it runs."""

    def __init__(self, store: LocalStore, settings: BuildSettings, session: LocalSession, build: BuildSetup) -> None:
        """
        @param session: nobody else's as long as the build runs.
        """
        self._store = store
        self._settings = settings
        self._session = session
        self._build = build

    def run(self, log: Callable[[bytes], None], cancel: CancelToken) -> BuildResult:
        """
        From the user to the result. Whatever happens, everything is given back.

        @param log: called with whole lines, from another thread.
        """
        patience = _Patience(cancel)
        try:
            user = patience(lambda: BuildUser.acquire(self._store.layout.stateDir))
        except (BuildError, StoreError) as error:
            return failed(error)
        try:
            return self._runAs(user, log, cancel, patience)
        except (BuildError, FormatError, StoreError, OSError) as error:
            return failed(error)
        finally:
            user.release()

    def _runAs(
        self, user: BuildUser, log: Callable[[bytes], None], cancel: CancelToken, patience: _Patience
    ) -> BuildResult:
        layout, build = self._store.layout, self._build
        parent = self._settings.buildDir or f"{layout.stateDir}/builds"
        workspace = makeBuildDir(layout, parent, build.request.drv.name, user, build.sandboxed)
        outcome: Outcome | None = None
        keep = False
        try:
            if build.sandboxed:
                workspace.sandbox = self._makeSandbox(workspace.inner)
            patience.limit(build.request.options.buildTimeout, self._timedOut())
            outcome = self._runBuilder(workspace, log, cancel, patience)
            self._requireSuccess(outcome)
            result = BuildResult(BuildStatus.BUILT, builtOutputs=self._register(workspace, patience))
        except (BuildError, FormatError, StoreError, OSError) as error:
            result = failed(error)
            keep = build.request.options.keepFailed and outcome is not None and not isBuiltin(build.request.drv.builder)
        finally:
            workspace.remove(keep)
            with contextlib.suppress(StoreError):
                self._removeScratch()
                self._removeHalfMade()
        if keep:
            workspace.keep()
            log(f"note: keeping build directory '{workspace.inner}'\n".encode(errors="surrogateescape"))
        return result if outcome is None else _timed(result, outcome)

    def _makeSandbox(self, buildDir: str) -> Sandbox:
        build, layout = self._build, self._store.layout
        shown = build.inputs | self._hostInputs()
        return Sandbox(
            chrootDir=build.workDir,
            buildDir=buildDir,
            storeDir=layout.storeDir.path,
            inputs=[(layout.realPath(path), str(path)) for path in sorted(shown)],
            paths=self._hostPaths(),
            network=build.hasNetwork,
            networkHelper=self._settings.networkHelper,
            kvm="kvm" in build.drvOptions.requiredSystemFeatures,
            caBundle=self._settings.caBundle,
        )

    def _hostInputs(self) -> set[StorePath]:
        """The closures of those of the operator's sandbox paths that lie in the store. They are no inputs."""
        storeDir = self._store.storeDir
        sources = [path.source for path in self._settings.sandboxPaths if storeDir.isInStore(path.source)]
        return self._session.queryClosure([storeDir.toStorePath(source) for source in sources])

    def _hostPaths(self) -> Sequence[SandboxPath]:
        """What the sandbox shows of the host, each where it really is."""
        layout = self._store.layout
        return [
            replace(path, source=layout.realStoreDir + path.source.removeprefix(layout.storeDir.path))
            if layout.storeDir.isInStore(path.source)
            else path
            for path in self._settings.sandboxPaths
        ]

    def _runBuilder(
        self, workspace: Workspace, log: Callable[[bytes], None], cancel: CancelToken, patience: _Patience
    ) -> Outcome:
        build = self._build
        for place in build.places.values():
            if not place.valid and place.known is not None:
                patience(functools.partial(vacate, self._store.layout.realPath(place.known)))
        self._removeScratch()
        if workspace.sandbox is not None:
            workspace.sandbox.prepare(workspace.user)
        spec = self._builtinSpec(workspace) if isBuiltin(build.request.drv.builder) else self._spec(workspace, patience)
        limits = ProcessLimits(
            build.request.options.maxSilentTime, build.request.options.buildTimeout, build.request.options.maxLogSize
        )
        if not self._settings.keepLogs:
            return runBuilder(spec, log, limits, cancel)
        with contextlib.closing(BuildLogFile(self._store.layout, build.request.drvPath)) as record:
            return runBuilder(spec, log, limits, cancel, record.write)

    def _spec(self, workspace: Workspace, patience: _Patience) -> ProcessSpec:
        """A builder that the derivation brings."""
        build = self._build
        seen = builderEnvironment(
            build.request.drv,
            workspace.buildTop,
            self._store.storeDir,
            self._settings.cores,
            self._outputPaths(),
            self._session,
            self._settings.impureEnv,
            inputClosure=build.inputs,
            options=build.drvOptions,
            proceed=lambda: patience(proceed),
        )
        workspace.writeFiles(seen.files)
        return ProcessSpec(
            builder=build.request.drv.builder,
            args=seen.args,
            env=seen.env,
            user=workspace.user,
            cwd=workspace.inner,
            sandbox=workspace.sandbox,
            linux32=build.request.drv.platform == "i686-linux" and self._settings.system == "x86_64-linux",
            # Whoever builds for both has 32-bit programs in builds for either.
            socketcall="i686-linux" in {self._settings.system, *self._settings.extraPlatforms},
        )

    def _builtinSpec(self, workspace: Workspace) -> ProcessSpec:
        """A builder of our own. It gets the variables of the derivation, but not as its environment."""
        build = self._build
        if "out" not in build.places:
            raise BuildError(BuildStatus.MISC_FAILURE, f"'{build.request.drv.builder}' needs an output 'out'")
        env = build.request.drv.env
        for old, new in outputRewrites(build.request.drv, self._outputPaths()).items():
            env = {name: value.replace(old, new) for name, value in env.items()}
        job = BuiltinJob(
            build.request.drv.builder, env, build.places["out"].scratch, build.hasNetwork, self._readCertificates()
        )
        return ProcessSpec(
            builder=build.request.drv.builder,
            args=(),
            env={"HOME": workspace.buildTop, "TMPDIR": workspace.buildTop},
            user=workspace.user,
            cwd=workspace.inner,
            sandbox=workspace.sandbox,
            stdin=job.encode(),
            module=builtins.__name__,
        )

    def _readCertificates(self) -> str:
        """The CA bundle, if the build has the network and there is one."""
        if self._build.hasNetwork and self._settings.caBundle:
            with (
                contextlib.suppress(OSError),
                open(self._settings.caBundle, encoding="ascii", errors="replace") as file,
            ):
                return file.read()
        return ""

    def _outputPaths(self) -> dict[str, str]:
        return {name: place.scratch for name, place in self._build.places.items()}

    def _register(self, workspace: Workspace, patience: _Patience) -> dict[str, Realisation]:
        build, user = self._build, workspace.user
        if not build.sandboxed:
            # As late as this, and new: builders without a sandbox may create in the store directory.
            deletePath(build.workDir)
            os.mkdir(build.workDir, 0o700)
        built = BuiltOutputs(
            build.request.drvPath,
            build.request.drv,
            build.drvOptions,
            build.places,
            build.inputs,
            build.workDir,
            range(user.uid, user.uid + 1),
            self._settings.maxOutputSize,
        )
        store = self._store
        outputs = registerOutputs(store.layout, store.validPaths, self._session, built, patience)
        return realisations(build.request.drv, outputs, store.storeDir)

    def _removeScratch(self) -> None:
        """Delete what lies where the builder puts what does not stay there. In a sandbox that goes with its root."""
        if not self._build.sandboxed:
            deletePath(self._build.workDir)
            for place in self._build.places.values():
                if place.scratch != place.known:
                    deletePath(place.realPath)

    def _removeHalfMade(self) -> None:
        """
        Delete the outputs of a build that failed. Nix leaves that to a collector, but its own fails for good at trees
        that are deeper than it can delete. In a sandbox they go with its root.
        """
        if self._build.sandboxed:
            return
        for place in self._build.places.values():
            if place.known is not None and not self._store.validPaths.isAnyValid([place.known]):
                deletePath(self._store.layout.realPath(place.known))

    # What is said of a builder that did not succeed.

    def _requireSuccess(self, outcome: Outcome) -> None:
        if not outcome.success:
            raise BuildError(*self._explain(outcome))

    def _explain(self, outcome: Outcome) -> tuple[BuildStatus, str]:
        build, ending = self._build, outcome.ending
        title = self._title()
        if ending is Ending.SILENCE:
            seconds = build.request.options.maxSilentTime
            return BuildStatus.TIMED_OUT, f"{title} timed out after {seconds} seconds of silence"
        if ending is Ending.TIMEOUT:
            return self._timedOut()
        if ending is Ending.LOG_LIMIT:
            limit = build.request.options.maxLogSize
            return (
                BuildStatus.LOG_LIMIT_EXCEEDED,
                f"{title} killed after writing more than {limit} bytes of log output",
            )
        if ending is Ending.CANCELLED:
            return _INTERRUPTED
        how = f"with exit code {outcome.code}"
        if ending is Ending.SIGNAL:
            how = f"due to signal {outcome.code} ({signal.strsignal(outcome.code)})"
        message = f"builder for '{build.request.drvPath}' failed {how}"
        if self._isDiskFull():
            note = "\nnote: build failure may have been caused by lack of free disk space"
            return BuildStatus.TRANSIENT_FAILURE, message + note
        return (BuildStatus.TRANSIENT_FAILURE if build.hasNetwork else BuildStatus.PERMANENT_FAILURE), message

    def _title(self) -> str:
        build = self._build
        wanted = f"{build.request.drvPath}!{','.join(sorted(build.request.drv.outputs))}"
        return f"building of '{wanted}' from in-memory derivation"

    def _timedOut(self) -> tuple[BuildStatus, str]:
        return (
            BuildStatus.TIMED_OUT,
            f"{self._title()} timed out after {self._build.request.options.buildTimeout} seconds",
        )

    def _isDiskFull(self) -> bool:
        layout = self._store.layout
        for path in (layout.realStoreDir, self._settings.buildDir or layout.stateDir):
            with contextlib.suppress(OSError):
                status = os.statvfs(path)
                if status.f_bavail * status.f_bsize < _DISK_FULL:
                    return True
        return False


class _Patience:
    """
    L{nixserve.builder.outputs.Patience} that ends when the build is cancelled or its time is up, if not before the
    attempt.
    """

    def __init__(self, cancel: CancelToken) -> None:
        self._cancel = cancel
        self._deadline = math.inf
        self._expired = _INTERRUPTED

    def limit(self, seconds: int, expired: tuple[BuildStatus, str]) -> None:
        """
        The time of the build begins. It goes on when the builder has ended: to read, hash and register what that has
        left may take much longer than to make it, a sparse file for instance.

        @param seconds: how long it is; 0 without end.
        @param expired: what to say at its end.
        """
        self._deadline = time.monotonic() + seconds if seconds else math.inf
        self._expired = expired

    def __call__(self, attempt: Callable[[], _T], /) -> _T:
        """
        @raise BuildError: cancelled, or time is up.
        """
        while not self._cancel.cancelled:
            if time.monotonic() >= self._deadline:
                raise BuildError(*self._expired)
            try:
                return attempt()
            except Busy as error:
                left = self._deadline - time.monotonic()
                with self._cancel.descriptor() as cancelled:
                    poll = select.poll()
                    poll.register(cancelled, select.POLLIN)
                    poll.poll(max(0.0, min(error.retryAfter, left)) * 1000)
        raise BuildError(*_INTERRUPTED)


def failed(error: BuildError | FormatError | StoreError | OSError) -> BuildResult:
    """The result of a build that ended with an error."""
    status = error.status if isinstance(error, BuildError) else BuildStatus.MISC_FAILURE
    return BuildResult(status, str(error), hashMismatch=isinstance(error, HashMismatch))


def _timed(result: BuildResult, outcome: Outcome) -> BuildResult:
    """With the times of the builder. One that was killed has built nothing."""
    ended = outcome.ending in (Ending.EXIT, Ending.SIGNAL)
    return replace(result, timesBuilt=int(ended), startTime=outcome.startTime, stopTime=outcome.stopTime)

"""
C{builtin:buildenv}: one tree of symbolic links to the files of many packages. User profiles are built with it.

Source: Nix 2.8, src/libstore/builtins/buildenv.cc.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from contextlib import suppress

from nixserve.builder.builtinjob import BuiltinFailed, BuiltinJob, warn

__all__ = ["buildEnvironment"]

# Ends of paths that are left out: useless in a profile, or bound to collide.
_LEFT_OUT = (
    "/propagated-build-inputs",
    "/nix-support",
    "/perllocal.pod",
    "/info/dir",
    "/log",
    "/manifest.nix",
    "/manifest.json",
)

# The priorities of packages that others bring with them begin here: below those of all that were asked for.
_PROPAGATED_PRIORITY = 1000


def buildEnvironment(job: BuiltinJob) -> None:
    """
    Merge the packages that the attribute C{derivations} lists, and link the attribute C{manifest} beside them.

    Directories that only one package has are links as well. Of two files in the same place that of the package with
    the lower number, its priority, wins.

    @raise BuiltinFailed: two packages collide, or the attributes are malformed.
    @raise OSError: a package cannot be read.
    """
    packages = _parsePackages(job.attribute("derivations"))
    manifest = job.attribute("manifest")
    os.makedirs(job.out, exist_ok=True)
    environment = _Environment(job.out)
    for priority, path in sorted(packages):
        environment.add(path, priority)
    environment.addPropagated()
    os.symlink(manifest, f"{job.out}/manifest.nix")


def _parsePackages(text: str) -> list[tuple[int, str]]:
    """
    @param text: for each package C{true} or C{false}, whether it is active; its priority; the number of its outputs;
        their paths.
    @return: priority and path of each output of those that are active.
    """
    words = iter(text.split())
    packages: list[tuple[int, str]] = []
    try:
        for active in words:
            priority, outputs = int(next(words)), int(next(words))
            paths = [next(words) for _ in range(outputs)]
            if active != "false":
                packages += [(priority, path) for path in paths]
    except (StopIteration, ValueError) as error:
        raise BuiltinFailed(f"attribute 'derivations' is malformed: '{text:.1000}'") from error
    return packages


class _Environment:
    """
    The tree of links.

    @ivar root: its top directory, which exists.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._done: set[str] = set()
        self._propagated: set[str] = set()
        # By what they are called: of the links, those of the packages to which they lead.
        self._priorities: dict[str, int] = {}

    def add(self, package: str, priority: int) -> None:
        """Link a package, unless that was done, and note which others it brings with it."""
        if package in self._done:
            return
        self._done.add(package)
        self._merge(package, priority)
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            open(f"{package}/nix-support/propagated-user-env-packages", errors="surrogateescape") as file,
        ):
            self._propagated.update(file.read().replace("\n", " ").split(" "))
            self._propagated.discard("")

    def addPropagated(self) -> None:
        """Link what packages bring with them, then what these bring, until there is nothing new."""
        priority = _PROPAGATED_PRIORITY
        while new := sorted(self._propagated - self._done):
            self._propagated.clear()
            for package in new:
                self.add(package, priority)
                priority += 1

    def _merge(self, package: str, priority: int) -> None:
        # A queue and no recursion: trees may be deep. What is to be merged into the same directory stays in order.
        pending = deque([(package, self.root, priority)])
        while pending:
            source, target, priority = pending.popleft()
            try:
                names = sorted(os.listdir(source))
            except NotADirectoryError:
                warn(f"not including '{source}' in the user environment because it's not a directory")
                continue
            for name in names:
                path = f"{source}/{name}"
                if not name.startswith(".") and not path.endswith(_LEFT_OUT):
                    pending += self._place(path, f"{target}/{name}", priority)

    def _place(self, source: str, target: str, priority: int) -> list[tuple[str, str, int]]:
        """
        Link C{target} to C{source}, if nothing better is there.

        @return: the directories that must be merged instead: source, target, priority.
        """
        try:
            isDirectory = stat.S_ISDIR(os.stat(source).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            warn(f"skipping dangling symlink '{target}'")
            return []
        try:
            there = os.lstat(target).st_mode
        except FileNotFoundError:
            self._link(source, target, priority)
            return []
        if isDirectory:
            return self._placeDirectory(source, target, priority, there)
        if stat.S_ISDIR(there):
            raise BuiltinFailed(f"collision between non-directory '{source}' and directory '{target}'")
        if self._priorities[target] == priority:
            raise BuiltinFailed(
                f"packages '{source}' and '{os.readlink(target)}' have the same priority {priority}; "
                "use 'nix-env --set-flag priority NUMBER INSTALLED_PKGNAME' "
                "to change the priority of one of the conflicting packages (0 being the highest priority)"
            )
        if self._priorities[target] > priority:
            os.unlink(target)
            self._link(source, target, priority)
        return []

    def _placeDirectory(self, source: str, target: str, priority: int, there: int) -> list[tuple[str, str, int]]:
        """
        @param there: the mode of what is at C{target}: a directory of ours, or a link.
        """
        merge = [(source, target, priority)]
        if stat.S_ISDIR(there):
            return merge
        other = os.path.realpath(target, strict=True)
        if not os.path.isdir(other):
            raise BuiltinFailed(f"collision between '{source}' and non-directory '{other}'")
        os.unlink(target)
        os.mkdir(target)
        return [(other, target, self._priorities[target]), *merge]

    def _link(self, source: str, target: str, priority: int) -> None:
        os.symlink(source, target)
        self._priorities[target] = priority

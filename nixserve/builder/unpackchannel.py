"""
C{builtin:unpack-channel}: an archive becomes a directory with one entry, called as the channel is.

Source: Nix 2.8, src/libstore/builtins/unpack-channel.cc and src/libutil/tarfile.cc. Archives come from the network, so
nothing in them may lead outside the output: names are resolved one at a time and never through a symbolic link. Links
may point anywhere, as in Nix; nobody follows them here.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import zlib
from contextlib import suppress

from nixserve.builder.builtinjob import BuiltinFailed, BuiltinJob
from nixserve.codec.nar import MAX_NESTING

__all__ = ["unpackChannel"]

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def unpackChannel(job: BuiltinJob) -> None:
    """
    Unpack the archive that the attribute C{src} names: a tar file, plain or compressed with gzip, bzip2 or xz. Nix
    takes a few other formats as well.

    @raise BuiltinFailed: it is none, it holds more or less than one file or directory, or what leads elsewhere.
    @raise OSError: it cannot be read, or the output not be written.
    """
    channelName, source = job.attribute("channelName"), job.attribute("src")
    if "/" in channelName or channelName in ("", ".", ".."):
        raise BuiltinFailed(f"channelName is not allowed to contain filesystem separators, got '{channelName}'")
    os.makedirs(job.out, exist_ok=True)
    try:
        with tarfile.open(source) as archive:
            _extractAll(archive, job.out)
    except (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise BuiltinFailed(f"failed to open archive '{source}': {error}") from error
    entries = os.listdir(job.out)
    if not entries:
        raise BuiltinFailed(f"channel tarball '{source}' is empty")
    if len(entries) > 1:
        raise BuiltinFailed(f"channel tarball '{source}' contains more than one file")
    os.rename(f"{job.out}/{entries[0]}", f"{job.out}/{channelName}")


def _extractAll(archive: tarfile.TarFile, target: str) -> None:
    root = os.open(target, _OPEN_DIRECTORY)
    try:
        for member in archive:
            parts = _split(member.name)
            # The top directory itself is there already.
            if parts:
                _extract(archive, member, parts, root)
    finally:
        os.close(root)


def _split(name: str) -> list[str]:
    """The components of a name in the archive. A leading slash means nothing."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BuiltinFailed(f"failed to extract archive: path '{name:.1000}' contains '..'")
    if len(parts) > MAX_NESTING:
        raise BuiltinFailed(f"failed to extract archive: path '{name:.1000}' has more than {MAX_NESTING} components")
    return parts


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, parts: list[str], root: int) -> None:
    """Make one file, directory or link. A later entry takes the place of an earlier one of the same name."""
    *directories, name = parts
    parent = _openDirectory(directories, root, create=True)
    try:
        if member.isdir():
            _makeDirectory(name, parent)
            return
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        if member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.islnk():
            _link(_split(member.linkname), name, parent, root)
        elif member.isreg():
            _writeFile(archive, member, name, parent)
        else:
            raise BuiltinFailed(f"failed to extract archive: '{member.name:.1000}' has an unsupported type")
    finally:
        os.close(parent)


def _openDirectory(parts: list[str], root: int, create: bool) -> int:
    """
    Open a directory below C{root}, step by step.

    @param create: make those that are missing: archives need not have entries for directories.
    @return: a new descriptor.
    @raise OSError: something on the way is no directory; a symbolic link is none.
    """
    fd = os.dup(root)
    for part in parts:
        try:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=fd)
            inner = os.open(part, _OPEN_DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


def _makeDirectory(name: str, parent: int) -> None:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=parent)
            os.mkdir(name, dir_fd=parent)


def _link(target: list[str], name: str, parent: int, root: int) -> None:
    """Make C{name} a hard link to a regular file that was extracted before."""
    if not target:
        raise BuiltinFailed(f"failed to extract archive: hard link '{name:.1000}' to a directory")
    *directories, targetName = target
    source = _openDirectory(directories, root, create=False)
    try:
        if not stat.S_ISREG(os.stat(targetName, dir_fd=source, follow_symlinks=False).st_mode):
            raise BuiltinFailed(f"failed to extract archive: hard link '{name:.1000}' to what is no regular file")
        os.link(targetName, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(source)


def _writeFile(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, parent: int) -> None:
    contents = archive.extractfile(member)
    assert contents is not None  # it is a regular file
    # Of the mode only this is kept in a store; setuid is not even to be there for a moment.
    fd = os.open(name, _CREATE, 0o755 if member.mode & stat.S_IXUSR else 0o644, dir_fd=parent)
    with contents, open(fd, "wb") as file:
        shutil.copyfileobj(contents, file)

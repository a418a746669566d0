"""
Files and directories that nobody else may have put in place of ours.

The rule is that of sshd's C{StrictModes} (OpenSSH 9.2, misc.c:safe_path): a path is ours if every directory on the way
to it belongs to root or to the user that we run as, and nobody else may write to it. Like sshd on Debian it takes a
group in which nobody else is for nobody else. Unlike sshd it takes a directory such as C{/tmp}, where everybody may
make files and nobody may rename those of others, if what comes next on the way is root's or ours; and it judges each
symbolic link on the way instead of only where they lead.

What is ours stays so while nobody but root and us does anything: so what follows may use the path, by its name.

Blocks for some system calls, a few microseconds. Imports next to nothing, as L{nixserve.app.hookentry} needs it.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat

from nixserve.errors import StoreError

__all__ = ["UnsafePath", "makeOwnDirectory", "requireOwn"]

_MAX_LINKS = 40
"""Symbolic links on the way to a file; the kernel's limit."""

_UNMAPPED = 65534
"""What a user namespace makes of users that are none of its own (the default of kernel.overflowuid)."""

_ACL = "system.posix_acl_access"


class UnsafePath(StoreError):
    """
    Somebody else could have put something in place of a file of ours.

    @ivar path: the file or directory that is wanted.
    @ivar where: what on the way to it, or it itself, is not ours.
    @ivar reason: all of that in words.
    @ivar advice: what to do.
    """

    def __init__(self, path: str, where: str, problem: str, advice: str) -> None:
        self.path = path
        self.where = where
        way = "" if where == path else f", on the way to '{path}',"
        self.reason = f"'{where}'{way} {problem}"
        self.advice = advice
        super().__init__(f"{self.reason}: {advice}")


def requireOwn(path: str) -> bool:
    """
    Check that C{path} is ours, as far as it exists: what is missing nobody else can make, but in a directory such as
    C{/tmp}.

    @return: whether all of it exists.
    @raise UnsafePath: it is not.
    @raise OSError: it cannot be examined, or leads through something that is no directory.
    """
    current = "/" if path.startswith("/") else os.getcwd()
    _judge(path, current, os.lstat(current))
    todo = [*reversed(path.split("/"))]
    if current != "/":
        # Its own way.
        todo += reversed(current.split("/"))
        current = "/"
    links = 0
    while todo:
        name = todo.pop()
        if name in ("", "."):
            continue
        if name == "..":
            current = os.path.dirname(current)
            continue
        child = f"{current.rstrip('/')}/{name}"
        try:
            status = os.lstat(child)
        except FileNotFoundError:
            return False
        _judge(path, child, status)
        if stat.S_ISLNK(status.st_mode):
            links += 1
            target = os.readlink(child)
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            if child.startswith("/proc/"):
                # An open file of ours, as /dev/stderr is one: no way leads there.
                return True
            todo += reversed(target.split("/"))
            current = "/" if target.startswith("/") else current
        elif stat.S_ISDIR(status.st_mode):
            current = child
        elif any(name not in ("", ".") for name in todo):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return True


def makeOwnDirectory(path: str, mode: int = 0o700, shared: bool = False) -> None:
    """
    Make a directory, if it is missing, and those above it; check that it is ours.

    @param mode: of the directory, less the umask; one that exists keeps its own.
    @param shared: others may make files of theirs in it, as in C{/tmp}.
    @raise UnsafePath: it is not.
    @raise OSError: it cannot be made, or is no directory.
    """
    if not requireOwn(path):
        _make(path, mode)
        # In a directory such as /tmp somebody may have been faster.
        requireOwn(path)
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    if not shared and (problem := _openTo(path, status)):
        raise UnsafePath(path, path, problem, "choose another directory")


def _make(path: str, mode: int) -> None:
    # Without what os.makedirs does: it leaves the mode of those above to the umask alone.
    parent = os.path.dirname(path.rstrip("/"))
    if parent and not os.path.lexists(parent):
        _make(parent, 0o755)
    try:  # noqa: SIM105 - contextlib takes longer to load than all of this
        os.mkdir(path, mode)
    except FileExistsError:
        pass


def _judge(path: str, where: str, status: os.stat_result) -> None:
    """
    @param path: what is wanted, for the message.
    @raise UnsafePath: C{where} is not ours.
    """
    uid = status.st_uid
    if uid not in (0, os.geteuid()) and not (uid == _UNMAPPED and _isUnmapped(uid)):
        advice = "chown it, or choose another place"
        raise UnsafePath(path, where, f"belongs to user {uid}, neither root nor the user of this process", advice)
    judged = stat.S_ISREG(status.st_mode) or (stat.S_ISDIR(status.st_mode) and not status.st_mode & stat.S_ISVTX)
    if judged and (problem := _openTo(where, status)):
        raise UnsafePath(path, where, problem, "chmod go-w it, or choose another place")


def _openTo(path: str, status: os.stat_result) -> str:
    """
    @return: who else may write to a file or directory, as the end of a sentence; or empty.
    """
    mode = stat.S_IMODE(status.st_mode)
    if mode & stat.S_IWOTH:
        return f"may be written to by everybody (mode {mode:04o})"
    if mode & stat.S_IWGRP and (_hasACL(path) or not _isOurGroup(status.st_gid)):
        return f"may be written to by group {status.st_gid} (mode {mode:04o})"
    return ""


def _hasACL(path: str) -> bool:
    """Then the mode of the group says what some others may do."""
    try:
        return _ACL in os.listxattr(path)
    except OSError:
        return False


def _isOurGroup(gid: int) -> bool:
    """Is nobody in a group but root and the user that we run as? Of one that has no name nobody knows."""
    try:
        members = [pwd.getpwnam(name).pw_uid for name in grp.getgrgid(gid).gr_mem]
    except KeyError:
        return False
    members += [user.pw_uid for user in pwd.getpwall() if user.pw_gid == gid]
    return {*members} <= {0, os.geteuid()}


def _isUnmapped(uid: int) -> bool:
    """
    Is a number only what this user namespace shows for users outside of it? Nobody in it can be one of them; root of
    the machine is, to whom most of what is above us belongs.
    """
    try:
        with open("/proc/self/uid_map", encoding="ascii") as stream:
            ranges = [tuple(map(int, line.split())) for line in stream]
    except (OSError, ValueError):
        return False
    return not any(inside <= uid < inside + count for inside, _, count in ranges)

"""
Objects as files and as NARs: from one to the other, and what must be true of them.
"""

import os
import resource
import stat
from contextlib import contextmanager

import pytest

from nixserve.codec.narwriter import encodeNar
from nixserve.store.files import dumpPath
from nixserve.store.restoring import restorePath
from tests.vectors.nar import trees

needsRoot = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change to another user")


def encode(tree):
    """The NAR of a tree."""
    return b"".join(encodeNar(trees.events(tree)))


def dump(path):
    """The NAR of a path."""
    return b"".join(dumpPath(path))


def restore(target, data, size=1000):
    """Restore a NAR that is fed in pieces of C{size} bytes."""
    return restorePath(target, (data[i : i + size] for i in range(0, len(data), size)))


def openFiles():
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def fewDescriptors(count):
    """No more than C{count} descriptors beside those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def walk(path):
    """Path and status of everything in a tree."""
    yield path, os.lstat(path)
    if stat.S_ISDIR(os.lstat(path).st_mode):
        for name in os.listdir(path):
            yield from walk(os.path.join(path, name))


def assertCanonical(path):
    """Everything in a tree has canonical metadata."""
    for name, status in walk(path):
        assert status.st_mtime_ns == 1_000_000_000, name
        if stat.S_ISDIR(status.st_mode):
            assert stat.S_IMODE(status.st_mode) == 0o555, name
        elif stat.S_ISREG(status.st_mode):
            assert stat.S_IMODE(status.st_mode) in (0o444, 0o555), name
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid()), name

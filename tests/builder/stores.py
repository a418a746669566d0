"""Stores and trees for the tests of what happens around a build."""

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager

from nixserve.codec.hashes import hashBytes
from nixserve.codec.storepath import StoreDir
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.testing import Executable, addObject, makeInfo, makeNar


@contextmanager
def temporaryRoot():
    """A directory, removed afterwards. Not below any that a sandbox has of its own."""
    path = tempfile.mkdtemp(prefix="nixserve-build-", dir="/var/tmp")
    # Builders without a sandbox have users of their own.
    os.chmod(path, 0o711)
    try:
        yield path
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", path], check=False)
        shutil.rmtree(path)


def divertedStore(root):
    """An open store whose objects lie elsewhere than their paths say."""
    return LocalStore(StoreLayout.underRoot(root), reservedSize=0)


def plainStore(root):
    """An open store whose objects lie where their paths say, so that builds need no sandbox."""
    return LocalStore(StoreLayout(StoreDir(f"{root}/store"), f"{root}/store", f"{root}/state", f"{root}/log"))


def someHash(text):
    """A hash that depends on a text."""
    return hashBytes("sha256", text.encode())


def add(store, name, tree=b"contents", references=()):
    """Add an object; its path."""
    session = store.openSession()
    nar = makeNar(tree)
    info = makeInfo(name, nar, references, storeDir=store.storeDir)
    addObject(session, info, nar)
    session.close()
    return info.path


def writeTree(path, tree):
    """Write what a builder would: nothing in canonical form."""
    if isinstance(tree, bytes):
        with open(path, "wb") as stream:
            stream.write(tree)
        os.chmod(path, 0o755 if isinstance(tree, Executable) else 0o644)
    elif isinstance(tree, str):
        os.symlink(tree, path)
    else:
        os.mkdir(path, 0o755)
        for name, child in tree.items():
            writeTree(f"{path}/{name}", child)


def info(store, path):
    """What is registered."""
    return store.validPaths.queryPathInfos([path])[path]

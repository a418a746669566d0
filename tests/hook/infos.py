"""
Infos of objects, from a short text.
"""

import hashlib

from nixserve.codec import base32
from nixserve.codec.hashes import Hash
from nixserve.codec.pathinfo import ValidPathInfo
from nixserve.codec.storepath import StorePath

NAR_HASH = Hash("sha256", bytes(32))


def path(name):
    """The path of an object."""
    return StorePath(f"/nix/store/{base32.encode(hashlib.sha256(name.encode()).digest())[:32]}-{name}")


def infos(text):
    """
    What is to be sent.

    @param text: C{c:a,b} for one that refers to two others, with blanks between.
    """
    made = []
    for word in text.split():
        name, _, references = word.partition(":")
        refers = frozenset(map(path, filter(None, references.split(","))))
        made.append(ValidPathInfo(path(name), NAR_HASH, references=refers))
    return made

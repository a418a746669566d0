"""
A user's key, and files of such.
"""

import os

from cryptography.hazmat.primitives.asymmetric import ed25519
from twisted.conch.ssh.keys import Key

PRIVATE = Key(ed25519.Ed25519PrivateKey.generate())
BLOB = PRIVATE.public().blob()
LINE = PRIVATE.public().toString("OPENSSH").decode()


def write(path, text, mode=0o600):
    """Write a file as sshd wants it."""
    with open(path, "w") as stream:
        stream.write(text)
    os.chmod(path, mode)

"""
Children that take the place of a server of the protocol.
"""

import os
import shlex
import struct
import sys
from urllib.parse import quote

HELLO = struct.pack("<QQ", 0x5452EECB, 0x207)
ENVIRON = {"PATH": os.environ.get("PATH", os.defpath)}
ANSWER = f"os.write(1, {HELLO!r})\nwhile os.read(0, 65536): pass"


def child(script, *parameters):
    """The URL of a child that runs a script."""
    code = f'import os, sys, time; exec(bytes.fromhex("{script.encode().hex()}"))'
    program = shlex.join([sys.executable, "-S", "-c", code])
    return "ssh://localhost?" + "&".join([f"remote-program={quote(program)}", *parameters])

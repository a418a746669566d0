"""
Another store for C{copy} and C{build}, without SSH, and a terminal.
"""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from urllib.parse import quote

from nixserve.builder.settings import hostPlatforms
from nixserve.codec.derivation import Derivation, DerivationOutput, outputPaths
from nixserve.store.layout import StoreLayout
from nixserve.store.local import LocalStore
from nixserve.testing import addObject, makeInfo, makeNar
from tests.app.box import BIN, TIMEOUT

SERVER = str(BIN / "nixserve-store")


def url(root, program=SERVER):
    """Of a chroot store behind a child process."""
    return f"ssh://localhost?remote-program={quote(str(program), safe='/')}&remote-store={root}"


def program(box, text, name="remote"):
    """A shell script to be the remote program, in which C{$SERVER} is the real one."""
    path = box.path / name
    path.write_text(f"#!/bin/sh\nSERVER={SERVER}\n{text}\n")
    path.chmod(0o755)
    return path


def opened(root):
    """A store, which is made if need be."""
    return LocalStore(StoreLayout.underRoot(str(root)), reservedSize=0)


def addChain(root, length, size=10):
    """
    Objects each of which refers to the one before.

    @return: their paths, the first first.
    """
    store = opened(root)
    session = store.openSession()
    chain = []
    for number in range(length):
        nar = makeNar(bytes([number % 256]) * size)
        info = makeInfo(f"path-{number}", nar, chain[-1:])
        addObject(session, info, nar)
        chain.append(info.path)
    store.close()
    return chain


def facts(root):
    """
    All that is registered in a store that must be in order, but when it came and whether it was built there: by path.
    """
    store = LocalStore(replace(StoreLayout.underRoot(str(root)), readOnly=True))
    session = store.openSession()
    with store.database.reading() as reader:
        paths = [row[0] for row in reader.execute("select path from ValidPaths")]
    infos = session.queryPathInfos([session.storeDir.parse(path) for path in paths])
    for path in infos:
        assert b"".join(session.narFromPath(path))
    store.close()
    return {path: replace(info, registrationTime=0, ultimate=False) for path, info in infos.items()}


def roots(root):
    """The files of temporary roots in a store: sessions that have not ended."""
    return os.listdir(f"{root}/nix/var/nix/temproots")


def addDerivation(session, name, script, outputs=("out",), sources=(), inputs=()):
    """
    Add a .drv file of something to be built by a shell.

    @param inputs: what this function gave before; all outputs of it are used.
    @return: its path, and the paths of its outputs by name.
    """
    platform, _ = hostPlatforms()
    env = {"name": name, "inputs": " ".join(path for _, paths in inputs for path in paths.values())}
    unknown = session.storeDir.parse("/nix/store/00000000000000000000000000000000-unknown")
    drv = Derivation(
        name=name,
        outputs={output: DerivationOutput(unknown) for output in outputs},
        inputSrcs=frozenset(sources),
        platform=platform,
        builder="/bin/sh",
        args=("-ec", script),
        env={**env, **dict.fromkeys(outputs, "")},
        inputDrvs={path: frozenset(paths) for path, paths in inputs},
    )
    paths = outputPaths(drv, session.readDerivation, session.storeDir, {})
    drv = replace(
        drv,
        outputs={output: DerivationOutput(path) for output, path in paths.items()},
        env={**drv.env, **{output: str(path) for output, path in paths.items()}},
    )
    return session.addDerivation(drv), paths


def onTerminal(box, *arguments, **options):
    """
    Run C{nixserve} with standard error on a terminal.

    @return: the process, which has ended, and what was shown.
    """
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 25, 120, 0, 0))
    options = {"stdout": subprocess.DEVNULL, **options}
    process = box.spawn("nixserve", *arguments, stdin=subprocess.DEVNULL, stderr=terminal, **options)
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(controller, 4096):
            shown += data
    except OSError:
        pass  # The other end is closed.
    os.close(controller)
    process.wait(TIMEOUT)
    return process, shown.decode()


_PASS = """
import os, sys, time
left, seconds = int(sys.argv[1]), float(sys.argv[2])
while left and (data := os.read(0, min(left, 65536))):
    left -= len(data)
    while data:
        data = data[os.write(1, data):]
open("half", "w").close()
time.sleep(seconds)
"""


def passing(box, count, seconds=0):
    """
    A shell command that passes on so many bytes, then makes a file C{half}, waits, and ends.
    """
    path = box.path / "passing.py"
    path.write_text(_PASS)
    return f"{sys.executable} {path} {count} {seconds}"

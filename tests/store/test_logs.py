"""Build logs on disk, read by the real C{nix-store} as well."""

import bz2
import os
import stat

import pytest

from nixserve.codec.storepath import StorePath
from nixserve.errors import StoreError
from nixserve.store.logs import BuildLogFile, buildLogPath

DRV = StorePath("/nix/store/jask8v368xn0v6hx55qgprkclq72bx57-fail.drv")


def contents(layout):
    """What the log holds."""
    with open(buildLogPath(layout, DRV), "rb") as file:
        return bz2.decompress(file.read())


def test_path(layout):
    """Where Nix looks for it."""
    expected = f"{layout.logDir}/drvs/ja/sk8v368xn0v6hx55qgprkclq72bx57-fail.drv.bz2"
    assert buildLogPath(layout, DRV) == expected


def test_bytesAsTheyCome(layout):
    """Every byte is kept, in whatever pieces it comes."""
    pieces = [b"", b"one\r\n", b"@nix {}\n", bytes(range(256)), b"no newline"]
    log = BuildLogFile(layout, DRV)
    for piece in pieces:
        log.write(piece)
    log.close()
    assert contents(layout) == b"".join(pieces)


def test_large(layout):
    """A log larger than what bzip2 compresses at once, most of which is on disk before the end."""
    data = os.urandom(1024 * 1024)
    log = BuildLogFile(layout, DRV)
    for _ in range(3):
        log.write(data)
    assert os.path.getsize(log.path) > 1024 * 1024
    log.close()
    assert contents(layout) == 3 * data


def test_empty(layout):
    """A builder that says nothing leaves a log, of 14 bytes."""
    BuildLogFile(layout, DRV).close()
    assert os.path.getsize(buildLogPath(layout, DRV)) == 14
    assert contents(layout) == b""


def test_secondBuild(layout):
    """The log of an earlier build goes."""
    for text in (b"a long first log\n", b"second\n"):
        log = BuildLogFile(layout, DRV)
        log.write(text)
        log.close()
    assert contents(layout) == b"second\n"


def test_twoAtOnce(layout):
    """Two builds under one name do not write into each other's log; the later one stays."""
    logs = [BuildLogFile(layout, DRV) for _ in range(2)]
    for log, text in zip(logs, (b"a long first log\n", b"second\n"), strict=True):
        log.write(text)
    for log in reversed(logs):
        log.close()
    assert contents(layout) == b"second\n"


def test_closeTwice(layout):
    """Closing again changes nothing."""
    log = BuildLogFile(layout, DRV)
    log.write(b"x")
    log.close()
    log.close()
    assert contents(layout) == b"x"


def test_mode(layout):
    """Others may read it, as far as the umask permits."""
    old = os.umask(0o027)
    try:
        log = BuildLogFile(layout, DRV)
    finally:
        os.umask(old)
    log.close()
    assert stat.S_IMODE(os.stat(log.path).st_mode) == 0o640


def test_fullDisk(layout):
    """A disk that is full is an error of the store, and closing closes the file all the same."""
    log = BuildLogFile(layout, DRV)
    log._file.close()
    log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 - closed by close
    with pytest.raises(StoreError, match=r"writing build log .*: No space left"):
        log.write(os.urandom(2 * 1024 * 1024))
    with pytest.raises(StoreError, match=r"writing build log .*: No space left"):
        log.close()
    log.close()


def test_cannotCreate(layout):
    """Something in the way is an error of the store."""
    os.makedirs(layout.logDir)
    with open(f"{layout.logDir}/drvs", "w"):
        pass
    with pytest.raises(StoreError, match="creating build log"):
        BuildLogFile(layout, DRV)


@pytest.mark.interop
def test_nixReadsIt(layout, nix):
    """C{nix-store --read-log} gives the same bytes."""
    data = b"line\n" * 100_000 + bytes(range(256))
    log = BuildLogFile(layout, DRV)
    log.write(data)
    log.close()
    assert nix("--read-log", DRV) == data

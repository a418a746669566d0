"""The builders that are part of Nix: which there are, and how they run in a process of their own."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nixserve.builder.builtinjob import BuiltinFailed, BuiltinJob
from nixserve.builder.builtins import isBuiltin
from tests.builder.builtinruns import run


def test_unknown(tmp_path):
    """There are no others."""
    with pytest.raises(BuiltinFailed, match=r"^unsupported builtin builder 'nope'$"):
        run("nope", tmp_path / "out")


def test_isBuiltin():
    """They are known by the beginning of their names."""
    assert isBuiltin("builtin:nope")
    assert not isBuiltin("/bin/builtin:fetchurl")


def test_jobTravels():
    """What one process writes another reads, whatever bytes derivations hold."""
    job = BuiltinJob("builtin:x", {"a": "é\udcff\n"}, "/out", True, "PEM", 3)
    assert BuiltinJob.decode(job.encode()) == job
    assert BuiltinJob.decode(job.encode().decode("ascii")) == job


def runProcess(job):
    """Run a job in a process of its own."""
    command = [sys.executable, "-m", "nixserve.builder.builtins"]
    return subprocess.run(
        command, input=job.encode(), capture_output=True, cwd=Path(__file__).parents[2], timeout=60, check=False
    )


def test_ownProcess(tmp_path):
    """In a process: nothing on success, on failure a line that begins with C{error:} and status 1."""
    (tmp_path / "file").write_text("hello")
    job = BuiltinJob("builtin:fetchurl", {"url": f"file://{tmp_path}/file"}, str(tmp_path / "out"), network=True)
    done = runProcess(job)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "hello"
    assert all(line.startswith(b"@nix {") for line in done.stderr.splitlines())
    done = runProcess(BuiltinJob("builtin:fetchurl", {}, str(tmp_path / "out"), network=True))
    assert (done.returncode, done.stderr) == (1, b"error: attribute 'url' missing\n")


def test_nothingIsImportedLate(tmp_path, server):
    """In a sandbox no Python file can be read, so all that is ever needed is imported before."""
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("é/x"))
    code = f"""
import sys
from nixserve.builder.builtins import BuiltinJob, runBuiltin
from nixserve.errors import NixServeError
sys.meta_path.clear(); sys.path.clear(); sys.path_importer_cache.clear()
known = set(sys.modules)
out = {str(tmp_path)!r}
runBuiltin(BuiltinJob("builtin:unpack-channel", {{"src": out + "/a.tar.xz", "channelName": "c"}}, out + "/1"))
runBuiltin(BuiltinJob("builtin:buildenv", {{"derivations": "", "manifest": "/m"}}, out + "/2"))
runBuiltin(BuiltinJob("builtin:fetchurl", {{"url": "{server.url}/redirect"}}, out + "/3", True))
for url in ("http://bücher.invalid/", "{server.url}/404", "{server.url}/partial", "https://127.0.0.1:1/", "file:///dev/null"):
    try:
        runBuiltin(BuiltinJob("builtin:fetchurl", {{"url": url}}, out + "/3", True, attempts=1))
    except NixServeError as error:
        assert "No module" not in str(error), error
assert set(sys.modules) == known, set(sys.modules) - known
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parents[2], timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()

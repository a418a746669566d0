"""
Files that nobody else may read.
"""

import os
from pathlib import Path

from nixserve.remote.localfiles import PrivateFile


def test_privateFile(tmp_path):
    """Others cannot get at it, whatever the umask, and nothing is left of it."""
    file = PrivateFile({"TMPDIR": str(tmp_path)}, "x")
    before = os.umask(0)
    try:
        file.write("secret")
    finally:
        os.umask(before)
    assert Path(file.path).read_text() == "secret" and Path(file.path).parent.stat().st_mode & 0o777 == 0o700
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []

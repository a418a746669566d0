"""What peers are told of errors."""

import errno

import pytest

from nixserve.codec.peertext import HIDDEN, hidePaths, peerText
from nixserve.errors import PolicyError, RemoteError, StoreError, UsageError

OBJECT = "/nix/store/" + "0123456789abcdfghijklmnpqrsvwxyz"[:32] + "-x"
NAME = OBJECT.removeprefix("/nix/store/")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"path '{OBJECT}' is not valid", f"path '{OBJECT}' is not valid"),
        (f"cannot read '{OBJECT}/a/b': Permission denied", f"cannot read '{OBJECT}/a/b': Permission denied"),
        (f"cannot read '/srv/root/nix/store/{NAME}/a'", f"cannot read '{OBJECT}/a'"),
        (f"cannot open lock file '/srv/objects/{NAME}.lock'", f"cannot open lock file '{OBJECT}.lock'"),
        (f"file '/srv/s/{NAME}.drv-nixserve-build/root{OBJECT}-dev/f' is odd", f"file '{OBJECT}-dev/f' is odd"),
        (f"file '{OBJECT}.drv-nixserve-build/root{OBJECT}-dev/f' is odd", f"file '{OBJECT}-dev/f' is odd"),
        ("the store in '/srv/nix/var/nix' is closed", f"the store in '{HIDDEN}' is closed"),
        ("'/srv/a', on the way to '/srv/b', is open", f"'{HIDDEN}', on the way to '{HIDDEN}', is open"),
        ("cannot read '/nix/store'", f"cannot read '{HIDDEN}'"),
        ("database '/nix/var/nix/db/db.sqlite': disk I/O error", f"database '{HIDDEN}': disk I/O error"),
        ("cannot read '/srv/o", "cannot read '/srv/o"),
        ("no 'quoted' path, and/or such", "no 'quoted' path, and/or such"),
    ],
)
def test_hidePaths(text, expected):
    """Objects are told by their logical paths, wherever they lie; other files are not told."""
    assert hidePaths(text, "/nix/store") == expected


def test_families():
    """Errors about this machine are so told; what a peer has sent is quoted to it as it is."""
    for family in (StoreError, RemoteError, UsageError):
        assert peerText(family("no '/srv/x'"), "/nix/store") == f"no '{HIDDEN}'"
    assert peerText(PolicyError("the store '/srv/x' is not served here"), "/nix/store").startswith("the store '/srv/x'")
    refused = PermissionError(errno.EACCES, "Permission denied", "/srv/x")
    assert peerText(refused, "/nix/store") == "Permission denied"
    assert "/srv" not in peerText(OSError("cannot open /srv/x"), "/nix/store")

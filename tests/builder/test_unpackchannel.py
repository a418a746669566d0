"""
C{builtin:unpack-channel}: archives of channels, and hostile ones, beside real Nix.
"""

import io
import os
import shutil
import tarfile

import pytest

from nixserve.builder.builtinjob import BuiltinFailed, BuiltinJob
from nixserve.builder.builtins import runBuiltin
from tests.builder.builtinruns import run, tree


def makeArchive(path, *members, mode="w"):
    """
    Write a tar file.

    @param members: (name, type, text or target).
    """
    with tarfile.open(path, mode) as archive:
        for name, kind, *rest in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            member.mode = 0o755 if "exec" in name or kind == tarfile.DIRTYPE else 0o644
            contents = b""
            if kind == tarfile.REGTYPE:
                contents = rest[0].encode()
            elif rest:
                member.linkname = rest[0]
            member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents))
    return path


FILE, DIR, LINK, HARD = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


CHANNEL = [
    ("top-1.0", DIR),
    ("top-1.0/default.nix", FILE, "nix"),
    ("./top-1.0/exec", FILE, "#!"),
    ("/top-1.0//abs", FILE, "abs"),
    ("top-1.0/no/directory/entry", FILE, "x"),
    ("top-1.0/link", LINK, "../../../etc"),
    ("top-1.0/absLink", LINK, "/etc/passwd"),
    ("top-1.0/hard", HARD, "top-1.0/exec"),
    ("top-1.0/é", FILE, "é"),
    ("top-1.0/again", FILE, "first"),
    ("top-1.0/again", FILE, "second"),
    ("top-1.0/empty", DIR),
]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_unpackChannel(tmp_path, out, mode):
    """The one directory in the archive, under the name of the channel, however it is compressed."""
    source = makeArchive(tmp_path / "archive", *CHANNEL, mode=mode)
    run("unpack-channel", out, src=str(source), channelName="foo")
    assert tree(out) == {
        "foo": None,
        "foo/default.nix": (b"nix", False),
        "foo/exec": (b"#!", True),
        "foo/abs": (b"abs", False),
        "foo/no": None,
        "foo/no/directory": None,
        "foo/no/directory/entry": (b"x", False),
        "foo/link": "../../../etc",
        "foo/absLink": "/etc/passwd",
        "foo/hard": (b"#!", True),
        "foo/é": ("é".encode(), False),
        "foo/again": (b"second", False),
        "foo/empty": None,
    }


def test_oneFile(tmp_path, out):
    """A file alone is as good as a directory, and may have the name already."""
    run("unpack-channel", out, src=str(makeArchive(tmp_path / "a", ("foo", FILE, "x"))), channelName="foo")
    assert tree(out) == {"foo": (b"x", False)}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../evil", FILE, "x")], "contains '..'"),
        ([("a/../../evil", FILE, "x")], "contains '..'"),
        ([("a", LINK, ".."), ("a/evil", FILE, "x")], "Not a directory|Too many levels"),
        ([("a", LINK, "/"), ("a/tmp", DIR)], "Not a directory|Too many levels|exists"),
        ([("a/b", LINK, "@dir@"), ("a/b/evil", FILE, "x")], "Not a directory|Too many levels"),
        ([("a", HARD, "../secret")], "contains '..'"),
        ([("a", LINK, "@dir@"), ("b", HARD, "a/secret")], "Not a directory|Too many levels"),
        ([("a", LINK, "@dir@/secret"), ("b", HARD, "a")], "no regular file"),
        ([("a", HARD, "/")], "to a directory"),
        ([("a", HARD, "nowhere")], "No such file"),
        ([("a", tarfile.FIFOTYPE)], "unsupported type"),
        ([("a", tarfile.CHRTYPE)], "unsupported type"),
        ([("/".join(5000 * "a"), FILE, "x")], "more than 4096 components"),
    ],
)
def test_hostileArchives(tmp_path, out, members, message):
    """Nothing in an archive leads outside of the output, to write there or to read."""
    (tmp_path / "secret").write_text("secret")
    before = tree(tmp_path)
    members = [(name, kind, *(text.replace("@dir@", str(tmp_path)) for text in rest)) for name, kind, *rest in members]
    with pytest.raises((BuiltinFailed, OSError), match=message):
        run("unpack-channel", out, src=str(makeArchive(tmp_path / "archive", *members)), channelName="foo")
    shutil.rmtree(out)
    (tmp_path / "archive").unlink()
    assert tree(tmp_path) == before


def test_linkIsReplaced(tmp_path, out):
    """A file in the place of an earlier link replaces the link, not what it leads to."""
    (tmp_path / "secret").write_text("secret")
    source = makeArchive(tmp_path / "archive", ("a", LINK, str(tmp_path / "secret")), ("a", FILE, "x"))
    run("unpack-channel", out, src=str(source), channelName="foo")
    assert (tmp_path / "secret").read_text() == "secret"
    assert tree(out) == {"foo": (b"x", False)}


@pytest.mark.parametrize(
    ("members", "message"),
    [([], "is empty"), ([(".", DIR)], "is empty"), ([("a", DIR), ("b", FILE, "x")], "contains more than one file")],
)
def test_notOneEntry(tmp_path, out, members, message):
    """A channel is one directory."""
    source = makeArchive(tmp_path / "archive", *members)
    with pytest.raises(BuiltinFailed, match=f"channel tarball '{source}' {message}"):
        run("unpack-channel", out, src=str(source), channelName="foo")


@pytest.mark.parametrize("name", ["a/b", "/", "", ".", ".."])
def test_badChannelName(tmp_path, out, name):
    """The name of the channel is that of a file."""
    source = makeArchive(tmp_path / "archive", ("a", FILE, "x"))
    with pytest.raises(BuiltinFailed, match="channelName is not allowed to contain filesystem separators"):
        run("unpack-channel", out, src=str(source), channelName=name)


@pytest.mark.parametrize("cut", [0, 5, 700, -700])
@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_damagedArchives(tmp_path, out, mode, cut):
    """What is no archive, or a part of one, is an error."""
    source = makeArchive(tmp_path / "archive", ("a", FILE, os.urandom(3000).hex()), mode=mode)
    source.write_bytes(source.read_bytes()[:cut])
    with pytest.raises((BuiltinFailed, OSError)):
        run("unpack-channel", out, src=str(source), channelName="foo")


@pytest.mark.interop
def test_channelAsNix(tmp_path, out, nixBuild):
    """The tree is the one that Nix unpacks from the same archive."""
    source = makeArchive(tmp_path / "archive.tar.xz", *CHANNEL, mode="w:xz")
    drv, theirs = nixBuild(
        'derivation { name = "c"; system = "builtin"; builder = "builtin:unpack-channel"; '
        f'channelName = "foo"; src = {source}; }}'
    )
    runBuiltin(BuiltinJob(drv.builder, drv.env, str(out)))
    assert tree(out) == tree(theirs)

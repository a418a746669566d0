"""What a relay and the service say to each other."""

import json

import pytest

from nixserve.codec.relay import MAX_FRAME, Frame, FrameReader, RelayHeader, encodeFrame
from nixserve.errors import FormatError


def frames(*pieces):
    """All frames in C{pieces}."""
    reader = FrameReader()
    return [frame for piece in pieces for frame in reader.feed(piece)]


def bytewise(data):
    """C{data} cut after each byte."""
    return [data[i : i + 1] for i in range(len(data))]


FRAMES = [(Frame.OUTPUT, b"out"), (Frame.ERROR, b""), (Frame.OUTPUT, bytes(1000)), (Frame.EXIT, b"\1")]


def test_frames():
    """Frames come back in any cut, and one byte says what each is, four its length."""
    data = b"".join(encodeFrame(*frame) for frame in FRAMES)
    assert data.startswith(b"\1\0\0\0\3out\2\0\0\0\0\1\0\0\3\xe8")
    assert frames(data) == frames(*bytewise(data)) == FRAMES
    assert frames(data[:-1]) == FRAMES[:-1]


def test_largestFrame():
    """A frame may be as large as the limit."""
    payload = bytes(MAX_FRAME)
    assert frames(encodeFrame(Frame.OUTPUT, payload)) == [(Frame.OUTPUT, payload)]


@pytest.mark.parametrize("data", [b"\0\0\0\0\0", b"\4\0\0\0\0", b"\1\0\4\0\1", b"\1\xff\xff\xff\xff", b"HTTP/1.1 400"])
def test_noFrames(data):
    """An unknown kind or a length beyond the limit is refused as soon as its head is there, each time."""
    reader = FrameReader()
    for piece in bytewise(data)[:4]:
        assert list(reader.feed(piece)) == []
    for _ in range(2):
        with pytest.raises(FormatError, match="something else than frames"):
            list(reader.feed(data[4:5]))


@pytest.mark.parametrize(
    "header", [RelayHeader("read"), RelayHeader("read,write,build,trust", "local?root=/a b"), RelayHeader("é\n", '"\n')]
)
def test_header(header):
    """A header is one line of ASCII and comes back."""
    line = header.encode()
    assert line.endswith(b"\n") and line.count(b"\n") == 1 and line.isascii()
    assert RelayHeader.decode(line) == header


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"hello",
        b"[]",
        b"1",
        b'"nixserve-relay"',
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b"9" * 5000,
        b'{"nixserve-relay": 1, "rights": "read"}',
        b'{"nixserve-relay": 2, "rights": "read", "store": ""}',
        b'{"nixserve-relay": 1, "rights": ["read"], "store": ""}',
        b'{"nixserve-relay": 1, "rights": "read", "store": null}',
    ],
)
def test_noHeader(line):
    """Anything else is refused."""
    with pytest.raises(FormatError):
        RelayHeader.decode(line)


def test_laterVersionsMayAddFields():
    """What a header says beyond the known fields is ignored."""
    line = json.dumps({"nixserve-relay": 1, "rights": "read", "store": "", "color": True}).encode()
    assert RelayHeader.decode(line) == RelayHeader("read")

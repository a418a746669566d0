"""Whatever bytes arrive as a NAR: events or our error, and the same whole as in pieces."""

from hypothesis import example, given
from hypothesis import strategies as st

from nixserve.codec.nar import BadArchive
from nixserve.codec.narparser import NarParser
from nixserve.codec.narwriter import encodeNar
from tests.vectors.nar.trees import TREES, joined, nar

ARCHIVES = [nar(name) for name in sorted(TREES)]
KEYWORDS = [
    b"nix-archive-1", b"(", b")", b"type", b"regular", b"executable", b"contents", b"symlink", b"target",
    b"directory", b"entry", b"name", b"node", b"", b"a", b"b", b"..", b"x/y", b"\0",
]  # fmt: skip


def string(data):
    """A padded string."""
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def outcome(pieces):
    """All that can be seen of a parser that is fed C{pieces}: the error, or events and what is left."""
    parser = NarParser(100_000)
    result = []
    try:
        for piece in pieces:
            result += parser.feed(piece)
        if not parser.finished:
            parser.close()
    except BadArchive as error:
        return str(error)
    return joined(result), parser.surplus


@st.composite
def mutated(draw):
    """A real NAR with a few bytes overwritten, removed, inserted or repeated."""
    data = draw(st.sampled_from(ARCHIVES))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 8, 16, 24, 100])))
        middle = draw(
            st.one_of(st.binary(max_size=9), st.sampled_from(KEYWORDS).map(string), st.just(data[start:end] * 2))
        )
        data = data[:start] + middle + data[end:]
    return data


soup = st.lists(st.sampled_from(KEYWORDS).map(string), max_size=40).map(b"".join)
directories = soup.map(lambda tail: b"".join(map(string, [*KEYWORDS[:2], b"type", b"directory"])) + tail)


@given(st.one_of(mutated(), soup, directories, st.binary(max_size=200)), st.data())
@example(ARCHIVES[0], None)
def test_wholeAndInPieces(data, draw):
    """The outcome depends on the bytes and not on their cuts; what is accepted is written back unchanged."""
    whole = outcome([data])
    assert outcome([data[i : i + 1] for i in range(len(data))]) == whole
    if draw is not None:
        cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=5)))
        assert outcome([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]) == whole
    if not isinstance(whole, str):
        events, surplus = whole
        assert b"".join(encodeNar(events)) + surplus == data

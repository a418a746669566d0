"""
Attributes as JSON, and its values as shell code.
"""

import pytest

from nixserve.builder.structuredattrs import parseStructuredAttrs, writeJSON
from nixserve.codec.buildresult import BuildStatus
from nixserve.errors import BuildError


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "1",
        "{",
        '{"a":NaN}',
        '{"a":-Infinity}',
        '{"a":1e999}',
        '{"a":"\\ud800"}',
        '{"a":"\udcff"}',
        '{"a":"\n"}',
        '{"a":1,}',
        '{"a":1} x',
        '{"a":' + 100_000 * "[",
        '{"a":' + 20_000 * "9" + "}",
    ],
)
def test_badJSON(text):
    """What is no JSON object is an error of the build."""
    with pytest.raises(BuildError, match="cannot process __json") as raised:
        parseStructuredAttrs(text)
    assert raised.value.status == BuildStatus.MISC_FAILURE


def test_manyJSONValues():
    """
    There is a limit to values: reading is one call, during which nothing else of the server runs. Long texts are no
    matter.
    """
    assert len(parseStructuredAttrs('{"a":[' + ",".join(200_000 * "1") + "]}")["a"]) == 200_000
    assert len(parseStructuredAttrs('{"a":"' + 4_000_000 * "x" + '"}')["a"]) == 4_000_000
    for value in ("1,", "[],", "{},"):
        with pytest.raises(BuildError, match="more than 250000 values"):
            parseStructuredAttrs('{"a":[' + 130_000 * value + 130_000 * value + "1]}")


def test_deepJSON():
    """There is a limit to lists in lists; what keeps to it can be written again."""
    text = '{"a":' + 99 * "[" + 99 * "]" + "}"
    assert writeJSON(parseStructuredAttrs(text)) == text
    with pytest.raises(BuildError, match="more than 100 levels deep"):
        parseStructuredAttrs('{"a":' + 100 * "[" + 100 * "]" + "}")

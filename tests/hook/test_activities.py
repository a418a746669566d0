"""
L{nixserve.hook.activities}: what Nix hears of copies.
"""

import json

from nixserve.hook.activities import CopyActivities
from nixserve.hook.conversation import HookLog
from nixserve.testing import makeInfo, makeNar


def test_activities():
    """One activity for a copy and one for each path, each begun once and ended once."""
    lines = []
    infos = [makeInfo(name, makeNar(name.encode())) for name in "ab"]
    activities = CopyActivities(HookLog(3, 1), lines.append, "", "ssh://m")
    activities.planned(infos, 0)
    activities.copied(infos[0])
    activities.planned(infos[1:], 0)
    activities.copied(infos[1])
    activities.end()
    said = [json.loads(line[5:]) for line in b"".join(lines).splitlines()]
    started = [value["id"] for value in said if value["action"] == "start"]
    assert sorted(started) == sorted(value["id"] for value in said if value["action"] == "stop")
    assert [value["fields"] for value in said if value["action"] == "result"] == [[1, 2, 1, 0], [1, 1, 0, 0]]
    texts = [value["text"] for value in said if value["action"] == "start"]
    assert texts[:2] == ["copying 2 paths", f"copying path '{infos[0].path}' to 'ssh://m'"]

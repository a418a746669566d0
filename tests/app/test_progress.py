"""
What people see of a copy: lines, bars and facts.
"""

import io
from types import SimpleNamespace

import pytest

from nixserve.app import progress
from nixserve.app.progress import CopyReport, Screen
from nixserve.testing import makeInfo, makeNar


class Terminal(io.StringIO):
    """A standard error that somebody is watching."""

    def isatty(self):
        """It is one."""
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Standard error is a terminal, and bars are drawn at every step."""
    stream = Terminal()
    # That of sys is pytest's, another one in each phase of a test.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0)
    return stream


INFOS = [makeInfo(f"path-{number}", makeNar(b"x" * number)) for number in range(3)]
SIZE = sum(info.narSize for info in INFOS)


class TestReport:
    """L{CopyReport}."""

    def test_bar(self, terminal):
        """It shows bytes and paths, and goes with the last path; the next copy has one of its own."""
        report = CopyReport(Screen(), "copying")
        for _ in range(2):
            report.planned(INFOS, 4)
            for number, info in enumerate(INFOS, 1):
                report.moved(info.narSize)
                report.copied(info)
                last = terminal.getvalue().rpartition("\r")[2] if number < 3 else ""
                assert number == 3 or f", {number}/3 paths [" in last
            assert terminal.getvalue().endswith("\r")
        assert f"{SIZE}/{SIZE}" in terminal.getvalue()
        assert report.paths == 6

    def test_line(self, terminal):
        """A line stands above the bar."""
        screen = Screen()
        report = CopyReport(screen, "copying")
        report.planned(INFOS, 0)
        screen.line("above")
        _, line, after = terminal.getvalue().rpartition("above\n")
        assert line and "0/3 paths" in after
        screen.endBar()

    def test_noBar(self, terminal, monkeypatch):
        """Without a terminal, or anything to copy, there is none."""
        CopyReport(Screen(), "copying").planned([], 3)
        monkeypatch.setattr(terminal, "isatty", lambda: False)
        report = CopyReport(Screen(), "copying")
        report.planned(INFOS, 0)
        report.moved(SIZE)
        report.copied(INFOS[0])
        assert terminal.getvalue() == ""

    def test_facts(self):
        """What happens is told as facts; if wanted, what will be copied too."""
        facts = []
        report = CopyReport(Screen(), "copying", facts.append, listPaths=True)
        report.planned(INFOS[:1], 4)
        report.copied(INFOS[0])
        path = {"path": INFOS[0].path, "narSize": INFOS[0].narSize}
        assert facts == [
            {"event": "planned", "paths": 1, "narBytes": INFOS[0].narSize, "present": 4},
            {"event": "missing", **path},
            {"event": "copied", **path},
        ]

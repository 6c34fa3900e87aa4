"""Counted report: a bounded number of lines, and nothing that is not at least counted."""

from __future__ import annotations

import pytest

from lockstep.net import counted_report
from lockstep.net.counted_report import CountedReport


def test_many_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, str]] = []
    report = CountedReport(lambda who, why: said.append((who, why)), listed=3)
    for port in range(440):
        report(f"127.0.0.1:{port}", "no certificate")
    report("b", "a goodbye")
    assert len(said) == 4, "three strangers, and the host"
    report.flush()
    assert len(said) == 4, "the minute is not over"
    report.flush(at_once=True)
    assert said[-1][0] == "strangers"
    assert said[-1][1].startswith("437 more")
    monkeypatch.setattr(counted_report, "PERIOD_SECONDS", 0.0)
    report("c", "again")
    assert said[-1] == ("c", "again")


def test_many_names_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted_report, "MAX_NAMES", 10)
    said: list[tuple[str, str]] = []
    report = CountedReport(lambda who, why: said.append((who, why)), listed=1)
    for number in range(50):
        report(f"host-{number}", "lost")
    assert len(said) == 11

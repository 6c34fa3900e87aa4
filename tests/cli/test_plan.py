"""`lockstep plan`, and what a run records of its plan."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lockstep.results.event_schema import Planned, parse_event
from tests.support import command

JOB = f"{command.TASKS}:Blobs"
TWO = len(os.sched_getaffinity(0)) >= 2
PARTS = {"compute", "wait", "reduce", "exchange", "update"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir(exist_ok=True)
    return made


@pytest.mark.skipif(not TWO, reason="needs two cores")
def test_the_ranking_as_json(tmp_path: Path) -> None:
    ended = command.lockstep("plan", JOB, "--steps=400", "--json", cwd=folder(tmp_path))
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    ranking = plan["ranking"]
    rows = ranking["candidates"]
    assert sorted(sum(row["workers"].values()) for row in rows) == [1, 2]
    assert sum(rows[0]["workers"].values()) == plan["workers"]
    for row in rows:
        assert row["parts"].keys() == PARTS
        assert sum(row["parts"].values()) == pytest.approx(row["predicted"])
        assert row["measured"] > 0
        assert row["missing"] == {}
        assert next(iter(row["memory"].values())) > 1 << 20
    assert ranking["planning_seconds"] > 0
    assert ranking["tried"] == []


@pytest.mark.long
@pytest.mark.skipif(not TWO, reason="needs two cores")
def test_nothing_is_timed_if_not_asked_and_tuning_chooses_nothing(tmp_path: Path) -> None:
    arguments = ("plan", JOB, "--steps=400", "--measure=0", "--tune")
    ended = command.lockstep(*arguments, cwd=folder(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "timing" not in ended.stderr
    assert "trying shards 2" in ended.stderr
    settings, _, rest = ended.stdout.partition("\nbecause\n")
    assert "shards           4\n" in settings
    assert "precision        fp32\n" in settings
    assert "considered, in milliseconds a step" in rest
    assert "settings that change the numbers" in rest
    assert "precision: bf16" in rest


@pytest.mark.skipif(not TWO, reason="needs two cores")
def test_a_run_records_what_was_predicted_and_the_bits_are_those_of_any_plan(
    tmp_path: Path,
) -> None:
    here = folder(tmp_path)
    planned = command.lockstep("run", JOB, "--steps=60", "--out=a", "--json", cwd=here)
    assert planned.returncode == 0, planned.stderr
    asked = command.lockstep("run", JOB, "--steps=60", "--out=b", "-w1", "--json", cwd=here)
    fingerprints = {json.loads(each.stdout)["fingerprint"] for each in (planned, asked)}
    assert len(fingerprints) == 1
    events = [parse_event(line) for line in (here / "a" / "events.jsonl").read_bytes().splitlines()]
    (event,) = [each for each in events if isinstance(each, Planned)]
    assert event.workers == json.loads(planned.stdout)["workers"]
    assert event.considered == 2
    assert event.predicted is not None
    assert event.predicted == pytest.approx(sum(event.parts.values()), rel=0.01)
    assert event.measured is not None
    shown = command.lockstep("status", "a", cwd=here).stdout
    assert "ms predicted" in shown
    assert "a step, as predicted" in (here / "a" / "report.html").read_text()


def test_as_many_workers_as_asked_are_not_measured_before_a_run(tmp_path: Path) -> None:
    here = folder(tmp_path)
    ended = command.lockstep("run", JOB, "--steps=6", "-w1", "--out=a", cwd=here)
    assert ended.returncode == 0, ended.stderr
    assert "measuring" not in ended.stderr
    assert b'"plan"' not in (here / "a" / "events.jsonl").read_bytes()

"""Run history, reader and summary: what is made of events, also of torn, old and hostile ones."""

from __future__ import annotations

import json
import os
import platform
import random
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import RunFolderError
from lockstep.results.event_schema import BY_NAME
from lockstep.results.ledger_check import LedgerCheck
from lockstep.results.run_comparison import find_parting
from lockstep.results.run_history import Table, latest, thin_times
from lockstep.results.run_list import RunList
from lockstep.results.run_reader import END_BYTES, RunReader
from lockstep.results.run_summary import details, merge_spans, summarise
from tests.support.recorded_runs import (
    HOSTILE,
    append,
    began,
    line,
    make_run,
    pace,
    workers,
    write_ledger,
)

HERE = platform.node()


def read(folder: Path) -> RunReader:
    reader = RunReader(folder)
    reader.refresh()
    return reader


def summary(reader: RunReader) -> dict[str, Any]:
    return summarise("x", reader.manifest, reader.result, reader.history, reader.status)


def death(seconds: float, worker: int = 1, step: int = 12) -> list[dict[str, Any]]:
    where = {"host": HERE, "worker": worker, "pid": 1001, "step": step, "phase": "compute"}
    how = {"how": "was killed by SIGKILL"}
    return [
        line(seconds, "died", **where, **how, status="working"),
        *workers(seconds + 0.5, [worker], step)[:2],
        line(seconds + 0.6, "formed", seats=[0, worker], step=step),
        line(seconds + 0.7, "recovered", **where, **how, detection_ms=1.0, regroup_ms=600.0,
             recovery_ms=700.0, recomputed=1, steps_back=0),
    ]  # fmt: skip


def test_a_death_and_a_recovery(tmp_path: Path) -> None:
    events = [began(), *workers(1, [0, 1]), *pace(2, 10), *death(3.0), *pace(4, 20)]
    history = read(make_run(tmp_path / "run", events)).history
    assert history.lanes.rows == [[HERE, 0], [HERE, 1]]
    of_worker_1 = [(at, state) for lane, at, state in history.states.rows if lane == 1]
    assert of_worker_1 == [
        (1.0, "starting"), (1.1, "working"), (3.0, "dead"), (3.5, "starting"), (3.6, "working")
    ]  # fmt: skip
    assert [(kind, step) for _, step, kind, _ in history.marks.rows] == [
        ("died", 12), ("joined", 12)
    ]  # fmt: skip
    assert history.bands.rows == [[3.0, 3.7, "recovering", history.events.rows[-1][3]]]
    assert "back in 700 ms" in history.events.rows[-1][3]
    assert history.working == [(HERE, 0), (HERE, 1)]
    assert history.step == 20
    assert history.times.rows[1] == [1, 1.0, 2.0, [0.6, 0.05, 0.2, 0.05, 0.0, 0.1, 0.0]]


def test_other_hosts_workers_are_lanes_of_their_own(tmp_path: Path) -> None:
    """The master's host has another name than the machine, as `LocalHost` may have."""
    events = [
        began(),
        line(1, "spawned", worker=0, pid=5, reason=""),
        line(1, "joined", host="a", worker=0, pid=5),
        line(1, "formed", seats=[0], step=0),
        *workers(2, [0, 1], host="b"),
        line(3, "hosts", generation=1, reason="", hosts=["a", "b"], going_on=True),
        line(4, "hosts", generation=2, reason="", hosts=["a", "b", "c"], going_on=True),
        line(5, "host_lost", host="b", why="gone"),
    ]
    history = read(make_run(tmp_path / "run", events)).history
    assert history.lanes.rows == [["a", 0], ["b", 0], ["b", 1]]
    assert history.working == [("a", 0)]
    assert [row[2:] for row in history.marks.rows] == [
        ["joined", "host c joined"], ["died", "host b was lost: gone"]
    ]  # fmt: skip


def test_a_resume_makes_later_steps_void_and_leaves_out_the_time_between(tmp_path: Path) -> None:
    events = [
        began(), *workers(1, [0, 1]), *pace(2, 10, 0.9), *pace(3, 20, 0.8), *pace(4, 30, 0.7),
        began(5000), line(5000, "resumed", step=10), *workers(5001, [0, 1], 10),
        *pace(5002, 20, 0.6),
    ]  # fmt: skip
    history = read(make_run(tmp_path / "run", events)).history
    assert [(row[1], row[2]) for row in latest(history.progress.rows)] == [(10, 0.9), (20, 0.6)]
    assert history.now == pytest.approx(4 + 1 + 2)
    assert history.first is not None
    assert history.began is not None
    assert history.first.time != history.began.time


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([], "running"),
        ([line(9, "paused", step=4)], "paused"),
        ([line(9, "paused", step=4), line(9, "went_on", step=4), *pace(10, 5)], "running"),
        ([line(9, "ended", how="stopped", step=4, why="as asked")], "stopped"),
        ([line(9, "ended", how="failed", step=4, why="full")], "failed"),
        ([line(9, "finished", steps=100, fingerprint="ab")], "finished"),
        ([line(9, "ended", how="stopped", step=4, why=""), began(10)], "running"),
        ([began(10, pid=2**22 + 1, started=77)], "killed"),
        ([began(10, pid=os.getpid(), started=1)], "killed"),
        ([began(10, host="another")], "unknown"),
    ],
)
def test_status(tmp_path: Path, ends: list[dict[str, Any]], expected: str) -> None:
    reader = read(make_run(tmp_path / "run", [began(), *workers(1, [0, 1]), *ends]))
    assert reader.status == expected
    row = summary(reader)
    assert row["status"] == expected
    assert row["workers"] == (
        0 if ends and ends[-1]["event"] == "began" and expected == "running" else 2
    )
    assert row["command"] == "lockstep run mnist"
    assert row["parameters"] == 7850


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    """Without `began`, times and pace: the loss comes from the ledger."""
    events = [*workers(1, [0, 1]), line(2, "first_step"), line(3, "finished", steps=40)]
    folder = make_run(tmp_path / "run", events)
    write_ledger(folder, [1 / (n + 1) for n in range(40)])
    reader = read(folder)
    assert [row[1] for row in reader.history.progress.rows] == list(range(1, 41))
    assert summary(reader)["loss"] == 1 / 40
    assert summary(reader)["status"] == "finished"


def test_a_folder_is_read_while_it_is_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [began(), *workers(1, [0, 1])])
    reader = read(folder)
    assert not reader.refresh()
    whole = json.dumps(line(2, "died", host=HERE, worker=1, step=3)).encode() + b"\n"
    with (folder / "events.jsonl").open("ab", buffering=0) as file:
        for part in (whole[:20], whole[20:-1]):
            file.write(part)
            assert not reader.refresh()
        file.write(whole[-1:] + whole[:9])
        assert reader.refresh()
    assert [row[2] for row in reader.history.marks.rows] == ["died"]
    append(folder, [])
    (folder / "live.jsonl").write_text("".join(json.dumps(e) + "\n" for e in pace(5, 10)))
    assert reader.refresh()
    live = reader.history.live_rows(reader.live)
    assert live["progress"][0][1] == 10
    assert [row[0] for row in live["times"]] == [0, 1]
    (folder / "events.jsonl").write_text(json.dumps(began()) + "\n")  # another file, and shorter
    assert reader.refresh()
    assert reader.generation == 1
    assert not reader.history.marks.rows


def test_of_a_long_run_the_ends_are_enough_for_a_list(tmp_path: Path) -> None:
    events = [began(), *workers(1, [0, 1])]
    for second in range(2, 3000):
        events += pace(second, 10 * second)
    folder = make_run(tmp_path / "runs" / "long", [*events, line(3000, "paused", step=29990)])
    assert (folder / "events.jsonl").stat().st_size > 4 * END_BYTES
    (row,) = RunList(tmp_path / "runs").summaries()
    assert (row["status"], row["step"], row["command"]) == ("paused", 29990, "lockstep run mnist")


def test_names_are_looked_up_and_never_paths(tmp_path: Path) -> None:
    make_run(tmp_path / "secret")
    make_run(tmp_path / "runs" / "one")
    runs = RunList(tmp_path / "runs")
    assert runs.find("one") == tmp_path / "runs" / "one"
    for name in ("../secret", "..", "", ".", str(tmp_path / "secret"), "one/", "one/../../secret"):
        assert runs.find(name) is None
    only = RunList(tmp_path / "runs" / "one")
    assert only.single
    assert list(only.folders()) == ["one"]
    with pytest.raises(RunFolderError):
        RunList(tmp_path / "nothing")


def test_settings_that_differ_from_their_defaults_come_first(tmp_path: Path) -> None:
    found = details(read(make_run(tmp_path / "run", seed=7, weird=HOSTILE)).manifest)
    assert found["changed"][0] == ["model", "cnn"]
    assert ["seed", "7"] in found["changed"]
    assert ["weird", HOSTILE] in found["changed"]
    assert ["clip_grad_norm", "–"] in found["same"]


def test_small_parts() -> None:
    assert merge_spans([(5, 9), (0, 3), (2, 5), (20, 21)]) == [[0, 9], [20, 21]]
    table = Table(2)
    for number in range(10):
        table.add(number)
    assert len(table) == 10
    assert table.since(9) == [[9]]
    assert table.since(0)[-1] == [9]
    rows = [[lane, n, n + 1, [1.0, 0.0]] for n in range(100) for lane in (0, 1)]
    thin = thin_times(rows, 20)
    assert len(thin) <= 22
    assert sum(row[3][0] for row in thin) == 200
    assert {row[0] for row in thin} == {0, 1}


def test_pipes_hold_up_nobody(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [began()])
    for name in ("events.jsonl", "result.json", "live.jsonl", "ledger.jsonl"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert find_parting(folder / "ledger.jsonl", folder / "ledger.jsonl").equal == 0
    assert not LedgerCheck(folder / "ledger.jsonl").advance()
    for name in ("events.jsonl", "ledger.jsonl"):
        with pytest.raises(RunFolderError, match="no regular file"):
            read(folder)
        (folder / name).unlink()
    assert read(folder).status == "unknown"


@pytest.mark.parametrize("seed", range(3))
def test_what_is_nonsense_stops_no_reader(tmp_path: Path, seed: int) -> None:
    """Events, manifests and results with values of any kind, at any place."""
    generator = random.Random(seed)
    odd: list[Any] = [None, -1, 1e308, "x", HOSTILE, [], {}, [1, "2"], {"a": {"b": []}}, 2**63]
    names = [*BY_NAME, "other"]
    fields = sorted({field for kind in BY_NAME.values() for field in kind.__struct_fields__})
    fields.remove("time")
    events = [
        {"time": generator.choice([at_time, HOSTILE, "", "9999-12-31T23:59:59.999+00:00"]),
         "event": generator.choice(names),
         **{name: generator.choice(odd) for name in generator.sample(fields, 4)}}
        for at_time in ["2026-01-01T00:00:00.000+00:00"] * 400
    ]  # fmt: skip
    folder = make_run(tmp_path / "run", events)
    manifest = json.loads((folder / "manifest.json").read_text())
    for part in ("plan", "job", "source", "profile"):
        manifest[part] = generator.choice([None, [], "x", {"steps": HOSTILE, "reasons": 3}])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "result.json").write_text(json.dumps({"metrics": generator.choice(odd), "steps": []}))
    reader = read(folder)
    json.dumps(summary(reader))
    json.dumps(details(reader.manifest))
    RunList(tmp_path).summaries()

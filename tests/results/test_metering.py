"""Metering: intervals that grow with the run, sums that stay exact, hosts that say nonsense."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from lockstep.results.event_schema import Event, Progressed, Timed, parse_event
from lockstep.results.ledger import StepRecord
from lockstep.results.metering import LIVE_SECONDS, Meter, Pace, checked_times, keep_seconds
from lockstep.results.run_folder import Events, RunFolder


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def record(step: int, loss: float = 1.0, norm: float | None = None) -> StepRecord:
    return StepRecord(step=step, data_epoch=0, samples=8, loss=loss, units={}, norm=norm)


def times(worker: int = 0, compute: float = 0.4) -> dict[str, Any]:
    return {"host": "a", "seconds": 0.5, "workers": {str(worker): [compute, 0, 0, 0, 0, 0, 0]}}


def events(folder: RunFolder) -> list[Event | None]:
    return [parse_event(line) for line in folder.events_path.read_bytes().splitlines()]


def test_a_long_run_writes_few_lines(tmp_path: Path) -> None:
    """Steps of 28 hours; each is counted once, and no line is made for it."""
    folder, clock = RunFolder(tmp_path), Clock()
    meter = Meter(folder, Events(folder.events_path), clock=clock)
    for step in range(200_000):
        meter.commit(record(step))
        if step % 200 == 0:
            clock.now += 100.0
            meter.timed(times())
            meter.look(2)
    meter.flush()
    found = events(folder)
    assert 1000 < len(found) < 2100
    assert folder.events_path.stat().st_size < 2_000_000
    progressed = [event for event in found if isinstance(event, Progressed)]
    assert sum(event.steps for event in progressed) == 200_000
    assert progressed[-1].step == 200_000
    told = [event for event in found if isinstance(event, Timed)]
    assert sum(event.workers[0].compute for event in told) == pytest.approx(1000 * 0.4, rel=1e-3)


def test_intervals_grow_with_the_run() -> None:
    assert keep_seconds(0) == keep_seconds(500) == LIVE_SECONDS
    assert keep_seconds(86_400) == pytest.approx(172.8)


def test_what_is_live_is_there_at_once_and_gone_at_the_end(tmp_path: Path) -> None:
    folder, clock = RunFolder(tmp_path), Clock()
    meter = Meter(folder, Events(folder.events_path), clock=clock)
    clock.now += 10_000
    meter.commit(record(0))
    meter.look(1)  # kept: nothing has been for long
    clock.now += 1.1
    meter.commit(record(1, loss=0.25))
    meter.timed(times())
    meter.look(1)
    live = [parse_event(line) for line in folder.live_path.read_bytes().splitlines()]
    assert isinstance(live[0], Progressed)
    assert (live[0].step, live[0].loss, live[0].steps) == (2, 0.25, 1)
    assert isinstance(live[1], Timed)
    assert len(events(folder)) == 1
    meter.flush()
    meter.close()
    assert not folder.live_path.exists()
    assert len(events(folder)) == 3


def test_losses_that_are_not_finite_are_left_out_of_the_mean() -> None:
    pace = Pace()
    for step, loss in enumerate([1.0, math.nan, 3.0, math.inf]):
        pace.add(record(step, loss, norm=2.0))
    fields = pace.fields(4, 1.0, 1)
    assert (fields["loss"], fields["low"], fields["high"], fields["norm"]) == (2.0, 1.0, 3.0, 2.0)
    assert fields["steps"] == 4
    assert Pace().fields(0, 1.0, 1)["loss"] is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"host": "a", "seconds": math.inf, "workers": {}},
        {"host": "a", "seconds": -1.0, "workers": {}},
        {"host": "a", "seconds": 1.0, "workers": {"x": [1]}},
        {"host": "a", "seconds": 1.0, "workers": {"0": [math.nan]}},
        {"host": "a", "seconds": 1.0, "workers": {"0": "compute"}},
        {"host": "a", "seconds": 1.0, "workers": {str(n): [] for n in range(5000)}},
        {"host": 3, "seconds": 1.0, "workers": {}},
    ],
)
def test_times_that_cannot_be_are_not_taken(fields: dict[str, Any]) -> None:
    assert checked_times(fields) is None


def test_a_folder_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    clock = Clock()
    meter = Meter(RunFolder(tmp_path / "gone"), Events(None), clock=clock)
    clock.now += 0.6
    meter.commit(record(0))
    meter.look(1)
    clock.now += 0.2
    meter.commit(record(1))
    meter.look(1)
    meter.close()


def test_learning_rate_and_memory_are_those_of_the_end(tmp_path: Path) -> None:
    folder, clock = RunFolder(tmp_path), Clock()
    meter = Meter(folder, Events(folder.events_path), clock=clock)
    for step, lr in enumerate((0.4, 0.2, 0.1)):
        meter.commit(dataclasses.replace(record(step), lr=lr))
        meter.timed({**times(), "memory": {"0": 1000 + step, "1": 7}})
        clock.now += 0.3
        meter.look(2)
    meter.flush()
    found = events(folder)
    assert [e.lr for e in found if isinstance(e, Progressed)][-1] == 0.1
    assert [e.memory for e in found if isinstance(e, Timed)][-1] == {0: 1002, 1: 7}


@pytest.mark.parametrize("memory", [{"0": -1}, {"0": 1 << 70}, {"0": "much"}, [1], {"a": 1}])
def test_memory_that_cannot_be_is_not_taken(memory: Any) -> None:
    assert checked_times({**times(), "memory": {"0": 1}}) is not None
    assert checked_times({**times(), "memory": memory}) is None

"""When checkpoints are due by time: as asked, or by default where they cost next to nothing."""

from __future__ import annotations

import pytest

from lockstep.coordinator.checkpoint_timer import COST_SHARE, CheckpointTimer
from lockstep.coordinator.stop_schedule import StopSchedule


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_by_default_there_is_one_a_minute() -> None:
    clock = Clock()
    timer = CheckpointTimer(None, automatic=True, state_bytes=1000, clock=clock)
    assert (timer.due, timer.affordable) == (False, False)
    clock.now += 10
    assert (timer.due, timer.affordable) == (False, True)
    clock.now += 50
    assert timer.due
    timer.taken(0.01, lambda: 0.1)
    assert (timer.due, timer.affordable) == (False, False)
    clock.now += 60
    assert timer.due


@pytest.mark.parametrize("cost", [0.7, 5.0, 60.0])
def test_they_cost_a_hundredth_of_the_time_at_most(cost: float) -> None:
    clock = Clock()
    timer = CheckpointTimer(None, automatic=True, state_bytes=0, clock=clock)
    timer.taken(cost / 2, lambda: cost / 2)
    clock.now += cost / COST_SHARE - 1
    assert (timer.due, timer.affordable) == (False, False)
    clock.now += 2
    assert (timer.due, timer.affordable) == (True, True)


def test_a_large_state_is_taken_to_be_costly_from_the_start() -> None:
    clock = Clock()
    timer = CheckpointTimer(None, automatic=True, state_bytes=4 << 30, clock=clock)
    clock.now += 300
    assert not timer.affordable


def test_what_a_job_asks_for_is_done_whatever_it_costs() -> None:
    clock = Clock()
    timer = CheckpointTimer(1.0, automatic=False, state_bytes=4 << 30, clock=clock)
    clock.now += 1
    assert (timer.due, timer.affordable) == (True, False)


def test_where_nothing_was_asked_for_and_nothing_is_automatic() -> None:
    clock = Clock()
    timer = CheckpointTimer(None, automatic=False, state_bytes=0, clock=clock)
    clock.now += 1e6
    assert (timer.due, timer.affordable) == (False, False)


@pytest.mark.parametrize(("step", "end"), [(1, 10), (9, 10), (10, 10), (11, 20)])
def test_ends_of_epochs(step: int, end: int) -> None:
    assert StopSchedule(steps=100, steps_per_epoch=10).epoch_end(step) == end

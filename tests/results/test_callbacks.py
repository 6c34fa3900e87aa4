"""How many steps a callback is told of, where it limits that."""

from __future__ import annotations

import threading

from lockstep.results.callbacks import (
    STEPS_AT_ONCE,
    Callback,
    CallbackThreads,
    EvaluationDone,
    RunEnded,
    StepAllowance,
    StepDone,
)
from lockstep.results.ledger import StepRecord

ENDED = RunEnded(result=None, error="")


class Hears(Callback):
    """Notes the steps and evaluations that it hears of, as far as it may."""

    steps_per_second: float | None = 1e-9

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.ended = threading.Event()

    def on_step(self, step: StepDone) -> None:
        self.heard.append(("step", step.step))

    def on_evaluation(self, evaluation: EvaluationDone) -> None:
        self.heard.append(("evaluation", evaluation.step))

    def on_end(self, end: RunEnded) -> None:
        self.ended.set()


class HearsAll(Hears):
    """Without a limit."""

    steps_per_second = None


def record(step: int) -> StepRecord:
    return StepRecord(step=step, data_epoch=0, samples=1, loss=0.5, units={})


def test_an_allowance_grows_with_time_up_to_its_size() -> None:
    now = [0.0]
    allowance = StepAllowance(4.0, lambda: now[0])
    assert sum(allowance.take() for _ in range(5000)) == STEPS_AT_ONCE
    now[0] = 0.2  # less than what one step takes
    assert not allowance.take()
    now[0] = 0.3
    assert allowance.take()
    assert not allowance.take()
    now[0] = 1.3
    assert sum(allowance.take() for _ in range(100)) == 4
    now[0] = 1e9
    assert sum(allowance.take() for _ in range(5000)) == STEPS_AT_ONCE


def test_no_limit_allows_any_number() -> None:
    allowance = StepAllowance(None, lambda: 0.0)
    assert all(allowance.take() for _ in range(3 * STEPS_AT_ONCE))


def test_steps_beyond_are_left_out_but_for_the_last() -> None:
    limited, free = Hears(), HearsAll()
    threads = CallbackThreads([limited, free])
    for step in range(STEPS_AT_ONCE + 5):
        threads.step(record(step))
    threads.evaluated(STEPS_AT_ONCE + 5, 0, {"loss": 0.25})
    for step in range(STEPS_AT_ONCE + 5, STEPS_AT_ONCE + 9):
        threads.step(record(step))
    assert not threads.end(ENDED)
    assert limited.ended.is_set()
    first = [("step", step) for step in range(STEPS_AT_ONCE)]
    evaluation = ("evaluation", STEPS_AT_ONCE + 5)
    last = ("step", STEPS_AT_ONCE + 8)
    assert limited.heard == [*first, ("step", STEPS_AT_ONCE + 4), evaluation, last]
    assert [step for kind, step in free.heard if kind == "step"] == list(range(STEPS_AT_ONCE + 9))


def test_nothing_is_told_twice() -> None:
    limited = Hears()
    threads = CallbackThreads([limited])
    for step in range(3):
        threads.step(record(step))
    threads.evaluated(3, 0, {"loss": 0.25})
    assert not threads.end(ENDED)
    assert limited.heard == [("step", 0), ("step", 1), ("step", 2), ("evaluation", 3)]

"""Decisions from held-out metrics, compared with those that Lightning and torch document."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import JobError
from lockstep.planning.metric_decisions import (
    Evaluation,
    Monitor,
    best_of,
    early_end,
    stop_reason,
)

NAN = math.nan


def monitor(mode: str = "min", patience: int | None = 2, min_delta: float = 0.0) -> Monitor:
    return Monitor(metric="m", mode=mode, patience=patience, min_delta=min_delta)


def evaluations(*values: float) -> list[Evaluation]:
    return [Evaluation(step=10 * n, metrics={"m": v}) for n, v in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("values", "mode", "patience", "min_delta", "end"),
    [
        ((3, 2, 1, 0), "min", 1, 0.0, None),
        ((3, 3), "min", 1, 0.0, 20),
        ((3, 2, 2, 2), "min", 2, 0.0, 40),
        ((3, 2, 2, 1, 2, 2), "min", 2, 0.0, 60),
        ((1, 2, 3), "max", 1, 0.0, None),
        ((1, 2, 2), "max", 1, 0.0, 30),
        ((1.0, 0.95, 0.89, 0.85), "min", 2, 0.1, None),  # little by little: compared with the last
        ((1.0, 0.96, 0.92), "min", 2, 0.1, 30),
        ((NAN, NAN), "min", 2, 0.0, 20),
        ((NAN, 1, NAN, 0.5, NAN, NAN), "min", 2, 0.0, 60),
        ((1.0, -math.inf, 0.5), "min", 1, 0.0, 20),
        ((math.inf, 1.0, -math.inf, -math.inf), "min", 2, 0.0, 40),
        ((1,) * 9, "min", None, 0.0, None),
    ],
)
def test_when_a_run_ends(
    values: tuple[float, ...], mode: str, patience: int | None, min_delta: float, end: int | None
) -> None:
    rule = monitor(mode, patience, min_delta)
    found = evaluations(*values)
    assert early_end(found, rule) == end
    assert bool(stop_reason(found, rule)) == (end == found[-1].step)
    assert early_end(found, None) is None


@pytest.mark.parametrize(
    ("values", "mode", "step"),
    [
        ((3, 1, 2, 1), "min", 20),  # the first of equals
        ((3, 1, 2), "max", 10),
        ((NAN, 2, NAN), "min", 20),
        ((NAN,), "min", None),
        ((2, -math.inf, math.inf), "min", 10),
        ((), "min", None),
    ],
)
def test_which_is_the_best(values: tuple[float, ...], mode: str, step: int | None) -> None:
    best = best_of(evaluations(*values), monitor(mode))
    assert (None if best is None else best.step) == step


def test_the_best_of_those_that_are_there() -> None:
    best = best_of(evaluations(3, 1, 2), monitor(), among={10, 30})
    assert best is not None
    assert best.step == 30


@given(st.lists(st.floats(-9, 9) | st.just(NAN)), st.integers(1, 4), st.floats(0, 2))
def test_as_a_loop_that_waits(values: list[float], patience: int, min_delta: float) -> None:
    """The loop of Keras and Lightning, which goes on from evaluation to evaluation."""
    best, waited, end = math.inf, 0, None
    for number, value in enumerate(values, start=1):
        if value < best - min_delta:
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            end = 10 * number
            break
    assert early_end(evaluations(*values), monitor("min", patience, min_delta)) == end


def test_a_metric_that_is_not_there_is_named() -> None:
    with pytest.raises(JobError, match="the metric 'other'") as error:
        best_of(evaluations(1), Monitor(metric="other", mode="min", patience=None, min_delta=0.0))
    assert "m" in error.value.expected

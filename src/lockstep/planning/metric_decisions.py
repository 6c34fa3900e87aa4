"""Metric decisions: from held-out metrics to which state is best, and when to stop. Pure.

The evaluations that they are made of are in the ledger, so everybody can make them again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lockstep.errors import JobError

if TYPE_CHECKING:
    from lockstep.planning.plan import Plan

Told = tuple[int, float]
"""After how many steps a schedule's metric was evaluated, and what it was."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Evaluation: the held-out metrics after `step` committed steps."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Monitor: the metric that a job goes by, and when it stops."""

    metric: str
    mode: str
    patience: int | None
    min_delta: float

    @staticmethod
    def of(plan: Plan) -> Monitor | None:
        """What the plan says of it; None: it goes by none."""
        if plan.monitor is None:
            return None
        return Monitor(
            metric=plan.monitor,
            mode=plan.monitor_mode,
            patience=plan.stop_patience,
            min_delta=plan.stop_min_delta,
        )

    def value(self, evaluation: Evaluation) -> float:
        """The metric.

        Raises:
            JobError: there is none of this name.
        """
        return metric_of(evaluation.metrics, self.metric, "the setting monitor")

    def improves(self, value: float, best: float | None, by: float = 0.0) -> bool:
        """Whether a value is better than the best so far, by more than `by`. One that is not finite
        never is."""
        if best is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < best - by if self.mode == "min" else value > best + by


def metric_of(metrics: Mapping[str, float], name: str, who: str) -> float:
    """A metric.

    Raises:
        JobError: there is none of this name. `who` asks for it.
    """
    if name not in metrics:
        raise unknown_metric(name, who, metrics)
    return metrics[name]


def unknown_metric(name: str, who: str, names: Collection[str]) -> JobError:
    """What to raise where `who` goes by a metric that the task does not have."""
    return JobError(
        f"{who} goes by the metric {name!r}, which the task does not have",
        expected=f"one of {', '.join(names)}" if names else "a metric of the task",
        found=name,
        fix="give the name of a held-out metric, or define it in Task.metrics or Task.score",
    )


def best_of(
    evaluations: Sequence[Evaluation], monitor: Monitor, among: Collection[int] | None = None
) -> Evaluation | None:
    """The evaluation with the best value, the first of equals; None: there is none with a value.

    `among`: the steps that count; None: all.
    """
    best: Evaluation | None = None
    for evaluation in evaluations:
        if among is not None and evaluation.step not in among:
            continue
        reference = None if best is None else monitor.value(best)
        if monitor.improves(monitor.value(evaluation), reference):
            best = evaluation
    return best


def stop_reason(evaluations: Sequence[Evaluation], monitor: Monitor | None) -> str:
    """Why the run ends after these evaluations; "": it goes on.

    It ends where the metric has not improved by more than `min_delta`, compared with the last
    value that had, in `patience` evaluations one after the other.
    """
    if monitor is None or monitor.patience is None:
        return ""
    for waited, best in list(_waits(evaluations, monitor))[-1:]:
        if waited < monitor.patience:
            return ""
        since = "at all" if best is None else f"since {monitor.value(best):.6g} at step {best.step}"
        times = "1 evaluation" if waited == 1 else f"{waited} evaluations"
        return f"{monitor.metric} has not improved {since}, in {times}"
    return ""


def early_end(evaluations: Sequence[Evaluation], monitor: Monitor | None) -> int | None:
    """After how many steps the run ends by its metric; None: these evaluations do not end it."""
    if monitor is None or monitor.patience is None:
        return None
    for evaluation, (waited, _) in zip(evaluations, _waits(evaluations, monitor), strict=True):
        if waited >= monitor.patience:
            return evaluation.step
    return None


def _waits(
    evaluations: Sequence[Evaluation], monitor: Monitor
) -> Iterator[tuple[int, Evaluation | None]]:
    """After each evaluation: how many have been no improvement since, and the last that was."""
    best: Evaluation | None = None
    waited = 0
    for evaluation in evaluations:
        reference = None if best is None else monitor.value(best)
        if monitor.improves(monitor.value(evaluation), reference, monitor.min_delta):
            best, waited = evaluation, 0
        else:
            waited += 1
        yield waited, best

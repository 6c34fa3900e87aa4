"""Metric watch: a run's evaluations, and what follows from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lockstep.planning.metric_decisions import (
    Evaluation,
    Monitor,
    Told,
    best_of,
    metric_of,
    stop_reason,
    unknown_metric,
)
from lockstep.planning.plan import Plan


class MetricWatch:
    """Keeps the evaluations that decide something, those before a resumption too."""

    def __init__(
        self, plan: Plan, scheduler_metric: str, evaluations: Sequence[Evaluation] = ()
    ) -> None:
        """`scheduler_metric`: what the task's schedule waits for; "": it does not wait."""
        self._monitor, self._scheduler_metric = Monitor.of(plan), scheduler_metric
        self._evaluations = list(evaluations)
        self.stop_reason = stop_reason(self._evaluations, self._monitor)
        """Why the run ends before its last step; "": it does not."""
        self.improved = False
        """Whether the last evaluation was the best."""

    @property
    def _wanted(self) -> list[tuple[str, str]]:
        """The metrics that somebody goes by, and who does."""
        wanted = [] if self._monitor is None else [(self._monitor.metric, "the setting monitor")]
        if self._scheduler_metric:
            wanted.append((self._scheduler_metric, "Task.scheduler_metric"))
        return wanted

    def check_names(self, names: Collection[str]) -> None:
        """Check that the metrics that somebody goes by are among all that there are.

        Raises:
            JobError: one is not.
        """
        for name, who in self._wanted:
            if name not in names:
                raise unknown_metric(name, who, names)

    def take(self, evaluation: Evaluation) -> None:
        """Take an evaluation, the last one perhaps for the second time.

        Raises:
            JobError: a metric that somebody goes by is not there.
        """
        self.check_names(evaluation.metrics)
        if self._evaluations and self._evaluations[-1].step == evaluation.step:
            self._evaluations.pop()
        self._evaluations.append(evaluation)
        self.stop_reason = stop_reason(self._evaluations, self._monitor)
        best = self._monitor and best_of(self._evaluations, self._monitor)
        self.improved = best is evaluation

    @property
    def told(self) -> tuple[Told, ...]:
        """What the task's schedule has been told."""
        if not self._scheduler_metric:
            return ()
        return tuple(
            (each.step, metric_of(each.metrics, self._scheduler_metric, "Task.scheduler_metric"))
            for each in self._evaluations
        )

"""LR schedule: the user's, stepped with the commits, and rolled back with the state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lockstep.errors import TaskError
from lockstep.job.task import Task
from lockstep.planning.metric_decisions import Told
from lockstep.system.torch_patches import mark_stepped

REMEMBERED = 1024
"""Steps: how far back the schedule goes without being run from its beginning."""

Options = list[dict[str, Any]]
"""What each parameter group holds beside its parameters."""


class Epochs(Protocol):
    """Knows when data epochs end."""

    @property
    def batch_size(self) -> int:
        """Samples of a step."""

    def ends_epoch(self, step: int) -> bool:
        """Whether a step is the last of its data epoch."""


class LrSchedule:
    """Sets the options of an optimizer's groups for each step. Workers inherit it, each its own.

    Raises:
        TaskError: what the task returned is no schedule.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        epochs: Epochs,
        *,
        waits: bool = True,
    ) -> None:
        """`waits`: whether it may wait for a held-out metric, which it is told."""
        self._task, self._optimizer, self._epochs = task, optimizer, epochs
        task.planned_batch_size = epochs.batch_size
        self._initial = _options(optimizer)
        self._known: dict[int, Options] = {}
        self.changed: set[tuple[int, str]] = set()
        """The options, by group, that the schedule has changed so far."""
        self._begin()
        if not waits:
            refuse_waiting(self._scheduler)
        self._told: list[Told] = []
        self._by_metric: list[Options] = []
        """Where it waits for a metric: the options after so many evaluations of it."""
        if self.metric:
            self.changed |= {(number, "lr") for number in range(len(optimizer.param_groups))}
            self._by_metric.append(_options(optimizer))

    @property
    def metric(self) -> str:
        """The held-out metric that it waits for; "": it does not wait."""
        return self._task.scheduler_metric if waits_for_metric(self._scheduler) else ""

    @property
    def rate(self) -> float:
        """The learning rate of the first group now; not a number: it has none."""
        try:
            return float(self._optimizer.param_groups[0]["lr"])
        except (LookupError, TypeError, ValueError):
            return math.nan

    def tell(self, told: Sequence[Told]) -> None:
        """Say what the metric was at each evaluation since the beginning of the run."""
        self._told = list(told)

    def _begin(self) -> None:
        before = _options(self._optimizer)
        self._scheduler = self._task.scheduler(self._optimizer)
        self._note_changed(before)
        check_schedule(self._scheduler)
        mark_stepped(self._optimizer)
        self._at = self._now = 0
        """After how many steps the scheduler is, and after how many the optimizer's options are."""

    def go_to(self, committed: int) -> None:
        """Set the options to what they are after so many committed steps, and no further: a step
        that others have to finish is finished at its own learning rate."""
        if self._scheduler is None:
            return
        if self.metric:
            self._follow(sum(step <= committed for step, _ in self._told))
            return
        if committed <= self._at and committed in self._known:
            self._set(self._known[committed])
            self._now = committed
            return
        if committed < self._at:
            self._set(self._initial)
            self._begin()
        elif self._now != self._at:
            self._set(self._known[self._at])
        every_step = self._task.scheduler_interval == "step"
        for step in range(self._at, committed):
            if every_step or self._epochs.ends_epoch(step):
                before = _options(self._optimizer)
                self._scheduler.step()
                self._note_changed(before)
        self._at = self._now = committed
        self._known[committed] = _options(self._optimizer)
        self._known.pop(committed - REMEMBERED, None)

    def _follow(self, evaluations: int) -> None:
        """Set the options to what they are after so many evaluations of the metric. All are kept:
        there are few, and a state that is put back may be older than the last."""
        known, schedule = self._by_metric, cast("ReduceLROnPlateau", self._scheduler)
        while len(known) <= evaluations:
            self._set(known[-1])  # the schedule goes on from what it has set last
            before = _options(self._optimizer)
            schedule.step(self._told[len(known) - 1][1])
            self._note_changed(before)
            known.append(_options(self._optimizer))
        self._set(known[evaluations])

    def _note_changed(self, before: Options) -> None:
        for number, (old, new) in enumerate(zip(before, _options(self._optimizer), strict=True)):
            for name, value in new.items():
                if name not in old or not _is_same(old[name], value):
                    self.changed.add((number, name))

    def _set(self, options: Options) -> None:
        for group, wanted in zip(self._optimizer.param_groups, options, strict=True):
            for name in group.keys() - wanted.keys() - {"params"}:
                del group[name]
            for name, value in wanted.items():
                if isinstance(value, torch.Tensor) and isinstance(group.get(name), torch.Tensor):
                    group[name].copy_(value)
                else:
                    group[name] = value


def _options(optimizer: torch.optim.Optimizer) -> Options:
    return [
        {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]


def _is_same(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return torch.equal(old, new)
    return old is new or bool(old == new)


def waits_for_metric(scheduler: object) -> bool:
    """Whether a schedule is stepped with a held-out metric: torch's, or one that says so."""
    return isinstance(scheduler, ReduceLROnPlateau) or getattr(scheduler, "waits", False)


def refuse_waiting(scheduler: object) -> None:
    """Refuse a schedule that waits for a metric, where it would not be told.

    Raises:
        TaskError: it does.
    """
    if waits_for_metric(scheduler):
        raise TaskError(
            "a schedule that waits for a metric cannot be used here",
            expected="a schedule that depends on the number of steps alone",
            found="ReduceLROnPlateau, of timm or with local_steps",
            fix="use torch.optim.lr_scheduler.ReduceLROnPlateau without local_steps, or another "
            "schedule, for instance torch.optim.lr_scheduler.CosineAnnealingLR",
        )


def check_schedule(scheduler: object) -> None:
    """Refuse what `Task.scheduler` may not return.

    Raises:
        TaskError: it cannot be stepped as a schedule.
    """
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TaskError(
            "Task.scheduler did not return a scheduler",
            expected="a torch.optim.lr_scheduler.LRScheduler, or None",
            found=repr(type(scheduler)),
            fix="return the scheduler itself; several in turn are a SequentialLR",
        )

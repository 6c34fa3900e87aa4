"""LR schedule: the user's, stepped with the commits, and rolled back with the state."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lockstep.errors import TaskError
from lockstep.job.task import Task
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

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, epochs: Epochs) -> None:
        self._task, self._optimizer, self._epochs = task, optimizer, epochs
        task.planned_batch_size = epochs.batch_size
        self._initial = _options(optimizer)
        self._known: dict[int, Options] = {}
        self.changed: set[tuple[int, str]] = set()
        """The options, by group, that the schedule has changed so far."""
        self._begin()

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


def check_schedule(scheduler: object) -> None:
    """Refuse what `Task.scheduler` may not return.

    Raises:
        TaskError: it cannot be stepped as a schedule.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise TaskError(
            "Task.scheduler returned a ReduceLROnPlateau, which waits for a metric",
            expected="a schedule that depends on the number of steps alone",
            found="ReduceLROnPlateau",
            fix="use another, for instance torch.optim.lr_scheduler.CosineAnnealingLR",
        )
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TaskError(
            "Task.scheduler did not return a scheduler",
            expected="a torch.optim.lr_scheduler.LRScheduler, or None",
            found=repr(type(scheduler)),
            fix="return the scheduler itself; several in turn are a SequentialLR",
        )

"""Task checks: whether a task has what every task needs, before anything is done with it."""

from __future__ import annotations

from lockstep.errors import TaskError
from lockstep.job.task import Task

_METHODS = {
    "model": "def model(self): the nn.Module to train",
    "train_data": "def train_data(self): a map-style data set",
    "loss": "def loss(self, model, batch): the mean loss over the batch",
    "optimizer": "def optimizer(self, params): a torch.optim.Optimizer over params",
}
"""The methods that a task must define, and their signatures."""


def check_complete(task: Task) -> Task:
    """The task, if it has every method that a task needs, and no attribute that hides one.

    Raises:
        TaskError: it has not.
    """
    missing = [
        name
        for name in _METHODS
        if getattr(getattr(task, name), "__func__", None) is getattr(Task, name)
    ]
    if missing:
        kind = type(task).__name__
        raise TaskError(
            f"the task {kind} has no {' and no '.join(missing)}",
            expected="; ".join(_METHODS[name] for name in missing),
            fix=f"write {'it' if len(missing) == 1 else 'them'} in class {kind}",
        )
    _check_attributes(task)
    return task


def _check_attributes(task: Task) -> None:
    """Refuse attributes that hide a method, and an unknown `scheduler_interval`."""
    from torch import nn

    kind = type(task).__name__
    for name, value in vars(task).items():
        if callable(getattr(Task, name, None)) and (
            isinstance(value, nn.Module) or not callable(value)
        ):
            raise TaskError(
                f"the task {kind} has an attribute {name}, which hides the method {name}()",
                expected=_METHODS.get(name, f"the method {name}() alone"),
                found=f"self.{name} is a {type(value).__name__}",
                fix="give the attribute another name",
            )
    if task.scheduler_interval not in ("step", "data_epoch"):
        raise TaskError(
            f"the scheduler_interval of {kind} is not one of its values",
            expected="step or data_epoch",
            found=repr(task.scheduler_interval),
            fix="name when the schedule is stepped",
        )

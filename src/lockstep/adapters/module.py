"""Adapter `from_module`: any `nn.Module` with a data set; timm's models and schedules too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lockstep.adapters.common import (
    answer_by,
    build_data,
    build_model,
    check_callable,
    draw_by,
)
from lockstep.errors import TaskError
from lockstep.job.loss_form import split_loss
from lockstep.job.task import Parameters, Task
from lockstep.optim.lr_schedule import check_schedule, refuse_waiting

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

Criterion = Callable[[Any, Any], Any]
"""`(outputs, targets) -> value`, such as `torch.nn.functional.cross_entropy`."""


def from_module(
    model: nn.Module | Callable[[], nn.Module],
    dataset: Dataset[Any] | Callable[[], Dataset[Any]],
    loss: Criterion,
    optimizer: Callable[[Parameters], torch.optim.Optimizer],
    *,
    eval_dataset: Dataset[Any] | Callable[[], Dataset[Any]] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    scheduler_interval: Literal["step", "data_epoch"] = "step",
    scheduler_metric: str = "loss",
    metrics: Mapping[str, Criterion] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    from_record: Callable[[Mapping[str, Any]], Any] | None = None,
    predict: Callable[[nn.Module, Any], Sequence[Mapping[str, Any]]] | None = None,
    keep_modes: bool = False,
    sample_weights: Any = None,
) -> Task:
    """Task of a plain PyTorch loop: `loss(model(inputs), targets).backward()` and a step.

    Args:
        model: the module, sent to the workers with its weights; or a function that builds it
            there, under the job's seed.
        dataset: map-style, of pairs `(inputs, targets)`; or a function that builds it. A
            data set is copied once: for a large one give a function.
        loss: the mean over a batch from `(outputs, targets)`, a scalar; or a pair of it and a
            mapping of what is to be logged, as `Task.loss` may return.
        optimizer: from the parameters, such as `functools.partial(torch.optim.SGD, lr=0.1)`.
        eval_dataset: the held-out data, of the same form.
        scheduler: from the optimizer, such as `functools.partial(StepLR, step_size=10)`. A
            schedule of timm counts updates (`t_in_epochs=False`), or with the interval
            `data_epoch` data epochs.
        scheduler_interval: when it is stepped.
        scheduler_metric: the held-out metric that a `ReduceLROnPlateau` is stepped with instead,
            after each evaluation.
        metrics: held-out metrics beside the loss, from `(outputs, targets)`: one number per
            sample, `[n]`, or the mean over the batch.
        collate: samples to a pair `(inputs, targets)`; default: torch's `default_collate`.
        from_record: from a record of a file to predict from: the sample for `collate`. With
            `default_collate` the inputs alone are enough.
        predict: from `(model, batch)`, a mapping for each sample.
        keep_modes: leave modules that are in eval mode in it, such as a frozen backbone;
            by default `model.train()` is called, as plain loops do.
        sample_weights: one number per sample, by which they are drawn, as `WeightedRandomSampler`
            takes them; or a function of the data set that returns them.

    Raises:
        JobError: an argument is of the wrong kind.
    """
    check_callable("model", model, "an nn.Module, or lambda: Net()")
    check_callable("loss", loss, "torch.nn.functional.cross_entropy")
    check_callable("optimizer", optimizer, "partial(torch.optim.SGD, lr=0.1)")
    check_callable("scheduler", scheduler, "partial(StepLR, step_size=10)", optional=True)
    check_callable("collate", collate, "a function of a list of samples", optional=True)
    for name, metric in (metrics or {}).items():
        check_callable(f"the metric {name!r}", metric, "a function of (outputs, targets)")
    task = ModuleTask(model, dataset, loss, optimizer, eval_dataset, scheduler, metrics or {})
    task.scheduler_interval, task.keep_modes = scheduler_interval, keep_modes
    task.scheduler_metric = scheduler_metric
    if collate is not None:
        task.collate = collate  # type: ignore[method-assign, assignment]
    answer_by(task, from_record, predict)
    draw_by(task, sample_weights)
    return task


class ModuleTask(Task):
    """Task made by `from_module`."""

    def __init__(
        self,
        model: Any,
        dataset: Any,
        loss: Criterion,
        optimizer: Callable[[Parameters], torch.optim.Optimizer],
        eval_dataset: Any,
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None,
        metrics: Mapping[str, Criterion],
    ) -> None:
        self._model, self._dataset, self._eval_dataset = model, dataset, eval_dataset
        self._criterion, self._metrics = loss, dict(metrics)
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self.made_from = (model, loss, optimizer, *self._metrics.values())

    def model(self) -> nn.Module:
        return build_model(self._model)

    def train_data(self) -> Dataset[Any]:
        data: Dataset[Any] = build_data(self._dataset)
        return data

    def eval_data(self) -> Dataset[Any] | None:
        data: Dataset[Any] | None = build_data(self._eval_dataset)
        return data

    def loss(self, model: nn.Module, batch: Any) -> Any:
        inputs, targets = _pair(batch)
        return self._criterion(model(inputs), targets)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        return self._make_optimizer(params)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        schedule = None if self._make_scheduler is None else self._make_scheduler(optimizer)
        if hasattr(schedule, "step_update"):
            return _TimmSchedule(schedule, self.scheduler_interval)  # type: ignore[return-value]
        return schedule

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        inputs, targets = _pair(batch)
        outputs = model(inputs)
        loss, beside = split_loss(self._criterion(outputs, targets))
        others = {name: metric(outputs, targets) for name, metric in self._metrics.items()}
        return {"loss": loss, **beside, **others}


class _TimmSchedule:
    """A schedule of timm, which takes the number of updates, with the `step()` of PyTorch's."""

    def __init__(self, schedule: Any, interval: Literal["step", "data_epoch"]) -> None:
        refuse_waiting(getattr(schedule, "lr_scheduler", None))
        check_schedule(schedule)
        if schedule.t_in_epochs != (interval == "data_epoch"):
            raise TaskError(
                "timm's schedule would never be stepped",
                expected='t_in_epochs=False with scheduler_interval "step", True with "data_epoch"',
                found=f"t_in_epochs={schedule.t_in_epochs}, scheduler_interval={interval!r}",
                fix="change one of them; t_initial and warmup_t count the same",
            )
        self._set = schedule.step if schedule.t_in_epochs else schedule.step_update
        self._count = 0

    def step(self) -> None:
        self._count += 1
        self._set(self._count)


def _pair(batch: Any) -> tuple[Any, Any]:
    """The inputs and targets of a batch. Raises: TaskError: the batch is not a pair."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    keys = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    raise TaskError(
        "a batch is not a pair of inputs and targets",
        expected="(inputs, targets), as loss(model(inputs), targets) needs them",
        found=f"a {type(batch).__name__}{keys}",
        fix="give collate=, a function that makes such a pair, or write a lockstep.Task",
    )

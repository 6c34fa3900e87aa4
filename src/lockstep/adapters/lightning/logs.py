"""Logs: the values that a LightningModule logs during evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lockstep.adapters.lightning.validation_state import Kept, is_metric
from lockstep.errors import TaskError


class Logged:
    """Logged: keeps what `self.log` and `self.log_dict` are called with."""

    def __init__(self, kept: Kept, module: nn.Module) -> None:
        self._kept, self._module = kept, module
        self.numbers: dict[str, torch.Tensor | float] = {}
        self.metrics: dict[str, str] = {}
        """By the logged name, the module's name of a torchmetrics metric, computed after all
        batches."""

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Keep a number or a metric; all options but reduce_fx are ignored.

        Raises:
            TaskError: the value is not a mean over the batch.
        """
        if is_metric(value):
            self.metrics[name] = self._kept.name_of(self._module, value)
            return
        reduce = options.get("reduce_fx", "mean")
        if reduce not in ("mean", torch.mean) or not _is_number(value):
            raise TaskError(
                f"the logged value {name!r} is not a number that can be averaged over samples",
                expected="a number or a tensor of one element, with reduce_fx='mean', or a metric "
                "of torchmetrics",
                found=f"a {type(value).__name__}, reduce_fx={reduce!r}",
                fix="log the mean over the batch, for an accuracy (scores.argmax(1) == labels)"
                ".float().mean(); otherwise log a metric, or log in on_validation_epoch_end",
            )
        self.numbers[name] = value

    def log_dict(self, values: Mapping[str, Any], *args: Any, **options: Any) -> None:
        """Keep each value of a mapping, which may be a MetricCollection."""
        for name, value in values.items():
            self.log(name, value, **options)


@contextlib.contextmanager
def logging_to(module: nn.Module, logged: Logged | None) -> Iterator[None]:
    """Have the module log to `logged`, or nowhere, within the block."""
    log = _drop if logged is None else logged.log
    log_dict = _drop if logged is None else logged.log_dict
    # In the instance's dict, around nn.Module.__setattr__.
    vars(module).update(log=log, log_dict=log_dict)
    try:
        yield
    finally:
        del vars(module)["log"], vars(module)["log_dict"]


def _drop(*args: Any, **options: Any) -> None:
    """Ignore what is logged, as in training."""


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float)

"""Optimizers: what configure_optimizers returns, in every form documented for one optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lockstep.errors import OptimizerError, TaskError
from lockstep.job.task import Parameters
from lockstep.optim.lr_schedule import check_schedule, waits_for_metric
from lockstep.system.torch_patches import mark_stepped

FORMS = (
    'an optimizer; [optimizer]; ([optimizer], [scheduler]); {"optimizer": ..., "lr_scheduler": ...}'
)


@dataclass(frozen=True, kw_only=True)
class Configured:
    """Configured: one optimizer, and its schedule if it has one."""

    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    interval: Literal["step", "data_epoch"] = "step"
    frequency: int = 1
    """Data epochs from one step of the schedule to the next."""
    monitor: str = ""
    """The held-out metric that the schedule waits for, if it does."""

    @staticmethod
    def of(module: Any) -> Configured:
        """The optimizer and schedule of the module's configure_optimizers.

        Raises:
            OptimizerError: there is no optimizer, or there are several.
            TaskError: the schedule is of a kind that is not supported.
        """
        optimizers, schedulers = _split(module.configure_optimizers())
        if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.Optimizer):
            raise OptimizerError(
                "configure_optimizers did not return one optimizer",
                expected=FORMS,
                found=f"{len(optimizers)}: {', '.join(type(o).__name__ for o in optimizers)}",
                fix="use one optimizer with parameter groups; several that take turns (as a GAN's) "
                "do not make one update per step",
            )
        if len(schedulers) > 1:
            raise TaskError(
                "configure_optimizers returned several schedules",
                expected="one",
                found=", ".join(type(scheduler).__name__ for scheduler in schedulers),
                fix="join them by torch.optim.lr_scheduler.SequentialLR or ChainedScheduler",
            )
        if not schedulers:
            return Configured(optimizer=optimizers[0])
        return _scheduled(optimizers[0], schedulers[0])


def bind(
    optimizer: torch.optim.Optimizer, module: torch.nn.Module, params: Parameters
) -> torch.optim.Optimizer:
    """The optimizer, over `params` instead of the module's parameters of the same names.

    With local steps, `params` are those of a copy."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    given = dict(params.named())
    for group in optimizer.param_groups:
        group["params"] = [given.get(names.get(id(p), ""), p) for p in group["params"]]
    return optimizer


def _split(found: Any) -> tuple[list[Any], list[Any]]:
    """The optimizers and the schedulers of any form."""
    if isinstance(found, Mapping):
        scheduler = found.get("lr_scheduler")
        return [found.get("optimizer")], [] if scheduler is None else [scheduler]
    if not isinstance(found, list | tuple):
        return [found], []
    if len(found) == 2 and isinstance(found[0], list | tuple):
        second = found[1]
        return list(found[0]), list(second) if isinstance(second, list | tuple) else [second]
    pairs = [_split(item) for item in found]
    return [o for one, _ in pairs for o in one], [s for _, some in pairs for s in some]


def _scheduled(optimizer: torch.optim.Optimizer, scheduler: Any) -> Configured:
    """The schedule, with Lightning's defaults: it is stepped after every data epoch."""
    options = {"interval": "epoch", "frequency": 1, "monitor": None}
    if isinstance(scheduler, Mapping):
        options |= {key: scheduler[key] for key in options if key in scheduler}
        scheduler = scheduler.get("scheduler")
    check_schedule(scheduler)
    interval, frequency, monitor = (options[key] for key in ("interval", "frequency", "monitor"))
    if waits_for_metric(scheduler) and (interval != "epoch" or not isinstance(monitor, str)):
        raise TaskError(
            "ReduceLROnPlateau waits for a held-out metric, after a data epoch",
            expected='{"scheduler": ..., "monitor": "val_loss"}, with the interval "epoch"',
            found=f"monitor={monitor!r}, interval={interval!r}",
            fix="see LightningModule.configure_optimizers",
        )
    known = interval in ("epoch", "step")
    if not known or not isinstance(frequency, int) or frequency < 1:
        found = f"interval={interval!r}, frequency={frequency!r}"
        raise TaskError(
            "the interval of the schedule is not one of its values",
            expected='interval "epoch" or "step", and a frequency of at least 1',
            found=found,
            fix="see LightningModule.configure_optimizers",
        )
    if interval == "step" and frequency > 1:
        raise TaskError(
            "the schedule is to be stepped every few steps",
            expected='frequency 1 with interval "step"',
            found=f"frequency {frequency}",
            fix="step it every time and stretch the schedule itself, as StepLR's step_size does",
        )
    return Configured(
        optimizer=optimizer,
        scheduler=scheduler,
        interval="step" if interval == "step" else "data_epoch",
        frequency=frequency if isinstance(frequency, int) else 1,
        monitor=monitor if isinstance(monitor, str) else "",
    )


class Following:
    """Following schedule: copies the group options of another optimizer, which has the schedule.

    configure_optimizers builds an optimizer and its schedule together, and a recovery builds the
    schedule anew: each time there is a fresh pair, of which only the group options are used.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, configured: Configured) -> None:
        self._optimizer, self._leader = optimizer, configured
        mark_stepped(configured.optimizer)
        self.waits = waits_for_metric(configured.scheduler)
        """Whether it is stepped with a metric."""
        self._steps = 0
        self._copy()

    def step(self, *metric: float) -> None:
        """Step the schedule, every `frequency` calls."""
        self._steps += 1
        if self._steps % self._leader.frequency == 0:
            self._leader.scheduler.step(*metric)
            self._copy()

    def _copy(self) -> None:
        groups = zip(self._optimizer.param_groups, self._leader.optimizer.param_groups, strict=True)
        for group, leading in groups:
            for name, value in leading.items():
                if name != "params":
                    group[name] = value

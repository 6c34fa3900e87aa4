"""A schedule goes back with the state, and then sets what it had set before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lockstep.job.task import Task
from lockstep.optim import lr_schedule as schedule
from lockstep.planning.sampling import Sampling

Make = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


class Scheduled(Task):
    def __init__(self, make: Make, interval: Any) -> None:
        self.make, self.scheduler_interval = make, interval

    def scheduler(self, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        return self.make(optimizer)


SCHEDULES: dict[str, tuple[Make, str]] = {
    "one-cycle": (lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=100), "step"),
    "warm-up-and-cosine": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.CosineAnnealingLR(o, 20)],
            milestones=[4],
        ),
        "step",
    ),
    "exponential": (lambda o: lr_scheduler.ExponentialLR(o, 0.9), "step"),
    "by-epoch": (lambda o: lr_scheduler.StepLR(o, 1, 0.5), "data_epoch"),
}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def begin(name: str, rate: str) -> tuple[schedule.LrSchedule, Callable[[], list[dict[str, Any]]]]:
    make, interval = SCHEDULES[name]
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups: list[dict[str, Any]] = [
        {"params": weights[:1]},
        {"params": weights[1:], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.1) if rate == "tensor" else 0.1)
    sampling = Sampling(samples=30, batch_size=10, shards=1, seed=0)

    def options() -> list[dict[str, Any]]:
        return [
            {name: _plain(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    return schedule.LrSchedule(Scheduled(make, interval), optimizer, sampling), options


@pytest.mark.parametrize("remembered", [1024, 3])
@pytest.mark.parametrize("rate", ["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_back_and_forth(
    name: str, rate: str, remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether what it had set is still remembered, or it has to begin anew."""
    monkeypatch.setattr(schedule, "REMEMBERED", remembered)
    straight, expected = begin(name, rate)
    wanted = []
    for step in range(25):
        straight.go_to(step)
        wanted.append(expected())
    other, found = begin(name, rate)
    for step in (0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 2, 3, 4, 20, 0, 1, 19, 20, 21, 22, 21, 24):
        other.go_to(step)
        assert found() == wanted[step], step


def test_a_schedule_that_begins_late_is_where_the_others_are() -> None:
    straight, expected = begin("one-cycle", "number")
    for step in range(18):
        straight.go_to(step)
    late, found = begin("one-cycle", "number")
    late.go_to(17)
    assert found() == expected()


class Waits(Task):
    scheduler_metric = "value"

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, min_lr=0.01)


@pytest.mark.parametrize("rate", ["number", "tensor"])
def test_one_that_waits_goes_back_and_forth(rate: str) -> None:
    """As a plain loop steps it, whatever it was asked for before, and told later."""
    values = [3.0, 2.0, 2.0, float("nan"), 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    told = [(3 * number, value) for number, value in enumerate(values, start=1)]

    def make() -> torch.optim.Optimizer:
        lr: Any = torch.tensor(0.1) if rate == "tensor" else 0.1
        return torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=lr)

    def lr_of(optimizer: torch.optim.Optimizer) -> float:
        return float(_plain(optimizer.param_groups[0]["lr"]))

    plain = make()
    plateau = Waits().scheduler(plain)
    wanted = [lr_of(plain)] * 3
    for value in values:
        plateau.step(value)
        wanted += [lr_of(plain)] * 3
    assert len(set(wanted)) > 3
    optimizer = make()
    sampling = Sampling(samples=30, batch_size=10, shards=1, seed=0)
    waiting = schedule.LrSchedule(Waits(), optimizer, sampling)
    assert waiting.metric == "value"
    assert waiting.changed == {(0, "lr")}
    for step, known in [(0, 0), (2, 0), (3, 0), (3, 1), (9, 3), (7, 3), (9, 3), (36, 12), (2, 12)]:
        waiting.tell(told[:known])
        waiting.go_to(step)
        assert lr_of(optimizer) == wanted[min(step, 3 * known + 2)], (step, known)
    late = schedule.LrSchedule(Waits(), make(), sampling)
    late.tell(told)
    late.go_to(20)
    assert lr_of(late._optimizer) == wanted[20]

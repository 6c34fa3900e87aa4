"""timm's models, optimizers and schedules by `from_module`: the bits of a plain loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset, TensorDataset

import lockstep
from lockstep.errors import TaskError
from lockstep.job.faults import Fault
from lockstep.job.task import Parameters, Task
from tests.support import reference_loop as reference

timm = pytest.importorskip("timm", reason="needs timm")

NUMBERS: dict[str, Any] = {"batch_size": 12, "steps": 5, "seed": 3, "eval_batch_size": 8}


def images(count: int, seed: int) -> TensorDataset:
    """Noise `[count, 3, 32, 32]`, and its classes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    return TensorDataset(pixels, torch.randint(4, (count,), generator=generator))


def build(name: str, **options: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=4, drop_path_rate=0.3, **options)
    return model


def adamw(params: Parameters) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    optimizer: torch.optim.Optimizer = create_optimizer_v2(params, opt="adamw", lr=1e-2)
    return optimizer


def cosine(optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    from timm.scheduler import CosineLRScheduler

    settings = {"t_initial": 5, "warmup_t": 2, "warmup_lr_init": 1e-4, "t_in_epochs": False}
    return CosineLRScheduler(optimizer, **(settings | options))


class Plain(Task):
    """What a user's own loop would have. The schedule is told how many updates there were."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make

    def model(self) -> nn.Module:
        return self.make()

    def train_data(self) -> Dataset[Any]:
        return images(32, 1)

    def eval_data(self) -> Dataset[Any]:
        return images(14, 2)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        return adamw(params)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        schedule = cosine(optimizer)
        updates = iter(range(1, 1000))
        schedule.step = lambda: schedule.step_update(next(updates))
        return schedule


@pytest.mark.parametrize(
    ("name", "options"),
    [("test_resnet", {}), pytest.param("test_vit", {"img_size": 32}, marks=pytest.mark.long)],
)
def test_a_model_of_timm(
    name: str, options: dict[str, Any], run_folders: Callable[[], str]
) -> None:
    """Batch statistics, whole paths dropped, timm's optimizer and its schedule; 1, 2 and 3 workers
    and 3 of which one is killed."""
    make = functools.partial(build, name, **options)
    settings: dict[str, Any] = {**NUMBERS, "threads": 1, "quiet": True}

    def run(**how: Any) -> lockstep.Result:
        task = lockstep.from_module(
            make, functools.partial(images, 32, 1), functional.cross_entropy, adamw,
            eval_dataset=functools.partial(images, 14, 2), scheduler=cosine,
        )  # fmt: skip
        return lockstep.run(task, out=run_folders(), **settings, **how)

    wanted = reference.train_unsharded(Plain(make), **NUMBERS)
    alone = run(workers=1, shards=1)
    assert (alone.folder / "model.safetensors").read_bytes() == wanted.file()
    summed = reference.train(Plain(make), shards=3, **NUMBERS)
    killed = run(workers=3, shards=3, faults=(Fault(worker_id=1, step=2, phase="backward"),))
    results = [*(run(workers=workers, shards=3) for workers in (1, 2, 3)), killed]
    for result in results:
        assert (result.folder / "model.safetensors").read_bytes() == summed.file()
        assert result.metrics == results[0].metrics
        assert result.fingerprint == results[0].fingerprint
    assert len(killed.recoveries) == 1


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (functools.partial(cosine, t_in_epochs=True), "would never be stepped"),
        (lambda optimizer: plateau(optimizer), "ReduceLROnPlateau"),
    ],
)
def test_schedules_that_are_refused(schedule: Callable[..., Any], says: str) -> None:
    task = lockstep.from_module(
        nn.Identity, images(4, 1), functional.cross_entropy, adamw, scheduler=schedule
    )
    with pytest.raises(TaskError, match=says):
        task.scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    from timm.scheduler import PlateauLRScheduler

    found = PlateauLRScheduler(optimizer)
    assert isinstance(found.lr_scheduler, ReduceLROnPlateau)
    return found

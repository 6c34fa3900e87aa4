"""Multi-layer perceptrons, and the optimizers and schedules that they are trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR
from torch.utils.data import Dataset, TensorDataset

from lockstep.job.task import Parameters, Task

SAMPLES, HELD_OUT, BATCH, STEPS = 109, 31, 26, 12
FEATURES, CLASSES = 12, 4


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *shape: int, seed: int = 2) -> torch.Tensor:
    """Whole numbers from 0 to below `high`."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


class Vectors(Task):
    """An MLP that classifies vectors, by SGD with Nesterov momentum."""

    inputs: tuple[int, ...] = (FEATURES,)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(normal(SAMPLES, *self.inputs), whole(CLASSES, SAMPLES))

    def eval_data(self) -> Dataset[Any] | None:
        inputs = normal(HELD_OUT, *self.inputs, seed=5)
        return TensorDataset(inputs, whole(CLASSES, HELD_OUT, seed=6), torch.arange(HELD_OUT))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        """`once` comes to `(2 ** HELD_OUT - 1) / HELD_OUT` if every sample is counted once."""
        inputs, labels, number = batch
        outputs = model(inputs)
        return {
            "loss": functional.cross_entropy(outputs, labels),
            "accuracy": outputs.argmax(1) == labels,
            "once": 2.0 ** number.double(),
        }


class By(Vectors):
    """The same by any class of `torch.optim`."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind, self.options = kind, options

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, self.kind)(params, **self.options)
        return made


class Matrices(By):
    """Only matrices, and no bias: Muon takes nothing else."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 16, bias=False), nn.Tanh(), nn.Linear(16, CLASSES, bias=False)
        )


class Scheduled(By):
    """A learning rate that changes with every step, and momentum with it."""

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        return OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1)


class ByLambda(By):
    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        return LambdaLR(optimizer, lambda step: 1 / (1 + step))


class ByEpoch(By):
    """A learning rate that changes with every data epoch."""

    scheduler_interval = "data_epoch"

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        return StepLR(optimizer, step_size=1, gamma=0.5)


class Wide(By):
    """A weight of 262,144 elements, which is cut into four blocks."""

    inputs = (512,)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))

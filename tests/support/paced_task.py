"""A task for tests that have to catch a run under way: its pace is set from outside.

Each shard takes `LOCKSTEP_TEST_PACE` seconds (default none). No number depends on it.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset, TensorDataset

import lockstep

PACE = "LOCKSTEP_TEST_PACE"
SAMPLES, HELD_OUT, FEATURES, CLASSES = 96, 20, 10, 3


class Paced(lockstep.Task):
    """Dropout, batch statistics and momentum: much that could be lost on the way."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(24, CLASSES),
        )  # fmt: skip

    def train_data(self) -> Dataset[Any]:
        return points(SAMPLES, seed=1)

    def eval_data(self) -> Dataset[Any] | None:
        return points(HELD_OUT, seed=2)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if model.training:
            time.sleep(float(os.environ.get(PACE, "0")))
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)


class Waiting(Paced):
    """A learning rate that waits for a held-out metric, and values beside the loss."""

    scheduler_metric = "accuracy"

    def loss(self, model: nn.Module, batch: Any) -> Any:
        scores = model(batch[0])
        if model.training:
            time.sleep(float(os.environ.get(PACE, "0")))
        return functional.cross_entropy(scores, batch[1]), {
            "accuracy": scores.argmax(1) == batch[1]
        }

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return ReduceLROnPlateau(optimizer, mode="max", factor=0.9, patience=1, min_lr=1e-3)


def points(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long())

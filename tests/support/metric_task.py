"""A task whose held-out metric is scripted.

`value` is read from a list by the data epoch, so that the decisions made of it are known; the loss
is a real one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset, TensorDataset

import lockstep

SAMPLES, HELD_OUT, BATCH, FEATURES, CLASSES = 60, 20, 20, 12, 4
EPOCH = SAMPLES // BATCH


def points(count: int, seed: int) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


class Metric(lockstep.Task):
    """`values`: what the metric is after each data epoch, the last one from then on. `plateau`:
    whether the learning rate is halved where it does not improve."""

    scheduler_metric = "value"

    def __init__(
        self, values: list[float], plateau: bool = False, scored: bool = False, broken: int = 99
    ) -> None:
        self.values, self.plateau, self.scored, self.broken = values, plateau, scored, broken

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.1), nn.Linear(8, CLASSES))

    def train_data(self) -> Dataset[Any]:
        return points(SAMPLES, 1)

    def eval_data(self) -> Dataset[Any] | None:
        return points(HELD_OUT, 2)

    def set_position(self, position: Any) -> None:
        self.position = position

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        if not self.plateau:
            return None
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.0)

    def _value(self) -> float:
        number = self.position.step // EPOCH - 1
        if number == self.broken:
            raise RuntimeError("the metric is broken")
        value: float = self.values[max(0, min(number, len(self.values) - 1))]
        return value

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        found = {"loss": self.loss(model, batch)}
        return found if self.scored else {**found, "value": self._value()}

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"labels": batch[1]} if self.scored else {}

    def score(self, outputs: dict[str, Any]) -> dict[str, float]:
        return {"value": self._value()} if self.scored else {}

    def baseline(self) -> dict[str, float]:
        return {"loss": 1.5}

    def from_record(self, record: Any) -> Any:
        return torch.tensor(record["x"])

    def predict(self, model: nn.Module, batch: Any) -> list[dict[str, Any]]:
        return [{"scores": row} for row in model(batch).tolist()]

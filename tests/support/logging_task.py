"""Tasks whose loss returns values beside it, in the forms that are taken and in others."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import lockstep

SAMPLES, HELD_OUT, BATCH, FEATURES, CLASSES = 109, 31, 26, 12, 4


def points(count: int, seed: int) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (count,), generator=generator))


class Logs(lockstep.Task):
    """Logs hits per sample, a mean with noise, a number, and the largest score."""

    def __init__(self, form: str = "") -> None:
        self.form = form

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, CLASSES)
        )

    def train_data(self) -> Dataset[Any]:
        return points(SAMPLES, 1)

    def eval_data(self) -> Dataset[Any] | None:
        return points(HELD_OUT, 2)

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def set_position(self, position: Any) -> None:
        self.position = position

    def loss(self, model: nn.Module, batch: Any) -> Any:
        scores = model(batch[0])
        loss = functional.cross_entropy(scores, batch[1])
        beside: dict[Any, Any] = {
            "größe": scores.max(),
            "accuracy": scores.argmax(1) == batch[1],
            "noisy": (scores * torch.rand_like(scores)).mean(1),
            "weight": 0.1 * len(batch[0]),
        }
        if not model.training:
            return loss, beside
        position = self.position
        match self.form:
            case "alone":
                return loss
            case "list":
                return [loss, beside]
            case "none":
                return loss, None
            case "three":
                return loss, beside, beside
            case "mapping first":
                return beside, loss
            case "taken":
                beside = {"loss": 1.0}
            case "no name":
                beside = {3: 1.0}
            case "matrix":
                beside = {"scores": scores}
            case "wrong length":
                beside = {"classes": torch.zeros(CLASSES + 1)}
            case "text":
                beside = {"text": "much"}
            case "many":
                beside = {f"value {number}": number for number in range(17)}
            case "by the shard":
                beside = {f"of {len(batch[0])}": 1.0}
            case "by the step" if position.step == 5:
                beside["new"] = 1.0
            case "not any more" if position.step == 5:
                return loss
            case "remembers":
                self.count = getattr(self, "count", 0) + 1
                beside = {"count": self.count}
            case "unseeded":
                beside = {"drawn": random.SystemRandom().random()}
        return loss, beside

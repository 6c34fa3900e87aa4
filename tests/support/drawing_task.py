"""Tasks that say in which order their samples come: by weights, or by lengths."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import lockstep

SAMPLES, HELD_OUT, FEATURES = 90, 20, 6


class Unlike(Dataset[Any]):
    """Two classes, one with a tenth of the samples, each with noise when it is looked at."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = (torch.arange(samples) % 10 == 0).long()
        self.x = torch.randn(samples, FEATURES, generator=generator)
        self.x[:, 0] += 2.0 * self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        noise = torch.randn(FEATURES) * random.random()
        return self.x[index] + noise, self.labels[index]


class Weighted(lockstep.Task):
    """Draws both classes equally often, and logs the smaller one's share."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 2))

    def train_data(self) -> Dataset[Any]:
        return Unlike(SAMPLES, 1)

    def eval_data(self) -> Dataset[Any] | None:
        return Unlike(HELD_OUT, 2)

    def sample_weights(self, data: Any) -> Any:
        return (1 / torch.bincount(data.labels) ** self.power)[data.labels]

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return functional.cross_entropy(model(batch[0]), batch[1]), {"share": batch[1].float()}

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return {"loss": functional.cross_entropy(model(batch[0]), batch[1])}

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)


class Grouped(Weighted):
    """Its samples have lengths."""

    def sample_weights(self, data: Any) -> Any:
        return None

    def sample_lengths(self, data: Any) -> Any:
        return (torch.arange(len(data)) * 37) % 50 + 1


class Still(Weighted):
    """The same without noise, which cannot be sent once for all."""

    def train_data(self) -> Dataset[Any]:
        return Labelled(*parts_of(SAMPLES, 1))

    def eval_data(self) -> Dataset[Any] | None:
        return Labelled(*parts_of(HELD_OUT, 2))


def parts_of(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    noisy = Unlike(samples, seed)
    return noisy.x, noisy.labels


class Labelled(TensorDataset):
    """Inputs and labels."""

    @property
    def labels(self) -> torch.Tensor:
        return self.tensors[1]

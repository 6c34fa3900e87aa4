"""Data sets that draw random numbers, or whose samples cannot be learned from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from tests.zoo.vectors import CLASSES, FEATURES, HELD_OUT, SAMPLES, Vectors, normal, whole


class Noisy(Dataset[Any]):
    """Augments with torch's, Python's and NumPy's random numbers."""

    def __init__(self, samples: int, seed: int) -> None:
        self.x, self.y = normal(samples, FEATURES, seed=seed), whole(CLASSES, samples)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        x = self.x[index] + 0.1 * torch.randn(FEATURES)
        x = x * random.uniform(0.9, 1.1) + float(np.random.normal())
        return (x.flip(0) if random.random() < 0.5 else x), self.y[index], index


class Augmented(Vectors):
    """Draws also where the model is made, and where the metrics are."""

    def model(self) -> nn.Module:
        model = super().model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(random.random() + np.random.rand() + torch.rand(()))
        return model

    def train_data(self) -> Dataset[Any]:
        return Noisy(SAMPLES, seed=1)

    def eval_data(self) -> Dataset[Any] | None:
        return Noisy(HELD_OUT, seed=5)

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        return {**super().metrics(model, batch), "draw": random.random() + float(torch.rand(()))}


class AtOnce(Noisy):
    """Fetches a batch's samples at once, drawing for all of them."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        noise = torch.randn(len(indices), FEATURES)
        return [
            (x, y, index)
            for x, y, index in zip(self.x[indices] + noise, self.y[indices], indices, strict=True)
        ]


class Fetched(Vectors):
    def train_data(self) -> Dataset[Any]:
        return AtOnce(SAMPLES, seed=1)

    def eval_data(self) -> Dataset[Any] | None:
        return AtOnce(HELD_OUT, seed=5)


class TurnsNan(Vectors):
    """A loss that is no number at one sample."""

    def train_data(self) -> Dataset[Any]:
        inputs = normal(SAMPLES, FEATURES)
        inputs[40] = float("nan")
        return TensorDataset(inputs, whole(CLASSES, SAMPLES))

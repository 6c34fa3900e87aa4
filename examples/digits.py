"""Softmax regression on 5,000 handwritten digits. First: lockstep data fetch mnist.

python examples/digits.py, or: lockstep run examples/digits.py:Digits --workers 2 --data-epochs 5
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lockstep
from lockstep.recipes.datasets import load_mnist


class Digits(lockstep.Task):
    """Which digit is it?"""

    def __init__(self, lr: float = 0.1) -> None:
        self.lr = lr

    def model(self) -> nn.Module:
        return nn.Linear(784, 10)

    def train_data(self) -> TensorDataset:
        return self.digits("train")

    def eval_data(self) -> TensorDataset:
        return self.digits("test")

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | float]:
        images, labels = batch
        return {"accuracy": model(images).argmax(dim=1) == labels}

    def digits(self, split: str) -> TensorDataset:
        arrays = load_mnist()
        images = torch.from_numpy(arrays[f"{split}_images"]).float().div_(255).flatten(1)
        return TensorDataset(images, torch.from_numpy(arrays[f"{split}_labels"]))


if __name__ == "__main__":
    # `shards` decides the numbers, `workers` only who computes them.
    settings: dict[str, Any] = {"data_epochs": 5, "batch_size": 64, "shards": 2, "threads": 1}
    for workers in (1, 2):
        result = lockstep.run(Digits(), workers=workers, quiet=True, **settings)
        accuracy = result.metrics["accuracy"]
        print(f"{workers} workers: accuracy {accuracy:.3f}, fingerprint {result.fingerprint[:16]}")

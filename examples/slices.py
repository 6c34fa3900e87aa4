"""Output = activation(W x + b), W cut into four slices: python examples/slices.py"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lockstep


class Waves(lockstep.Task):
    """The sum of sines, from sixteen numbers."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 1))

    def train_data(self) -> Any:
        x = torch.linspace(-2, 2, 16 * 4096).view(16, 4096).t().contiguous()
        return torch.utils.data.TensorDataset(x, x.sin().sum(1, keepdim=True))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-3)


if __name__ == "__main__":
    for cut in lockstep.plan(Waves(), slices=4, workers=1).cuts:
        print(cut["module"], cut["cut"], cut["pieces"], cut["reason"])
    for slices, workers in ((1, 1), (4, 1), (4, 2)):
        result = lockstep.run(Waves(), slices=slices, workers=workers, data_epochs=5, quiet=True)
        loss, model = result.metrics["train_loss"], type(result.model()).__name__
        print(f"{slices} slices, {workers} workers: {loss:.8f} {result.fingerprint[:16]} {model}")

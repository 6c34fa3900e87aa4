"""The tasks of `benchmarks.device_check`: small models that a GPU computes in ways of its own.

Nothing here is of Lockstep's test suite, so that the check runs where that is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import lockstep

SAMPLES, CLASSES, WIDTH, LENGTH = 512, 10, 64, 32


def _drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Mlp(lockstep.Task):
    """Linear layers, by Adam."""

    shape: tuple[int, ...] = (WIDTH,)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, CLASSES))

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        return TensorDataset(_drawn(SAMPLES, *self.shape, seed=1), labels)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-3, fused=True)


class Cnn(Mlp):
    """Convolutions with BatchNorm, by SGD."""

    shape = (3, 16, 16)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 64, CLASSES),
        )  # fmt: skip

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9)


class Transformer(Mlp):
    """Attention by scaled_dot_product_attention, with dropout."""

    shape = (LENGTH, WIDTH)

    def model(self) -> nn.Module:
        return nn.Sequential(Attention(), Attention(), nn.Flatten(), nn.Linear(2048, CLASSES))


class Attention(nn.Module):
    """One layer."""

    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.into(self.norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1 * self.training)
        out: torch.Tensor = x + self.out(mixed.transpose(1, 2).flatten(2))
        return out


CASES: dict[str, tuple[str, str]] = {
    "mlp": ("Mlp", "fp32"),
    "cnn": ("Cnn", "fp32"),
    "transformer": ("Transformer", "fp32"),
    "transformer-bf16": ("Transformer", "bf16"),
}
"""By name: the class, and the precision."""

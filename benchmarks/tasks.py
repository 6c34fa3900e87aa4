"""The benchmark's models as Lockstep tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import models
from lockstep.job import Parameters, Task

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset


class Benchmark(Task):
    """One of `models.CASES`, with the data and the optimizer that every contender has."""

    def __init__(self, name: str) -> None:
        self.name = name

    def model(self) -> nn.Module:
        """The model, freshly initialised."""
        return models.find(self.name).model()

    def train_data(self) -> Dataset[Any]:
        """All inputs and labels, in memory."""
        from torch.utils.data import TensorDataset

        return TensorDataset(*models.find(self.name).tensors())

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        return models.loss(model, batch)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """Fused Adam."""
        return models.adam(params)


class Pixels(Task):
    """The large transformer on MNIST's 5,000 digits: 8 x 8 pixels, each a token that has its place
    and one of 15 greys."""

    def model(self) -> nn.Module:
        """The model, freshly initialised."""
        return models.large_transformer()

    def train_data(self) -> Dataset[Any]:
        """4,000 digits."""
        return _pixels("train")

    def eval_data(self) -> Dataset[Any]:
        """1,000 digits."""
        return _pixels("test")

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        return models.loss(model, batch)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """Fused Adam, at a rate at which it learns."""
        import torch

        return torch.optim.Adam(params, lr=3e-4, fused=True)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """The part that is right."""
        tokens, labels = batch
        return {"accuracy": model(tokens).argmax(1) == labels}


def _pixels(part: str) -> Dataset[Any]:
    import torch
    from torch.nn import functional
    from torch.utils.data import TensorDataset

    from lockstep.datasets.mnist import load_mnist

    digits = load_mnist()
    images, labels = (torch.from_numpy(digits[f"{part}_{what}"]) for what in ("images", "labels"))
    small = functional.adaptive_avg_pool2d(images.float().view(-1, 1, 28, 28), 8).flatten(1)
    grey = (small / small.max() * 14.99).long()
    return TensorDataset(grey + 15 * torch.arange(64), labels)

"""The benchmark's models as Lockstep tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import models
from lockstep.job.task import Parameters, Task

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
        return models.find(self.name).loss(model, batch)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """Adam, or SparseAdam beside it."""
        return models.find(self.name).optimizer(list(params.named()))

"""Fewer synchronisations, for slow links: several optimizer steps between two exchanges.

Each shard takes so many steps of the task's own optimizer on a copy of the model, on its own part
of the batch, and what is exchanged is how far it has come. The copies are averaged (McMahan et al.,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017; Stich, "Local SGD
Converges Fast and Communicates Little", 2019). That changes the numbers, so it is the job's choice.
It does not make them depend on who computes: shards are copied, not workers or hosts, each round
begins with the committed parameters and a new optimizer, and the average is a sum along the tree.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from lockstep.errors import DataError, TaskError
from lockstep.job import Parameters, Task


@dataclass(frozen=True)
class Samples:
    """What a shard is given: it is divided among its steps when these are taken."""

    samples: list[Any]


class LocalSteps(Task):
    """A task whose step is a round: `steps` steps of `task` on each shard, then the average.

    Optimizer state lives for a round: Adam's averages begin anew.
    """

    def __init__(self, task: Task, steps: int) -> None:
        """Raises:
        TaskError: the task has a schedule, which would have to reach into rounds.
        """
        if getattr(task.scheduler, "__func__", None) is not Task.scheduler:
            raise TaskError(
                "local_steps does not go with a learning-rate schedule",
                expected="a task without scheduler()",
                found=f"{type(task).__name__}.scheduler",
                fix="leave out local_steps, or the schedule",
            )
        self.task, self.steps = task, steps
        self.made_from = (task,)

    def model(self) -> nn.Module:
        return self.task.model()

    def train_data(self) -> Dataset[Any]:
        return self.task.train_data()

    def eval_data(self) -> Dataset[Any] | None:
        return self.task.eval_data()

    def collate(self, samples: list[Any]) -> Samples:
        return Samples(samples)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """What is exchanged is subtracted as it is: that leaves the average of the copies."""
        return torch.optim.SGD(params, lr=1.0)

    def loss(self, model: nn.Module, batch: Samples) -> torch.Tensor:
        """The mean loss over the shard's steps; its gradient is how far these have come."""
        local = _copy(model)
        named = [(name, p) for name, p in local.named_parameters() if p.requires_grad]
        optimizer = self.task.optimizer(Parameters(named))
        total = torch.zeros((), dtype=torch.float64)
        for samples in divide(batch.samples, self.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = self.task.loss(local, self.task.collate(samples))
            loss.backward()
            optimizer.step()
            total += loss.detach().double() * len(samples)
        for (_, kept), (_, moved) in zip(model.named_buffers(), local.named_buffers(), strict=True):
            kept.copy_(moved)
        params = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            ways = [p - moved for p, (_, moved) in zip(params, named, strict=True)]
        mean = (total / len(batch.samples)).float()
        found: torch.Tensor = _Way.apply(mean, ways, *params)  # type: ignore[no-untyped-call]
        return found

    # What is done without learning is done as the task does it.

    def metrics(self, model: nn.Module, batch: Samples) -> Mapping[str, torch.Tensor | float]:
        return self.task.metrics(model, self.task.collate(batch.samples))

    def outputs(self, model: nn.Module, batch: Samples) -> Mapping[str, Any]:
        return self.task.outputs(model, self.task.collate(batch.samples))

    def score(self, outputs: dict[str, Any]) -> Mapping[str, float]:
        return self.task.score(outputs)

    def baseline(self) -> Mapping[str, float]:
        return self.task.baseline()

    def from_record(self, record: Mapping[str, Any]) -> Any:
        return self.task.from_record(record)

    def predict(self, model: nn.Module, batch: Samples) -> Sequence[Mapping[str, Any]]:
        return self.task.predict(model, self.task.collate(batch.samples))


def divide(samples: Sequence[Any], steps: int) -> list[list[Any]]:
    """A shard's samples in as many parts, which differ by at most one sample.

    A short last batch of a data epoch takes fewer steps: none is empty.

    Raises:
        DataError: there are no samples.
    """
    if not samples:
        raise DataError("a shard without samples", expected="at least one")
    steps = min(steps, len(samples))
    edges = [len(samples) * step // steps for step in range(steps + 1)]
    return [list(samples[edges[i] : edges[i + 1]]) for i in range(steps)]


def _copy(model: nn.Module) -> nn.Module:
    """A copy in memory of its own, with gradients that its own optimizer takes."""
    local = copy.deepcopy(model)
    for module in local.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False  # as it may be run for the exchange (see `embeddings`)
    return local


class _Way(torch.autograd.Function):
    """A number whose gradient, with regard to each parameter, is known already."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, ways: list[torch.Tensor], *_: Any) -> torch.Tensor:
        ctx.ways = ways
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        return None, None, *(way * grad.to(way.dtype) for way in ctx.ways)

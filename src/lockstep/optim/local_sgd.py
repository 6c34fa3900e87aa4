"""Local SGD: several optimizer steps between two exchanges, for slow links.

Each shard takes so many steps of the task's own optimizer on a copy of the model, on its own part
of the batch, and what is exchanged is how far it has come. The copies are averaged (McMahan et al.,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017; Stich, "Local SGD
Converges Fast and Communicates Little", 2019). That changes the numbers, so it is the job's choice.
It does not make them depend on who computes: shards are copied, not workers or hosts, each round
begins with the committed parameters and the shard's own optimizer state, and the average is a sum
along the tree. How a worker does it: `local_rounds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from lockstep.errors import DataError
from lockstep.job.position import Position
from lockstep.job.task import Parameters, Task


@dataclass(frozen=True)
class ShardSamples:
    """What a shard is given: it is divided among its steps when these are taken."""

    samples: list[Any]


class LocalSGD(Task):
    """A task whose step is a round: `steps` steps of `task` on each shard, then the average.

    The task's schedule, if it has one, counts the steps within rounds.
    """

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.steps = task, steps
        self.keep_modes = task.keep_modes
        self.made_from = (task,)

    def model(self) -> nn.Module:
        return self.task.model()

    def set_position(self, position: Position) -> None:
        self._position = position
        self.begin_update(0)

    def begin_update(self, number: int) -> None:
        """Tell the task of an update within the round."""
        self.task.set_position(self._position.within(number, self.steps))

    def train_data(self) -> Dataset[Any]:
        return self.task.train_data()

    def sample_weights(self, data: Any) -> Sequence[float] | torch.Tensor | None:
        return self.task.sample_weights(data)

    def sample_lengths(self, data: Any) -> Sequence[float] | torch.Tensor | None:
        return self.task.sample_lengths(data)

    def eval_data(self) -> Dataset[Any] | None:
        return self.task.eval_data()

    def collate(self, samples: list[Any]) -> ShardSamples:
        return ShardSamples(samples)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """What is exchanged is subtracted as it is: that leaves the average of the copies."""
        return torch.optim.SGD(params, lr=1.0)

    def buffer_rules(self) -> Mapping[str, str]:
        return self.task.buffer_rules()

    # What is done without learning is done as the task does it.

    def metrics(self, model: nn.Module, batch: ShardSamples) -> Mapping[str, torch.Tensor | float]:
        return self.task.metrics(model, self.task.collate(batch.samples))

    def outputs(self, model: nn.Module, batch: ShardSamples) -> Mapping[str, Any]:
        return self.task.outputs(model, self.task.collate(batch.samples))

    def score(self, outputs: dict[str, Any]) -> Mapping[str, float]:
        return self.task.score(outputs)

    def baseline(self) -> Mapping[str, float]:
        return self.task.baseline()

    def fitted(self) -> str:
        return self.task.fitted()

    def from_record(self, record: Mapping[str, Any]) -> Any:
        return self.task.from_record(record)

    def predict(self, model: nn.Module, batch: ShardSamples) -> Sequence[Mapping[str, Any]]:
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

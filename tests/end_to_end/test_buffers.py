"""Buffers that add up over samples: by a declared rule they are the whole batch's, else refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lockstep
from lockstep.errors import TaskError

SAMPLES, BATCH = 44, 16  # the last batch is short


def inputs() -> torch.Tensor:
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1


class Sums(nn.Module):
    """A count, a sum, a confusion matrix, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.seen: torch.Tensor
        self.total: torch.Tensor
        self.confusion: torch.Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("confusion", torch.zeros(2, 2, dtype=torch.int64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.norm(x))
        if self.training:
            self.seen = self.seen + len(x)
            self.total += x.double().sum(0)
            ones = torch.ones(len(y), dtype=torch.int64)
            self.confusion.index_put_((y, out.argmax(1)), ones, accumulate=True)
        return out


class Counting(lockstep.Task):
    def __init__(self, rules: Mapping[str, str]) -> None:
        self.rules = rules

    def model(self) -> nn.Module:
        return Sums()

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(inputs(), (inputs()[:, 0] > 1).long())

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(*batch), batch[1])

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)

    def buffer_rules(self) -> Mapping[str, str]:
        return self.rules


SUMS = {"seen": "sum", "total": "sum", "confusion": "sum"}


def run(task: lockstep.Task, folder: Path, **settings: Any) -> lockstep.Result:
    return lockstep.run(
        task, out=folder, threads=1, batch_size=BATCH, data_epochs=1, quiet=True, **settings
    )


def test_sums_are_those_of_the_whole_batch_on_any_number_of_workers(tmp_path: Path) -> None:
    with lockstep.preloaded():
        results = [
            run(Counting(SUMS), tmp_path / f"{shards}-{workers}", shards=shards, workers=workers)
            for shards, workers in ((4, 1), (4, 3), (1, 1))
        ]
    assert results[0].fingerprint == results[1].fingerprint
    for result in results:
        model: Any = result.model()
        assert int(model.seen) == SAMPLES
        assert torch.allclose(model.total, inputs().double().sum(0), rtol=1e-12)
        assert int(model.confusion.sum()) == SAMPLES
        assert (
            model.confusion.sum(1).tolist() == torch.bincount((inputs()[:, 0] > 1).long()).tolist()
        )
        assert int(model.norm.num_batches_tracked) == result.steps


def test_a_buffer_without_a_rule_is_refused_on_any_number_of_workers(tmp_path: Path) -> None:
    said = set()
    with lockstep.preloaded():
        for workers in (1, 2):
            with pytest.raises(TaskError) as error:
                run(Counting({"seen": "sum"}), tmp_path / str(workers), shards=2, workers=workers)
            said.add(str(error.value))
    (only,) = said
    assert "changed buffers total, confusion" in only
    assert "mean, sum" in only
    assert "shards to 1" in only


class Resizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.scale.resize_(2).copy_(self.layer.weight.detach().abs().amax(1))
        out: torch.Tensor = self.layer(x) * self.scale
        return out


class Resized(Counting):
    def model(self) -> nn.Module:
        return nn.ModuleDict({"inner": Resizing()})

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model.get_submodule("inner"), batch)


def test_a_buffer_whose_shape_changes_in_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"shape or type of buffer inner\.scale") as error:
        run(Resized({}), tmp_path / "run", shards=2, workers=1)
    assert "(1,)" in str(error.value.expected)
    assert "(2,)" in str(error.value.found)

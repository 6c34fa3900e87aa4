"""Samples that are None, for a collate to leave out: not counted where held out, else refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, default_collate

import lockstep
from lockstep.data.fetching import AbsentSamples, make_fetch
from lockstep.errors import DataError
from lockstep.job.task import Task


class Holed(Dataset[Any]):
    def __init__(self, samples: int, bad: Any) -> None:
        self.x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples))
        self.bad = bad

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.bad.get(index, (self.x[index], int(self.x[index, 0] > 0)))


HELD_OUT = {4: None, 9: (None, None)}


class Dropping(Task):
    def __init__(self, bad: Mapping[int, Any]) -> None:
        self.bad = dict(bad)

    def model(self) -> nn.Module:
        return nn.Linear(4, 2)

    def train_data(self) -> Dataset[Any]:
        return Holed(24, self.bad)

    def eval_data(self) -> Dataset[Any]:
        return Holed(10, HELD_OUT)

    def collate(self, samples: list[Any]) -> Any:
        return default_collate([s for s in samples if s is not None and s[0] is not None])

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        return {"loss": self.loss(model, batch), "ones": torch.ones(len(batch[1]))}

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor]:
        return {"label": batch[1]}

    def score(self, outputs: dict[str, Any]) -> Mapping[str, float]:
        return {"scored": float(len(outputs["label"]))}


def run(folder: Path, bad: Mapping[int, Any], **settings: Any) -> lockstep.Result:
    return lockstep.run(
        Dropping(bad),
        out=folder,
        threads=1,
        batch_size=8,
        eval_batch_size=4,
        quiet=True,
        **settings,
    )


def test_held_out_means_are_over_what_is_left(tmp_path: Path) -> None:
    result = run(tmp_path / "run", {}, shards=2, workers=1)
    assert (result.metrics["ones"], result.metrics["scored"]) == (1.0, 8.0)
    data, model = Holed(10, {}), result.model()
    left = [data[i] for i in range(10) if i not in HELD_OUT]
    x, y = default_collate(left)
    assert result.metrics["loss"] == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-6)


def test_training_with_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="samples are None") as error:
        run(tmp_path / "run", {17: None}, shards=2, workers=2)
    assert "samples 17" in str(error.value)


def test_one_shard_is_the_plain_loop(tmp_path: Path) -> None:
    assert run(tmp_path / "run", {17: None}, shards=1, workers=1).steps == 3


def test_all_at_once() -> None:
    class AtOnce(Holed):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[index] for index in indices]

    absent = AbsentSamples(allowed=True)
    task = Dropping({})
    fetch = make_fetch(task, AtOnce(10, HELD_OUT), 0, absent)
    assert len(fetch(0, [3, 4, 9])[1]) == 1
    assert absent.count == 2
    fetch(0, [1, 2])
    assert absent.count == 0
    with pytest.raises(DataError, match=r"samples 4, 9"):
        make_fetch(task, AtOnce(10, HELD_OUT), 0, AbsentSamples(allowed=False))(0, [3, 4, 9])

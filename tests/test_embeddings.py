"""Large dense embeddings move only the rows that they touch, and nobody can tell from the bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import lockstep
from lockstep.embeddings import LARGE, SparseTables
from tests import reference
from tests.test_same_bits import assert_equals_reference, assert_same_run

ROWS, WIDTH = 40_000, 32
SETTINGS: dict[str, Any] = {"batch_size": 96, "steps": 12, "seed": 3}


class Model(nn.Module):
    """An embedding, used once, twice, or as a projection too."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.table = nn.Embedding(ROWS, WIDTH, padding_idx=0)
        self.out = nn.Linear(8 * WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.table(x)
        if self.use == "twice":
            rows = rows + self.table(x.flip(1))
        out: torch.Tensor = self.out(rows.flatten(1))
        if self.use == "projection":
            out = out + rows[:, 0] @ self.table.weight[:2].T
        return out


class Clicks(lockstep.Task):
    """Rows that come again within a batch, and padding."""

    def __init__(self, use: str) -> None:
        self.use = use

    def model(self) -> nn.Module:
        return Model(self.use)

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(ROWS, (1000, 8), generator=generator)
        x = x % torch.randint(1, ROWS, (1000, 8), generator=generator)
        return TensorDataset(x, torch.randint(2, (1000,), generator=generator))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.01)


def test_the_table_is_large_enough_to_be_treated_so() -> None:
    model = Model("once")
    assert model.table.weight.numel() >= LARGE
    tables = SparseTables(model, list(model.parameters()))
    assert 0 in tables
    assert model.table.sparse


@pytest.mark.parametrize("use", ["once", "twice", "projection"])
def test_equals_the_dense_gradient(use: str, run_folders: Callable[[], str]) -> None:
    task = Clicks(use)
    one, three = (
        lockstep.run(
            task, workers=w, shards=4, threads=1, out=run_folders(), quiet=True, **SETTINGS
        )
        for w in (1, 3)
    )
    assert_equals_reference(one, reference.train(task, shards=4, **SETTINGS))
    assert_same_run(one, three)

"""Embeddings with sparse gradients: only touched rows move, and the bits are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import lockstep
from lockstep.errors import OptimizerError, TaskError
from lockstep.job.faults import Fault
from tests.end_to_end.test_same_bits import assert_equals_reference, assert_same_run
from tests.support import reference_loop as reference

ROWS, WIDTH, FIELDS = 5_000, 24, 6
SETTINGS: dict[str, Any] = {"batch_size": 48, "steps": 8, "seed": 3, "shards": 4}


class Model(nn.Module):
    """A table, a bag of another one, and a linear layer."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.table = nn.Embedding(ROWS, WIDTH, sparse=True, padding_idx=0)
        self.table_of_bags = nn.EmbeddingBag(300, 5, mode="sum", sparse=True)
        self.out = nn.Linear(FIELDS * WIDTH + 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.table(x)
        if self.use == "twice":
            rows = rows + self.table(x.flip(1))
        whole = torch.cat([rows.flatten(1), self.table_of_bags(x % 300)], dim=1)
        out: torch.Tensor = self.out(whole)
        if self.use == "two losses":
            (out.square().mean() * 0.1).backward(retain_graph=True)
        if self.use == "dense too":
            out = out + rows[:, 0] @ self.table.weight[:3].T
        return out


class Sparse(lockstep.Task):
    """Rows that come again within a batch."""

    def __init__(self, optimizer: str, use: str = "once") -> None:
        self.kind, self.use = optimizer, use

    def model(self) -> nn.Module:
        return Model(self.use)

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(ROWS, (200, FIELDS), generator=generator)
        x = x % torch.randint(1, ROWS, (200, FIELDS), generator=generator)
        return TensorDataset(x, torch.randint(3, (200,), generator=generator))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        tables = [p for name, p in params.named() if name.startswith("table")]
        others = [p for name, p in params.named() if not name.startswith("table")]
        if self.kind == "sgd":
            return torch.optim.SGD(params, lr=0.1)
        if self.kind == "momentum":
            return torch.optim.SGD(params, lr=0.1, momentum=0.9)
        if self.kind == "adagrad":
            return torch.optim.Adagrad(params, lr=0.1, initial_accumulator_value=0.1)
        if self.kind == "adam":
            return torch.optim.Adam(params)
        return lockstep.Together(
            torch.optim.SparseAdam(tables, lr=0.01), torch.optim.AdamW(others, lr=0.01)
        )

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)


def run(task: lockstep.Task, out: str, workers: int, **more: Any) -> lockstep.Result:
    return lockstep.run(
        task, workers=workers, threads=1, out=out, quiet=True, **{**SETTINGS, **more}
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "sparse-adam"])
def test_the_same_bits(optimizer: str, run_folders: Callable[[], str]) -> None:
    task = Sparse(optimizer)
    one, three = run(task, run_folders(), 1), run(task, run_folders(), 3)
    assert_equals_reference(one, reference.train(task, **SETTINGS))
    assert_same_run(one, three)


@pytest.mark.parametrize("use", ["twice", "two losses"])
def test_other_uses(use: str, run_folders: Callable[[], str]) -> None:
    task = Sparse("sparse-adam", use)
    two = run(task, run_folders(), 2)
    assert_equals_reference(two, reference.train(task, **SETTINGS))


def test_one_shard(run_folders: Callable[[], str]) -> None:
    task = Sparse("sparse-adam")
    settings = {**SETTINGS, "shards": 1}
    assert_equals_reference(
        run(task, run_folders(), 1, shards=1), reference.train(task, **settings)
    )


def test_a_death_in_the_middle_of_an_update(run_folders: Callable[[], str]) -> None:
    task = Sparse("sparse-adam")
    calm = run(task, run_folders(), 2)
    fault = Fault(worker_id=1, step=5, phase="update_end")
    harmed = run(task, run_folders(), 2, faults=(fault,), audit=0.5)
    assert len(harmed.recoveries) == 1
    assert harmed.fingerprint == calm.fingerprint


@pytest.mark.parametrize(
    ("optimizer", "use", "settings", "says"),
    [
        ("adam", "once", {}, "cannot be run by owners"),
        ("momentum", "once", {}, "keeps state that cannot be shared"),
        ("sgd", "once", {"clip_grad_norm": 1.0}, "clip_grad_norm does not work with sparse"),
        ("sgd", "dense too", {}, "is dense in part"),
    ],
)
def test_what_cannot_be_done_is_said(
    optimizer: str, use: str, settings: dict[str, Any], says: str, run_folder: str
) -> None:
    with pytest.raises((OptimizerError, TaskError), match=says):
        run(Sparse(optimizer, use), run_folder, 1, **settings)


def test_together_is_each_by_itself() -> None:
    def made() -> list[nn.Parameter]:
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]

    both, alone = made(), made()
    together = lockstep.Together(torch.optim.SGD(both[:1], lr=0.1), torch.optim.Adam(both[1:]))
    apart = [torch.optim.SGD(alone[:1], lr=0.1), torch.optim.Adam(alone[1:])]
    for step in range(3):
        for parameter in (*both, *alone):
            parameter.grad = torch.full_like(parameter, step + 1.0)
        together.step()
        for optimizer in apart:
            optimizer.step()
    for left, right in zip(both, alone, strict=True):
        assert left.detach().numpy().tobytes() == right.detach().numpy().tobytes()
    assert len(together.param_groups) == 2
    assert set(together.state) == {both[1]}  # plain SGD keeps none

"""Large dense embeddings move only the rows that they touch, and nobody can tell from the bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import lockstep
from lockstep.collectives.table_sum import SparseSum, TableSum
from lockstep.collectives.tree_sum import tree_sum
from lockstep.planning.reduction_tree import tree
from lockstep.state.embedding_tables import DENSE, LARGE, Table, TableGradient, find_tables
from lockstep.worker.sparse_autograd import SparseTables, keep_sparse
from tests.end_to_end.test_same_bits import assert_equals_reference, assert_same_run
from tests.support import reference_loop as reference

ROWS, WIDTH = 40_000, 33
"""A width at which blocks of 65,536 elements would end within a row."""
SETTINGS: dict[str, Any] = {"batch_size": 96, "steps": 6, "seed": 3}


class Model(nn.Module):
    """An embedding, used once, twice, or as a projection too."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.table = nn.Embedding(ROWS, WIDTH, padding_idx=0)
        self.out = nn.Linear(12 * WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.table(x)
        if self.use == "twice":
            rows = rows + self.table(x.flip(1))
        out: torch.Tensor = self.out(rows.flatten(1))
        if self.use == "two losses":
            (out.square().mean() * 0.1).backward(retain_graph=True)
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
        x = torch.randint(ROWS, (1000, 12), generator=generator)
        x = x % torch.randint(1, ROWS, (1000, 12), generator=generator)
        return TensorDataset(x, torch.randint(2, (1000,), generator=generator))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.01)


def test_the_table_is_large_enough_to_be_treated_so() -> None:
    model = Model("once")
    assert model.table.weight.numel() >= LARGE
    table = find_tables(model, list(model.parameters()))[0]
    assert (table.rows, table.width, table.module) == (ROWS, WIDTH, model.table)


def check(
    use: str, run_folders: Callable[[], str], *, shards: int = 4, batch_size: int = 96, **more: Any
) -> None:
    """One worker and three make what the plain loop makes."""
    task, common = Clicks(use), {**SETTINGS, "batch_size": batch_size, "shards": shards, **more}
    one, three = (
        lockstep.run(
            task, workers=min(w, shards), threads=1, out=run_folders(), quiet=True, **common
        )
        for w in (1, 3)
    )
    assert_equals_reference(one, reference.train(task, **common))
    assert_same_run(one, three)


@pytest.mark.parametrize("use", ["once", "twice", "projection", "two losses"])
def test_equals_the_dense_gradient(use: str, run_folders: Callable[[], str]) -> None:
    check(use, run_folders)


def test_one_shard(run_folders: Callable[[], str]) -> None:
    check("once", run_folders, shards=1)


def test_a_limited_norm(run_folders: Callable[[], str]) -> None:
    check("once", run_folders, clip_grad_norm=0.05)


def test_rows_beyond_the_share_that_is_kept_sparse(run_folders: Callable[[], str]) -> None:
    check("once", run_folders, shards=1, batch_size=1000, steps=3)


def test_an_audit_compares_whole_gradients(run_folders: Callable[[], str]) -> None:
    task = Clicks("twice")  # each worker finds out by itself that the dense form is needed
    settings = {"workers": 3, "shards": 4, "threads": 1, "quiet": True, **SETTINGS}
    plain = lockstep.run(task, out=run_folders(), **settings)
    audited = lockstep.run(task, out=run_folders(), audit=1.0, **settings)
    assert audited.fingerprint == plain.fingerprint
    assert '"corrupt"' not in (audited.folder / "events.jsonl").read_text()


@st.composite
def gradients(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[TableGradient]]:
    """Dense gradients of a table, and the same as slots have them."""
    rows, width = draw(st.integers(1, 30)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    dense, kept = [], []
    for _ in range(draw(st.integers(1, 5))):
        module = nn.Embedding(rows, width)
        home = torch.full((rows, width), 7.0)
        numbers = torch.full((1 + rows,), 99)
        count = draw(st.integers(0, 10))
        looked_up = torch.randint(rows, (count,), generator=generator)
        values = torch.randn(count, width, generator=generator)
        values[values.abs() < 0.1] = -0.0
        tables = SparseTables({0: Table(rows=rows, width=width, module=module)})
        tables.begin()
        (module(looked_up) * values).sum().backward()
        assert module.weight.grad is not None
        tables.store(0, module.weight.grad, home, numbers)
        kept.append(TableGradient(home, numbers))
        plain = nn.Embedding(rows, width)
        (plain(looked_up) * values).sum().backward()
        assert plain.weight.grad is not None
        dense.append(plain.weight.grad)
    return dense, kept


@given(st.lists(gradients(), min_size=1, max_size=3), st.data())
def test_sums_are_those_of_dense_gradients(
    steps: list[tuple[list[torch.Tensor], list[TableGradient]]], data: st.DataObject
) -> None:
    for dense, kept in steps:
        rows, width = dense[0].shape
        first = data.draw(st.integers(0, rows - 1))
        last = data.draw(st.integers(first + 1, rows))
        total = torch.full(((last - first) * width,), 5.0)
        table = TableSum(first, kept, total)
        for _ in range(2):
            present = tuple(data.draw(st.booleans()) for _ in kept)
            node = tree(present)
            if node is None:
                continue

            def add(leaves: Any, out: torch.Tensor, node: Any = node) -> None:
                spare = [torch.empty_like(out) for _ in leaves]
                out.copy_(tree_sum(node, leaves, out, spare))

            table.sum(present, add)
            expected = torch.empty_like(total)
            add([leaf[first:last].reshape(-1) for leaf in dense], expected)
            assert total.numpy().tobytes() == expected.numpy().tobytes()
            assert all(leaf.row_indices[0] != DENSE or len(leaf.rows) < 40 for leaf in kept)


@given(
    rows=st.integers(1, 30),
    width=st.integers(1, 3),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_sparse_sums_are_those_of_rows_in_the_order_of_the_tree(
    rows: int, width: int, counts: list[int], seed: int, data: st.DataObject
) -> None:
    """Rows that a shard has not are -0.0, which changes nothing that it is added to."""
    generator = torch.Generator().manual_seed(seed)
    kept, spread = [], []
    for count in counts:
        values = torch.randn(count, width, generator=generator)
        values[values.abs() < 0.3] = -0.0
        looked_up = torch.randint(rows, (1, count), generator=generator)
        gradient = torch.sparse_coo_tensor(looked_up, values, (rows, width))
        home, numbers = torch.full((rows, width), 7.0), torch.full((1 + rows,), 99)
        keep_sparse("table", gradient, home, numbers)
        kept.append(TableGradient(home, numbers))
        whole = torch.full((rows, width), -0.0)
        whole[gradient.coalesce()._indices()[0]] = gradient.coalesce()._values()
        spread.append(whole)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    node = tree(tuple(data.draw(st.booleans()) for _ in kept))
    table = SparseSum(first, last - first, kept)
    found = table.sum(node)
    if node is None:
        assert found is None
        return
    assert found is not None
    out = torch.empty(rows * width)
    leaves, spare = [leaf.view(-1) for leaf in spread], [torch.empty_like(out) for _ in spread]
    expected = tree_sum(node, leaves, out, spare).view(rows, width)[first:last]
    named = found._indices()[0]
    assert named.tolist() == sorted(set(named.tolist()))
    assert found._values().numpy().tobytes() == expected[named].numpy().tobytes()
    nothing = torch.ones(last - first, dtype=torch.bool).index_fill_(0, named, 0)
    assert torch.equal(expected[nothing], torch.full_like(expected[nothing], -0.0))

    middle = data.draw(st.integers(0, last - first))
    upper, lower = table.cut(found, [0, middle, last - first])
    assert upper is not None
    assert lower is not None
    assert torch.equal(torch.cat([upper.to_dense(), lower.to_dense()]), found.to_dense())

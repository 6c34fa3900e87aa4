"""Optimizers that are run on touched rows alone: the bits are those of a step on the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lockstep
from lockstep.optim.probes import Kind, may_step_rows
from lockstep.optim.row_update import RowGradient, step_rows
from lockstep.state.embedding_tables import put_rows
from tests.collectives.test_sparse_gradients import SETTINGS, Sparse, run
from tests.end_to_end.test_same_bits import assert_equals_reference, assert_same_run
from tests.support import reference_loop as reference


class Decaying(torch.optim.Optimizer):
    """Momentum, of which every row's decays in every step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is not None:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(0.9).add_(parameter.grad)
                parameter.add_(state["momentum"], alpha=-0.1)


KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sparse-adam": lambda params: torch.optim.SparseAdam(params, lr=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, lr_decay=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
}


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.detach().numpy().tobytes() == right.detach().numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_which_optimizers_may(kind: str) -> None:
    table = nn.Parameter(torch.zeros(3, 2))
    sparse = Kind(group=0, dtype=torch.float32, sparse=True)
    assert may_step_rows(KINDS[kind]([table]), sparse)
    assert not may_step_rows(Decaying([table]), sparse)


def some_rows(table: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A gradient of some rows, of none at times."""
    chosen = torch.rand(len(table), generator=generator) < torch.rand(1, generator=generator)
    numbers = chosen.nonzero()[:, 0]
    values = torch.randn(len(numbers), table.shape[1], generator=generator)
    return torch.sparse_coo_tensor(
        numbers[None], values, table.shape, is_coalesced=True, check_invariants=False
    )


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.integers(1, 40), width=st.integers(1, 70), seed=st.integers(0, 1000))
def test_rows_get_what_they_get_in_the_table(kind: str, rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = nn.Parameter(torch.randn(rows, width, generator=generator))
    apart = nn.Parameter(whole.detach().clone())
    optimizer, other = KINDS[kind]([whole]), KINDS[kind]([apart])

    def step(parameter: nn.Parameter, state: dict[str, Any]) -> None:
        other.param_groups[0]["params"] = [parameter]
        other.state[parameter] = state
        other.step()

    for number in range(4):
        gradient = some_rows(whole, generator)
        whole.grad = gradient
        optimizer.step()
        state = other.state[apart]
        if number:
            like = {name for name in state if name != "step"}
            step_rows(apart.detach(), gradient, state, like, step)
        else:
            apart.grad = gradient
            step(apart, state)
        assert_same(apart, whole)
        for name, value in optimizer.state[whole].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[name]))


def test_sparse_arithmetic_is_done_densely_to_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    state, values = (torch.randn(7, 5, generator=generator) for _ in range(2))
    values[values.abs() < 0.2] = -0.0
    indices = torch.arange(7)[None]
    plain = torch.sparse_coo_tensor(indices, values, values.shape, is_coalesced=True)
    rows = RowGradient.of(values)
    assert isinstance(rows.coalesce(), RowGradient)

    taken = state.sparse_mask(rows)
    assert isinstance(taken, RowGradient)
    assert_same(taken._values(), state.sparse_mask(plain)._values())
    assert taken._values().data_ptr() != state.data_ptr()  # what becomes of either is its own

    added = rows.new(rows._indices(), values * 3, rows.size())
    assert isinstance(added, RowGradient)
    assert_same(
        state.clone().add_(added), state.clone().add_(plain.new(indices, values * 3, (7, 5)))
    )
    assert_same(state.clone().add_(rows, alpha=-0.3), state.clone().add_(plain, alpha=-0.3))

    some = rows.new(indices[:, ::2], values[::2], rows.size())
    assert not isinstance(some, RowGradient)
    assert_same((-rows).to_dense(), -values)


class Counting(torch.optim.Optimizer):
    """Plain steps, for which it counts which rows come together."""

    def __init__(self, params: Any, how: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.how = how

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            gradient, state = parameter.grad.coalesce(), self.state[parameter]
            count = gradient._nnz()
            if self.how == "skips" and not count:
                continue
            state["step"] = state.get("step", 0) + 1
            parameter.add_(gradient, alpha=-0.1 / count if self.how == "divides" else -0.1)


@pytest.mark.parametrize(("how", "may"), [("adds", True), ("divides", False), ("skips", False)])
def test_rows_that_are_stepped_together_must_not_count(how: str, may: bool) -> None:
    table = nn.Parameter(torch.zeros(3, 2))
    sparse = Kind(group=0, dtype=torch.float32, sparse=True)
    assert may_step_rows(Counting([table], how), sparse) == may


def test_an_optimizer_that_may_not_is_given_the_table(run_folders: Callable[[], str]) -> None:
    class Task(Sparse):
        def optimizer(self, params: Any) -> torch.optim.Optimizer:
            return Decaying(params)

    task = Task("sgd")
    one, three = run(task, run_folders(), 1), run(task, run_folders(), 3)
    assert_equals_reference(one, reference.train(task, **SETTINGS))
    assert_same_run(one, three)


@given(
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]),
    chosen=st.lists(st.integers(0, 19), unique=True),
)
def test_put_rows(width: int, dtype: torch.dtype, chosen: list[int]) -> None:
    numbers = torch.tensor(chosen, dtype=torch.int64)
    rows = torch.arange(len(chosen) * width).view(-1, width).to(dtype) - 3
    table, expected = (torch.ones(20, width, dtype=dtype) for _ in range(2))
    put_rows(table, numbers, rows)
    assert torch.equal(table, expected.index_copy_(0, numbers, rows))


def test_together_leaves_out_who_has_nothing_to_do() -> None:
    class Never(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise AssertionError("stepped without parameters")

    one, other = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    together = lockstep.Together(torch.optim.SGD([one], lr=1.0), Never([other], lr=1.0))
    together.param_groups[1]["params"] = []
    one.grad = torch.ones(2)
    together.step()
    assert one.tolist() == [-1.0, -1.0]

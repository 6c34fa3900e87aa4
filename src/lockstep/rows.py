"""Steps on the rows of a table that a sparse gradient has, as if there were no others.

Optimizers that take sparse gradients read and write scattered rows again and again, by kernels that
are slow at it: `sparse_mask` alone is half of SparseAdam. Here the rows are gathered once, the
user's own optimizer is run on them, and they are put back: the same arithmetic on the same rows.
Whether an optimizer may be run so is tried (see `probing.may_step_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import nn

Step = Callable[[nn.Parameter, dict[str, Any]], None]
"""Runs the optimizer on a parameter that holds its gradient, with its state, which it changes."""


def step_rows(
    table: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, Any],
    like: Collection[str],
    step: Step,
) -> None:
    """Update the rows that a gradient has, in the table and in the optimizer's state of it.

    Args:
        table: rows x width.
        gradient: sparse and coalesced, of the table's shape.
        state: as the optimizer has left it after an earlier step; it is updated.
        like: the names of the state that is one value per element, of the table's shape.
        step: called once, with a parameter of the gradient's rows and their state.
    """
    numbers, values = gradient._indices()[0], gradient._values()
    rows = nn.Parameter(table.index_select(0, numbers))
    rows.grad = torch.sparse_coo_tensor(
        torch.arange(len(numbers))[None], values, values.shape,
        check_invariants=False, is_coalesced=True,
    )  # fmt: skip
    taken = {
        name: value.index_select(0, numbers) if name in like else value
        for name, value in state.items()
    }
    step(rows, taken)
    put_rows(table, numbers, rows.detach())
    for name, value in taken.items():
        if name in like:
            put_rows(state[name], numbers, value)
        else:
            state[name] = value


def put_rows(table: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows to their places: `table.index_copy_(0, numbers, rows)`, in half of its time.

    NumPy moves an element of any size at once, so a row is made one.

    Args:
        table: rows x width, contiguous, of any type.
        numbers: `[n]`, int64, each from 0 to before the table's rows, none twice.
        rows: `[n, width]`, contiguous, of the table's type.
    """
    if not len(numbers):
        return
    row = np.dtype((np.void, table.shape[1] * table.dtype.itemsize))
    places, values = (tensor.view(torch.uint8).numpy().view(row) for tensor in (table, rows))
    places[numbers.numpy()] = values

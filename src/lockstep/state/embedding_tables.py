"""Embedding tables: the large ones, and the rows of them that a shard has touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

LARGE = 1 << 20
"""Elements: embeddings from this size on are kept as touched rows."""


DENSE = -1
"""Instead of the number of rows: the slot has the dense gradient."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A parameter of which a shard touches some rows."""

    rows: int
    width: int
    module: nn.Embedding | None
    """The plain embedding that is run in the sparse form, and can be run in the dense one. None:
    the model itself asks for sparse gradients, and the optimizer is to get them."""
    by_rows: bool = False
    """Whether the optimizer is run on touched rows alone (see `optim.row_update`)."""

    @property
    def sparse(self) -> bool:
        """Whether the optimizer gets a sparse gradient."""
        return self.module is None


def find_tables(model: nn.Module, params: Sequence[nn.Parameter]) -> dict[int, Table]:
    """The tables of a model, by the index of their parameter."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    tables = {}
    for index, parameter in enumerate(params):
        holders = owners.get(id(parameter), [])
        if any(getattr(holder, "sparse", False) is True for holder in holders):
            if parameter.ndim == 2 and parameter.is_contiguous():
                rows, width = parameter.shape
                tables[index] = Table(rows=rows, width=width, module=None)
        elif parameter.numel() >= LARGE and len(holders) == 1 and _suits(holders[0]):
            module = holders[0]
            assert isinstance(module, nn.Embedding)
            rows, width = parameter.shape
            tables[index] = Table(rows=rows, width=width, module=module)
    return tables


def _suits(module: nn.Module) -> bool:
    """Whether a module is a plain embedding whose sparse gradient has the same rows."""
    return (
        type(module) is nn.Embedding
        and not module.sparse
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and module.weight.is_contiguous()
        and not module.weight._backward_hooks
    )


@dataclass(frozen=True)
class TableGradient:
    """A shard's gradient of a table, as a slot has it."""

    rows: torch.Tensor
    """Rows x width: the touched rows, or all."""
    row_indices: torch.Tensor
    """Their count, then their indices; or `DENSE`."""

    def part(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The touched rows from `first` to before `last`: indices and values; None: all."""
        count = int(self.row_indices[0])
        if count == DENSE:
            return None
        indices = self.row_indices[1 : count + 1]
        inside = slice(*np.searchsorted(indices.numpy(), (first, last)).tolist())
        return indices[inside], self.rows[inside]

    def keep(self, part: Part) -> None:
        """Make this the gradient that has these rows."""
        indices, rows = part
        self.rows[: len(indices)] = rows
        self.row_indices[1 : len(indices) + 1] = indices
        self.row_indices[0] = len(indices)

    def dense(self, first: int, last: int) -> torch.Tensor:
        """The rows from `first` to before `last`, with their zeros."""
        part = self.part(first, last)
        if part is None:
            return self.rows[first:last]
        indices, values = part
        spread = self.rows.new_zeros(last - first, self.rows.shape[1])
        put_rows(spread, indices - first, values)
        return spread


Part = tuple[torch.Tensor, torch.Tensor]
"""Indices of rows, ascending, and the rows."""


def put_rows(table: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows into a table: `table.index_copy_(0, indices, rows)`, in half of its time.

    NumPy moves an element of any size at once, so a row is made one.

    Args:
        table: rows x width, contiguous, of any type.
        indices: `[n]`, int64, each from 0 to before the table's rows, none twice.
        rows: `[n, width]`, contiguous, of the table's type.
    """
    if not len(indices):
        return
    row = np.dtype((np.void, table.shape[1] * table.dtype.itemsize))
    targets, values = (tensor.view(torch.uint8).numpy().view(row) for tensor in (table, rows))
    targets[indices.numpy()] = values

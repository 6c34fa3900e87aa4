"""Sparse autograd: large embeddings in sparse form, dense where a shard touches too many rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lockstep.errors import TaskError
from lockstep.state.embedding_tables import DENSE, Table

MANY = 4
"""A gradient is kept dense where a shard looks up more than one row in so many."""


class Redo(Exception):
    """A table turned out to need the dense form: compute the shard again."""


class SparseTables:
    """The tables of a model that are run in the sparse form. One per worker."""

    def __init__(self, tables: Mapping[int, Table]) -> None:
        self._modules = {
            index: table.module for index, table in tables.items() if table.module is not None
        }
        self._calls: dict[int, int] = {}
        for index, module in self._modules.items():
            module.sparse = True
            module.register_forward_pre_hook(self._counter(index))

    def __contains__(self, index: int) -> bool:
        return index in self._modules

    def begin(self) -> None:
        """A shard begins."""
        self._calls.clear()

    def store(
        self, index: int, gradient: torch.Tensor, target: torch.Tensor, row_indices: torch.Tensor
    ) -> None:
        """Keep a gradient in a slot.

        Args:
            index: the parameter's.
            gradient: as autograd has left it, rows x width.
            target: the slot's memory for it, rows x width. Its first rows get the touched ones.
            row_indices: 1 + rows, int64: gets how many they are, and which, ascending.

        Raises:
            Redo: its bits would not be those of the dense form.
        """
        if not gradient.is_sparse or self._calls.get(index) != 1:
            self.give_up(index)
        looked_up, values = gradient._indices()[0], gradient._values()
        if len(looked_up) * MANY > len(target):
            target.copy_(_summed(values, looked_up, len(target)))
            row_indices[0] = DENSE
            return
        rows, inverse = torch.unique(looked_up, return_inverse=True)
        target[: len(rows)] = _summed(values, inverse, len(rows))
        row_indices[1 : len(rows) + 1] = rows
        row_indices[0] = len(rows)

    def give_up(self, index: int) -> None:
        """Run a table in the dense form from now on.

        Raises:
            Redo: always; the shard in hand is to be computed again.
        """
        self._modules.pop(index).sparse = False
        raise Redo

    def _counter(self, index: int):  # type: ignore[no-untyped-def]  # a hook, as nn.Module wants it
        def count(_: nn.Module, __: object) -> None:
            self._calls[index] = self._calls.get(index, 0) + 1

        return count


def keep_sparse(
    name: str, gradient: torch.Tensor, target: torch.Tensor, row_indices: torch.Tensor
) -> None:
    """Keep a gradient that the model asks to be sparse, as `SparseTables.store` does.

    Raises:
        TaskError: it is dense.
    """
    if not gradient.is_sparse:
        raise TaskError(
            f"the gradient of {name} is dense in part",
            expected="a sparse gradient: the module that holds it has sparse=True",
            found="its weight is used elsewhere, too",
            fix="build the module with sparse=False",
        )
    gradient = gradient.coalesce()
    count = gradient._nnz()
    target[:count] = gradient._values()
    row_indices[1 : count + 1] = gradient._indices()[0]
    row_indices[0] = count


def _summed(values: torch.Tensor, row_indices: torch.Tensor, rows: int) -> torch.Tensor:
    """The gradient of a table of so many rows, by the kernel that `nn.Embedding` uses itself."""
    summed: torch.Tensor = torch.ops.aten.embedding_dense_backward(
        values, row_indices, rows, -1, False
    )
    return summed

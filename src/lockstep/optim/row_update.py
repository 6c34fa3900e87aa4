"""Row update: an optimizer step on the rows that a sparse gradient has, as if there were no others.

Optimizers that take sparse gradients read and write scattered rows again and again, by kernels that
are slow at it: `sparse_mask` alone is half of SparseAdam. Here the rows are gathered once, the
user's own optimizer is run on them, and they are put back: the same arithmetic on the same rows.
Whether an optimizer may be run so is tried (see `probes.may_step_rows`).

Optimizers still see a sparse gradient, but one that has every row of its parameter: what they do
with it is arithmetic on dense tensors then, and is done so (`RowGradient`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from lockstep.state.embedding_tables import put_rows


class RowGradient(torch.Tensor):
    """A sparse gradient that has all rows of its parameter, in their order.

    Optimizers take what their state has in the rows of a gradient (`sparse_mask`), and add sparse
    tensors of the same rows to dense ones. PyTorch's kernels look each row up for that, one by
    one; here they are all there. What else is done with it is done by PyTorch, to a sparse tensor.
    """

    @staticmethod
    def of(values: torch.Tensor, indices: torch.Tensor | None = None) -> RowGradient:
        """The gradient of these values, `[n, width]`. `indices`: all, `[1, n]`."""
        if indices is None:
            indices = torch.arange(len(values))[None]
        sparse = torch.sparse_coo_tensor(
            indices, values, values.shape, check_invariants=False, is_coalesced=True
        )
        return torch.Tensor._make_subclass(RowGradient, sparse)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if not kwargs:
                dense = _DENSE.get(getattr(func, "__name__", ""))
                found = dense(*args) if dense is not None else None
                if found is not None:
                    return found
            return func(*args, **(kwargs or {}))


def _mask(tensor: Any, gradient: Any) -> torch.Tensor | None:
    """`tensor.sparse_mask(gradient)`: a copy of all rows."""
    if not _is_dense_beside(tensor, gradient):
        return None
    return RowGradient.of(tensor.clone(), gradient._indices())


def _add(tensor: Any, gradient: Any) -> torch.Tensor | None:
    """`tensor.add_(gradient)`; with a factor, sparse sums may round otherwise."""
    if not _is_dense_beside(tensor, gradient):
        return None
    total: torch.Tensor = tensor.add_(gradient._values())
    return total


def _new(gradient: Any, *like: Any) -> torch.Tensor | None:
    """`gradient.new(indices, values, size)`, where the indices are the gradient's own."""
    if len(like) != 3 or not isinstance(gradient, RowGradient):
        return None
    indices, values, size = like
    own = indices.data_ptr() == gradient._indices().data_ptr()
    if not own or values.shape != size or values.shape != gradient.shape:
        return None
    return RowGradient.of(values, indices)


def _is_dense_beside(tensor: Any, gradient: Any) -> bool:
    return (
        isinstance(gradient, RowGradient)
        and isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and tensor.shape == gradient.shape
        and tensor.dtype == gradient.dtype
    )


_DENSE: dict[str, Callable[..., torch.Tensor | None]] = {
    "coalesce": lambda gradient: gradient,
    "sparse_mask": _mask,
    "add_": _add,
    "new": _new,
}
"""By a function's name, what it is where all rows are there; None: leave it to PyTorch."""

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
    indices, values = gradient._indices()[0], gradient._values()
    rows = nn.Parameter(table.index_select(0, indices))
    rows.grad = RowGradient.of(values)
    gathered = {
        name: value.index_select(0, indices) if name in like else value
        for name, value in state.items()
    }
    step(rows, gathered)
    put_rows(table, indices, rows.detach())
    for name, value in gathered.items():
        if name in like:
            put_rows(state[name], indices, value)
        else:
            state[name] = value

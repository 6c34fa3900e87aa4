"""Large dense embeddings, without their zeros.

The gradient of a dense `nn.Embedding` is as large as its table and nearly all zeros. Autograd
fills, a slot would be filled with, and owners would sum, all of them at each step. Here the module
is asked for the sparse form, and the slot keeps the rows that the shard touched, one after the
other, and their numbers: the dense gradient without its zeros, bit for bit, since the rows are
summed by the very kernel that makes the dense one. Owners sum the rows that some shard has.

Where that would not be so (the module is called twice in a forward pass, or its table is used
elsewhere as well) the shard is computed again in the dense form, and the module is left dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

LARGE = 1 << 20
"""Elements: tables from this size on are treated so."""
MANY = 4
"""A gradient is kept dense where a shard looks up more than one row in so many."""
DENSE = -1
"""Instead of the number of rows: the slot has the dense gradient."""

Sum = Callable[[Sequence[torch.Tensor], torch.Tensor], None]
"""`(leaves, out)`: the sum of 1-D leaves, in the order of the tree."""


class Redo(Exception):
    """A table turned out to need the dense form: compute the shard again."""


def find_tables(model: nn.Module, params: Sequence[nn.Parameter]) -> dict[int, nn.Embedding]:
    """The embeddings that can be run in the sparse form, by the index of their parameter."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    found = {}
    for index, parameter in enumerate(params):
        holders = owners.get(id(parameter), [])
        if parameter.numel() >= LARGE and len(holders) == 1:
            module = holders[0]
            if isinstance(module, nn.Embedding) and _suits(module):
                found[index] = module
    return found


def _suits(module: nn.Embedding) -> bool:
    """Whether a module is a plain embedding whose sparse gradient has the same rows."""
    return (
        type(module) is nn.Embedding
        and not module.sparse
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and module.weight.is_contiguous()
        and not module.weight._backward_hooks
    )


class SparseTables:
    """The tables of a model that are run in the sparse form. One per worker."""

    def __init__(self, tables: dict[int, nn.Embedding]) -> None:
        self._modules = dict(tables)
        self._calls: dict[int, int] = {}
        for index, module in tables.items():
            module.sparse = True
            module.register_forward_pre_hook(self._counter(index))

    def __contains__(self, index: int) -> bool:
        return index in self._modules

    def begin(self) -> None:
        """A shard begins."""
        self._calls.clear()

    def store(
        self, index: int, gradient: torch.Tensor, home: torch.Tensor, numbers: torch.Tensor
    ) -> None:
        """Keep a gradient in a slot.

        Args:
            index: the parameter's.
            gradient: as autograd has left it, rows x width.
            home: the slot's room for it, rows x width. Its first rows get the touched ones.
            numbers: 1 + rows, int64: gets how many they are, and which, ascending.

        Raises:
            Redo: its bits would not be those of the dense form.
        """
        if not gradient.is_sparse or self._calls.get(index) != 1:
            self.give_up(index)
        looked_up, values = gradient._indices()[0], gradient._values()
        if len(looked_up) * MANY > len(home):
            home.copy_(_summed(values, looked_up, len(home)))
            numbers[0] = DENSE
            return
        rows, inverse = torch.unique(looked_up, return_inverse=True)
        home[: len(rows)] = _summed(values, inverse, len(rows))
        numbers[1 : len(rows) + 1] = rows
        numbers[0] = len(rows)

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


def _summed(values: torch.Tensor, numbers: torch.Tensor, rows: int) -> torch.Tensor:
    """The gradient of a table of so many rows, by the kernel that `nn.Embedding` uses itself."""
    summed: torch.Tensor = torch.ops.aten.embedding_dense_backward(values, numbers, rows, -1, False)
    return summed


@dataclass(frozen=True)
class TableGradient:
    """A shard's gradient of a table, as a slot has it."""

    home: torch.Tensor
    """Rows x width: the touched rows, or all."""
    numbers: torch.Tensor
    """Their count and numbers, or `DENSE`."""

    def part(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The touched rows from `first` to before `last`: numbers and values; None: all."""
        count = int(self.numbers[0])
        if count == DENSE:
            return None
        numbers = self.numbers[1 : count + 1]
        ends = torch.searchsorted(numbers, torch.tensor([first, last]))
        mine = slice(int(ends[0]), int(ends[1]))
        return numbers[mine], self.home[mine]

    def dense(self, first: int, last: int) -> torch.Tensor:
        """The rows from `first` to before `last`, with their zeros."""
        part = self.part(first, last)
        if part is None:
            return self.home[first:last]
        numbers, values = part
        return self.home.new_zeros(last - first, self.home.shape[1]).index_copy_(
            0, numbers - first, values
        )


class TableSum:
    """An owner's sum of its rows of a table."""

    def __init__(self, first: int, leaves: Sequence[TableGradient], total: torch.Tensor) -> None:
        """`total` (1-D) takes the sum of the shards' rows from `first` on."""
        self.leaves = leaves
        self._total = total.view(-1, leaves[0].home.shape[1])
        self._first, self._last = first, first + len(self._total)
        self._named: torch.Tensor | None = None
        """The rows of `total` that may hold something else than zeros; None: any."""

    def sum(self, present: Sequence[bool], add: Sum) -> None:
        """Put the sum of the present shards' gradients into `total`.

        A row that no shard has touched is zero in every dense gradient, and so is its sum.
        """
        if not any(present):
            return
        first, last = self._first, self._last
        parts = [
            leaf.part(first, last) if has else _nothing(leaf)
            for leaf, has in zip(self.leaves, present, strict=True)
        ]
        sparse = [part for part in parts if part is not None]
        if len(sparse) < len(parts):
            dense = [leaf.dense(first, last) for leaf in self.leaves]
            add([leaf.view(-1) for leaf in dense], self._total.view(-1))
            self._named = None
            return
        named = torch.unique(torch.cat([numbers for numbers, _ in sparse]))
        summed = self._total.new_empty(len(named), self._total.shape[1])
        add([_spread(part, named).view(-1) for part in sparse], summed.view(-1))
        named -= first
        if self._named is None:
            self._total.zero_()
        else:
            self._total.index_fill_(0, self._named, 0)
        self._total.index_copy_(0, named, summed)
        self._named = named


def _nothing(leaf: TableGradient) -> tuple[torch.Tensor, torch.Tensor]:
    """No rows: what a shard without a gradient has."""
    return leaf.numbers[:0], leaf.home[:0]


def _spread(part: tuple[torch.Tensor, torch.Tensor], named: torch.Tensor) -> torch.Tensor:
    """A shard's rows among all that are named, zeros between them."""
    numbers, values = part
    if len(numbers) == len(named):
        return values
    spread = values.new_zeros(len(named), values.shape[1])
    return spread.index_copy_(0, torch.searchsorted(named, numbers), values)

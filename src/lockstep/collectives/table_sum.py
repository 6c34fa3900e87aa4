"""Large dense embeddings, without their zeros.

The gradient of a dense `nn.Embedding` is as large as its table and nearly all zeros. Autograd
fills, a slot would be filled with, and owners would sum, all of them at each step. Here the module
is asked for the sparse form, and the slot keeps the rows that the shard touched, one after the
other, and their numbers: the dense gradient without its zeros, bit for bit, since the rows are
summed by the very kernel that makes the dense one. Owners sum the rows that some shard has.

Where that would not be so (the module is called twice in a forward pass, or its table is used
elsewhere as well) the shard is computed again in the dense form, and the module is left dense.

Where the model itself has `sparse=True`, slots keep its gradients likewise, and the optimizer gets
the sum as a sparse tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lockstep.errors import TaskError
from lockstep.optim.row_update import put_rows

LARGE = 1 << 20
"""Elements: tables from this size on are treated so."""
MANY = 4
"""A gradient is kept dense where a shard looks up more than one row in so many."""
DENSE = -1
"""Instead of the number of rows: the slot has the dense gradient."""

Sum = Callable[[Sequence[torch.Tensor], torch.Tensor], None]
"""`(leaves, out)`: the sum of 1-D leaves, in the order of the tree."""


Node = int | tuple["Node", "Node"]
"""The order of a sum: a shard, or two such orders (see `gradients.tree`)."""


class Redo(Exception):
    """A table turned out to need the dense form: compute the shard again."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A parameter of which a shard touches some rows."""

    rows: int
    width: int
    module: nn.Embedding | None
    """The plain embedding that is run in the sparse form, and can be run in the dense one. None:
    the model itself asks for sparse gradients, and the optimizer is to get them."""
    by_rows: bool = False
    """Whether the optimizer is run on touched rows alone (see `rows`)."""

    @property
    def asked(self) -> bool:
        """Whether the optimizer gets a sparse gradient."""
        return self.module is None


def find_tables(model: nn.Module, params: Sequence[nn.Parameter]) -> dict[int, Table]:
    """The tables of a model, by the index of their parameter."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    found = {}
    for index, parameter in enumerate(params):
        holders = owners.get(id(parameter), [])
        if any(getattr(holder, "sparse", False) is True for holder in holders):
            if parameter.ndim == 2 and parameter.is_contiguous():
                rows, width = parameter.shape
                found[index] = Table(rows=rows, width=width, module=None)
        elif parameter.numel() >= LARGE and len(holders) == 1 and _suits(holders[0]):
            module = holders[0]
            assert isinstance(module, nn.Embedding)
            rows, width = parameter.shape
            found[index] = Table(rows=rows, width=width, module=module)
    return found


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


def keep_sparse(
    name: str, gradient: torch.Tensor, home: torch.Tensor, numbers: torch.Tensor
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
    home[:count] = gradient._values()
    numbers[1 : count + 1] = gradient._indices()[0]
    numbers[0] = count


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
        mine = slice(*np.searchsorted(numbers.numpy(), (first, last)).tolist())
        return numbers[mine], self.home[mine]

    def keep(self, part: Part) -> None:
        """Make this the gradient that has these rows."""
        named, rows = part
        self.home[: len(named)] = rows
        self.numbers[1 : len(named) + 1] = named
        self.numbers[0] = len(named)

    def dense(self, first: int, last: int) -> torch.Tensor:
        """The rows from `first` to before `last`, with their zeros."""
        part = self.part(first, last)
        if part is None:
            return self.home[first:last]
        numbers, values = part
        spread = self.home.new_zeros(last - first, self.home.shape[1])
        put_rows(spread, numbers - first, values)
        return spread


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
        put_rows(self._total, named, summed)
        self._named = named


def sum_tables(
    leaves: Sequence[TableGradient],
    present: Sequence[bool],
    target: TableGradient,
    add: Sum,
) -> None:
    """Put the sum of the present gradients of a whole table into `target`."""
    if not any(present):
        return
    rows, width = target.home.shape
    parts = [
        leaf.part(0, rows) if has else _nothing(leaf)
        for leaf, has in zip(leaves, present, strict=True)
    ]
    sparse = [part for part in parts if part is not None]
    if len(sparse) < len(parts):
        add([leaf.dense(0, rows).view(-1) for leaf in leaves], target.home.view(-1))
        target.numbers[0] = DENSE
        return
    named = torch.unique(torch.cat([numbers for numbers, _ in sparse]))
    summed = target.home.new_empty(len(named), width)
    add([_spread(part, named).view(-1) for part in sparse], summed.view(-1))
    target.keep((named, summed))


class SparseSum:
    """An owner's sum of its rows of a table whose optimizer takes sparse gradients."""

    def __init__(self, first: int, rows: int, leaves: Sequence[TableGradient]) -> None:
        self.leaves, self._first, self._rows = leaves, first, rows
        self._width = leaves[0].home.shape[1]

    def sum(self, node: Node | None) -> torch.Tensor | None:
        """The sum of the shards' gradients along a tree, sparse and coalesced; None: there are
        none. It may be a shard's own memory: it is not to be changed.

        A row that one side of a sum does not have is the other's, as if -0.0 were added, which
        changes nothing.
        """
        if node is None:
            return None
        named, summed = self.merge(node)
        return self._sparse(named - self._first, summed, self._rows)

    def cut(self, gradient: torch.Tensor | None, edges: Sequence[int]) -> list[torch.Tensor | None]:
        """The parts of a sum between rows, from the first one's on: `edges` ascend from 0."""
        if gradient is None:
            return [None] * (len(edges) - 1)
        named, summed = gradient._indices()[0], gradient._values()
        places = np.searchsorted(named.numpy(), edges).tolist()
        return [
            self._sparse(named[start:stop] - first, summed[start:stop], last - first)
            for (first, last), (start, stop) in zip(
                itertools.pairwise(edges), itertools.pairwise(places), strict=True
            )
        ]

    def _sparse(self, named: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
        return torch.sparse_coo_tensor(
            named[None], rows, (size, self._width), check_invariants=False, is_coalesced=True
        )

    def merge(self, node: Node) -> Part:
        """The same sum, as numbers of the whole table's rows, and the rows."""
        if isinstance(node, int):
            return _some(self.leaves[node].part(self._first, self._first + self._rows))
        left, right = self.merge(node[0]), self.merge(node[1])
        return add_parts(left, right, self._first + self._rows)


Part = tuple[torch.Tensor, torch.Tensor]
"""Numbers of rows, ascending, and the rows."""


def add_parts(left: Part, right: Part, rows: int) -> Part:
    """The sum of two shards' rows: of those that both have, and the others as they are."""
    both = torch.sparse_coo_tensor(
        torch.cat([left[0], right[0]])[None], torch.cat([left[1], right[1]]),
        (rows, left[1].shape[1]), check_invariants=False,
    ).coalesce()  # fmt: skip
    return both._indices()[0], both._values()


def _some(part: Part | None) -> Part:
    assert part is not None, "what was asked to be sparse is never kept dense"
    return part


def _nothing(leaf: TableGradient) -> tuple[torch.Tensor, torch.Tensor]:
    """No rows: what a shard without a gradient has."""
    return leaf.numbers[:0], leaf.home[:0]


def _spread(part: Part, named: torch.Tensor) -> torch.Tensor:
    """A shard's rows among all that are named, zeros between them."""
    numbers, values = part
    if len(numbers) == len(named):
        return values
    spread = values.new_zeros(len(named), values.shape[1])
    put_rows(spread, torch.searchsorted(named, numbers), values)
    return spread

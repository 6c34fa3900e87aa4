"""Table sum: gradients of large embeddings are summed by touched rows, without their zeros.

The gradient of a dense `nn.Embedding` is as large as its table and nearly all zeros. Autograd
fills, a slot would be filled with, and owners would sum, all of them at each step. Here the module
is asked for the sparse form, and the slot keeps the rows that the shard touched, one after the
other, and their indices: the dense gradient without its zeros, bit for bit, since the rows are
summed by the very kernel that makes the dense one. Owners sum the rows that some shard has.

Where that would not be so (the module is called twice in a forward pass, or its table is used
elsewhere as well) the shard is computed again in the dense form, and the module is left dense.

Where the model itself has `sparse=True`, slots keep its gradients likewise, and the optimizer gets
the sum as a sparse tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from lockstep.planning.reduction_tree import Node
from lockstep.state.embedding_tables import DENSE, Part, TableGradient, put_rows

Sum = Callable[[Sequence[torch.Tensor], torch.Tensor], None]
"""`(leaves, out)`: the sum of 1-D leaves, in the order of the tree."""


class TableSum:
    """An owner's sum of its rows of a table."""

    def __init__(self, first: int, leaves: Sequence[TableGradient], total: torch.Tensor) -> None:
        """`total` (1-D) takes the sum of the shards' rows from `first` on."""
        self.leaves = leaves
        self._total = total.view(-1, leaves[0].rows.shape[1])
        self._first, self._last = first, first + len(self._total)
        self._indices: torch.Tensor | None = None
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
            self._indices = None
            return
        indices = torch.unique(torch.cat([own for own, _ in sparse]))
        summed = self._total.new_empty(len(indices), self._total.shape[1])
        add([_spread(part, indices).view(-1) for part in sparse], summed.view(-1))
        indices -= first
        if self._indices is None:
            self._total.zero_()
        else:
            self._total.index_fill_(0, self._indices, 0)
        put_rows(self._total, indices, summed)
        self._indices = indices


def sum_tables(
    leaves: Sequence[TableGradient],
    present: Sequence[bool],
    target: TableGradient,
    add: Sum,
) -> None:
    """Put the sum of the present gradients of a whole table into `target`."""
    if not any(present):
        return
    rows, width = target.rows.shape
    parts = [
        leaf.part(0, rows) if has else _nothing(leaf)
        for leaf, has in zip(leaves, present, strict=True)
    ]
    sparse = [part for part in parts if part is not None]
    if len(sparse) < len(parts):
        add([leaf.dense(0, rows).view(-1) for leaf in leaves], target.rows.view(-1))
        target.row_indices[0] = DENSE
        return
    indices = torch.unique(torch.cat([own for own, _ in sparse]))
    summed = target.rows.new_empty(len(indices), width)
    add([_spread(part, indices).view(-1) for part in sparse], summed.view(-1))
    target.keep((indices, summed))


class SparseSum:
    """An owner's sum of its rows of a table whose optimizer takes sparse gradients."""

    def __init__(self, first: int, rows: int, leaves: Sequence[TableGradient]) -> None:
        self.leaves, self._first, self._rows = leaves, first, rows
        self._width = leaves[0].rows.shape[1]

    def sum(self, node: Node | None) -> torch.Tensor | None:
        """The sum of the shards' gradients along a tree, sparse and coalesced; None: there are
        none. It may be a shard's own memory: it is not to be changed.

        A row that one side of a sum does not have is the other's, as if -0.0 were added, which
        changes nothing.
        """
        if node is None:
            return None
        indices, summed = self.merge(node)
        return self._sparse(indices - self._first, summed, self._rows)

    def cut(self, gradient: torch.Tensor | None, edges: Sequence[int]) -> list[torch.Tensor | None]:
        """The parts of a sum between rows, from the first one's on: `edges` ascend from 0."""
        if gradient is None:
            return [None] * (len(edges) - 1)
        indices, summed = gradient._indices()[0], gradient._values()
        cuts = np.searchsorted(indices.numpy(), edges).tolist()
        return [
            self._sparse(indices[start:stop] - first, summed[start:stop], last - first)
            for (first, last), (start, stop) in zip(
                itertools.pairwise(edges), itertools.pairwise(cuts), strict=True
            )
        ]

    def _sparse(self, indices: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
        return torch.sparse_coo_tensor(
            indices[None], rows, (size, self._width), check_invariants=False, is_coalesced=True
        )

    def merge(self, node: Node) -> Part:
        """The same sum, as indices into the whole table, and the rows."""
        if isinstance(node, int):
            return _some(self.leaves[node].part(self._first, self._first + self._rows))
        left, right = self.merge(node[0]), self.merge(node[1])
        return add_parts(left, right, self._first + self._rows)


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
    return leaf.row_indices[:0], leaf.rows[:0]


def _spread(part: Part, indices: torch.Tensor) -> torch.Tensor:
    """A shard's rows among all that are touched, zeros between them."""
    own, values = part
    if len(own) == len(indices):
        return values
    spread = values.new_zeros(len(indices), values.shape[1])
    put_rows(spread, torch.searchsorted(indices, own), values)
    return spread

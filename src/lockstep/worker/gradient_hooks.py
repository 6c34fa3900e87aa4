"""Gradients: from autograd into a shard's slot, and from all slots to their sum in tree order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lockstep.collectives.table_sum import DENSE, Node, SparseTables, keep_sparse
from lockstep.errors import TaskError
from lockstep.planning.slot_map import AGAIN
from lockstep.state.gradient_slots import Slot
from lockstep.state.shared_state import SharedState
from lockstep.worker.model_checks import CONSTANT

CHUNK = 1 << 15
"""Elements: sums of more than two shards are made in pieces of this size, within the cache."""


EARLY = 1 << 16
"""Elements: gradients from this size on are copied and dropped as soon as they are there. In a job
on several hosts all are, and are sent while the backward pass goes on."""


class SlotWriter:
    """Copies a shard's gradients into its slot: large ones as soon as autograd has finished them,
    so that a worker holds one gradient and not two, small ones all at once after the backward pass.

    They are copied, not added to zeros: adding would turn -0.0 into 0.0.
    """

    def __init__(self, shared: SharedState) -> None:
        self._slot, self._control = shared.slots[0], shared.control
        self._early: tuple[int, int] | None = None
        buckets = shared.slot_map().buckets
        self._last = {param for bucket in buckets for param in sorted(bucket.params)[:2]}
        """The parameters of which the exchanger is told: mostly the last ones of their buckets."""
        least = 0 if shared.networked else EARLY
        self._written: npt.NDArray[np.uint8] = shared.control.has_grad[0]
        self._names, self._params = shared.names, shared.params
        self.tables = SparseTables(shared.tables)
        self._sparse: list[tuple[int, nn.Parameter]] = []
        self._late: list[tuple[int, nn.Parameter]] = []
        for index, parameter in enumerate(shared.params):
            table = shared.tables.get(index)
            if table is not None and table.asked:
                self._sparse.append((index, parameter))
            elif parameter.numel() < least:
                self._late.append((index, parameter))
            else:
                parameter.register_post_accumulate_grad_hook(self._hook(index))

    def begin(
        self, slot: Slot, written: npt.NDArray[np.uint8], early: tuple[int, int] | None = None
    ) -> None:
        """Direct the gradients of the coming backward pass to a slot; `written` marks them.

        `early`: the step and the shard, if other hosts may have gradients as soon as they are
        there.
        """
        self.tables.begin()
        self._early = early
        self._slot, self._written = slot, written
        written[:] = 0

    def abandon(self) -> None:
        """Drop what a backward pass that was cut short has left."""
        for parameter in self._params:
            parameter.grad = None

    def finish(self) -> None:
        """Copy the small gradients, and those that are to be sparse. Called after each backward
        pass of a shard."""
        homes, gradients = [], []
        for index, parameter in self._late:
            gradient = parameter.grad
            if gradient is not None:
                self._check(index, gradient)
                homes.append(self._slot.grads[index])
                gradients.append(gradient)
                self._written[index] = 1
                parameter.grad = None
        if homes:
            torch._foreach_copy_(homes, gradients)
        for index, parameter in self._sparse:
            gradient = parameter.grad
            if gradient is not None:
                slot = self._slot
                keep_sparse(self._names[index], gradient, slot.grads[index], slot.numbers[index])
                self._written[index] = 1
                parameter.grad = None

    def _hook(self, index: int) -> Callable[[nn.Parameter], None]:
        def keep(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            parameter.grad = None
            again = bool(self._written[index])  # the loss ran backward more than once
            home = self._slot.grads[index]
            if index in self.tables:
                if again:
                    self.tables.give_up(index)
                self.tables.store(index, gradient, home, self._slot.numbers[index])
            else:
                self._check(index, gradient)
                home.add_(gradient) if again else home.copy_(gradient)
                if index in self._slot.numbers:
                    self._slot.numbers[index][0] = DENSE
            self._written[index] = AGAIN if again else 1
            if self._early is not None:
                step, shard = self._early
                self._control.ready[shard, index] = step + 1
                if index in self._last:
                    self._control.ring()

        return keep

    def _check(self, index: int, gradient: torch.Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise TaskError(
                f"the gradient of {self._names[index]} is sparse",
                expected="a dense gradient, or a contiguous matrix in a module with sparse=True",
                found=str(gradient.layout),
                fix="make it dense",
            )


@lru_cache(maxsize=256)
def tree(present: tuple[bool, ...]) -> Node | None:
    """The order in which shards are summed: a balanced binary tree over shard indices.

    Neighbours first: ((0 1)(2 3))((4 5)...). A shard without a gradient leaves its place empty,
    and its sibling moves up. A leaf is a shard's index.
    """
    level: list[Node | None] = [index if has else None for index, has in enumerate(present)]
    while len(level) > 1:
        pairs = [level[index : index + 2] for index in range(0, len(level), 2)]
        level = [_join(pair) for pair in pairs]
    return level[0]


def _join(pair: list[Node | None]) -> Node | None:
    nodes = [node for node in pair if node is not None]
    if not nodes:
        return None
    return nodes[0] if len(nodes) == 1 else (nodes[0], nodes[1])


def tree_sum(
    node: Node, leaves: Sequence[torch.Tensor], out: torch.Tensor, spare: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Sum 1-D leaves of equal length along the tree, into `out`; a lone leaf is returned itself.

    `spare` holds one temporary per level of the tree, each at least as long as a leaf.
    """
    if isinstance(node, int):
        return leaves[node]
    left = tree_sum(node[0], leaves, out, spare)
    right = tree_sum(node[1], leaves, spare[0][: out.numel()], spare[1:])
    return torch.add(left, right, out=out)


def depth(node: Node) -> int:
    """How many levels of sums the tree has."""
    return 0 if isinstance(node, int) else 1 + max(depth(node[0]), depth(node[1]))


class Reducer:
    """Sums runs of the shards' slots. One per worker; it holds the temporaries."""

    def __init__(self, shared: SharedState) -> None:
        self._spare: dict[torch.dtype, list[torch.Tensor]] = {}
        self._levels = max(len(shared.slots) - 1, 1).bit_length()

    def sum(
        self, present: tuple[bool, ...], leaves: Sequence[torch.Tensor], out: torch.Tensor
    ) -> None:
        """Put the sum of the present leaves (1-D, as long as `out`) into `out`, piece by piece."""
        node = tree(present)
        if node is None:
            return
        size = out.numel()
        if isinstance(node, int):
            out.copy_(leaves[node])
        elif depth(node) == 1 or size <= CHUNK:
            tree_sum(node, leaves, out, self._temporaries(out.dtype))
        else:
            spare = self._temporaries(out.dtype)
            for start in range(0, size, CHUNK):
                piece = [leaf[start : start + CHUNK] for leaf in leaves]
                tree_sum(node, piece, out[start : start + CHUNK], spare)

    def _temporaries(self, dtype: torch.dtype) -> list[torch.Tensor]:
        if dtype not in self._spare:
            self._spare[dtype] = [torch.empty(CHUNK, dtype=dtype) for _ in range(self._levels)]
        return self._spare[dtype]


def combine_buffers(
    committed: torch.Tensor, slots: Sequence[torch.Tensor], weights: Sequence[float]
) -> None:
    """Merge what the shards left in one buffer, in tree order, into the committed one.

    `weights` are the shards' shares n/N of the step's samples; shards without samples are left
    out. Floating-point buffers take the weighted mean, except where all shards agree: constants
    stay as they are. Integer and boolean buffers take the maximum.

    Raises:
        TaskError: a buffer has changed whose type cannot be computed with.
    """
    used = [(slot, weight) for slot, weight in zip(slots, weights, strict=True) if weight]
    values = [slot for slot, _ in used]
    if len(values) == 1:
        committed.copy_(values[0])
    elif committed.dtype in CONSTANT:
        before = committed.flatten().view(torch.uint8)
        if not all(torch.equal(value.flatten().view(torch.uint8), before) for value in values):
            raise TaskError(
                f"the forward pass changed a buffer of {committed.dtype}",
                expected="a buffer of a type whose mean or maximum can be taken",
                found=f"shape {tuple(committed.shape)} {committed.dtype}",
                fix="use int64 or float32 for what changes",
            )
    elif committed.is_floating_point() or committed.is_complex():
        scaled = [slot * weight for slot, weight in used]
        present = tuple(bool(weight) for weight in weights)
        places = iter(scaled)
        leaves = [next(places).flatten() if has else committed.flatten() for has in present]
        node = tree(present)
        assert node is not None
        spare = [torch.empty_like(leaves[0]) for _ in range(depth(node))]
        mean = tree_sum(node, leaves, torch.empty_like(leaves[0]), spare).view(committed.shape)
        same = torch.stack([value == values[0] for value in values]).all(0)
        committed.copy_(torch.where(same, values[0], mean))
    else:
        highest = values[0]
        for value in values[1:]:
            highest = torch.maximum(highest, value)
        committed.copy_(highest)

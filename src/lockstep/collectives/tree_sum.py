"""Tree sum: gradients summed and buffers merged along the reduction tree."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from lockstep.errors import TaskError
from lockstep.planning.reduction_tree import Node, depth, tree
from lockstep.state.buffer_rules import BufferRule, same_bytes
from lockstep.state.shared_state import SharedState
from lockstep.system.dtypes import CONSTANT

CHUNK = 1 << 15
"""Elements: sums of more than two shards are made in pieces of this size, within the cache."""


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
            tree_sum(node, leaves, out, self._temporaries(out))
        else:
            spare = self._temporaries(out)
            for start in range(0, size, CHUNK):
                piece = [leaf[start : start + CHUNK] for leaf in leaves]
                tree_sum(node, piece, out[start : start + CHUNK], spare)

    def _temporaries(self, out: torch.Tensor) -> list[torch.Tensor]:
        dtype = out.dtype
        if dtype not in self._spare:
            self._spare[dtype] = [
                torch.empty(CHUNK, dtype=dtype, device=out.device) for _ in range(self._levels)
            ]
        return self._spare[dtype]


def combine_buffers(
    committed: torch.Tensor,
    slots: Sequence[torch.Tensor],
    weights: Sequence[float],
    rule: BufferRule | None,
) -> None:
    """Merge what the shards left in one buffer, in tree order, into the committed one.

    `weights` are the shards' shares n/N of the step's samples; shards without samples are left
    out. What one shard alone has left is taken as it is. Without a rule a buffer stays as it was
    (see `state.buffer_rules`, which refuses others where there are several shards).

    Raises:
        TaskError: a buffer has changed whose type cannot be computed with.
    """
    used = [(slot, weight) for slot, weight in zip(slots, weights, strict=True) if weight]
    values = [slot for slot, _ in used]
    if len(values) == 1:
        committed.copy_(values[0])
    elif rule is None:
        return
    elif rule == "last":
        committed.copy_(values[-1])
    elif committed.dtype in CONSTANT:
        if not all(same_bytes(value, committed) for value in values):
            raise TaskError(
                f"the forward pass changed a buffer of {committed.dtype}",
                expected="a buffer of a type whose mean or maximum can be taken",
                found=f"shape {tuple(committed.shape)} {committed.dtype}",
                fix="use int64 or float32 for what changes",
            )
    elif rule == "mean":
        scaled = [slot * weight for slot, weight in used]
        mean = _sum_of(scaled, weights).view(committed.shape)
        # Where all shards agree, constants stay as they are.
        same = torch.stack([value == values[0] for value in values]).all(0)
        committed.copy_(torch.where(same, values[0], mean))
    elif rule == "sum":
        changes = [value - committed for value in values]
        committed.add_(_sum_of(changes, weights).view(committed.shape))
    else:
        pick = torch.maximum if rule == "max" else torch.minimum
        committed.copy_(functools.reduce(pick, values))


def _sum_of(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The sum of what the shards with samples have, along their tree, as one run."""
    node = tree(tuple(bool(weight) for weight in weights))
    assert node is not None
    left = iter(values)
    leaves = [next(left).flatten() if weight else values[0].flatten() for weight in weights]
    spare = [torch.empty_like(leaves[0]) for _ in range(depth(node))]
    return tree_sum(node, leaves, torch.empty_like(leaves[0]), spare)

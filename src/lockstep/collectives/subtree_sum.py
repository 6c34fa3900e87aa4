"""Partial sums that hosts give each other, divided among a host's workers.

They are of the gradients of the host's own shards, subtree by subtree, and, where each host sums a
share for all, of all subtrees.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from lockstep.collectives.gradient_presence import GradientPresence, Mask
from lockstep.collectives.table_sum import SparseSum, sum_tables
from lockstep.collectives.tree_sum import Reducer
from lockstep.planning.blocks import Block, own_blocks
from lockstep.planning.byte_ranges import ByteRange, overlap
from lockstep.planning.reduction_tree import leaf_slots, tree
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.shared_state import SharedState, storage_run


def leaves_of(
    shared: SharedState, subtrees: Sequence[range], host_shards: range
) -> list[GradientSlot]:
    """By shard, the slot that is summed for it: for a subtree's first shard that of its sum.

    Without subtrees, on one host, the shards' own slots.
    """
    leaves, room = list(shared.slots), [*shared.slots, *shared.sums]
    for first, slot in leaf_slots(subtrees, host_shards, len(shared.slots)).items():
        leaves[first] = room[slot]
    return leaves


def dense_leaves(
    shared: SharedState, subtrees: Sequence[range], *, summed: bool
) -> list[GradientSlot] | None:
    """What is summed of all gradients but those of large tables, where that is not `leaves_of`:
    the sum itself, if it is there already, or what a codec has left of each group's."""
    if summed:
        assert shared.total is not None
        return [shared.total]
    if shared.codec is None:
        return None
    leaves = list(shared.slots)
    for group, subtree in enumerate(subtrees):
        leaves[subtree.start] = shared.restored[group]
    return leaves


class SubtreeSums:
    """One worker's part of its host's sums. Made anew when the membership changes."""

    def __init__(
        self,
        shared: SharedState,
        subtrees: Sequence[range],
        host_shards: range,
        rank: int,
        workers: int,
        into: Sequence[GradientSlot] | None = None,
    ) -> None:
        """`into`: by a subtree's first shard, where its sum goes; it may be that shard's own slot.
        None: the sums have slots of their own."""
        self.shared = shared
        self._reducer = Reducer(shared)
        leaves = leaves_of(shared, subtrees, host_shards) if into is None else into
        self._sums = [
            (tree, leaves[tree.start])
            for tree in subtrees
            if len(tree) > 1 and tree.start in host_shards
        ]
        blocks = [shared.blocks[number] for number in own_blocks(shared.blocks, workers)[rank]]
        self._blocks = [block for block in blocks if block.param not in shared.tables]
        self._runs = _runs(shared, self._blocks)
        self._tables = [index for index in shared.tables if index % workers == rank]

    def __bool__(self) -> bool:
        return bool(self._sums)

    def sum(self, presence: GradientPresence) -> None:
        """Make the sums. Called when all shards of the host are computed."""
        for subtree, target in self._sums:
            if presence.uniform is not None:
                mask = _within(presence.uniform, subtree)
                for start, stop, dtype in self._runs:
                    pieces = [slot.flat[start:stop].view(dtype) for slot in self.shared.slots]
                    self._reducer.sum(mask, pieces, target.flat[start:stop].view(dtype))
            else:
                for block in self._blocks:
                    self._sum_block(block, _within(presence.of(block.param), subtree), target)
            for index in self._tables:
                self._sum_table(index, _within(presence.of(index), subtree), target)

    def _sum_block(self, block: Block, mask: Mask, target: GradientSlot) -> None:
        pieces = [storage_run(slot.grads[block.param], block) for slot in self.shared.slots]
        self._reducer.sum(mask, pieces, storage_run(target.grads[block.param], block))

    def _sum_table(self, index: int, mask: Mask, target: GradientSlot) -> None:
        leaves = [slot.table(index) for slot in self.shared.slots]
        table = self.shared.tables[index]
        if not table.sparse:
            sum_tables(leaves, mask, target.table(index), partial(self._reducer.sum, mask))
        elif (node := tree(mask)) is not None:
            target.table(index).keep(SparseSum(0, table.rows, leaves).merge(node))


class ShareSum:
    """One worker's part of what its host sums for all. Made anew when the membership changes."""

    def __init__(
        self, shared: SharedState, leaves: Sequence[GradientSlot], share: Sequence[ByteRange]
    ) -> None:
        """`leaves` are the subtrees' sums, by first shard; `share` are runs of a slot's bytes."""
        self._reducer = Reducer(shared)
        self._runs = []
        for byte_range in share:
            for param, run in _of_params(shared, byte_range):
                assert shared.total is not None
                dtype, part = shared.params[param].dtype, slice(run.offset, run.offset + run.nbytes)
                pieces = [slot.flat[part].view(dtype) for slot in leaves]
                self._runs.append((param, pieces, shared.total.flat[part].view(dtype)))

    def sum(self, presence: GradientPresence) -> None:
        """Make the sums. Called when all subtrees' sums are there."""
        for param, pieces, total in self._runs:
            self._reducer.sum(presence.of(param), pieces, total)


def _of_params(shared: SharedState, byte_range: ByteRange) -> Iterator[tuple[int, ByteRange]]:
    """What of a run of a slot's bytes is which parameter's gradient."""
    for param, (parameter, offset) in enumerate(
        zip(shared.params, shared.grad_offsets, strict=True)
    ):
        whole = ByteRange(offset=offset, nbytes=parameter.numel() * parameter.dtype.itemsize)
        common = overlap(whole, byte_range)
        if common.nbytes:
            yield param, common


def _within(present: Mask, tree: range) -> Mask:
    return tuple(has and shard in tree for shard, has in enumerate(present))


def _runs(shared: SharedState, blocks: Sequence[Block]) -> list[tuple[int, int, torch.dtype]]:
    """The blocks' bytes in a slot, joined where they follow one another, with their type."""
    runs: list[tuple[int, int, torch.dtype]] = []
    for dtype, group in itertools.groupby(blocks, lambda block: shared.params[block.param].dtype):
        for block in group:
            offset = shared.grad_offsets[block.param]
            start = offset + block.start * dtype.itemsize
            stop = offset + block.stop * dtype.itemsize
            if runs and runs[-1][2] == dtype and 0 <= start - runs[-1][1] < 256:
                start = runs.pop()[0]
            runs.append((start, stop, dtype))
    return runs

"""Home moves: what workers with homes of their own give each other through the host's segments.

A step, as each worker does it:

    the sums of its shards' complete subtrees, and what these have left in the buffers, are stored
    COMPUTED    it loads what its blocks need of the others' sums, updates, stores the parameters
    UPDATED     it loads the parameters that others have updated

The host's state segment is the *mirror* that the agent, checkpoints and the ledger read. It has all
parameters after each step, if there are several workers. Optimizer state and buffers are stored
before `UPDATED` in the steps at whose end the snapshot is brought up to date, and at rest: so the
mirror is whole, or the snapshot is. A lone worker moves nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from blake3 import blake3

from lockstep.collectives.gradient_presence import GradientPresence
from lockstep.collectives.subtree_sum import SubtreeSums
from lockstep.planning.assignment import Assignment, WorkerShare
from lockstep.planning.blocks import Block
from lockstep.planning.byte_ranges import ByteRange, merge_ranges, overlap
from lockstep.planning.reduction_tree import subtrees
from lockstep.planning.sampling import home_shards
from lockstep.state.control_segment import DIGEST_BYTES
from lockstep.worker.context import WorkerContext
from lockstep.worker.moves import Moves


class HomeMoves(Moves):
    """One worker's, in one membership."""

    def __init__(
        self,
        context: WorkerContext,
        assignment: Assignment,
        share: WorkerShare,
        own: Sequence[ByteRange],
    ) -> None:
        """`own`: the bytes of the state segment that this worker alone writes to."""
        super().__init__(context.device)
        shared = context.shared
        self.shared, self._control, self._context = shared, shared.control, context
        self._rank, self._alone = assignment.rank, assignment.workers == 1
        self._shards, self._owned_params = assignment.shards, assignment.owned_params
        self._own = merge_ranges(own)
        self._mirrored = assignment.step
        """After how many steps the mirror had this worker's part of the state."""
        self._mirror = memoryview(shared.segments["state"].map)
        blocks = [shared.blocks[number] for number in share.blocks]
        self._block_grads = merge_ranges(self._gradient_of(block) for block in blocks)
        self._block_params = merge_ranges(self._parameter_of(block) for block in blocks)
        others = set(range(len(shared.blocks))) - set(share.blocks)
        self._other_params = merge_ranges(
            self._parameter_of(shared.blocks[number]) for number in sorted(others)
        )
        slots = shared.slot_map()
        self._grads = merge_ranges(slots.grads.values())
        self._buffers = [slots.buffers] if shared.committed else []
        self._norm_grads = merge_ranges(slots.grads[param] for param in share.norms)
        self._total = slots.total
        self._own_trees: tuple[range, ...] = ()
        if not self._alone:
            self.digest = self._digest_of_mirror
            by_rank = _trees_by_rank(len(shared.slots), assignment.workers)
            self.subtrees = tuple(tree for trees in by_rank for tree in trees)
            self._own_trees = by_rank[self._rank]
            first, last = self._shards[0], self._shards[-1] + 1
            self._sums = SubtreeSums(
                shared, self._own_trees, range(first, last), 0, 1, into=shared.slots
            )

    def give_model(self) -> None:
        layout = self.shared.layout
        model = [
            ByteRange(offset=entry.offset, nbytes=entry.nbytes)
            for entry in layout.entries
            if entry.kind in ("param", "buffer")
        ]
        self.device.store("state", merge_ranges(model))
        self.device.settle()

    def give_gradients(self, step: int) -> None:
        if self._alone:
            return
        mine = [shard for shard in self._active(step) if shard in self._shards]
        self._sums.sum(GradientPresence.of_step(self._control, mine))
        self.device.store("slots", self._of_slots(self._used(self._own_trees, mine), self._grads))
        self.device.store("slots", self._of_slots(mine, self._buffers))
        self.device.settle()

    def take_gradients(self, step: int) -> None:
        if self._alone:
            return
        theirs = [shard for shard in self._active(step) if shard not in self._shards]
        trees = [tree for tree in self.subtrees if tree not in self._own_trees]
        self.device.load("slots", self._of_slots(self._used(trees, theirs), self._block_grads))
        self.device.load("slots", self._of_slots(theirs, self._buffers))
        self.device.settle()

    def give_sums(self) -> None:
        if not self._alone:
            self.device.store("slots", self._of_slots([self._total], self._block_grads))
            self.device.settle()

    def take_sums(self) -> None:
        if not self._alone:
            self.device.load("slots", self._of_slots([self._total], self._norm_grads))
            self.device.settle()

    def give_state(self, step: int, *, due: bool) -> None:
        if due:
            self._give_all(step + 1)
            if self._rank == 0:
                self._control.mirror_step = step + 1
        elif not self._alone:
            self.device.store("state", [*self._block_params, *self._digested(step)])
            self.device.settle()

    def take_parameters(self) -> None:
        if not self._alone:
            self.device.load("state", self._other_params)
            self.device.settle()

    def rest(self, step: int) -> None:
        if self._mirrored != step:
            self._give_all(step)

    def _give_all(self, committed: int) -> None:
        """Have the mirror have this worker's part of the state after so many steps."""
        self.device.store("state", self._own)
        self.device.settle()
        self._mirrored = committed

    def _digested(self, step: int) -> list[ByteRange]:
        """What of this worker's part the ledger digests for a step."""
        _, units = self._context.digest_sample.split(step, self._owned_params)
        common = [
            overlap(own, ByteRange(offset=unit.offset, nbytes=unit.nbytes))
            for unit in units.values()
            for own in self._own
        ]
        return [item for item in common if item.nbytes]

    def _digest_of_mirror(self, offset: int, nbytes: int) -> bytes:
        return blake3(self._mirror[offset : offset + nbytes]).digest(DIGEST_BYTES)

    def _active(self, step: int) -> Sequence[int]:
        return self._context.sampling.active(step)

    @staticmethod
    def _used(trees: Iterable[range], active: Sequence[int]) -> list[int]:
        """The first shards of the subtrees of which some shard has samples."""
        return [tree.start for tree in trees if any(shard in tree for shard in active)]

    def _of_slots(self, slots: Sequence[int], ranges: Sequence[ByteRange]) -> list[ByteRange]:
        """Runs of a slot's bytes, of each of these slots, in the segment."""
        size = self.shared.layout.slots_bytes
        return [
            ByteRange(offset=slot * size + item.offset, nbytes=item.nbytes)
            for slot in slots
            for item in ranges
        ]

    def _gradient_of(self, block: Block) -> ByteRange:
        """Where a block's gradient lies in a slot."""
        size = self.shared.params[block.param].dtype.itemsize
        offset = self.shared.grad_offsets[block.param] + block.start * size
        return ByteRange(offset=offset, nbytes=block.size * size)

    def _parameter_of(self, block: Block) -> ByteRange:
        """Where a block lies in the state segment."""
        size = self.shared.params[block.param].dtype.itemsize
        offset = self.shared.layout.entry(self.shared.names[block.param]).offset
        return ByteRange(offset=offset + block.start * size, nbytes=block.size * size)


@functools.cache
def _trees_by_rank(shards: int, workers: int) -> tuple[tuple[range, ...], ...]:
    """By rank: the complete subtrees of the shards that a worker computes."""
    runs = (home_shards(shards, workers, rank) for rank in range(workers))
    return tuple(tuple(subtrees(shards, run.start, run.stop)) for run in runs)

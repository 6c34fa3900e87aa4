"""Update groups: blocks that an owner updates together, with their gradients and state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lockstep.collectives.table_sum import SparseSum, TableSum
from lockstep.optim.direct_update import DirectUpdate
from lockstep.planning.blocks import Block, group_blocks
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.optimizer_state import StateKey, load_value
from lockstep.state.shared_state import PRESENT, SharedState, state_name

Run = tuple[list[torch.Tensor], torch.Tensor] | TableSum
"""What is summed at once: the shards' runs, 1-D, and where their sum goes; or a table's rows."""


@dataclass
class OwnedBlock:
    """A block, its parameter as the optimizer sees it, and where its gradient lies."""

    number: int
    block: Block
    param: nn.Parameter
    first: int
    """Where its run begins in its group's."""
    state: dict[StateKey, torch.Tensor]
    """Where its optimizer state lies in shared memory."""
    rebound: list[StateKey]
    leaves: list[torch.Tensor]
    """Its run of each shard's slot, 1-D."""
    total: torch.Tensor
    """Where its gradient is summed, 1-D."""
    begun: bool
    """Whether its optimizer state is in shared memory."""

    def shaped(self, run: torch.Tensor) -> torch.Tensor:
        """A 1-D run of this block in the shape of its parameter."""
        return run.as_strided(self.param.shape, self.param.stride())


@dataclass
class SparseTable:
    """The rows of a table that an owner updates by sparse gradients."""

    sum: SparseSum
    edges: list[int]
    """Where its blocks begin and end, in rows from the first one's on."""
    rows: torch.Tensor
    """Rows x width, as `like`."""
    like: dict[str, torch.Tensor]
    """The state that is one value per element."""
    by_rows: bool
    """Whether the optimizer is run on touched rows alone."""


@dataclass
class UpdateGroup:
    """Consecutive blocks that are summed and updated together."""

    blocks: list[OwnedBlock]
    total: torch.Tensor
    """Where the gradients of all blocks are summed, 1-D."""
    tables: list[tuple[int, Run]]
    """The runs of large embeddings, each with its parameter."""
    dense: list[Run]
    """The runs between them."""
    sparse: SparseTable | None
    """Where these are a table's blocks, and its optimizer takes sparse gradients."""
    grads: list[torch.Tensor]
    """Per block: its part of `total`, in the shape of its parameter."""
    only_grads: list[torch.Tensor]
    """Where V = 1, per block: the gradient in the slot itself, except of large embeddings."""
    members: list[list[nn.Parameter]]
    """Per parameter group of the optimizer."""
    grads_in_place: Sequence[torch.Tensor | None] = ()
    """The gradients that the blocks' parameters hold."""
    settled: bool = False
    """Whether all optimizer state is in shared memory and stays there by itself."""
    direct: DirectUpdate | None = None
    """Once it is settled: what does the same as the optimizer's `step`, where that is known."""


class Grouping:
    """Makes an owner's groups."""

    def __init__(
        self, shared: SharedState, slots: Sequence[GradientSlot], dense: Sequence[GradientSlot]
    ) -> None:
        """`slots` are what is summed of large tables, `dense` of all else."""
        self.shared, self.slots, self._dense = shared, slots, dense
        self._present = shared.view(PRESENT)

    def groups(self, numbers: Sequence[int]) -> list[UpdateGroup]:
        """The groups of these blocks, those left out whose parameters the optimizer does not have.

        What of their optimizer state has begun is given to the optimizer.
        """
        shared = self.shared
        updated = [n for n in numbers if shared.groups[shared.blocks[n].param] is not None]
        return [
            self._make_group(part)
            for (_, table), run in itertools.groupby(
                updated, lambda n: (self._dtype(n), self._table(n))
            )
            for part in (group_blocks(shared.blocks, list(run)) if table is None else [list(run)])
        ]

    def run(self, block: Block, leaves: list[torch.Tensor], total: torch.Tensor) -> Run:
        """How a run that begins with a block is summed into `total`."""
        table = self.shared.tables.get(block.param)
        if table is None:
            return leaves, total
        gradients = [slot.table(block.param) for slot in self.slots]
        return TableSum(block.start // table.width, gradients, total)

    def _table(self, number: int) -> int | None:
        """The block's parameter, if its optimizer takes sparse gradients."""
        param = self.shared.blocks[number].param
        table = self.shared.tables.get(param)
        return param if table is not None and table.sparse else None

    def _dtype(self, number: int) -> torch.dtype:
        return self.shared.params[self.shared.blocks[number].param].dtype

    def _make_group(self, numbers: list[int]) -> UpdateGroup:
        shared = self.shared
        first, last = shared.blocks[numbers[0]], shared.blocks[numbers[-1]]
        dtype = self._dtype(numbers[0])
        start = shared.grad_offsets[first.param] + first.start * dtype.itemsize
        stop = shared.grad_offsets[last.param] + last.stop * dtype.itemsize
        leaves = [slot.flat[start:stop].view(dtype) for slot in self._dense]
        # The sum of a sparse table has memory of its own, and one gradient is its own sum: memory
        # that nobody touches is not taken.
        unused = self._table(numbers[0]) is not None or len(leaves) == 1
        room = torch.empty if unused else torch.zeros
        total = room((stop - start) // dtype.itemsize, dtype=dtype, device=leaves[0].device)
        owned = [self._own(number, start, leaves, total) for number in numbers]
        members: list[list[nn.Parameter]] = [[] for _ in self.shared.optimizer.param_groups]
        for item in owned:
            members[shared.groups[item.block.param] or 0].append(item.param)
        tables, dense = self._divide(owned, leaves, total)
        return UpdateGroup(
            blocks=owned,
            total=total,
            tables=tables,
            dense=dense,
            sparse=self._sparse(owned),
            grads=[item.shaped(item.total) for item in owned],
            only_grads=[
                item.shaped(item.total if item.block.param in shared.tables else item.leaves[0])
                for item in owned
            ],
            members=members,
        )

    def _divide(
        self, owned: list[OwnedBlock], leaves: list[torch.Tensor], total: torch.Tensor
    ) -> tuple[list[tuple[int, Run]], list[Run]]:
        """Part the group's run into those of large embeddings, and what lies between them."""
        tables, dense = [], []
        for table, items in itertools.groupby(
            owned, lambda item: item.block.param if item.block.param in self.shared.tables else None
        ):
            blocks = list(items)
            part = slice(blocks[0].first, blocks[-1].first + blocks[-1].block.size)
            run = self.run(blocks[0].block, [leaf[part] for leaf in leaves], total[part])
            if table is None:
                dense.append(run)
            elif not self.shared.tables[table].sparse:
                tables.append((table, run))
        return tables, dense

    def _sparse(self, owned: list[OwnedBlock]) -> SparseTable | None:
        """The rows of a group's blocks, where the optimizer takes sparse gradients."""
        first, last = owned[0], owned[-1].block
        if self._table(first.number) is None:
            return None
        shared, start = self.shared, first.block.start
        name, table = shared.names[first.block.param], shared.tables[first.block.param]
        inside = slice(start // table.width, last.stop // table.width)
        gradients = [slot.table(first.block.param) for slot in self.slots]
        return SparseTable(
            sum=SparseSum(inside.start, inside.stop - inside.start, gradients),
            edges=[0, *((item.block.stop - start) // table.width for item in owned)],
            rows=shared.params[first.block.param].detach()[inside],
            like={
                key.name: shared.view(state_name(name, first.block, key))[inside]
                for key in first.state
                if key.form == "like"
            },
            by_rows=table.by_rows,
        )

    def _param(self, block: Block) -> nn.Parameter:
        """The block as the optimizer sees it; the model's own parameter if it is undivided."""
        if self.shared.undivided is not None:
            return self.shared.params[block.param]
        return nn.Parameter(self.shared.block_view(block))

    def _own(
        self, number: int, start: int, leaves: list[torch.Tensor], total: torch.Tensor
    ) -> OwnedBlock:
        shared, block = self.shared, self.shared.blocks[number]
        size = total.dtype.itemsize
        first = (shared.grad_offsets[block.param] - start) // size + block.start
        state = {key: shared.state_view(number, key) for key in shared.keys[number]}
        owned = OwnedBlock(
            number=number,
            block=block,
            param=self._param(block),
            first=first,
            state=state,
            rebound=[key for key in state if key.rebound],
            leaves=[leaf[first : first + block.size] for leaf in leaves],
            total=total[first : first + block.size],
            begun=bool(self._present[number]),
        )
        if owned.begun and shared.undivided is None:
            self.shared.optimizer.state[owned.param] = {
                key.name: load_value(stored, key) for key, stored in state.items()
            }
        return owned

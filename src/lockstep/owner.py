"""An owner's part of a step: sum the gradients of its blocks and run the optimizer on them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lockstep.embeddings import SparseSum, TableSum
from lockstep.faults import FaultScript
from lockstep.gradients import Reducer, tree
from lockstep.layout import Block, group_blocks
from lockstep.optim import StateKey, check_known
from lockstep.presence import Mask, Presence
from lockstep.rows import step_rows
from lockstep.slots import Slot
from lockstep.state import (
    PRESENT,
    SharedState,
    load_value,
    state_name,
    storage_run,
    store_value,
)
from lockstep.stepping import bare_step

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
    homes: dict[StateKey, torch.Tensor]
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


class Owner:
    """Updates the blocks of one worker. Made anew when the membership changes."""

    def __init__(
        self,
        shared: SharedState,
        numbers: Sequence[int],
        faults: FaultScript,
        slots: Sequence[Slot] | None = None,
        *,
        dense: Sequence[Slot] | None = None,
    ) -> None:
        """`numbers` are its blocks, `slots` what is summed, by shard; the shards' own if None.

        `dense` takes their place for all but large tables; one slot has the sum of all already.
        """
        self.shared, self.faults = shared, faults or None
        self.slots = shared.slots if slots is None else slots
        self._dense = self.slots if dense is None else dense
        self._numbers = numbers
        self.optimizer = shared.optimizer
        self._present = shared.view(PRESENT)
        self._reducer = Reducer(shared)
        self.optimizer.state.clear()
        updated = [n for n in numbers if shared.groups[shared.blocks[n].param] is not None]
        self.groups = [
            self._make_group(part)
            for (_, table), run in itertools.groupby(
                updated, lambda n: (self._dtype(n), self._table(n))
            )
            for part in (group_blocks(shared.blocks, list(run)) if table is None else [list(run)])
        ]
        self._loaded: UpdateGroup | None = None
        self._step = bare_step(self.optimizer)

    def reduce(self, presence: Presence) -> None:
        """Sum this owner's blocks into the slot of the sum, before its norm is taken."""
        for param, target in self._targets:
            self._sum_run(target, presence.of(param))

    @functools.cached_property
    def _targets(self) -> list[tuple[int, Run]]:
        """Where the blocks are summed whose sums are not there yet, with their parameters."""
        blocks = [self.shared.blocks[number] for number in self._numbers]
        return [
            (block.param, self._target(block))
            for block in blocks
            if len(self._dense) > 1 or len(self.slots) == 1 or block.param in self.shared.tables
        ]

    def _target(self, block: Block) -> Run:
        assert self.shared.total is not None
        leaves = [storage_run(slot.grads[block.param], block) for slot in self._dense]
        total = self.shared.total.grads[block.param]
        return self._run(block, leaves, storage_run(total, block))

    def _run(self, block: Block, leaves: list[torch.Tensor], total: torch.Tensor) -> Run:
        """How a run that begins with a block is summed into `total`."""
        table = self.shared.tables.get(block.param)
        if table is None:
            return leaves, total
        gradients = [slot.table(block.param) for slot in self.slots]
        return TableSum(block.start // table.width, gradients, total)

    def _sum_run(self, run: Run, present: Mask) -> None:
        if isinstance(run, TableSum):
            run.sum(present, partial(self._reducer.sum, present))
        else:
            self._reducer.sum(present, *run)

    def update(
        self,
        step: int,
        presence: Presence,
        scale: torch.Tensor | None = None,
    ) -> None:
        """Update all blocks of this owner. If it does not return, the state is torn.

        `scale` is given where the norm is limited: the gradient is then what `reduce` has summed,
        times `scale`.
        """
        for group in self.groups:
            if scale is None:
                grads = self._sum(group, presence)
            else:
                grads = self._scale(group, presence, scale)
            if self.faults is not None:
                self.faults.at("update_begin", step)
            self._run_optimizer(group, grads)
            if self.faults is not None:
                self.faults.at("update_end", step)

    def _sum(self, group: UpdateGroup, presence: Presence) -> Sequence[torch.Tensor | None]:
        if group.sparse is not None:
            present = presence.of(group.blocks[0].block.param)
            return [group.sparse.sum.sum(tree(present))]
        for param, table in group.tables:
            self._sum_run(table, presence.of(param))
        grads: Sequence[torch.Tensor | None]
        if presence.uniform == (True,):
            grads = group.only_grads
        elif presence.uniform is not None:
            for run in group.dense:
                self._sum_run(run, presence.uniform)
            grads = group.grads
        else:
            for owned in group.blocks:
                if owned.block.param not in self.shared.tables:
                    self._reducer.sum(presence.of(owned.block.param), owned.leaves, owned.total)
            grads = self._present_grads(group, presence)
        return grads

    def _scale(
        self, group: UpdateGroup, presence: Presence, scale: torch.Tensor
    ) -> Sequence[torch.Tensor | None]:
        assert self.shared.total is not None
        for owned in group.blocks:
            run = storage_run(self.shared.total.grads[owned.block.param], owned.block)
            torch.mul(run, scale, out=owned.total)
        return self._present_grads(group, presence)

    @staticmethod
    def _present_grads(group: UpdateGroup, presence: Presence) -> Sequence[torch.Tensor | None]:
        return [
            gradient if any(presence.of(owned.block.param)) else None
            for owned, gradient in zip(group.blocks, group.grads, strict=True)
        ]

    def _run_optimizer(self, group: UpdateGroup, grads: Sequence[torch.Tensor | None]) -> None:
        table = group.sparse
        if table is not None:
            (gradient,) = grads
            if table.by_rows and all(owned.begun for owned in group.blocks):
                if gradient is not None:
                    self._update_rows(group, table, gradient)
                return
            grads = table.sum.cut(gradient, table.edges)
        if grads is not group.grads_in_place:
            for owned, gradient in zip(group.blocks, grads, strict=True):
                owned.param.grad = gradient
            group.grads_in_place = grads
        if group is not self._loaded:
            for options, members in zip(self.optimizer.param_groups, group.members, strict=True):
                options["params"] = members
            self._loaded = group
        self._step(self.optimizer)
        if not group.settled:
            for owned, gradient in zip(group.blocks, grads, strict=True):
                if gradient is not None and (owned.rebound or not owned.begun):
                    self._share(owned)
            group.settled = all(owned.begun and not owned.rebound for owned in group.blocks)

    def _update_rows(self, group: UpdateGroup, table: SparseTable, gradient: torch.Tensor) -> None:
        """Run the optimizer on the rows of a table that the gradient has."""

        def step(rows: nn.Parameter, state: dict[str, Any]) -> None:
            for options, members in zip(self.optimizer.param_groups, group.members, strict=True):
                options["params"] = [rows] if members else []
            self._loaded = None
            self.optimizer.state[rows] = state
            self._step(self.optimizer)
            del self.optimizer.state[rows]

        # What is not per element is the same in all blocks: they are always stepped together.
        state = {**self.optimizer.state[group.blocks[0].param], **table.like}
        step_rows(table.rows, gradient, state, table.like, step)
        check_known(self.optimizer, state, group.blocks[0].homes)
        for owned in group.blocks:
            for key, home in owned.homes.items():
                if key.form != "like":
                    store_value(home, state[key.name])
                    self.optimizer.state[owned.param][key.name] = load_value(home, key)

    def _share(self, owned: OwnedBlock) -> None:
        """Bring state that the optimizer has made or replaced to its place in shared memory.

        Raises:
            OptimizerError: there is state that was not there when it was tried.
        """
        state = self.optimizer.state[owned.param]
        check_known(self.optimizer, state, owned.homes)
        for key in owned.rebound if owned.begun else owned.homes:
            home = owned.homes[key]
            store_value(home, state[key.name])
            state[key.name] = load_value(home, key)
        self._present[owned.number] = 1
        owned.begun = True

    def _table(self, number: int) -> int | None:
        """The block's parameter, if its optimizer takes sparse gradients."""
        param = self.shared.blocks[number].param
        table = self.shared.tables.get(param)
        return param if table is not None and table.asked else None

    def _dtype(self, number: int) -> torch.dtype:
        return self.shared.params[self.shared.blocks[number].param].dtype

    def _make_group(self, numbers: list[int]) -> UpdateGroup:
        shared = self.shared
        first, last = shared.blocks[numbers[0]], shared.blocks[numbers[-1]]
        dtype = self._dtype(numbers[0])
        start = shared.grad_offsets[first.param] + first.start * dtype.itemsize
        stop = shared.grad_offsets[last.param] + last.stop * dtype.itemsize
        leaves = [slot.flat[start:stop].view(dtype) for slot in self._dense]
        # The sum of a sparse table has memory of its own; this is never touched then.
        room = torch.zeros if self._table(numbers[0]) is None else torch.empty
        total = room((stop - start) // dtype.itemsize, dtype=dtype)
        owned = [self._own(number, start, leaves, total) for number in numbers]
        members: list[list[nn.Parameter]] = [[] for _ in self.optimizer.param_groups]
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
            run = self._run(blocks[0].block, [leaf[part] for leaf in leaves], total[part])
            if table is None:
                dense.append(run)
            elif not self.shared.tables[table].asked:
                tables.append((table, run))
        return tables, dense

    def _sparse(self, owned: list[OwnedBlock]) -> SparseTable | None:
        """The rows of a group's blocks, where the optimizer takes sparse gradients."""
        first, last = owned[0], owned[-1].block
        if self._table(first.number) is None:
            return None
        shared, start = self.shared, first.block.start
        name, table = shared.names[first.block.param], shared.tables[first.block.param]
        mine = slice(start // table.width, last.stop // table.width)
        gradients = [slot.table(first.block.param) for slot in self.slots]
        return SparseTable(
            sum=SparseSum(mine.start, mine.stop - mine.start, gradients),
            edges=[0, *((item.block.stop - start) // table.width for item in owned)],
            rows=shared.params[first.block.param].detach()[mine],
            like={
                key.name: shared.view(state_name(name, first.block, key))[mine]
                for key in first.homes
                if key.form == "like"
            },
            by_rows=table.by_rows,
        )

    def _own(
        self, number: int, start: int, leaves: list[torch.Tensor], total: torch.Tensor
    ) -> OwnedBlock:
        shared, block = self.shared, self.shared.blocks[number]
        size = total.dtype.itemsize
        first = (shared.grad_offsets[block.param] - start) // size + block.start
        homes = {key: shared.state_view(number, key) for key in shared.keys[number]}
        owned = OwnedBlock(
            number=number,
            block=block,
            param=nn.Parameter(shared.block_view(block)),
            first=first,
            homes=homes,
            rebound=[key for key in homes if key.rebound],
            leaves=[leaf[first : first + block.size] for leaf in leaves],
            total=total[first : first + block.size],
            begun=bool(self._present[number]),
        )
        if owned.begun:
            self.optimizer.state[owned.param] = {
                key.name: load_value(home, key) for key, home in homes.items()
            }
        return owned

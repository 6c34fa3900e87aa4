"""Block owner: sums the gradients of its blocks and runs the optimizer on them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lockstep.collectives.gradient_presence import GradientPresence, Mask
from lockstep.collectives.table_sum import TableSum
from lockstep.collectives.tree_sum import Reducer
from lockstep.optim.chained import bare_step
from lockstep.optim.direct_update import DirectUpdate
from lockstep.optim.introspection import check_known
from lockstep.optim.row_update import step_rows
from lockstep.optim.undivided_update import UndividedUpdate
from lockstep.optim.update_groups import Grouping, OwnedBlock, Run, SparseTable, UpdateGroup
from lockstep.planning.blocks import Block
from lockstep.planning.reduction_tree import tree
from lockstep.state.fault_injection import FaultInjector
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.optimizer_state import load_value, store_value
from lockstep.state.shared_state import PRESENT, SharedState, storage_run
from lockstep.system.machine import give_back_freed_memory


class BlockOwner:
    """Updates the blocks of one worker. Made anew when the membership changes."""

    def __init__(
        self,
        shared: SharedState,
        numbers: Sequence[int],
        faults: FaultInjector,
        slots: Sequence[GradientSlot] | None = None,
        *,
        dense: Sequence[GradientSlot] | None = None,
        scheduled: Collection[tuple[int, str]] = (),
    ) -> None:
        """`numbers` are its blocks, `slots` what is summed, by shard; the shards' own if None.

        `dense` takes their place for all but large tables; one slot has the sum of all already.
        `scheduled` are the options, by group, that the schedule sets.
        """
        self.shared, self.faults = shared, faults or None
        self.slots = shared.slots if slots is None else slots
        self._dense = self.slots if dense is None else dense
        self._numbers = numbers
        self.optimizer = shared.optimizer
        self._present = shared.view(PRESENT)
        self._reducer = Reducer(shared)
        self.optimizer.state.clear()
        self._grouping = Grouping(shared, self.slots, self._dense)
        self.groups = self._grouping.groups(numbers)
        self._loaded: UpdateGroup | None = None
        self._step = bare_step(self.optimizer)
        self._undivided: UndividedUpdate | None = None
        if shared.undivided is not None and self.groups:
            owned = [item.number for group in self.groups for item in group.blocks]
            self._undivided = UndividedUpdate(shared, owned, scheduled)

    def reduce(self, presence: GradientPresence) -> None:
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
        return self._grouping.run(block, leaves, storage_run(total, block))

    def _sum_run(self, run: Run, present: Mask) -> None:
        if isinstance(run, TableSum):
            run.sum(present, partial(self._reducer.sum, present))
        else:
            self._reducer.sum(present, *run)

    def update(
        self,
        step: int,
        presence: GradientPresence,
        scale: torch.Tensor | None = None,
    ) -> None:
        """Update all blocks of this owner. If it does not return, the state is between two steps.

        `scale` is given where the norm is limited: the gradient is then what `reduce` has summed,
        times `scale`.
        """
        if self._undivided is not None:
            self._update_all(self._undivided, step, presence, scale)
            return
        for group in self.groups:
            grads = self._gradients(group, presence, scale)
            if self.faults is not None:
                self.faults.at("update_begin", step)
            self._run_optimizer(group, grads)
            if self.faults is not None:
                self.faults.at("update_end", step)

    def _update_all(
        self,
        undivided: UndividedUpdate,
        step: int,
        presence: GradientPresence,
        scale: torch.Tensor | None,
    ) -> None:
        """Give every parameter its gradient, and step once."""
        for group in self.groups:
            grads = self._gradients(group, presence, scale)
            if group.sparse is not None:
                grads = group.sparse.sum.cut(grads[0], group.sparse.edges)
            for owned, gradient in zip(group.blocks, grads, strict=True):
                owned.param.grad = gradient
        if self.faults is not None:
            self.faults.at("update_begin", step)
        undivided.step()
        if self.faults is not None:
            self.faults.at("update_end", step)

    def _gradients(
        self, group: UpdateGroup, presence: GradientPresence, scale: torch.Tensor | None
    ) -> Sequence[torch.Tensor | None]:
        if scale is None:
            return self._sum(group, presence)
        return self._scale(group, presence, scale)

    def _sum(self, group: UpdateGroup, presence: GradientPresence) -> Sequence[torch.Tensor | None]:
        if group.sparse is not None:
            present = presence.of(group.blocks[0].block.param)
            return [group.sparse.sum.sum(tree(present))]
        for param, table in group.tables:
            self._sum_run(table, presence.of(param))
        grads: Sequence[torch.Tensor | None]
        # An undivided optimizer may change gradients in place: never those in a slot.
        if presence.uniform == (True,) and self._undivided is None:
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
        self, group: UpdateGroup, presence: GradientPresence, scale: torch.Tensor
    ) -> Sequence[torch.Tensor | None]:
        assert self.shared.total is not None
        for owned in group.blocks:
            run = storage_run(self.shared.total.grads[owned.block.param], owned.block)
            torch.mul(run, scale, out=owned.total)
        return self._present_grads(group, presence)

    @staticmethod
    def _present_grads(
        group: UpdateGroup, presence: GradientPresence
    ) -> Sequence[torch.Tensor | None]:
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
        elif group.direct is not None and group.direct.run(grads):
            return
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
            begins = not _have_begun(group)
            for owned, gradient in zip(group.blocks, grads, strict=True):
                if gradient is not None and (owned.rebound or not owned.begun):
                    self._share(owned)
            group.settled = all(owned.begun and not owned.rebound for owned in group.blocks)
            if group.settled and table is None:
                group.direct = self._direct(group)
            if begins and all(map(_have_begun, self.groups)):
                give_back_freed_memory()  # the optimizer has made its state, and then it was moved

    def _direct(self, group: UpdateGroup) -> DirectUpdate | None:
        groups = self.shared.groups
        members = [(groups[item.block.param] or 0, item.param) for item in group.blocks]
        return DirectUpdate.of(self.optimizer, members)

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
        check_known(self.optimizer, state, group.blocks[0].state)
        for owned in group.blocks:
            for key, stored in owned.state.items():
                if key.form != "like":
                    store_value(stored, state[key.name])
                    self.optimizer.state[owned.param][key.name] = load_value(stored, key)

    def _share(self, owned: OwnedBlock) -> None:
        """Bring state that the optimizer has made or replaced to shared memory.

        Raises:
            OptimizerError: there is state that was not there when it was tried.
        """
        state = self.optimizer.state[owned.param]
        check_known(self.optimizer, state, owned.state)
        for key in owned.rebound if owned.begun else owned.state:
            stored = owned.state[key]
            store_value(stored, state[key.name])
            state[key.name] = load_value(stored, key)
        self._present[owned.number] = 1
        owned.begun = True


def _have_begun(group: UpdateGroup) -> bool:
    return all(owned.begun for owned in group.blocks)

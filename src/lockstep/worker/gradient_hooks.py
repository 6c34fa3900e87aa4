"""Gradient hooks: copy gradients from autograd into a shard's slot."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lockstep.errors import TaskError
from lockstep.planning.slot_map import AGAIN
from lockstep.state.embedding_tables import DENSE
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.shared_state import SharedState
from lockstep.worker.sparse_autograd import SparseTables, keep_sparse

EARLY = 1 << 16
"""Elements: gradients from this size on are copied and dropped as soon as they are there. In a job
on several hosts all are, and are sent while the backward pass goes on."""


class GradientHooks:
    """Copies a shard's gradients into its slot: large ones as soon as autograd has finished them,
    so that a worker holds one gradient and not two, small ones all at once after the backward pass.

    They are copied, not added to zeros: adding would turn -0.0 into 0.0.
    """

    def __init__(self, shared: SharedState) -> None:
        self._slot, self._control = shared.slots[0], shared.control
        self._early: tuple[int, int] | None = None
        buckets = shared.slot_map().buckets
        self._last = {param for bucket in buckets for param in sorted(bucket.params)[:2]}
        """The parameters that notify the exchange thread: mostly the last ones of their buckets."""
        least = 0 if shared.networked else EARLY
        self._written: npt.NDArray[np.uint8] = shared.control.has_grad[0]
        self._names, self._params = shared.names, shared.params
        self.tables = SparseTables(shared.tables)
        self.others: frozenset[int] = frozenset()
        """The parameters whose gradients other members of the team write."""
        self._sparse: list[tuple[int, nn.Parameter]] = []
        self._late: list[tuple[int, nn.Parameter]] = []
        for index, parameter in enumerate(shared.params):
            table = shared.tables.get(index)
            if table is not None and table.sparse:
                self._sparse.append((index, parameter))
            elif parameter.numel() < least:
                self._late.append((index, parameter))
            else:
                parameter.register_post_accumulate_grad_hook(self._hook(index))

    def begin(
        self,
        slot: GradientSlot,
        written: npt.NDArray[np.uint8],
        early: tuple[int, int] | None = None,
    ) -> None:
        """Direct the gradients of the coming backward pass to a slot; `written` marks them.

        `early`: the step and the shard, if other hosts may have gradients as soon as they are
        there.
        """
        self.tables.begin()
        self._early = early
        self._slot, self._written = slot, written
        written[:] = 0

    def all_are_there(self, step: int, shard: int, written: npt.NDArray[np.uint8]) -> None:
        """Say that other hosts may have a shard's gradients, which were all computed at once."""
        self._control.ready[shard, written != 0] = step + 1
        self._control.notify()

    def abandon(self) -> None:
        """Drop what a backward pass that was cut short has left."""
        for parameter in self._params:
            parameter.grad = None

    def finish(self) -> None:
        """Copy the small gradients, and those that are to be sparse. Called after each backward
        pass of a shard."""
        targets, gradients = [], []
        for index, parameter in self._late:
            gradient = parameter.grad
            if index in self.others:
                parameter.grad = None
            elif gradient is not None:
                self._check(index, gradient)
                targets.append(self._slot.grads[index])
                gradients.append(gradient)
                self._written[index] = 1
                parameter.grad = None
        if targets:
            torch._foreach_copy_(targets, gradients)
        for index, parameter in self._sparse:
            gradient = parameter.grad
            if index in self.others:
                parameter.grad = None
            elif gradient is not None:
                slot = self._slot
                keep_sparse(
                    self._names[index], gradient, slot.grads[index], slot.row_indices[index]
                )
                self._written[index] = 1
                parameter.grad = None

    def _hook(self, index: int) -> Callable[[nn.Parameter], None]:
        def keep(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            parameter.grad = None
            if index in self.others:
                return
            again = bool(self._written[index])  # the loss ran backward more than once
            target = self._slot.grads[index]
            if index in self.tables:
                if again:
                    self.tables.give_up(index)
                self.tables.store(index, gradient, target, self._slot.row_indices[index])
            else:
                self._check(index, gradient)
                target.add_(gradient) if again else target.copy_(gradient)
                if index in self._slot.row_indices:
                    self._slot.row_indices[index][0] = DENSE
            self._written[index] = AGAIN if again else 1
            if self._early is not None:
                step, shard = self._early
                self._control.ready[shard, index] = step + 1
                if index in self._last:
                    self._control.notify()

        return keep

    def _check(self, index: int, gradient: torch.Tensor) -> None:
        if gradient.layout is not torch.strided:
            raise TaskError(
                f"the gradient of {self._names[index]} is sparse",
                expected="a dense gradient, or a contiguous matrix in a module with sparse=True",
                found=str(gradient.layout),
                fix="make it dense",
            )

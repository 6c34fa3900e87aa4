"""Recompute audit: silent corruption is looked for, named, and where it can be, put right.

Two things are checked, each for a fraction of the cases that the job's `audit` gives:

- A shard is computed a second time by another worker, and the bytes are compared before they are
  used. If they differ, a third computation decides who was wrong, and the right bytes are used.
- A block's parameters and optimizer state are digested when they have been updated and again just
  before the next update. Nobody writes to them in between, so a difference is a fault of the
  memory (or of a process that wrote where it must not). The state is then treated as one that a
  death has corrupted: it is rolled back to the snapshot, and the steps since are computed again.
  The snapshot is older than the digest, so it was taken before the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from lockstep.errors import IntegrityError
from lockstep.planning.blocks import Block
from lockstep.planning.worker_messages import Report, ShardCorrupted
from lockstep.state.control_segment import RING
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.shared_state import SharedState
from lockstep.system.seeding import derive

Compute = Callable[[int, int, GradientSlot, Any], float]
"""`(step, shard, slot, flags) -> loss`: forward and backward of a shard into a slot."""


def is_audited(seed: int, what: str, step: int, index: int, fraction: float) -> bool:
    """Whether a shard or a block of a step is in the sample. The same for every worker."""
    return derive(seed, f"audit {what}", step, index) < fraction * 2**63


def auditor_of(shard: int, workers: int) -> int:
    """The rank that computes a shard again. Its turn comes round, so that all check all."""
    return (shard + 1) % workers


class GradientAudit:
    """One worker's second computations."""

    def __init__(
        self, shared: SharedState, compute: Compute, report: Report, seed: int, fraction: float
    ) -> None:
        self.shared, self.compute, self.report = shared, compute, report
        self.seed, self.fraction = seed, fraction
        self._spares = [private_copy(shared.slots[0]) for _ in range(2)]
        self._flags = [np.zeros_like(shared.control.has_grad[0]) for _ in range(2)]

    def check(
        self, step: int, shards: Sequence[int], rank: int, workers: int, worker_id: int
    ) -> None:
        """Compute this worker's part of the sample again and compare.

        Called when all gradients of the step are there and before any is used.

        Raises:
            IntegrityError: three computations gave three results.
        """
        for shard in shards:
            own = auditor_of(shard, workers) == rank
            if own and is_audited(self.seed, "shard", step, shard, self.fraction):
                self._check_shard(step, shard, worker_id)

    def _check_shard(self, step: int, shard: int, worker_id: int) -> None:
        control, slot = self.shared.control, self.shared.slots[shard]
        losses = control.losses[step % RING]
        first = self._again(step, shard, 0)
        original = _digest(slot, control.has_grad[shard], float(losses[shard]))
        if first == original:
            return
        second = self._again(step, shard, 1)
        worker = int(control.shard_by[shard])
        if second == original:
            worker = worker_id
        elif second != first:
            raise IntegrityError(
                f"shard {shard} of step {step} gave three results in three computations",
                expected="the same bytes",
                found=f"workers {worker} and {worker_id} disagree, and {worker_id} with itself",
                fix="the task draws on something that is not seeded, or this machine is faulty",
            )
        else:
            _copy(self._spares[1], slot)
            control.has_grad[shard] = self._flags[1]
            losses[shard] = self._loss
        self.report(ShardCorrupted(step=step, shard=shard, worker_id=worker))

    def _again(self, step: int, shard: int, copy: int) -> bytes:
        self._loss = self.compute(step, shard, self._spares[copy], self._flags[copy])
        return _digest(self._spares[copy], self._flags[copy], self._loss)


class StateGuard:
    """One owner's digests of its blocks between two updates."""

    def __init__(self, shared: SharedState, blocks: Sequence[int], seed: int, fraction: float):
        self.shared, self.blocks, self.seed, self.fraction = shared, blocks, seed, fraction
        self._bytes = memoryview(shared.segments["state"].map)
        self._digests: dict[int, bytes] = {}

    def close(self, step: int) -> None:
        """Digest a sample of the blocks. Called when `step` has been committed."""
        self._digests = {
            number: self._digest(number)
            for number in self.blocks
            if is_audited(self.seed, "block", step, number, self.fraction)
        }

    def open(self) -> Block | None:
        """Compare; returns the first block that has changed. Called before the next update."""
        digests, self._digests = self._digests, {}
        for number, digest in digests.items():
            if self._digest(number) != digest:
                return self.shared.blocks[number]
        return None

    def _digest(self, number: int) -> bytes:
        digest = blake3()
        for item in self.shared.block_ranges(number):
            digest.update(self._bytes[item.offset : item.offset + item.nbytes])
        return digest.digest(16)


def private_copy(slot: GradientSlot) -> GradientSlot:
    """Memory of this process for what a slot holds."""
    return GradientSlot(
        grads=[torch.empty_like(gradient) for gradient in slot.grads],
        buffers=[torch.empty_like(buffer) for buffer in slot.buffers],
        row_indices={i: torch.empty_like(rows) for i, rows in slot.row_indices.items()},
        local=torch.empty_like(slot.local),
        flat=torch.empty(0, dtype=torch.uint8),
    )


def _digest(slot: GradientSlot, flags: Any, loss: float) -> bytes:
    """A digest of what a shard's computation left: gradients where there are any, buffers, loss,
    and what its own optimizer keeps."""
    digest = blake3(np.float64(loss).tobytes() + flags.tobytes())
    grads = [slot.dense(index) for index, there in enumerate(flags) if there]
    for tensor in (*grads, *slot.buffers, slot.local):
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest(16)


def _copy(source: GradientSlot, target: GradientSlot) -> None:
    for left, right in zip(
        (*target.grads, *target.buffers, target.local),
        (*source.grads, *source.buffers, source.local),
        strict=True,
    ):
        left.copy_(right)
    for index, row_indices in target.row_indices.items():
        row_indices.copy_(source.row_indices[index])


def flip_gradient_bit(slot: GradientSlot) -> None:
    """Flip a bit of a gradient: the first that is not a table's, whose last row may not count."""
    flip_bit(next(grad for i, grad in enumerate(slot.grads) if i not in slot.row_indices))


def flip_bit(tensor: torch.Tensor) -> None:
    """Flip a high bit of a tensor's last element."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)
    flat[-1] ^= 0x40

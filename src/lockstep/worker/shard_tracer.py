"""Shard tracer: decides which shards are run as a list of kernels (see `traced_shard`).

A traced pass is used once it has given the bytes of the plain one, loss, gradients and buffers, on
a batch of the same form. That it may be used at all is the guard's to say; the comparison finds
what neither knows of. Whoever computes a shard either way leaves the same bytes, so each worker
decides by itself, when it pays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lockstep.job.task import Task
from lockstep.native.library import Library
from lockstep.planning.plan import Plan
from lockstep.planning.worker_messages import Report, ShardsTraced
from lockstep.state.buffer_rules import same_bytes
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.module_state import PrivateBuffers
from lockstep.state.shared_state import SharedState
from lockstep.worker.loss_capture import (
    UntraceableError,
    capture,
    checked_tensors,
    first_line,
    has_hooks,
    obstacle,
    tensors_of,
)
from lockstep.worker.traced_shard import TracedShard

PATIENCE = 30
"""Shards of one form that are computed the plain way first: they tell what a shard takes."""
QUICK_SECONDS = 0.004
"""A shard that takes longer has little to gain: what is saved is some 0.1 ms."""
LEAST_SECONDS = 5.0
"""Tracing takes a second; so much is left to compute at least."""
MOST_SILENCE = 10.0
"""Seconds that tracing may take where the machine is busy, without a heartbeat."""
MOST_BYTES = 1 << 28
"""A traced pass holds all gradients at once."""
MOST_FORMS = 6
"""So many forms of batches are tried, one after the other."""


@dataclass(frozen=True, kw_only=True)
class PlainPass:
    """What the plain pass has left of a shard."""

    loss: float
    slot: GradientSlot
    written: npt.NDArray[np.uint8]
    """By parameter: whether it has a gradient."""


class ShardTracer:
    """One worker's traced passes, by the form of the batch."""

    def __init__(
        self, task: Task, shared: SharedState, plan: Plan, report: Report, native: Library
    ) -> None:
        """`report` tells the agent what has become of a trial."""
        self._task, self._shared, self._report, self._native = task, shared, report, native
        self._always = plan.trace == "always"
        self._share = plan.shards / plan.workers
        self._buffers = PrivateBuffers(shared.model, shared.buffers)
        self._traced: list[TracedShard] = []
        self._plain: dict[object, list[float]] = {}
        """By the form of a batch: the seconds that shards took."""
        self._why_not = why_not(task, shared, plan)
        """Why nothing more is traced, in words."""

    def find(self, batch: Any) -> TracedShard | None:
        """The traced pass for this batch, if there is one."""
        for traced in self._traced:
            if traced.captured.holds(self._task, self._shared.model, batch):
                return traced
        return None

    def note(self, batch: Any, seconds: float, steps_left: int) -> bool:
        """Take in what a shard took the plain way; whether a batch like this one should be traced
        now."""
        if self._why_not:
            return False
        form = form_of(batch)
        if form is None:
            self._give_up("batches hold more than tensors")
            return False
        taken = self._plain.setdefault(form, [])
        taken.append(seconds)
        if self._always:
            return len(taken) == 1
        if len(taken) < PATIENCE:
            return False
        usual = float(np.median(taken))
        del taken[: PATIENCE // 2]
        return usual <= QUICK_SECONDS and usual * self._share * steps_left >= LEAST_SECONDS

    def trace(
        self,
        fresh: Callable[[], Any],
        seed: Callable[[], None],
        root: torch.Tensor,
        plain: PlainPass,
    ) -> None:
        """Trace batches of the form of this one, if that gives the bytes of the plain pass.

        `fresh` gives the batch as it comes from the data set, `seed` seeds the generators.
        """
        try:
            traced = self._trace_once(fresh, seed)
            self._compare(traced, fresh, seed, root, plain)
        except UntraceableError as error:
            self._give_up(str(error))
            return
        self._traced.append(traced)
        if len(self._traced) == MOST_FORMS:
            self._why_not = f"{MOST_FORMS} forms of batches are traced"
        self._report(
            ShardsTraced(
                forms=len(self._traced),
                why_not=self._why_not,
                native=not traced.why_not_native,
                why_not_native=traced.why_not_native,
            )
        )

    def _give_up(self, why_not: str) -> None:
        self._why_not = why_not
        self._report(ShardsTraced(forms=len(self._traced), why_not=why_not))

    def _trace_once(self, fresh: Callable[[], Any], seed: Callable[[], None]) -> TracedShard:
        shared = self._shared
        if has_hooks(shared.model):
            raise UntraceableError("parameters or modules have hooks")
        batch = self._begin(fresh, seed)
        captured = capture(self._task, shared.model, batch)
        try:
            return TracedShard(captured, shared, tensors_of(batch), self._native)
        except UntraceableError:
            raise
        except Exception as error:  # an operation that cannot be traced
            reason = first_line(error)
            raise UntraceableError(f"the loss cannot be traced: {reason}") from error

    def _begin(self, fresh: Callable[[], Any], seed: Callable[[], None]) -> Any:
        batch = fresh()
        seed()
        self._buffers.restore(self._shared.committed)
        return batch

    def _compare(
        self,
        traced: TracedShard,
        fresh: Callable[[], Any],
        seed: Callable[[], None],
        root: torch.Tensor,
        plain: PlainPass,
    ) -> None:
        """Run it on the same batch, into the same slot.

        Raises:
            UntraceableError: it gives other bytes, or the guard does not hold; the slot has those
                of the plain pass again.
        """
        batch = self._begin(fresh, seed)
        if not traced.captured.holds(self._task, self._shared.model, batch):
            raise UntraceableError("the loss changes what it depends on")
        grads = [plain.slot.grads[index] for index in np.flatnonzero(plain.written)]
        wanted = [gradient.clone() for gradient in grads]
        value = traced.run(tensors_of(batch), root, plain.slot)
        same = (
            value == plain.loss
            and traced.flags.tolist() == plain.written.tolist()
            and all(map(same_bytes, grads, wanted))
            and all(map(same_bytes, self._buffers.values(), plain.slot.buffers))
        )
        torch._foreach_copy_(grads, wanted)
        if not same:
            raise UntraceableError("the traced pass gives other bytes")


def why_not(task: Task, shared: SharedState, plan: Plan) -> str:
    """Why no shard of this job is ever traced; empty if some may be."""
    if plan.trace == "never":
        return "by request"
    if plan.stall_seconds is not None and plan.stall_seconds < MOST_SILENCE:
        return "stall_seconds leaves no time to trace"
    if sum(parameter.nbytes for parameter in shared.params) > MOST_BYTES:
        return "the gradients are large"
    if shared.networked:
        return "other hosts get gradients while the backward pass goes on"
    return obstacle(task, shared, plan)


def form_of(batch: Any) -> object:
    """What batches that are computed alike have in common; None if it holds more than tensors."""
    tensors = checked_tensors(batch)
    return None if tensors is None else tuple((each.dtype, each.shape) for each in tensors)

"""Native step: what follows a worker's shards, in one call without the interpreter, where it fits.

It fits the plain case: one host, gradients that are summed whole, fused kernels that are called
directly, and nothing in between that Python would have to do. Everything else goes through
`TrainStep` as ever, also a single step of a run that is otherwise plain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lockstep.collectives.barrier import SPINS, Barrier, Regroup
from lockstep.collectives.tree_sum import CHUNK
from lockstep.native.library import BY_REQUEST
from lockstep.native.step_tail import (
    NOT_UNIFORM,
    REGROUP,
    Addition,
    additions,
    lowered_part,
    option_values,
)
from lockstep.optim.block_owner import BlockOwner
from lockstep.optim.direct_update import Part
from lockstep.optim.update_groups import UpdateGroup
from lockstep.planning.reduction_tree import tree
from lockstep.planning.step_phases import Phase, progress_of
from lockstep.planning.worker_messages import StepsNative
from lockstep.state.control_segment import RING, ControlSegment
from lockstep.worker.context import WorkerContext

MOST_ELEMENTS = 1 << 23
"""Of an owner's gradients: with more, what the interpreter takes does not count."""


class Passed(NamedTuple):
    """When a step reached what, in seconds of `time.perf_counter`."""

    met: float
    reduced: float
    updated: float
    committed: float


class NativeStep:
    """One worker's, in one membership."""

    def __init__(
        self, module: Any, control: ControlSegment, barrier: Barrier, owner: BlockOwner, rank: int
    ) -> None:
        """`module` is the library; it is the plain case, see `why_not_native`."""
        flags = control.has_grad
        self._tail = module.StepTail(
            control.progress_address(barrier.worker_id),
            [control.progress_address(other) for other in barrier.others],
            control.epoch_address,
            control.updating_address(barrier.worker_id),
            (flags.ctypes.data, flags.size),
            control.learning_rates.ctypes.data if rank == 0 else 0,
            barrier.epoch,
            1 if barrier.crowded else SPINS,
        )
        self.arrive: Callable[[int], None] = self._tail.arrive
        """As `Barrier.arrive`."""
        self._parts: list[Part] = []
        for group in owner.groups:
            self._tail.group(*self._lowered(group, len(owner.slots)))

    def _lowered(
        self, group: UpdateGroup, shards: int
    ) -> tuple[list[Addition], list[tuple[Any, ...]]]:
        assert group.direct is not None
        sums: list[Addition] = []
        grads = group.only_grads
        if shards > 1:
            node = tree((True,) * shards)
            assert node is not None
            grads = group.grads
            for leaves, total in group.dense:  # type: ignore[misc] # no large embeddings here
                sums += additions(node, leaves, total, CHUNK)
        self._parts += group.direct.parts
        parts = [
            lowered_part(
                part.kernel, part.params, [grads[index] for index in part.indices], part.state
            )
            for part in group.direct.parts
        ]
        return sums, parts

    def finish(self, step: int, rate: float) -> Passed | None:
        """From the first meeting, at which this worker has arrived, to the commit; None: this
        step is not plain, and nothing has been done.

        Raises:
            Regroup: the membership changed; the step is not committed.
        """
        options = []
        for part in self._parts:
            values = option_values(part.options) if part.fits() else None
            if values is None:
                return None
            options.append(values)
        ending, *times = self._tail.finish(
            step,
            progress_of(step, Phase.COMPUTED),
            progress_of(step, Phase.UPDATED),
            step % RING,
            rate,
            options,
        )
        if ending == REGROUP:
            raise Regroup
        if ending == NOT_UNIFORM:
            return None
        met, updated, committed = times
        return Passed(met, met, updated, committed)


def native_step(
    context: WorkerContext, barrier: Barrier, owner: BlockOwner, rank: int, *, several_hosts: bool
) -> NativeStep | None:
    """The native step of a membership, if there is one; the agent is told why not."""
    library = context.native
    if library is BY_REQUEST:
        return None
    reason = library.why_not or why_not_native(context, owner, several_hosts=several_hosts)
    if reason not in context.told_native:
        context.told_native.append(reason)
        context.report(StepsNative(why_not=reason))
    if reason:
        return None
    return NativeStep(library.module, context.shared.control, barrier, owner, rank)


def why_not_native(context: WorkerContext, owner: BlockOwner, *, several_hosts: bool) -> str:
    """Why the steps of a membership are not of the plain case; empty if they are. Asked when each
    block has been updated once."""
    shared = context.shared
    reasons = {
        "several hosts": several_hosts,
        "an audit": context.gradient_audit is not None,
        "scripted faults": bool(context.faults),
        "the gradient's norm is limited": context.norm_clipper is not None,
        "gradients are compressed": shared.codec is not None,
        "a step has several updates": context.plan.local_steps > 1,
        "the model has buffers": bool(shared.committed),
        "large embeddings": bool(shared.tables),
        "an optimizer that is run whole": shared.undivided is not None,
        "teams": context.plan.team > 1,
        "workers with memory of their own": context.device.apart,
        "large blocks": sum(group.total.numel() for group in owner.groups) > MOST_ELEMENTS,
    }
    found = next((reason for reason, holds in reasons.items() if holds), "")
    if not found and any(group.direct is None for group in owner.groups):
        return "an optimizer without a fused kernel that is known"
    return found

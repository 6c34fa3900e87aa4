"""Last state: what a failed run has committed last, for a checkpoint.

Whatever has ended the run, all workers are killed first. Then the words in shared memory say, as
after any death, whether the state is whole or has to be taken from the snapshot.
"""

from __future__ import annotations

import contextlib

from lockstep.agent.recovery import resume
from lockstep.agent.worker_group import WorkerGroup
from lockstep.errors import IntegrityError, LockstepError, ResourceError
from lockstep.state.fingerprint import non_finite_tensors

UNTRUSTED = (IntegrityError, ResourceError)
"""Errors after which nothing is kept: the state is not sound, or it cannot be written."""


def keep_last_state(group: WorkerGroup, error: LockstepError, start: int) -> None:
    """Give the last committed state to the observer as a checkpoint, if it is sound itself.

    `start`: after how many steps the run began; that state is there already.
    """
    if isinstance(error, UNTRUSTED) or not group.has_state or not group.step_log.worker_ids:
        return
    if not group.host.kill_workers():
        return  # somebody may still write to the state
    with contextlib.suppress(LockstepError):  # the error that has ended the run is shown
        step, state = _last_state(group)
        if step <= start:
            return
        broken = non_finite_tensors(group.memory.layout, state)
        if broken:
            group.observer.event("not_saved", step=step, tensors=broken[:5])
        else:
            group.observer.checkpoint(step, state)


def _last_state(group: WorkerGroup) -> tuple[int, memoryview]:
    """The newest state that is whole, and after how many steps it is."""
    control, step_log, snapshot = group.control, group.step_log, group.memory.snapshot
    step_log.drain()
    members = step_log.worker_ids
    resumption = resume(
        [control.progress(worker_id) for worker_id in members],
        [control.updating(worker_id) for worker_id in members],
        control.shard_done.tolist(),
        control.snapshot_step,
        1,
        mirror_step=control.mirror_step if group.plan.apart else None,
    )
    if resumption.back is not None or group.role.parted:
        return control.snapshot_step, snapshot.view
    step_log.mend(resumption.step)
    group.observer.settle()
    return resumption.step, snapshot.take(resumption.step)

"""One step of one worker: compute its shards, meet, update its blocks, meet again: committed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import blake3

from lockstep.collectives.barrier import Barrier, Regroup
from lockstep.collectives.grad_norm import GradNormClipper
from lockstep.collectives.gradient_compression import Compressor
from lockstep.collectives.gradient_presence import GradientPresence, Summed
from lockstep.collectives.subtree_sum import ShareSum, SubtreeSums
from lockstep.collectives.tree_sum import combine_buffers
from lockstep.data.loader import Loader
from lockstep.job.faults import Fault
from lockstep.job.position import Position
from lockstep.job.task import Task
from lockstep.optim.block_owner import BlockOwner
from lockstep.optim.local_rounds import LocalRounds, LocalUpdate
from lockstep.optim.local_sgd import LocalSGD
from lockstep.optim.lr_schedule import LrSchedule
from lockstep.planning.assignment import Assignment, WorkerShare
from lockstep.planning.blocks import Block
from lockstep.planning.digest_sample import DigestSample
from lockstep.planning.sampling import Sampling
from lockstep.planning.step_phases import Phase, Stage, exchange_of, progress_of
from lockstep.planning.worker_messages import StateCorrupted
from lockstep.state.control_segment import DIGEST_BYTES, RING, Stat
from lockstep.state.fault_injection import FaultInjector
from lockstep.state.shared_state import SharedState
from lockstep.state.snapshot import SnapshotPart
from lockstep.worker.audit import GradientAudit, Report, StateGuard, flip_bit, flip_gradient_bit
from lockstep.worker.forward_backward import ForwardBackward
from lockstep.worker.shard_claims import ShardClaims


class TrainStep:
    """Runs steps for one worker."""

    def __init__(
        self,
        task: Task,
        shared: SharedState,
        sampling: Sampling,
        loader: Loader,
        schedule: LrSchedule,
        audit: DigestSample,
        *,
        place: Position,
        seed: int,
        autocast: bool,
        clip_grad_norm: float | None,
        faults: FaultInjector,
        audit_fraction: float,
        report: Report,
    ) -> None:
        self.shared, self.sampling, self.loader = shared, sampling, loader
        self.audit, self.seed, self.faults = audit, seed, faults or None
        self.control = shared.control
        self.schedule = schedule
        self._audit_fraction, self._report = audit_fraction, report
        self._gradient_audit: GradientAudit | None = None
        self._claims = ShardClaims(shared.control)
        self._state = memoryview(shared.segments["state"].map)
        rounds: LocalRounds | None = None
        self._limit: GradNormClipper | None = None
        if isinstance(task, LocalSGD):
            rounds = LocalRounds(task, shared, sampling, clip_grad_norm)
        elif clip_grad_norm is not None:
            self._limit = GradNormClipper(shared, clip_grad_norm)
        self._gradients = ForwardBackward(
            task, shared, sampling, loader, rounds,
            place=place, seed=seed, autocast=autocast, faults=faults,
        )  # fmt: skip

    def join(
        self, part: Assignment, share: WorkerShare, barrier: Barrier, owner: BlockOwner
    ) -> None:
        """Take a part in the membership that begins now."""
        self.part, self.share, self.barrier, self.owner = part, share, barrier, owner
        self.host_shards, self._subtrees = part.host_shards, part.subtrees
        self._rank, self._workers, self._worker_id = part.rank, part.workers, part.worker_id
        self._seconds = self.control.seconds[part.worker_id]
        self._gradients.early = part.several_hosts and not self._audit_fraction
        self._sums = SubtreeSums(
            self.shared, part.subtrees, self.host_shards, part.rank, part.workers
        )
        self._not_begun = set(part.remote_params)
        self._compressor = None
        if self.shared.codec is not None:
            self._compressor = Compressor(
                self.shared,
                self.shared.codec,
                part.subtrees,
                self.host_shards,
                owner.slots,
                share.blocks,
            )
        self._share = ShareSum(self.shared, owner.slots, share.sums)
        self._guard = StateGuard(self.shared, share.blocks, self.seed, self._audit_fraction)
        ranges = itertools.chain.from_iterable(map(self.shared.block_ranges, share.blocks))
        buffers = self.shared.buffer_ranges() if part.rank == 0 else []
        self._local = LocalUpdate(self.shared, self.host_shards, part.rank, part.workers)
        segments = self.shared.segments
        if self._audit_fraction:
            self._guard.close(part.step - 1)
        self._base = SnapshotPart(
            segments["state"], segments["base"], [*ranges, *buffers, *self._local.ranges]
        )

    def run(self, step: int, todo: Sequence[int]) -> None:
        """Run one step to its commit.

        `todo` are this worker's shards that are not computed yet.

        Raises:
            Regroup: the membership changed; the step is not committed.
            TaskError: the user's code failed, or its loss is not finite.
        """
        clock = time.perf_counter
        control, barrier, seconds = self.control, self.barrier, self._seconds
        begun = clock()
        self._compute_all(step, todo)
        computed = clock()
        fetching = self._gradients.take_fetching()
        seconds[Stat.COMPUTE] += computed - begun - fetching
        self.loader.consider(seconds[Stat.COMPUTE])
        barrier.arrive(progress_of(step, Phase.COMPUTED))
        if self._fault("barrier", step) is not None:
            flip_bit(self.owner.groups[0].blocks[0].param.detach())
        self.loader.prefetch()
        waiting = clock()
        barrier.wait(progress_of(step, Phase.COMPUTED))
        meeting = clock()
        self._fault("reduce", step)
        active = self.sampling.active(step)
        if self._audit_fraction:
            self._check_all(step, [shard for shard in active if shard in self.host_shards])
        presence = self._exchange(step, active)
        scale = None
        if self._limit is not None:
            scale = self._limit.scale(step, presence, self.share.norms, self._meet_norms)
        reduced = clock()
        control.set_updating(self._worker_id, step)
        self.owner.update(step, presence, scale)
        if self.shared.committed:
            self._combine_buffers(step)
        self._local.run(active)
        self._fault("update_done", step)
        if self.part.returns == "parameters":
            self._await_parameters(step, presence)
        updated = clock()
        barrier.arrive(progress_of(step, Phase.UPDATED), ring=self.part.several_hosts)
        self._fault("commit", step)
        barrier.wait(progress_of(step, Phase.UPDATED))
        committed = clock()
        self.schedule.go_to(step + 1)
        if control.snapshot_due[step % RING]:
            self.refresh_snapshot(step + 1)
        copied = clock()
        self._fault("audit", step)
        if self._rank == 0:
            control.times[step % RING] = committed
        if self._audit_fraction:
            self._guard.close(step)
        self._record_digests(step)
        seconds[Stat.DATA] += waiting - computed + fetching
        seconds[Stat.WAIT] += (meeting - waiting) + (committed - updated)
        seconds[Stat.REDUCE] += reduced - meeting
        seconds[Stat.UPDATE] += (updated - reduced) + (copied - committed)

    def _exchange(self, step: int, active: Sequence[int]) -> GradientPresence:
        """See that all hosts' gradients are there, as shards or as sums of subtrees."""
        control, part = self.control, self.part
        if self._subtrees and control.exchanged < exchange_of(step, Stage.SENDING):
            self._sum_subtrees(step, active)
        if part.several_hosts:
            self._fault("exchange", step)
            self.barrier.arrive(progress_of(step, Phase.SUMMED))
            self.barrier.await_exchange(exchange_of(step, Stage.GATHERED))
        if self._compressor is not None:
            self._compressor.restore()
        presence: GradientPresence = GradientPresence(control, active, self._subtrees)
        if part.returns == "sums":
            if control.exchanged < exchange_of(step, Stage.RETURNING):
                self._share.sum(presence)
            self._fault("return", step)
            self.barrier.await_exchange(exchange_of(step + 1, Stage.STARTED))
            presence = Summed(presence, self.shared.tables)
        if self._limit is not None:
            self.owner.reduce(presence)
            self._meet(progress_of(step, Phase.REDUCED))
        return presence

    def _sum_subtrees(self, step: int, active: Sequence[int]) -> None:
        """Make what other hosts get: sums, and these small if asked."""
        if not self._sums and self._compressor is None:
            return
        presence = GradientPresence(
            self.control, [shard for shard in active if shard in self.host_shards]
        )
        self._sums.sum(presence)
        if self._compressor is not None:
            self._compressor.compress(step, presence)

    def _await_parameters(self, step: int, presence: GradientPresence) -> None:
        """Return when what other hosts have updated is there."""
        self._fault("return", step)
        self.barrier.await_exchange(exchange_of(step + 1, Stage.STARTED))
        if self._rank == 0 and self._not_begun:
            begun = {param for param in self._not_begun if any(presence.of(param))}
            self.shared.note_begun(begun)
            self._not_begun -= begun

    def refresh_snapshot(self, committed: int) -> None:
        """Bring this worker's part of the base to the state after so many committed steps."""
        self._base.refresh()
        if self._rank == 0:
            self.control.snapshot_step = committed

    def _compute_all(self, step: int, todo: Sequence[int]) -> None:
        """This worker's shards, and then those that others have not begun."""
        mine = self.host_shards
        if len(mine) == self._workers:
            for shard in todo:
                self._compute(step, shard)
            return
        for shard in (*todo, *reversed(mine)):
            if self._claims.take(shard, step):
                self._compute(step, shard)
                self._claims.release(shard)
            elif shard in todo:
                self.loader.skip(step, shard)

    def _compute(self, step: int, shard: int) -> None:
        """Forward and backward of one shard, into its slot."""
        control, loss = self.control, 0.0
        if shard in self.sampling.active(step):
            control.beat(self._worker_id, shard)
            slot = self.shared.slots[shard]
            loss = self._gradients.make(step, shard, slot, control.has_grad[shard])
            struck = self._fault("slot", step, shard)
            if struck is not None:
                flip_gradient_bit(slot)
        control.losses[step % RING, shard] = loss
        control.shard_by[shard] = self._worker_id
        control.shard_done[shard] = step

    def _fault(self, phase: str, step: int, shard: int | None = None) -> Fault | None:
        """Let a scripted fault strike here; one that flips a bit is returned."""
        return None if self.faults is None else self.faults.at(phase, step, shard)

    def _check_all(self, step: int, active: Sequence[int]) -> None:
        """Audit the step before its gradients are used."""
        part = self.part
        if self._gradient_audit is None:
            self._gradient_audit = GradientAudit(
                self.shared, self._gradients.make, self._report, self.seed, self._audit_fraction
            )
        changed = self._guard.open()
        if changed is not None:
            self._give_up_state(step, changed)
        self._meet(progress_of(step, Phase.GUARDED))
        self._gradient_audit.check(step, active, part.rank, part.workers, part.worker_id)
        self._meet(progress_of(step, Phase.AUDITED))

    def _give_up_state(self, step: int, changed: Block) -> None:
        """Leave the step: the committed state has changed in memory.

        Raises:
            Regroup: always. The others are held up until the master has regrouped them.
        """
        self.control.set_updating(self._worker_id, step)  # so the state counts as torn
        self._report(
            StateCorrupted(
                step=step,
                worker_id=self._worker_id,
                tensor=self.shared.names[changed.param],
                elements=(changed.start, changed.stop),
            )
        )
        raise Regroup

    def _meet(self, progress: int) -> None:
        self.barrier.arrive(progress)
        self.barrier.wait(progress)

    def _meet_norms(self, step: int) -> None:
        """Meet when all norms are taken, also those that only other hosts can take."""
        self._meet(progress_of(step, Phase.NORMED))
        if self.part.returns == "parameters":
            self.barrier.await_exchange(exchange_of(step, Stage.NORMED))

    def _combine_buffers(self, step: int) -> None:
        """Merge this worker's share of the buffers."""
        weights = self.sampling.weights(step)
        part, committed = self.part, self.shared.committed
        for index in range(part.rank, len(committed), part.workers):
            homes = [slot.buffers[index] for slot in self.shared.slots]
            combine_buffers(committed[index], homes, weights)

    def _record_digests(self, step: int) -> None:
        """Digest this worker's share of the state for the ledger, and publish the next step."""
        _, everybodys = self.audit.split(
            step, self.part.owned_params
        )  # the exchanger does the others
        for index, unit in everybodys.items():
            if (step + index) % self._workers == self._rank:
                view = self._state[unit.offset : unit.offset + unit.nbytes]
                self.control.set_digest(step, index, blake3.blake3(view).digest(DIGEST_BYTES))
        # Nobody sleeps until a step has started, so nobody is woken: the master looks by itself.
        self.control.set_progress(self._worker_id, progress_of(step + 1, Phase.STARTED))

"""Train step: compute the shards, meet, reduce, update the blocks, meet again: committed.

All workers of a host run the same step together. They meet at barriers alone; a step counts when
everybody has passed the last one. Nothing that a worker does before `UPDATED` can be seen in the
state by others but the blocks that it owns, so a step that is cut short can be finished by others
or, where some blocks are updated and others not, be undone from the snapshot.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Sequence

from lockstep.collectives.barrier import Barrier, Regroup
from lockstep.collectives.gradient_compression import Compressor
from lockstep.collectives.gradient_presence import GradientPresence
from lockstep.collectives.subtree_sum import ShareSum, SubtreeSums
from lockstep.collectives.tree_sum import combine_buffers
from lockstep.job.faults import Fault
from lockstep.optim.block_owner import BlockOwner
from lockstep.optim.local_rounds import LocalUpdate
from lockstep.planning.assignment import Assignment, WorkerShare
from lockstep.planning.blocks import Block
from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.step_phases import Phase, Stage, exchange_of, progress_of
from lockstep.planning.worker_messages import StateCorrupted
from lockstep.state.control_segment import RING, Stat
from lockstep.state.shard_outcomes import NOTHING, check_agreement, write_outcome
from lockstep.state.snapshot import SnapshotPart
from lockstep.worker.audit import StateGuard, flip_bit, flip_gradient_bit
from lockstep.worker.context import WorkerContext
from lockstep.worker.home_moves import HomeMoves
from lockstep.worker.moves import Moves
from lockstep.worker.native_step import NativeStep, Passed, native_step
from lockstep.worker.purity_watch import PurityWatch
from lockstep.worker.shard_claims import ShardClaims
from lockstep.worker.team_work import TeamWork


class TrainStep:
    """Runs the steps of one worker in one membership."""

    team: TeamWork | None = None
    """The worker's part in its team, if it has one."""

    def __init__(
        self,
        context: WorkerContext,
        assignment: Assignment,
        share: WorkerShare,
        barrier: Barrier,
        owner: BlockOwner,
        watch: PurityWatch | None,
    ) -> None:
        shared = context.shared
        self.context, self.shared, self.control = context, shared, shared.control
        self.barrier, self.owner, self._watch = barrier, owner, watch
        self.shards = assignment.shards
        """Those of this worker."""
        self._sampling, self._loader = context.sampling, context.loader
        self._schedule, self._faults = context.schedule, context.faults or None
        self._local = context.plan.local_steps > 1
        self._forward_backward = context.forward_backward
        self._norm_clipper, self._audit = context.norm_clipper, context.gradient_audit
        self._worker_id, self._rank = assignment.worker_id, assignment.rank
        self._workers, self._several_hosts = assignment.workers, assignment.several_hosts
        self._teams = assignment.teams
        self._idle = assignment.host_team is not None and self._rank >= self._teams
        """Whether it has no partner on another host, and no shard."""
        self._host_shards, self._subtrees = assignment.host_shards, assignment.subtrees
        self._returns, self._norms = assignment.returns, share.norms
        self._owned_apart = assignment.owned_apart
        self._owned_params = assignment.owned_params
        self._ahead_from = assignment.ahead_from
        self._unseen = set(assignment.remote_params)
        """The parameters of other hosts that have had no gradient yet."""
        self._agreed = False
        """Whether all shards are known to log the same values."""
        self._native: NativeStep | None = None
        self._arrive: Callable[[int], None] = barrier.arrive
        self._asked_native = False
        """Whether it is known if the native path fits."""
        self._seconds = self.control.seconds[self._worker_id]
        self._claims = ShardClaims(self.control)
        apart = self._several_hosts and assignment.host_team is None
        self._forward_backward.early = apart and self._audit is None
        self._subtree_sums = SubtreeSums(
            shared, self._subtrees, self._host_shards, self._rank, self._workers
        )
        self._compressor: Compressor | None = None
        if shared.codec is not None:
            self._compressor = Compressor(
                shared, shared.codec, self._subtrees, self._host_shards, owner.slots, share.blocks
            )
        self._share_sum = ShareSum(shared, owner.slots, share.sums)
        self._local_update = LocalUpdate(shared, self._host_shards, self._rank, self._workers)
        own = self._own_ranges(share)
        self._snapshot = SnapshotPart(shared.segments["state"], shared.segments["snapshot"], own)
        self._moves = Moves(context.device)
        if context.device.apart:
            self._moves = HomeMoves(context, assignment, share, own)
        self._summed = self._moves.subtrees or self._subtrees
        self._guard = StateGuard(shared, share.blocks, context.plan.seed, context.plan.audit)
        if self._audit is not None:
            self._guard.close(assignment.step - 1)

    def _own_ranges(self, share: WorkerShare) -> list[ByteRange]:
        """What of the state this worker alone writes to."""
        shared = self.shared
        ranges = [run for number in share.blocks for run in shared.block_ranges(number)]
        if self._rank == 0:
            ranges += [*shared.buffer_ranges(), *shared.remembered_ranges()]
        return ranges + self._local_update.ranges

    def run(self, step: int, todo: Sequence[int]) -> None:
        """Run one step to its commit.

        `todo` are this worker's shards that are not computed yet.

        Raises:
            Regroup: the membership changed; the step is not committed.
            TaskError: the user's code failed, or its loss is not finite.
        """
        clock = time.perf_counter
        control, seconds = self.control, self._seconds
        # Compute.
        begun = clock()
        self._compute_all(step, todo)
        computed = clock()
        froze_at = self._forward_backward.froze_at
        if self._watch is not None and self._watch.is_due(step, computed, froze_at):
            self._moves.give_model()
            self._watch.check(step, self._computed(step), computed - begun, froze_at)
            computed = clock()
        if self._moves.apart:
            self._moves.give_gradients(step)
            computed = clock()
        fetching = self._forward_backward.pop_fetching_seconds()
        waited = 0.0 if self.team is None else self.team.pop_waiting_seconds()
        seconds[Stat.COMPUTE] += computed - begun - fetching - waited
        self._loader.consider(seconds[Stat.COMPUTE])
        # Meet: all gradients of this host are in their slots.
        self._arrive(progress_of(step, Phase.COMPUTED))
        if self._fault("barrier", step) is not None:
            flip_bit(self.owner.groups[0].blocks[0].param.detach())
        if step >= self._ahead_from:
            self._loader.prefetch()
        waiting = clock()
        passed = self._finish_natively(step) or self._finish(step)
        self._moves.take_parameters()
        self._schedule.go_to(step + 1)
        if control.snapshot_due[step % RING]:
            self.refresh_snapshot(step + 1)
        copied = clock()
        self._fault("audit", step)
        if self._rank == 0:
            control.times[step % RING] = passed.committed
        if self._audit is not None:
            self._guard.close(step)
        self._record_digests(step)
        seconds[Stat.DATA] += waiting - computed + fetching
        meetings = (passed.met - waiting) + (passed.committed - passed.updated)
        seconds[Stat.WAIT] += waited + meetings
        seconds[Stat.REDUCE] += passed.reduced - passed.met
        seconds[Stat.UPDATE] += (passed.updated - passed.reduced) + (copied - passed.committed)

    def _finish(self, step: int) -> Passed:
        """From the first meeting to the commit: sum the gradients and update the blocks."""
        clock = time.perf_counter
        control, barrier = self.control, self.barrier
        barrier.wait(progress_of(step, Phase.COMPUTED))
        met = clock()
        # Reduce.
        self._moves.take_gradients(step)
        self._fault("reduce", step)
        active = self._sampling.active(step)
        if self._audit is not None:
            self._check_step(step, [shard for shard in active if shard in self._host_shards])
        presence = self._exchange(step, active)
        if not self._agreed:  # from then on each shard is compared with itself
            check_agreement(control, step, active)
            self._agreed = True
        scale = None
        if self._norm_clipper is not None:
            scale = self._norm_clipper.scale(step, presence, self._norms, self._meet_norms)
        reduced = clock()
        # Update: until all workers have updated their blocks, the state is between two steps.
        control.set_updating(self._worker_id, step)
        if self._rank == 0:
            control.learning_rates[step % RING] = self._told_rate()
        self.owner.update(step, presence, scale)
        if self.shared.committed:
            self._combine_buffers(step)
        self._local_update.run(active)
        self._fault("update_done", step)
        if self._owned_apart:
            self._await_parameters(step, presence)
        due = bool(control.snapshot_due[step % RING])
        self._moves.give_state(step, due=due)
        updated = clock()
        # Meet: committed.
        barrier.arrive(progress_of(step, Phase.UPDATED), notify=self._several_hosts)
        self._fault("commit", step)
        barrier.wait(progress_of(step, Phase.UPDATED))
        return Passed(met, reduced, updated, clock())

    def _finish_natively(self, step: int) -> Passed | None:
        """The same without the interpreter; None where this step is not of the plain case."""
        if not self._agreed or len(self._sampling.active(step)) < len(self.shared.slots):
            return None
        if not self._asked_native:
            self._asked_native = True
            self._native = native_step(
                self.context,
                self.barrier,
                self.owner,
                self._rank,
                several_hosts=self._several_hosts,
            )
            if self._native is not None:
                self._arrive = self._native.arrive
        return None if self._native is None else self._native.finish(step, self._told_rate())

    # Compute.

    def _compute_all(self, step: int, todo: Sequence[int]) -> None:
        """This worker's shards, and then those that others have not begun."""
        if self._idle:
            return
        if self._moves.apart:
            todo = self.shards  # what is summed together follows from them
        alone = self.team is None and len(self._host_shards) == self._workers
        if self._moves.apart or alone:
            for shard in todo:
                self._compute(step, shard)
            return
        with contextlib.closing(self._chosen(step, todo)) as chosen:
            shards = chosen if self.team is None else self.team.shards(step, todo, chosen)
            for shard in shards:
                self._compute(step, shard)

    def _chosen(self, step: int, todo: Sequence[int]) -> Generator[int]:
        """The shards that this worker computes, each claimed until the next is asked for."""
        host_shards = self._host_shards
        if len(host_shards) == self._teams:
            yield from todo
            return
        for shard in (*todo, *reversed(host_shards)):
            if self._claims.claim(shard, step):
                try:
                    yield shard
                finally:
                    self._claims.release(shard)
            elif shard in todo:
                self._loader.skip(step, shard)

    def _compute(self, step: int, shard: int) -> None:
        """Forward and backward of one shard, into its slot."""
        control, outcome = self.control, NOTHING
        if shard in self._sampling.active(step):
            control.beat(self._worker_id, shard)
            slot = self.shared.slots[shard]
            if self.team is not None:
                outcome = self.team.make(step, shard, slot)
            else:
                outcome = self._forward_backward.make(step, shard, slot, control.has_grad[shard])
            if self._fault("slot", step, shard) is not None:
                flip_gradient_bit(slot)
        if self.team is not None and not self.team.records:
            return
        write_outcome(control, step, shard, outcome)
        control.shard_by[shard] = self._worker_id
        control.shard_done[shard] = step

    def _computed(self, step: int) -> list[int]:
        """The shards of a step that this worker has computed."""
        control = self.control
        return [
            shard
            for shard in self._sampling.active(step)
            if shard in self._host_shards
            and control.shard_done[shard] == step
            and control.shard_by[shard] == self._worker_id
        ]

    # Reduce.

    def _check_step(self, step: int, active: Sequence[int]) -> None:
        """Audit the step before its gradients are used."""
        assert self._audit is not None
        changed = self._guard.open()
        if changed is not None:
            self._give_up_state(step, changed)
        self._meet(progress_of(step, Phase.GUARDED))
        self._audit.check(step, active, self._rank, self._workers, self._worker_id)
        self._meet(progress_of(step, Phase.AUDITED))

    def _give_up_state(self, step: int, changed: Block) -> None:
        """Leave the step: the committed state has changed in memory.

        Raises:
            Regroup: always. The others are held up until the agent has regrouped them.
        """
        self.control.set_updating(self._worker_id, step)  # so the state counts as corrupted
        self.context.report(
            StateCorrupted(
                step=step,
                worker_id=self._worker_id,
                tensor=self.shared.names[changed.param],
                elements=(changed.start, changed.stop),
            )
        )
        raise Regroup

    def _exchange(self, step: int, active: Sequence[int]) -> GradientPresence:
        """See that all hosts' gradients are there, as shards or as sums of subtrees."""
        control = self.control
        if self._subtrees and control.exchanged < exchange_of(step, Stage.SENDING):
            self._sum_subtrees(step, active)
        if self._several_hosts:
            self._fault("exchange", step)
            self.barrier.arrive(progress_of(step, Phase.SUMMED))
            self.barrier.await_exchange(exchange_of(step, Stage.GATHERED))
        if self._compressor is not None:
            self._compressor.restore()
        presence = GradientPresence.of_step(control, active, self._summed)
        if self._returns == "sums":
            if control.exchanged < exchange_of(step, Stage.RETURNING):
                self._share_sum.sum(presence)
            self._fault("return", step)
            self.barrier.await_exchange(exchange_of(step + 1, Stage.STARTED))
            presence = presence.summed(self.shared.tables)
        if self._norm_clipper is not None:
            self.owner.reduce(presence)
            self._moves.give_sums()
            self._meet(progress_of(step, Phase.REDUCED))
            self._moves.take_sums()
        return presence

    def _sum_subtrees(self, step: int, active: Sequence[int]) -> None:
        """Make what other hosts get: sums, compressed if asked."""
        if not self._subtree_sums and self._compressor is None:
            return
        presence = GradientPresence.of_step(
            self.control, [shard for shard in active if shard in self._host_shards]
        )
        self._subtree_sums.sum(presence)
        if self._compressor is not None:
            self._compressor.compress(step, presence)

    def _meet(self, progress: int) -> None:
        self.barrier.arrive(progress)
        self.barrier.wait(progress)

    def _meet_norms(self, step: int) -> None:
        """Meet when all norms are taken, also those that only other hosts can take."""
        self._meet(progress_of(step, Phase.NORMED))
        if self._owned_apart:
            self.barrier.await_exchange(exchange_of(step, Stage.NORMED))

    # Update.

    def _combine_buffers(self, step: int) -> None:
        """Merge this worker's share of the buffers; in a home of its own, all of them."""
        weights = self._sampling.weights(step)
        committed, rules = self.shared.committed, self.shared.buffer_rules
        first, every = (0, 1) if self._moves.apart else (self._rank, self._workers)
        for index in range(first, len(committed), every):
            left = [slot.buffers[index] for slot in self.shared.slots]
            combine_buffers(committed[index], left, weights, rules[index])

    def _await_parameters(self, step: int, presence: GradientPresence) -> None:
        """Return when what other hosts have updated is there."""
        self._fault("return", step)
        self.barrier.await_exchange(exchange_of(step + 1, Stage.STARTED))
        if self._rank == 0 and self._unseen:
            begun = {param for param in self._unseen if any(presence.of(param))}
            self.shared.note_begun(begun)
            self._unseen -= begun

    # Commit.

    def rest(self, step: int) -> None:
        """Leave the state after so many steps where the agent finds it."""
        self._moves.rest(step)

    def refresh_snapshot(self, committed: int) -> None:
        """Bring this worker's part of the snapshot to the state after so many committed steps."""
        self._snapshot.refresh()
        if self._rank == 0:
            self.control.snapshot_step = committed

    def _record_digests(self, step: int) -> None:
        """Digest this worker's share of the state for the ledger, and publish the next step."""
        # The exchange thread digests what some host alone has.
        _, everywhere = self.context.digest_sample.split(step, self._owned_params)
        for index, unit in everywhere.items():
            if (step + index) % self._workers == self._rank:
                digest = self._moves.digest(unit.offset, unit.nbytes)
                self.control.set_digest(step, index, digest)
        # Nobody sleeps until a step has started, so nobody is woken: the agent looks by itself.
        self.control.set_progress(self._worker_id, progress_of(step + 1, Phase.STARTED))

    def _told_rate(self) -> float:
        """The learning rate of this step, for the events; with local steps shards have theirs."""
        return math.nan if self._local else self._schedule.rate

    def _fault(self, phase: str, step: int, shard: int | None = None) -> Fault | None:
        """Let a scripted fault strike here; one that flips a bit is returned."""
        return None if self._faults is None else self._faults.at(phase, step, shard)

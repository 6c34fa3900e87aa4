"""Worker: a fork of the forkserver that computes shards and updates blocks, as its agent says."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lockstep.collectives.barrier import Barrier, Regroup
from lockstep.collectives.subtree_sum import dense_leaves, leaves_of
from lockstep.data.fetching import AbsentSamples, make_fetch
from lockstep.data.records import RecordDataset
from lockstep.device.choice import device_of
from lockstep.optim.block_owner import BlockOwner
from lockstep.planning.assignment import Assignment, share_of
from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.eval_batches import batch_range
from lockstep.planning.forkserver_messages import ToPristine
from lockstep.planning.metric_decisions import Told
from lockstep.planning.step_phases import describe_progress
from lockstep.planning.worker_messages import (
    BatchDone,
    BatchesDone,
    InferBatches,
    Interrupted,
    LoaderLost,
    MetricTold,
    Rested,
    RunSteps,
    Scored,
    ScoreOutputs,
    Started,
    Stop,
    ToAgent,
    WorkerFailed,
    WorkerMessage,
)
from lockstep.state.control_segment import Stat
from lockstep.system import numerics
from lockstep.system.seeding import derive
from lockstep.system.unix_channel import Closed
from lockstep.worker.context import Session, WorkerContext
from lockstep.worker.error_report import describe_error
from lockstep.worker.evaluate import (
    Inference,
    baseline,
    evaluate_batches,
    predict_batches,
    score,
)
from lockstep.worker.purity_watch import PurityWatch
from lockstep.worker.team_work import TeamWork, team_work_of
from lockstep.worker.train_step import TrainStep


class Worker:
    """The worker's loop: messages from the agent, steps between them."""

    def __init__(
        self,
        session: Session,
        worker_id: int,
        channel: ToAgent,
        to_forkserver: ToPristine | None = None,
    ) -> None:
        self.context = WorkerContext.of(
            session, worker_id, channel.send, device_of(session.plan.device, worker_id)
        )
        self.worker_id, self.channel = worker_id, channel
        self.control, self.loader = session.shared.control, self.context.loader
        self.watch: PurityWatch | None = None
        alone = session.plan.ownership != "slices"  # else a fork has some of the slices alone
        # Forks compute on the CPU.
        if to_forkserver is not None and session.plan.device != "cuda" and alone:
            seen = replace(session, shared=self.context.shared)
            self.watch = PurityWatch(seen, worker_id, to_forkserver)
        self.told: tuple[Told, ...] = ()
        """What the task's schedule has been told, where it waits for a metric."""
        self.team: TeamWork | None = None
        """The worker's part in its team, if it has one."""
        self.step = 0
        self.doing = "starting"

    def serve(self) -> None:
        """Do what the agent asks, until it says stop."""
        stack = os.memfd_create("lockstep-stack", os.MFD_CLOEXEC)
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        step, _ = describe_progress(self.control.progress(self.worker_id))
        self.context.faults.at("start", step)
        self.channel.send(Started(probe=self.context.device.probe()), [stack])
        while True:
            self.doing = "waiting for the agent"
            message, _ = self.channel.receive()
            match message:
                case Assignment():
                    train_step = self.join(message)
                    self.run(train_step, message.todo)
                case RunSteps():
                    self.run(train_step, train_step.shards)
                case MetricTold():
                    self.told = (*self.told, message.told)
                    self.tell_schedule()
                case InferBatches():
                    self.infer(message)
                case ScoreOutputs():
                    self.score(message)
                case Stop():
                    self.loader.close()
                    return

    def join(self, assignment: Assignment) -> TrainStep:
        """Take a part in a new membership, with the state that there is."""
        self.doing, self.step = "joining", assignment.step
        context, shared = self.context, self.context.shared
        context.faults.at("join", self.step)
        whole = ByteRange(offset=0, nbytes=shared.layout.state_bytes)
        context.device.load("state", [whole])
        context.device.settle()
        sizes = [parameter.numel() for parameter in shared.params]
        share = share_of(assignment, shared.blocks, sizes, undivided=shared.undivided is not None)
        threads = context.plan.threads
        barrier = Barrier(
            self.control, self.worker_id, assignment.worker_ids, assignment.epoch, threads
        )
        owner = BlockOwner(
            shared,
            share.blocks,
            context.faults,
            leaves_of(shared, assignment.subtrees, assignment.host_shards),
            dense=dense_leaves(shared, assignment.subtrees, summed=assignment.returns == "sums"),
            scheduled=context.schedule.changed,
        )
        train_step = TrainStep(context, assignment, share, barrier, owner, self.watch)
        train_step.team = self.team = team_work_of(context, assignment, barrier)
        self.told = assignment.told
        self.tell_schedule()
        if assignment.refresh:
            train_step.refresh_snapshot(self.step)
        if not assignment.loaders:
            self.loader.do_without()
        all_of_step = assignment.todo == assignment.shards
        self.loader.assign(assignment.shards, self.step if all_of_step else self.step + 1)
        return train_step

    def tell_schedule(self) -> None:
        """Set the options of the optimizer to what they are now."""
        self.context.schedule.tell(self.told)
        self.context.schedule.go_to(self.step)
        if self.watch is not None:
            self.watch.told = self.told

    def run(self, train_step: TrainStep, todo: Sequence[int]) -> None:
        """Run steps up to the lease's end. `todo`: what is left of the first."""
        try:
            while self.step < self.control.lease:
                self.doing = f"computing step {self.step}"
                train_step.run(self.step, todo)
                self.step += 1
                todo = train_step.shards
        except Regroup:
            self.channel.send(Interrupted())
            return
        train_step.rest(self.step)
        self.channel.send(Rested(step=self.step))

    def infer(self, request: InferBatches) -> None:
        """Evaluate or predict the given held-out batches; send what comes of each, then rest."""
        self.doing = "predicting" if request.predict else "evaluating"
        begun = time.perf_counter()
        if self.context.faults:
            self.context.faults.at("evaluate", self.step)
        if request.batches:  # where there are none, there may be no data
            with contextlib.suppress(Regroup):  # of a team: what it has not done is asked again
                self._infer(request, self.team if request.together else None)
        self.control.seconds[self.worker_id][Stat.EVALUATE] += time.perf_counter() - begun
        self.channel.send(BatchesDone())

    def _infer(self, request: InferBatches, team: TeamWork | None) -> None:
        context, plan = self.context, self.context.plan
        assert context.held_out is not None
        absent = AbsentSamples(allowed=True)
        fetch = make_fetch(context.task, context.held_out, plan.seed, absent)
        samples, before = plan.own_held_out
        size = {"samples": samples, "batch_size": plan.eval_batch_size}
        together = contextlib.nullcontext() if team is None else team.computing_batches()
        with self._inference(autocast=plan.precision == "bf16") as inference, together:
            batches = self._one_by_one([batch - before for batch in request.batches], team)
            if request.predict:
                assert isinstance(context.held_out, RecordDataset)
                for batch, rows in predict_batches(inference, fetch, batches, **size):
                    indices = batch_range(batch, **size)
                    self._answer(request, batch, context.held_out.beside(indices, rows), team)
            else:
                for sums in evaluate_batches(inference, fetch, absent, batches, **size):
                    batch = sums["batch"] + before
                    self._answer(request, batch, {**sums, "batch": batch}, team)

    def _inference(self, *, autocast: bool) -> Inference:
        context, plan = self.context, self.context.plan
        position = plan.position.at_batch(self.step, 0, plan.position.samples)
        return Inference(
            context.task, context.shared, context.generators, context.device, position, plan.seed,
            autocast=autocast,
        )  # fmt: skip

    def _one_by_one(self, batches: Sequence[int], team: TeamWork | None) -> Iterator[int]:
        for batch in batches:
            self.control.beat(self.worker_id, batch)
            if team is not None:
                team.begin_batch(self.step, batch)
            yield batch

    def _answer(
        self, request: InferBatches, batch: int, result: Any, team: TeamWork | None
    ) -> None:
        text = json.dumps(result)
        if team is not None:
            team.finish_batch(text)
        if team is None or team.answers:
            self.channel.send(BatchDone(round=request.round, batch=batch, result=text))

    def score(self, request: ScoreOutputs) -> None:
        """Score the gathered outputs, and the baseline if asked, and send the numbers."""
        self.doing = "scoring"
        begun = time.perf_counter()
        task, seed = self.context.task, self.context.plan.seed
        outputs = json.loads(request.outputs)
        with self._inference(autocast=False) as inference:
            inference.reset("score", 0, self.context.plan.eval_samples)
            metrics = score(task, outputs, seed) if outputs else {}
        self.context.generators.seed(derive(seed, "baseline"))
        beside = baseline(task, seed) if request.baseline else {}
        self.control.seconds[self.worker_id][Stat.EVALUATE] += time.perf_counter() - begun
        self.channel.send(Scored(round=request.round, metrics=metrics, baseline=beside))


def work(
    session: Session, worker_id: int, channel: ToAgent, to_forkserver: ToPristine | None = None
) -> int:
    """Be a worker until the agent says stop; returns the exit code.

    `to_forkserver`: where shards can be had computed again, to find what remembers.
    """
    worker: Worker | None = None
    try:
        numerics.configure(session.plan.threads)
        worker = Worker(session, worker_id, channel, to_forkserver)
        worker.serve()
        return 0
    except Closed:
        return 0
    except BaseException as error:  # the user's code may call sys.exit()
        try:
            return _report_end(worker, channel, error)
        except RuntimeError as again:  # torch's handler, a moment before it was taken out
            return _report_end(worker, channel, again)


def _report_end(worker: Worker | None, channel: ToAgent, error: BaseException) -> int:
    """Say why a worker ends, if anybody is there to hear it; returns the exit code."""
    # Torch reports a loader's death by an error from a signal handler: not while that is reported.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if worker is not None and worker.loader.has_lost_a_process(error):
        message: WorkerMessage = LoaderLost()
    else:
        doing, step = (worker.doing, worker.step) if worker is not None else ("starting", 0)
        message = WorkerFailed(error=describe_error(error, doing), step=step)
    with contextlib.suppress(Closed):
        channel.send(message)
    return 1

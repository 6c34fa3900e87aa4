"""A worker: a fork of the nursery that computes shards and updates blocks, as the master says."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from lockstep.collectives.barrier import Barrier, Regroup
from lockstep.collectives.subtree_sum import dense_leaves, leaves_of
from lockstep.data.fetching import make_fetch
from lockstep.data.loader import Loader
from lockstep.data.records import RecordDataset
from lockstep.job.task import Task
from lockstep.optim.block_owner import BlockOwner
from lockstep.optim.lr_schedule import LrSchedule
from lockstep.planning.assignment import Assignment, share_of
from lockstep.planning.digest_sample import plan_digest_sample
from lockstep.planning.eval_batches import batch_range
from lockstep.planning.plan import Plan
from lockstep.planning.step_phases import describe_progress
from lockstep.planning.worker_messages import (
    BatchDone,
    BatchesDone,
    InferBatches,
    Interrupted,
    LoaderLost,
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
from lockstep.state.fault_injection import FaultInjector
from lockstep.state.shared_state import SharedState
from lockstep.system import machine, numerics
from lockstep.system.unix_channel import Closed
from lockstep.worker.build_state import build
from lockstep.worker.error_report import describe_error
from lockstep.worker.evaluate import (
    Inference,
    baseline,
    evaluate_batches,
    predict_batches,
    score,
)
from lockstep.worker.train_step import TrainStep


@dataclass
class Session:
    """What the nursery prepares and its forks inherit."""

    task: Task
    train: Dataset[Any]
    held_out: Dataset[Any] | None
    shared: SharedState
    schedule: LrSchedule
    """As it is before the first step."""
    plan: Plan

    @staticmethod
    def build(
        task: Task,
        model: nn.Module,
        train: Dataset[Any],
        held_out: Dataset[Any] | None,
        plan: Plan,
        *,
        networked: bool,
    ) -> Session:
        """Move the model to shared memory. Called once, in the forkserver."""
        model.train()
        task.set_position(plan.place)
        shared = build(
            task,
            model,
            shards=plan.shards,
            max_workers=plan.max_workers,
            clip=plan.sum_limit is not None,
            networked=networked,
            compression=plan.compression,
            groups=plan.groups,
        )
        schedule = LrSchedule(task, shared.optimizer, plan.sampling)
        return Session(
            task=task, train=train, held_out=held_out, shared=shared, schedule=schedule, plan=plan
        )


class Worker:
    """The worker's loop: messages from the master, steps between them."""

    def __init__(self, session: Session, worker_id: int, channel: ToAgent) -> None:
        plan = session.plan
        self.session, self.worker_id, self.channel = session, worker_id, channel
        self.shared, self.control = session.shared, session.shared.control
        self.sampling = plan.sampling
        self.fetch = make_fetch(session.task, session.train, plan.seed)
        spare = machine.cores() - plan.workers * plan.threads
        self.loader = Loader(
            self.fetch,
            self.sampling,
            loaders=plan.loaders,
            spare_cores=spare,
            last=plan.steps,
            part=plan.part,
        )
        self.faults = FaultInjector(plan.faults, worker_id, self.control)
        self.train_step = TrainStep(
            session.task,
            self.shared,
            self.sampling,
            self.loader,
            session.schedule,
            plan_digest_sample(self.shared.layout),
            place=plan.place,
            seed=plan.seed,
            autocast=plan.precision == "bf16",
            clip_grad_norm=plan.clip_grad_norm,
            faults=self.faults,
            audit_fraction=plan.audit,
            report=channel.send,
        )
        self.step = 0
        self.doing = "starting"

    def serve(self) -> None:
        """Do what the master asks, until it says stop."""
        self.stack = os.memfd_create("lockstep-stack", os.MFD_CLOEXEC)
        faulthandler.register(signal.SIGUSR1, file=self.stack, all_threads=True)
        self.faults.at("start", describe_progress(self.control.progress(self.worker_id))[0])
        self.channel.send(Started(probe=numerics.probe()), [self.stack])
        while True:
            self.doing = "waiting for the master"
            message, _ = self.channel.receive()
            match message:
                case Assignment():
                    self.join(message)
                    self.run(message.todo)
                case RunSteps():
                    self.run()
                case InferBatches():
                    self.infer(message)
                case ScoreOutputs():
                    self.score(message)
                case Stop():
                    self.loader.close()
                    return

    def join(self, assignment: Assignment) -> None:
        """Take a part in a new membership and catch up with the step in flight."""
        self.doing = "joining"
        self.step = assignment.step
        self.faults.at("join", self.step)
        shared, subtrees = self.shared, assignment.subtrees
        sizes = [parameter.numel() for parameter in shared.params]
        share = share_of(assignment, shared.blocks, sizes)
        barrier = Barrier(
            self.control,
            self.worker_id,
            assignment.worker_ids,
            assignment.epoch,
            self.session.plan.threads,
        )
        owner = BlockOwner(
            shared,
            share.blocks,
            self.faults,
            leaves_of(shared, subtrees, assignment.host_shards),
            dense=dense_leaves(shared, subtrees, summed=assignment.returns == "sums"),
        )
        self.train_step.join(assignment, share, barrier, owner)
        self.train_step.schedule.go_to(self.step)
        if assignment.refresh:
            self.train_step.refresh_snapshot(self.step)
        if not assignment.loaders:
            self.loader.do_without()
        self.shards = assignment.shards
        all_of_step = assignment.todo == self.shards
        self.loader.assign(self.shards, self.step if all_of_step else self.step + 1)

    def run(self, todo: Sequence[int] | None = None) -> None:
        """Run steps up to the lease's end. `todo`: what is left of the first, if not all."""
        try:
            while self.step < self.control.lease:
                self.doing = f"computing step {self.step}"
                self.train_step.run(self.step, self.shards if todo is None else todo)
                self.step += 1
                todo = None
        except Regroup:
            self.channel.send(Interrupted())
            return
        self.channel.send(Rested(step=self.step))

    def infer(self, request: InferBatches) -> None:
        """Evaluate or predict the given held-out batches; send what comes of each, then rest."""
        self.doing = "predicting" if request.predict else "evaluating"
        begun = time.perf_counter()
        if self.faults:
            self.faults.at("evaluate", self.step)
        if request.batches:  # where there are none, there may be no data
            self._infer(request)
        self.control.seconds[self.worker_id][Stat.EVALUATE] += time.perf_counter() - begun
        self.channel.send(BatchesDone())

    def _infer(self, request: InferBatches) -> None:
        session, plan = self.session, self.session.plan
        assert session.held_out is not None
        fetch = make_fetch(session.task, session.held_out, plan.seed)
        samples, before = plan.own_held_out
        size = {"samples": samples, "batch_size": plan.eval_batch_size}
        with self._inference(autocast=plan.precision == "bf16") as inference:
            batches = self._one_by_one([batch - before for batch in request.batches])
            if request.predict:
                assert isinstance(session.held_out, RecordDataset)
                for batch, rows in predict_batches(inference, fetch, batches, **size):
                    indices = batch_range(batch, **size)
                    self._answer(request, batch, session.held_out.beside(indices, rows))
            else:
                for sums in evaluate_batches(inference, fetch, batches, **size):
                    batch = sums["batch"] + before
                    self._answer(request, batch, {**sums, "batch": batch})

    def _inference(self, *, autocast: bool) -> Inference:
        plan = self.session.plan
        begun = plan.place
        place = begun.at_batch(self.step, 0, begun.samples)
        return Inference(self.session.task, self.shared, place, plan.seed, autocast=autocast)

    def _one_by_one(self, batches: Sequence[int]) -> Iterator[int]:
        for batch in batches:
            self.control.beat(self.worker_id, batch)
            yield batch

    def _answer(self, request: InferBatches, batch: int, result: Any) -> None:
        self.channel.send(BatchDone(round=request.round, batch=batch, result=json.dumps(result)))

    def score(self, request: ScoreOutputs) -> None:
        """Score the gathered outputs, and the baseline if asked, and send the numbers."""
        self.doing = "scoring"
        begun = time.perf_counter()
        task, seed = self.session.task, self.session.plan.seed
        outputs = json.loads(request.outputs)
        with self._inference(autocast=False) as inference:
            inference.afresh("score", 0, self.session.plan.eval_samples)
            metrics = score(task, outputs, seed) if outputs else {}
        beside = baseline(task, seed) if request.baseline else {}
        self.control.seconds[self.worker_id][Stat.EVALUATE] += time.perf_counter() - begun
        self.channel.send(Scored(round=request.round, metrics=metrics, baseline=beside))


def work(session: Session, worker_id: int, channel: ToAgent) -> int:
    """Be a worker until the agent says stop; returns the exit code."""
    worker: Worker | None = None
    try:
        numerics.configure(session.plan.threads)
        worker = Worker(session, worker_id, channel)
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

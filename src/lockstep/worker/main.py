"""A worker: a fork of the nursery that computes shards and updates blocks, as the master says."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Iterator
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
from lockstep.planning.blocks import own_blocks
from lockstep.planning.byte_ranges import ByteRange, cut_evenly
from lockstep.planning.digest_sample import plan_digest_sample
from lockstep.planning.eval_batches import batch_range
from lockstep.planning.plan import Plan
from lockstep.planning.sampling import home_shards
from lockstep.planning.step_phases import describe_progress
from lockstep.state.control_segment import Stat
from lockstep.state.fault_injection import FaultInjector
from lockstep.state.shared_state import SharedState
from lockstep.system import machine, numerics
from lockstep.system.unix_channel import Channel, Closed, Message
from lockstep.worker.build_state import build
from lockstep.worker.error_report import describe_error
from lockstep.worker.evaluate import (
    Inference,
    baseline,
    evaluate_batches,
    predict_batches,
    score,
)
from lockstep.worker.train_step import Assignment, TrainStep, norm_parts


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
        message: Message,
        *,
        networked: bool,
    ) -> Session:
        """Move the model to shared memory. Called once, in the nursery, with the plan's message."""
        model.train()
        plan = Plan.from_message(message)
        task.set_position(plan.position)
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

    def __init__(self, session: Session, worker_id: int, channel: Channel) -> None:
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
            place=plan.position,
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
        self.channel.send({"event": "hello", "probe": numerics.probe()}, [self.stack])
        while True:
            self.doing = "waiting for the master"
            message, _ = self.channel.receive()
            match message["op"]:
                case "join":
                    self.join(message)
                    self.run(message["todo"])
                case "run":
                    self.run()
                case "evaluate" | "predict":
                    self.infer(message)
                case "score":
                    self.score(message)
                case "stop":
                    self.loader.close()
                    return

    def join(self, message: Message) -> None:
        """Take a place among the members and catch up with the step in flight."""
        self.doing = "joining"
        self.step = message["step"]
        self.faults.at("join", self.step)
        worker_ids: list[int] = message["seats"]
        rank, workers = worker_ids.index(self.worker_id), len(worker_ids)
        shared = self.shared
        mine, subtrees = range(*message["mine"]), tuple(range(*each) for each in message["trees"])
        theirs = frozenset(message["theirs"])
        sizes = [
            0 if index in theirs else parameter.numel()
            for index, parameter in enumerate(shared.params)
        ]
        ours = [n for n, block in enumerate(shared.blocks) if block.param not in theirs]
        run = own_blocks([shared.blocks[number] for number in ours], workers)[rank]
        share = [cut_evenly(ByteRange(**place), workers)[rank] for place in message["sums"]]
        part = Assignment(
            worker_id=self.worker_id,
            rank=rank,
            workers=workers,
            shards=tuple(mine[home] for home in home_shards(len(mine), workers, rank)),
            mine=mine,
            subtrees=subtrees,
            several=message["several"],
            blocks=ours[run.start : run.stop],
            norms=[index for index in norm_parts(sizes, workers)[rank] if index not in theirs],
            returns=message["returns"],
            sums=tuple(share),
            theirs=theirs,
            owned=frozenset(message["owned"]),
        )
        threads = self.session.plan.threads
        barrier = Barrier(self.control, self.worker_id, worker_ids, message["epoch"], threads)
        owner = BlockOwner(
            shared,
            part.blocks,
            self.faults,
            leaves_of(shared, subtrees, mine),
            dense=dense_leaves(shared, subtrees, summed=part.returns == "sums"),
        )
        self.train_step.join(part, barrier, owner, self.step)
        self.train_step.schedule.go_to(self.step)
        if message["refresh"]:
            self.train_step.refresh_snapshot(self.step)
        if not message["loaders"]:
            self.loader.do_without()
        all_of_step = tuple(message["todo"]) == part.shards
        self.loader.assign(part.shards, self.step if all_of_step else self.step + 1)

    def run(self, todo: list[int] | None = None) -> None:
        """Run steps up to the lease's end."""
        part = self.train_step.part
        try:
            while self.step < self.control.lease:
                self.doing = f"computing step {self.step}"
                self.train_step.run(self.step, part.shards if todo is None else todo)
                self.step += 1
                todo = None
        except Regroup:
            self.channel.send({"event": "regroup", "step": self.step})
            return
        self.channel.send({"event": "idle", "step": self.step})

    def infer(self, message: Message) -> None:
        """Evaluate or predict the given held-out batches; send what comes of each, then rest."""
        self.doing = "evaluating" if message["op"] == "evaluate" else "predicting"
        begun = time.perf_counter()
        if self.faults:
            self.faults.at("evaluate", self.step)
        if message["batches"]:  # where there are none, there may be no data
            self._infer(message)
        self.control.seconds[self.worker_id][Stat.EVALUATE] += time.perf_counter() - begun
        self.channel.send({"event": "inferred", "round": message["round"]})

    def _infer(self, message: Message) -> None:
        session, plan = self.session, self.session.plan
        assert session.held_out is not None
        fetch = make_fetch(session.task, session.held_out, plan.seed)
        samples, before = plan.own_held_out
        size = {"samples": samples, "batch_size": plan.eval_batch_size}
        with self._inference(autocast=plan.precision == "bf16") as inference:
            batches = self._one_by_one([batch - before for batch in message["batches"]])
            if message["op"] == "evaluate":
                for sums in evaluate_batches(inference, fetch, batches, **size):
                    batch = sums["batch"] + before
                    self._answer(message, batch, {**sums, "batch": batch})
            else:
                assert isinstance(session.held_out, RecordDataset)
                for batch, rows in predict_batches(inference, fetch, batches, **size):
                    indices = batch_range(batch, **size)
                    self._answer(message, batch, session.held_out.beside(indices, rows))

    def _inference(self, *, autocast: bool) -> Inference:
        plan = self.session.plan
        begun = plan.position
        place = begun.at_batch(self.step, 0, begun.samples)
        return Inference(self.session.task, self.shared, place, plan.seed, autocast=autocast)

    def _one_by_one(self, batches: list[int]) -> Iterator[int]:
        for batch in batches:
            self.control.beat(self.worker_id, batch)
            yield batch

    def _answer(self, message: Message, batch: int, result: Any) -> None:
        self.channel.send(
            {"event": "batch", "round": message["round"], "batch": batch, "result": result}
        )

    def score(self, message: Message) -> None:
        """Score the gathered outputs, and the baseline if asked, and send the numbers."""
        self.doing = "scoring"
        begun = time.perf_counter()
        task, seed = self.session.task, self.session.plan.seed
        with self._inference(autocast=False) as inference:
            inference.afresh("score", 0, self.session.plan.eval_samples)
            numbers = score(task, message["outputs"], seed) if message["outputs"] else {}
        beside = baseline(task, seed) if message["baseline"] else {}
        self.control.seconds[self.worker_id][Stat.EVALUATE] += time.perf_counter() - begun
        self.channel.send(
            {"event": "scored", "round": message["round"], "metrics": numbers, "baseline": beside}
        )


def work(session: Session, worker_id: int, channel: Channel) -> int:
    """Be the worker of a seat until the master says stop; returns the exit code."""
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
            return _last_words(worker, channel, error)
        except RuntimeError as again:  # torch's handler, a moment before it was taken out
            return _last_words(worker, channel, again)


def _last_words(worker: Worker | None, channel: Channel, error: BaseException) -> int:
    """Say why a worker ends, if anybody is there to hear it; returns the exit code."""
    # Torch tells of a loader's death by an error from a signal's handler: not while that is told.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if worker is not None and worker.loader.has_lost_a_process(error):
        message: Message = {"event": "lost_loader"}
    else:
        doing, step = (worker.doing, worker.step) if worker is not None else ("starting", 0)
        message = {"event": "failed", "error": describe_error(error, doing), "step": step}
    with contextlib.suppress(Closed):
        channel.send(message)
    return 1

"""Context: what a worker process keeps while memberships change.

The forkserver prepares a `Session`, which its forks inherit. Each worker makes a `WorkerContext`
of it once; what belongs to one membership alone is made anew with each (see `train_step`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from lockstep.collectives.grad_norm import GradNormClipper
from lockstep.data.fetching import AbsentSamples, Fetch, make_fetch
from lockstep.data.loader import Loader
from lockstep.data.order_rules import OrderRule
from lockstep.device.device import Device
from lockstep.errors import TaskError
from lockstep.job.task import Task
from lockstep.native.library import BY_REQUEST, Library, load_library
from lockstep.optim.local_rounds import LocalRounds
from lockstep.optim.local_sgd import LocalSGD
from lockstep.optim.lr_schedule import LrSchedule
from lockstep.planning.digest_sample import DigestSample, plan_digest_sample
from lockstep.planning.plan import Plan
from lockstep.planning.sampling import Sampling
from lockstep.planning.worker_messages import Report
from lockstep.slices.board_memory import BoardMemory
from lockstep.state.fault_injection import FaultInjector
from lockstep.state.shared_state import SharedState
from lockstep.system import machine, numerics
from lockstep.system.own_generators import OwnGenerators
from lockstep.worker.audit import GradientAudit
from lockstep.worker.build_state import build
from lockstep.worker.compiled_shard import CompiledPasses, compile_passes, versions
from lockstep.worker.device_facts import device_facts
from lockstep.worker.forward_backward import ForwardBackward
from lockstep.worker.shard_tracer import ShardTracer


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """What the forkserver prepares and its forks inherit."""

    task: Task
    train: Dataset[Any]
    fetch: Fetch
    """From the training set."""
    order_rule: OrderRule | None
    """What decides the training set's order, besides the seed."""
    held_out: Dataset[Any] | None
    generators: OwnGenerators
    """Those of task and model."""
    shared: SharedState
    schedule: LrSchedule
    """As it is before the first step."""
    plan: Plan
    compiled: CompiledPasses | None
    """Where the job asks for it."""
    native: Library = BY_REQUEST
    """The native library, or why it is not used."""
    boards: BoardMemory | None = None
    """Where teams compute shards."""

    @staticmethod
    def build(
        task: Task,
        model: nn.Module,
        train: Dataset[Any],
        held_out: Dataset[Any] | None,
        plan: Plan,
        order_rule: OrderRule | None = None,
        *,
        networked: bool,
    ) -> Session:
        """Move the model to shared memory. Called once, in the forkserver.

        Raises:
            LockstepError: the task cannot be trained.
        """
        if plan.memory_format == "channels_last":
            _to_channels_last(model)
        absent = AbsentSamples(allowed=plan.shards == 1)
        fetch = make_fetch(task, train, plan.seed, absent)
        generators = OwnGenerators({"task": task, "model": model})
        if not task.keep_modes:
            model.train()
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
            ownership=plan.ownership,
            slices=plan.slices,
            slice_plan=plan.slice_plan,
            device=plan.device,
        )
        schedule = LrSchedule(task, shared.optimizer, plan.sampling)
        return Session(
            task=task,
            train=train,
            fetch=fetch,
            order_rule=order_rule,
            held_out=held_out,
            generators=generators,
            shared=shared,
            schedule=schedule,
            plan=plan,
            compiled=compile_passes(task, shared, plan, fetch) if plan.compile else None,
            native=load_library() if plan.native == "auto" else BY_REQUEST,
            boards=_boards(plan, networked=networked),
        )

    def profile(self) -> dict[str, Any]:
        """The numerics profile."""
        profile = numerics.profile(self.plan.numerics, self.plan.threads)
        profile |= device_facts(self.plan.device)
        return profile | versions() if self.compiled is not None else profile

    def tracer(self, report: Report) -> ShardTracer | CompiledPasses:
        """What finds other ways to compute a shard than the plain one, for a worker."""
        if self.compiled is not None:
            return self.compiled
        return ShardTracer(self.task, self.shared, self.plan, report, self.native)


def _boards(plan: Plan, *, networked: bool) -> BoardMemory | None:
    """A line for each worker that there may be in a team, also on other hosts."""
    if plan.ownership == "slices" and networked:
        return BoardMemory.create(plan.slices * plan.max_workers)
    return BoardMemory.create(plan.max_workers) if plan.team > 1 else None


def _to_channels_last(model: nn.Module) -> None:
    if not any(parameter.dim() == 4 for parameter in model.parameters()):
        raise TaskError(
            "memory_format: channels_last would change nothing",
            expected="a model with 4-D parameters, such as weights of Conv2d",
            found=f"none in {type(model).__name__}",
            fix="leave memory_format out",
        )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True, eq=False)
class WorkerContext:
    """One worker process: its view of the session, and what carries over from step to step."""

    worker_id: int
    task: Task
    held_out: Dataset[Any] | None
    generators: OwnGenerators
    plan: Plan
    device: Device
    shared: SharedState
    """This worker's home: what it computes with."""
    sampling: Sampling
    loader: Loader
    schedule: LrSchedule
    forward_backward: ForwardBackward
    norm_clipper: GradNormClipper | None
    """Where the norm of the summed gradient is limited."""
    gradient_audit: GradientAudit | None
    """Where the job asks for an audit."""
    digest_sample: DigestSample
    faults: FaultInjector
    report: Report
    """Tells the agent of corruption, and of what is traced or native."""
    native: Library
    told_native: list[str]
    """Why its steps were not native, as far as the agent was told."""
    boards: BoardMemory | None
    """Where teams compute shards."""

    @staticmethod
    def of(session: Session, worker_id: int, report: Report, device: Device) -> WorkerContext:
        """The context of a worker that has just been forked; its home is made."""
        session = replace(session, shared=device.home(session.shared))
        plan, task, shared = session.plan, session.task, session.shared
        sampling = plan.sampling
        loader = Loader(
            session.fetch,
            sampling,
            loaders=plan.loaders,
            spare_cores=machine.cores() - plan.workers * plan.threads,
            last=plan.steps,
            part=plan.part,
            rule=session.order_rule,
        )
        faults = FaultInjector(plan.faults, worker_id, shared.control)
        rounds: LocalRounds | None = None
        norm_clipper: GradNormClipper | None = None
        if isinstance(task, LocalSGD):
            rounds = LocalRounds(task, shared, sampling, plan.clip_grad_norm)
        elif plan.clip_grad_norm is not None:
            norm_clipper = GradNormClipper(shared, plan.clip_grad_norm)
        forward_backward = ForwardBackward(
            task, shared, sampling, loader, rounds, session.generators, device,
            start=plan.position, seed=plan.seed, autocast=plan.precision == "bf16", faults=faults,
            tracer=session.tracer(report),
        )  # fmt: skip
        gradient_audit: GradientAudit | None = None
        if plan.audit:
            gradient_audit = GradientAudit(
                shared, forward_backward.make, report, plan.seed, plan.audit
            )
        return WorkerContext(
            worker_id=worker_id,
            task=task,
            held_out=session.held_out,
            generators=session.generators,
            plan=plan,
            device=device,
            shared=shared,
            sampling=sampling,
            loader=loader,
            schedule=session.schedule,
            forward_backward=forward_backward,
            norm_clipper=norm_clipper,
            gradient_audit=gradient_audit,
            digest_sample=plan_digest_sample(shared.layout),
            faults=faults,
            report=report,
            native=session.native,
            told_native=[],
            boards=session.boards,
        )

"""Plan: from a job and the facts about it to a plan. Pure; every decision has its reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.errors import DataError, JobError
from lockstep.job.faults import NOBODY
from lockstep.job.job import Job
from lockstep.job.position import Position
from lockstep.job.slice_words import check_team
from lockstep.planning.core_split import DEFAULT_BATCH_SIZE, Division, Facts
from lockstep.planning.data_partition import Holdings, from_message, held_out_batches, parts
from lockstep.planning.sampling import Sampling, steps_in_epoch
from lockstep.planning.step_phases import MAX_STEPS
from lockstep.planning.teams import describe_teams


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a job is run: every setting decided, and why."""

    workers: int
    shards: int
    threads: int
    max_workers: int
    """The most workers that there can be at a time."""
    steps: int
    batch_size: int
    eval_batch_size: int
    train_samples: int
    eval_samples: int
    local_steps: int
    compression: str
    groups: int
    """How many there are; 0 without compression."""
    ownership: str
    servers: tuple[str, ...]
    seed: int
    clip_grad_norm: float | None
    precision: str
    numerics: str
    loaders: int | None
    stall_seconds: float | None
    audit: float
    faults: tuple[Mapping[str, Any], ...]
    reasons: tuple[str, ...]
    holdings: Holdings = ()
    """Who has which part of the data, where it stays there."""
    part: int = 0
    """Which of the holdings is this host's own."""
    shuffle: bool = True
    drop_last: bool = False
    planned_steps: int = 0
    """`steps` as the run has them, also where a replay or a prediction has fewer."""
    purity: float = 0.0
    monitor: str | None = None
    monitor_mode: str = "min"
    stop_patience: int | None = None
    stop_min_delta: float = 0.0
    trace: str = "auto"
    native: str = "auto"
    compile: bool = False
    slices: int = 1
    slice_plan: Mapping[str, str] | None = None
    team: int = 1
    """How many workers compute a shard together."""
    cuts: tuple[Mapping[str, Any], ...] = ()
    """What becomes of each module with matrices: known when the model has been cut."""
    sample_order: str = ""
    """What decides the order of the training data besides the seed, with its digest; "": nothing.
    """
    memory_format: str = "contiguous"
    device: str = "cpu"

    @property
    def apart(self) -> bool:
        """Whether workers have homes of their own, of which the host's segment is a mirror."""
        return self.device != "cpu"

    @property
    def division(self) -> Division:
        """The division of the cores."""
        return Division(
            workers=self.workers, threads=self.threads, shards=self.shards, team=self.team
        )

    @property
    def sampling(self) -> Sampling:
        """The division of the training set into steps and shards."""
        return Sampling(
            samples=self.train_samples,
            batch_size=self.batch_size,
            shards=self.shards,
            seed=self.seed,
            parts=parts(self.holdings),
            shuffle=self.shuffle,
            drop_last=self.drop_last,
        )

    @property
    def sum_limit(self) -> float | None:
        """The limit of the norm of the shards' summed gradient, if it is that which is limited."""
        return self.clip_grad_norm if self.local_steps == 1 else None

    @property
    def eval_batches(self) -> int:
        """How many held-out batches there are; the last of a set may be short, none is padded."""
        sizes = [each.held_out for each in self.holdings] or [self.eval_samples]
        return sum(math.ceil(size / self.eval_batch_size) for size in sizes)

    @property
    def own_held_out(self) -> tuple[int, int]:
        """How many held-out samples this host has, and how many batches come before its own."""
        if not self.holdings:
            return self.eval_samples, 0
        own = self.holdings[self.part]
        batches = held_out_batches(self.holdings, self.eval_batch_size)
        return own.held_out if self.eval_samples else 0, batches[own.host].start

    @property
    def steps_per_epoch(self) -> int:
        return self.sampling.steps_per_epoch

    @property
    def position(self) -> Position:
        """The position of the beginning of the run."""
        return Position(
            training=True,
            step=0,
            steps=self.planned_steps or self.steps,
            steps_per_epoch=self.steps_per_epoch,
            batch=0,
            samples=self.batch_size,
        )

    def with_workers(self, workers: int | None) -> Plan:
        """The same plan, and so the same bits, on another number of workers.

        Raises:
            JobError: there are fewer shards than that.
        """
        if workers is None:
            return self
        if workers > self.most_workers:
            raise JobError(
                "there are more workers than shards: some would never have work",
                expected=f"at most {self.most_workers} workers",
                found=f"{workers}",
            )
        max_workers = max(workers, self.max_workers)
        return dataclasses.replace(self, workers=workers, max_workers=max_workers, faults=())

    def with_device(self, device: str | None) -> Plan:
        """The same plan, and so the same bits, on another device.

        Raises:
            JobError: it gives other bits.
        """
        if device is None:
            return self
        if (device == "cuda") != (self.device == "cuda"):
            raise JobError(
                "a run that began on the one does not go on to the same numbers on the other",
                expected=f"device = {self.device}, or one that computes the same bits",
                found=f"device = {device}",
                fix="leave device out, or start another run",
            )
        return dataclasses.replace(self, device=device)

    @property
    def most_workers(self) -> int:
        """As many as can have work: there may be a team for each shard."""
        return self.shards * self.team

    def resized(self, workers: int | None, team: int | None) -> Plan:
        """The same plan, and so the same bits, on another number of workers, in teams of another
        size; None: as they are.

        Raises:
            JobError: there are fewer shards, slices or workers than that.
        """
        if team is None:
            return self.with_workers(workers)
        check_team(team, self.slices, workers or self.workers, compiled=self.compile)
        if self.apart and team > 1:
            raise JobError(
                f"team does not go with device: {self.device}: its members compute in the host's "
                "segments",
                expected="team = 1, or a run with device = cpu",
                found=f"team = {team}",
                fix="leave team out",
            )
        return dataclasses.replace(self, team=team).with_workers(workers)

    def with_cuts(self, cuts: Sequence[Mapping[str, Any]]) -> Plan:
        """The same plan, with what has become of the model's matrices."""
        whole = sum(cut["elements"] for cut in cuts)
        sliced = sum(cut["elements"] for cut in cuts if cut["cut"])
        reasons = self.reasons
        if cuts:
            kept = f"{sliced:,} of {whole:,} elements of matrices are in {self.slices} slices"
            reasons = (*reasons, kept)
        return dataclasses.replace(self, cuts=tuple(cuts), reasons=reasons)

    def for_host(self, name: str, workers: int) -> Plan:
        """One host's part: its number of workers, and no faults that are for other hosts."""
        faults = tuple(
            fault if fault["host"] in (None, name) else {**fault, "worker_id": NOBODY}
            for fault in self.faults
        )
        plan = dataclasses.replace(self, workers=workers, max_workers=workers, faults=faults)
        if not self.holdings:
            return plan
        part = [each.host for each in self.holdings].index(name)
        most = min(workers, self.holdings[part].shards)
        return dataclasses.replace(plan, part=part, workers=most, max_workers=most)

    def to_message(self) -> dict[str, Any]:
        """JSON-ready. `max_workers` is called `seats` in manifests."""
        message = dataclasses.asdict(self)
        return {"seats" if name == "max_workers" else name: message[name] for name in message}

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> Plan:
        names = [name for name in ("reasons", "faults", "servers", "cuts") if name in message]
        tuples = {name: tuple(message[name]) for name in names}
        holdings = from_message(message.get("holdings", ()))
        fields = {"max_workers" if name == "seats" else name: message[name] for name in message}
        return Plan(**{**fields, **tuples, "holdings": holdings})


def decompose(job: Job, facts: Facts, division: Division, why: str = "") -> Plan:
    """Decide everything that the job leaves open.

    Raises:
        JobError, DataError: the settings do not fit each other or the data.
    """
    reasons = [why] if why else [_division_reason(job, facts, division)]
    batch_size = (job.batch_size or DEFAULT_BATCH_SIZE) * job.local_steps
    if job.shards is None:
        reasons.append(f"{division.shards} shards: by the batch size, whatever the machine")
    most_workers = division.shards * job.team
    reasons.append(f"the results are the same for 1 to {most_workers} workers")
    if job.batch_size is None:
        reasons.append(f"batch_size {DEFAULT_BATCH_SIZE}: the default")
    reasons += _loader_reasons(job, facts)
    if job.team > 1:
        teams = describe_teams(range(division.workers), job.team)
        reasons.append(
            f"{teams}; a team computes a shard together, each member some slices: predicted as if "
            "nothing were exchanged"
        )
    if job.local_steps > 1:
        reasons.append(f"a step is a round of {job.local_steps} batches, {batch_size} samples")
    if facts.train_samples < batch_size:
        raise DataError(
            "the training set is shorter than one batch",
            expected=f"at least batch_size = {batch_size} samples",
            found=f"{facts.train_samples}",
            fix=f"set batch_size to {facts.train_samples} or fewer",
        )
    if job.monitor is not None and not (job.evaluate and facts.eval_samples):
        raise DataError(
            f"monitor is set to {job.monitor!r}, and nothing is evaluated",
            expected="a data set from Task.eval_data, and evaluate = true",
            found=f"{facts.eval_samples} held-out samples, evaluate = {job.evaluate}",
            fix="define Task.eval_data, or leave monitor out",
        )
    if batch_size < division.shards:
        raise JobError(
            "a batch has fewer samples than shards",
            expected=f"batch_size >= shards = {division.shards}",
            found=f"batch_size = {batch_size}",
            fix="raise batch_size, or lower shards",
        )
    groups = 0 if job.compression == "none" else job.groups or division.shards
    if groups and (division.shards % groups or (division.shards // groups).bit_count() != 1):
        raise JobError(
            "the shards cannot be divided into these groups",
            expected="groups of 1, 2, 4, 8, ... shards each",
            found=f"{division.shards} shards, {groups} groups",
            fix="choose other numbers of shards and groups",
        )
    per_epoch = steps_in_epoch(facts.train_samples, batch_size, drop_last=job.drop_last)
    if job.steps is not None:
        steps = job.steps
        reasons.append(f"{steps} steps, as asked: {steps / per_epoch:.2f} data epochs")
    else:
        epochs = 1 if job.data_epochs is None else job.data_epochs
        steps = round(epochs * per_epoch)
        if epochs and not steps:
            raise JobError(
                "so small a part of a data epoch is no step",
                expected=f"at least {1 / per_epoch:.3g} data epochs: one of {per_epoch} steps",
                found=f"data_epochs = {epochs:g}",
                fix="set data_epochs to more, or steps",
            )
        reasons.append(f"{steps} steps: {epochs:g} data epochs of {per_epoch}")
    if steps > MAX_STEPS:
        raise JobError("too many steps", expected=f"at most {MAX_STEPS:,}", found=f"{steps:,}")
    if facts.sample_order:
        reasons.append(f"samples {facts.sample_order.rpartition(' ')[0]}, as the task says")
    left = facts.train_samples % batch_size
    if left:
        dropped = "are left out" if job.drop_last else "make a short last step"
        reasons.append(f"{left} samples of a data epoch {dropped}; drop_last is {job.drop_last}")
    return Plan(
        workers=division.workers,
        shards=division.shards,
        threads=division.threads,
        max_workers=max(division.workers, job.max_workers or division.shards),
        steps=steps,
        planned_steps=steps,
        shuffle=job.shuffle,
        drop_last=job.drop_last,
        batch_size=batch_size,
        eval_batch_size=job.eval_batch_size or job.batch_size or DEFAULT_BATCH_SIZE,
        train_samples=facts.train_samples,
        eval_samples=facts.eval_samples if job.evaluate else 0,
        local_steps=job.local_steps,
        compression=job.compression,
        groups=groups,
        ownership=job.ownership,
        servers=tuple(job.servers),
        seed=job.seed,
        clip_grad_norm=job.clip_grad_norm,
        precision=job.precision,
        numerics=job.numerics,
        loaders=job.loaders,
        stall_seconds=job.stall_seconds,
        audit=job.audit,
        purity=job.purity,
        monitor=job.monitor,
        monitor_mode=job.monitor_mode,
        stop_patience=job.stop_patience,
        stop_min_delta=job.stop_min_delta,
        trace=job.trace,
        native=job.native,
        compile=job.compile,
        slices=job.slices,
        slice_plan=job.slice_plan,
        team=job.team,
        sample_order=facts.sample_order,
        memory_format=job.memory_format,
        device=job.device,
        faults=tuple(dataclasses.asdict(fault) for fault in job.faults),
        reasons=tuple(reasons),
    )


def _loader_reasons(job: Job, facts: Facts) -> list[str]:
    """What of the settings of the task's DataLoaders counts."""
    found = []
    for name, value in facts.loader_settings.items():
        used = getattr(job, name)
        if used == value:
            found.append(f"{name} {value}: that of the task's DataLoader")
        else:
            found.append(f"{name} {used}, as asked; the task's DataLoader has {value}")
    return found


def _division_reason(job: Job, facts: Facts, division: Division) -> str:
    asked = [name for name in ("workers", "threads", "shards") if getattr(job, name) is not None]
    return f"{division}: " + (
        f"{', '.join(asked)} as asked, on {facts.cores} cores"
        if asked
        else f"one worker a core, on {facts.cores} cores"
    )

"""Core split: ways to divide the cores into workers and threads, and V where it is left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep.errors import JobError
from lockstep.job.job import Job

DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the plan needs to know about the task and the machine."""

    train_samples: int
    eval_samples: int
    cores: int
    loader_settings: Mapping[str, Any] = field(default_factory=dict)
    """What the task's own DataLoaders are set to: it counts where the job does not say."""
    sample_order: str = ""
    """What decides the order of the training data besides the seed; "": nothing."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """A way to divide the machine's cores."""

    workers: int
    threads: int
    shards: int
    team: int = 1
    """How many workers compute a shard together."""

    def __str__(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        teams = f" in teams of {self.team}" if self.team > 1 else ""
        return f"{workers} x {threads}{teams}, {self.shards} shard{'s' * (self.shards > 1)}"


def default_shards(batch_size: int) -> int:
    """V, into how many shards a batch is cut where the job does not say.

    It changes the numbers, so it is a function of the job alone: never of cores, hosts or time.
    As many as let the job use several workers, and as few samples each as still make good use of
    a kernel: what more shards cost is in docs/decisions/0018-default-shards.md.
    """
    shards = MOST_SHARDS
    while shards > LEAST_SHARDS and batch_size < shards * SAMPLES_PER_SHARD:
        shards //= 2
    return min(shards, batch_size)


MOST_SHARDS, LEAST_SHARDS, SAMPLES_PER_SHARD = 8, 4, 64


def shards_of(job: Job) -> int:
    """V of a job, as asked or by default.

    Raises:
        JobError: it is asked for more workers than there are shards.
    """
    batch_size = job.batch_size or DEFAULT_BATCH_SIZE
    shards = job.shards or default_shards(batch_size)
    if job.ownership == "slices":  # counted for each host, where these are known
        return shards
    for name in ("workers", "max_workers"):
        wanted = getattr(job, name)
        if wanted is not None and wanted > shards * job.team:
            most = (
                f"at most {shards * job.team}: a batch of {batch_size} is cut into {shards} shards"
            )
            raise JobError(
                f"{name} is more than there are shards: some workers would never have work",
                expected=most if job.team == 1 else f"{most}, for teams of {job.team}",
                found=f"{name} = {wanted}",
                fix=f"set shards = {wanted} (the numbers depend on it), or lower {name}",
            )
    return shards


def divisions(job: Job, facts: Facts) -> list[Division]:
    """The numbers of workers that there may be, the most first. One: nothing to choose.

    They differ in workers alone: shards and threads change the numbers, and are the job's.
    """
    shards, threads = shards_of(job), job.threads or 1
    most = max(job.team, min(facts.cores // threads, shards * job.team))
    counts = [count for count in worker_counts(most) if count >= job.team]
    if job.workers is not None:
        counts = [job.workers]
    return [
        Division(workers=count, threads=threads, shards=shards, team=job.team) for count in counts
    ]


MOST_COUNTS = 16
"""Up to so many workers all numbers are tried; above, the most, its half, its quarter, ..."""


def worker_counts(most: int) -> list[int]:
    """Numbers of workers, the most first."""
    if most <= MOST_COUNTS:
        return list(range(most, 0, -1))
    return list(dict.fromkeys([*(most >> k for k in range(most.bit_length())), 1]))

"""Core split: ways to divide the cores into workers and threads, and which is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.job.job import Job


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the plan needs to know about the task and the machine."""

    train_samples: int
    eval_samples: int
    cores: int


@dataclass(frozen=True, kw_only=True)
class Division:
    """A way to divide the machine's cores."""

    workers: int
    threads: int
    shards: int

    def __str__(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{workers} x {threads}, {self.shards} shard{'s' * (self.shards > 1)}"


def divisions(job: Job, facts: Facts) -> list[Division]:
    """The ways worth trying, the preferred one first. One: there is nothing to choose."""
    cores = facts.cores
    if job.workers is not None:
        counts = [job.workers]
    else:
        counts = [cores >> k for k in range(cores.bit_length()) if cores >> k]
        counts = list(dict.fromkeys([*counts, 1]))
    found = []
    for workers in counts:
        threads = job.threads or max(1, cores // workers)
        shards = job.shards or workers
        if shards >= workers:
            found.append(Division(workers=workers, threads=threads, shards=shards))
    return found


PREFERENCE = 1.03
"""A later division must be faster by this factor: near ties always go the same way."""


CLOSE = 1.15
"""The fastest must beat the next by this factor, or they are measured once more."""


def close(rates: Sequence[float]) -> bool:
    """Whether the two fastest are too close to be told apart by a short trial."""
    best, *others = sorted(rates, reverse=True)
    return any(best < other * CLOSE for other in others[:1])


def choose(rates: Sequence[tuple[Division, float]]) -> tuple[Division, str]:
    """Pick a division by its measured samples per second, and say why."""
    best, best_rate = rates[0]
    for division, rate in rates[1:]:
        if rate > best_rate * PREFERENCE:
            best, best_rate = division, rate
    if len(rates) == 1:
        return best, f"{best}: nothing else fits the settings"
    listed = "; ".join(f"{division}: {rate:,.0f} samples/s" for division, rate in rates)
    return best, f"{best}: fastest of those measured ({listed})"

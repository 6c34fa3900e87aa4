"""Variations: settings that change a job's numbers and may make it faster. Pure.

They are shown by `lockstep plan --tune`, and never chosen by a plan.
"""

from __future__ import annotations

from typing import Any

from lockstep.job.job import Job
from lockstep.planning.core_split import DEFAULT_BATCH_SIZE


def variations(job: Job, shards: int, cores: int) -> list[dict[str, Any]]:
    """One setting changed at a time: fewer or more shards, more threads, bf16."""
    batch_size = job.batch_size or DEFAULT_BATCH_SIZE
    asked = max(job.workers or 1, job.max_workers or 1)
    found: list[dict[str, Any]] = [
        {"shards": count}
        for count in dict.fromkeys([shards // 4, shards // 2, shards * 2])
        if asked <= count <= batch_size and count >= 1 and _fits_groups(job, count)
    ]
    threads = job.threads or 1
    found += [
        {"threads": count}
        for count in dict.fromkeys([threads * 2, cores])
        if threads < count <= cores
    ]
    if job.precision == "fp32":
        found.append({"precision": "bf16"})
    return found


def _fits_groups(job: Job, shards: int) -> bool:
    return job.groups is None or (shards % job.groups == 0)

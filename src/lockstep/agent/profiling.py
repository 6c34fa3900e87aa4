"""Profiling: a job's costs on this host, measured in a forked clone or kept from an earlier run.

A profile is kept in the user's cache under a digest of all that decides about it: the task's code,
the model's shapes, the settings that change numbers, torch, the processor, the cores, the limit of
memory. It is measured anew where a run took other times than it says.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from lockstep.agent.local_host import LocalHost
from lockstep.errors import LockstepError, ResourceError
from lockstep.job.job import SETTINGS, Job
from lockstep.planning.job_profile import JobProfile, StateMemory, shard_sizes
from lockstep.planning.plan import Plan
from lockstep.system import cgroup, machine
from lockstep.system.folders import user_cache
from lockstep.system.private_files import replace_private

FORM = 1
"""Of the files; it is a part of the digests."""
BUDGET_SECONDS = 4.0
"""When no other size of shards is begun."""
LIMIT_SECONDS = 10.0
"""For one of the two measurements; a job whose shards take longer is run as it comes."""
MOST_KEPT = 200
ALSO = ("trace", "native", "loaders", "audit")
"""Settings that change no number, and what a step takes."""


def profile_job(host: LocalHost, plan: Plan, path: Path, *, all_sizes: bool) -> JobProfile | None:
    """The profile of a job, from the cache or measured now; None where it cannot be measured.

    Args:
        host: which has loaded the task.
        plan: of a job without what is no part of a step, for the most workers that there may be.
        path: where it is kept, see `profile_path`.
        all_sizes: whether other sizes of shards than the job's own are wanted, too.

    Raises:
        ResourceError: there is not enough memory for the job's state.
    """
    kept = read_profile(path)
    if kept is not None and (len(kept.alone.shards) > 1 or not all_sizes):
        return kept
    found = _measure(host, plan, all_sizes=all_sizes)
    if found is not None:
        with contextlib.suppress(OSError):  # no cache, no harm
            _keep(path, found)
    return found


def _measure(host: LocalHost, plan: Plan, *, all_sizes: bool) -> JobProfile | None:
    sizes = shard_sizes(plan.batch_size, plan.shards, plan.train_samples, plan.local_steps)
    sizes = sizes if all_sizes else sizes[:1]
    limits = {"budget": BUDGET_SECONDS / 2, "limit": LIMIT_SECONDS}
    try:
        with host.clone() as clone:
            memory = clone.set_up(plan)
            alone = clone.measure_job(1, sizes, **limits)
            busy = alone if plan.workers == 1 else clone.measure_job(plan.workers, sizes, **limits)
            state = StateMemory.of(memory.layout, memory.slots.nbytes)
    except ResourceError:
        raise
    except LockstepError:
        return None  # the run will meet the same, and tell of it
    if alone is None or busy is None:
        return None
    return JobProfile(alone=alone, busy=busy, memory=state)


def job_digest(loaded: Mapping[str, Any], job: Job, plan: Plan) -> str:
    """A digest of what of a job decides about its profile. `loaded`: the facts about the task."""
    settings = {
        name: getattr(job, name)
        for name, setting in SETTINGS.items()
        if setting.declared.changes_numbers or name in ALSO
    }
    decides = {
        "task": [loaded["task"], loaded["code"], loaded["fitted"], loaded["parameters"]],
        "args": dict(job.args),
        "settings": settings,
        "samples": plan.train_samples,
        "shards": plan.shards,
    }
    return _digest(json.dumps(decides, sort_keys=True, default=repr))


def profile_path(job_digest: str, plan: Plan) -> Path:
    """Where the profile of a job is kept on this host."""
    decides = {
        "form": FORM,
        "versions": [version("lockstep-dlp"), version("torch")],
        "job": job_digest,
        "cores": [machine.cores(), plan.workers, plan.threads, machine.cpu_model()],
        "memory": cgroup.memory_limit(),
    }
    return user_cache() / "profiles" / f"{_digest(json.dumps(decides))}.json"


def _digest(text: str) -> str:
    return blake3(text.encode()).hexdigest()[:32]


def read_profile(path: Path) -> JobProfile | None:
    """A profile that is kept; None: there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=JobProfile)
    except (OSError, msgspec.DecodeError):
        return None


def forget_profile(path: Path) -> None:
    """Have it measured anew the next time."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _keep(path: Path, profile: JobProfile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_private(path, msgspec.json.encode(profile))
    files = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
    for old in files[:-MOST_KEPT]:
        old.unlink(missing_ok=True)

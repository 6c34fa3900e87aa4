"""Host split: how many workers each host of a job gets, and the plan over all hosts. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lockstep.errors import JobError
from lockstep.job.job import Job
from lockstep.planning.core_split import Division, Facts, shards_of
from lockstep.planning.data_partition import Holdings, Samples, divide
from lockstep.planning.ownership import check_slices, ownership_of
from lockstep.planning.plan import Plan, decompose
from lockstep.planning.shard_placement import share
from lockstep.planning.teams import most_partners


def computing(job: Job, capacities: Mapping[str, int]) -> dict[str, int]:
    """By host that computes shards, how many workers it would run: parameter servers do not."""
    ownership = ownership_of(job.ownership, job.servers, job.compression, job.local_steps)
    names = ownership.computing(list(capacities))
    return {name: count for name, count in capacities.items() if name in names}


def decompose_over_hosts(
    job: Job, facts: Facts, capacities: Mapping[str, int], samples: Mapping[str, Samples]
) -> Plan:
    """Decompose a job for several hosts: as many workers as they would run, or as asked.

    Args:
        job: the job, with its recipe's settings.
        facts: about the task, from the master's host.
        capacities: by host, how many workers it would run.
        samples: by host, how many samples it has.

    Raises:
        JobError, DataError: the settings do not fit each other, the data or the hosts.
    """
    candidates = computing(job, capacities)
    shards = shards_of(job)
    if job.ownership == "slices":
        candidates = _partners(job, candidates, shards)
        most = sum(candidates.values())
    else:
        most = min(sum(candidates.values()), shards)
    workers = job.workers or most
    division = Division(workers=workers, threads=job.threads or 1, shards=shards)
    shares = {**capacities, **share(workers, candidates)}
    listed = ", ".join(f"{name}: {count}" for name, count in shares.items())
    why = f"{division}: on {len(capacities)} hosts, {listed}"
    if job.data == "local":
        holdings = divide(samples, division.shards)
        plan = decompose(job, _of_all(facts, holdings), division, why)
        return dataclasses.replace(plan, holdings=holdings)
    plan = decompose(job, facts, division, why)
    if plan.groups and plan.groups < len(capacities):
        raise JobError(
            "there are fewer groups than hosts",
            expected=f"at least {len(capacities)} groups",
            found=f"{plan.groups}",
            fix="raise `groups`, and `shards` with it, or use fewer hosts",
        )
    return plan


def _partners(job: Job, candidates: Mapping[str, int], shards: int) -> dict[str, int]:
    """As many workers on each host, at most one for each shard: they compute shards together.

    Raises:
        JobError: there are more hosts than slices, or workers that would have no partners.
    """
    check_slices(job.slices, list(candidates))
    most = most_partners(job.slices, shards)
    each = min(most, *candidates.values())
    if job.workers:
        each, rest = divmod(job.workers, len(candidates))
        if rest or each > most:
            raise JobError(
                "with ownership: slices workers compute shards together with those of other hosts",
                expected=f"a multiple of {len(candidates)} hosts, at most {most} on each",
                found=f"workers = {job.workers}",
                fix="leave workers out, or set such a number",
            )
    return dict.fromkeys(candidates, each)


def _of_all(facts: Facts, holdings: Holdings) -> Facts:
    """The facts about the data of all hosts together."""
    train, held_out = (
        sum(getattr(each, name) for each in holdings) for name in ("train", "held_out")
    )
    return dataclasses.replace(facts, train_samples=train, eval_samples=held_out)

"""Host planner: which of the hosts that there are take part in a job, and with how many workers.

What a shard takes is measured on each of them, and what the links move; the rest is predicted.
Nothing is timed with several hosts before a run: to start one on them takes seconds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from lockstep.agent.profiling import job_digest, profile_job, profile_path
from lockstep.api.core_trials import quick_plan
from lockstep.api.planner import Decision, describe, work_of
from lockstep.coordinator.open_hosts import OpenHosts
from lockstep.job.job import Job
from lockstep.planning.candidates import Host, candidates
from lockstep.planning.core_split import Division, Facts, shards_of
from lockstep.planning.host_split import decompose_over_hosts
from lockstep.planning.plan import Plan
from lockstep.planning.ranking import Ranked, check_fits, rank
from lockstep.planning.step_prediction import predict
from lockstep.system import machine


def decide_hosts(
    hosts: OpenHosts,
    facts: Facts,
    *,
    all_sizes: bool = False,
    explain: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Decision:
    """Stage 1 over several hosts.

    Args:
        hosts: which have loaded the task.
        facts: about the task, from the master's host.
        all_sizes: whether profiles are wanted for other sizes of shards, too.
        explain: whether all candidates are wanted, though all hosts take part in any case.
        say: told what is being done.

    Raises:
        JobError, DataError: the settings do not fit each other, the data or the hosts.
        ResourceError: the job fits no choice of hosts.
        LockstepError: a host does not answer.
    """
    job, begun = hosts.job, time.monotonic()
    plan = decompose_over_hosts(job, facts, hosts.capacities, hosts.samples)
    if not _may_choose(job) or not (explain or job.hosts == "planned"):
        return Decision(plan=plan)
    say("measuring what a shard takes on each host, and what the links move")
    measured = _measured(hosts, facts, all_sizes=all_sizes)
    if measured is None:
        return Decision(plan=plan)
    work = work_of(plan)
    found = candidates(measured, plan.shards, job.workers)
    predictions = rank([predict(each, measured, work) for each in found])
    everywhere = [each for each in predictions if len(each.candidate.workers) == len(measured)]
    considered = predictions if job.hosts == "planned" or not everywhere else everywhere
    check_fits(considered)
    ranked = [Ranked(prediction=each) for each in predictions]
    chosen = next(each for each in ranked if each.prediction is considered[0])
    return Decision(
        plan=_plan_of(chosen, ranked, hosts, facts),
        ranked=tuple(ranked),
        chosen=chosen,
        planning_seconds=time.monotonic() - begun,
    )


def leave_out(decision: Decision, hosts: OpenHosts) -> None:
    """Let the hosts go that a decision does without."""
    if decision.chosen is not None:
        for name in list(hosts.capacities):
            if name not in decision.chosen.prediction.candidate.workers:
                hosts.leave_out(name)


def _may_choose(job: Job) -> bool:
    """Whether a host may be left out: not where it has data, or a role, of its own."""
    return job.data != "local" and job.ownership not in ("servers", "slices")


def _measured(hosts: OpenHosts, facts: Facts, *, all_sizes: bool) -> list[Host] | None:
    """The hosts with what the job costs on each; None where that cannot be measured."""
    job, own = hosts.job, hosts.host.name
    shards, threads = shards_of(job), job.threads or 1
    job = job.replace(workers=None, hosts="all")
    plans = {
        name: quick_plan(
            job, facts, Division(workers=min(count, shards), threads=threads, shards=shards)
        )
        for name, count in hosts.capacities.items()
    }
    digest = job_digest(hosts.host.facts, job, plans[own])
    others = {name: plan for name, plan in plans.items() if name != own}
    found = hosts.measure(others, digest, all_sizes=all_sizes)
    memory = machine.available_bytes()
    path = profile_path(digest, plans[own])
    profile = profile_job(hosts.host, plans[own], path, all_sizes=all_sizes)
    profiles = {own: profile, **{name: each.profile for name, (each, _) in found.items()}}
    made = []
    for name, count in hosts.capacities.items():
        profile = profiles[name]
        if profile is None:
            return None
        made.append(
            Host(
                name=name,
                most_workers=count,
                memory=memory if name == own else found[name][0].memory,
                profile=profile,
                link=None if name == own else found[name][1],
            )
        )
    return made


def _plan_of(chosen: Ranked, ranked: list[Ranked], hosts: OpenHosts, facts: Facts) -> Plan:
    """The plan for the hosts of a candidate, with the reason for it."""
    counts = chosen.prediction.candidate.workers
    capacities = {name: count for name, count in hosts.capacities.items() if name in counts}
    samples = {name: count for name, count in hosts.samples.items() if name in counts}
    job = hosts.job.replace(workers=chosen.prediction.candidate.total)
    plan = decompose_over_hosts(job, facts, capacities, samples)
    listed = "; ".join(f"{each.prediction.candidate}: {describe(each)}" for each in ranked[:4])
    why = f"of {len(ranked)} choices of hosts and workers: {listed}"
    return dataclasses.replace(plan, reasons=(*plan.reasons, why))

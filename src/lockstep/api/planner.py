"""Planner: predicts what a step takes for every way to run a job, measures the best, and chooses.

Only what changes no bit is chosen: the number of workers. The decisions are pure (`planning`); here
is what has to be measured for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lockstep.agent.local_host import LocalHost
from lockstep.agent.profiling import (
    forget_profile,
    job_digest,
    profile_job,
    profile_path,
    read_profile,
)
from lockstep.api.core_trials import quick_plan, time_step
from lockstep.job.job import Job
from lockstep.planning.candidates import Host, candidates
from lockstep.planning.core_split import Division, Facts, divisions
from lockstep.planning.job_profile import JobProfile
from lockstep.planning.plan import Plan, decompose
from lockstep.planning.ranking import Ranked, check_fits, choose, close, rank
from lockstep.planning.step_prediction import Prediction, Work, predict
from lockstep.system import machine

MEASURED = 2
"""So many of the best are timed."""
MOST_ROUNDS = 3
"""How often, where they are close."""
TRIALS_SECONDS = 4.0
"""When no more trials are begun."""
TRIAL_STEPS = 8
"""About so many steps a trial has at least."""
LEAVES = 0.25
"""A profile that is wrong by more than this part is measured anew the next time."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A plan, and how it was chosen."""

    plan: Plan
    ranked: tuple[Ranked, ...] = ()
    """All that were considered, the best first; none where nothing was predicted."""
    chosen: Ranked | None = None
    planning_seconds: float = 0.0

    def event(self) -> dict[str, Any]:
        """The fields of the event `plan`; empty where nothing was predicted."""
        if self.chosen is None:
            return {}
        prediction = self.chosen.prediction
        return {
            "chosen": str(prediction.candidate),
            "workers": prediction.candidate.total,
            "considered": len(self.ranked),
            "predicted": _rounded(prediction.seconds),
            "parts": {name: _rounded(value) for name, value in vars(prediction.parts).items()},
            "measured": None if self.chosen.measured is None else _rounded(self.chosen.measured),
            "memory": dict(prediction.memory),
            "planning": round(self.planning_seconds, 3),
        }


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def decide_alone(
    job: Job,
    facts: Facts,
    host: LocalHost,
    *,
    measure: int = MEASURED,
    all_sizes: bool = False,
    force: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Decision:
    """Stage 1 on this host alone.

    Args:
        job: with the recipe's settings.
        facts: about the task and the machine.
        host: which has loaded the task.
        measure: how many of the best are timed.
        all_sizes: whether the profile is wanted for other sizes of shards, too.
        force: whether it is measured though there is nothing to choose.
        say: told what is being done.

    Raises:
        JobError, DataError: the settings do not fit each other or the data.
        ResourceError: the job does not fit this machine.
    """
    begun = time.monotonic()
    found = divisions(job, facts)
    most = found[0]
    decided = decompose(job, facts, most)  # what is wrong with the job shows first
    quick = quick_plan(job, facts, most)
    path = profile_path(job_digest(host.facts, job, quick), quick)
    if len(found) == 1 and not (all_sizes or force):
        profile = read_profile(path)
    else:
        say("measuring what a shard takes")
        profile = profile_job(host, quick, path, all_sizes=all_sizes)
    if profile is None:
        return Decision(plan=decided)
    predictions = predictions_alone(job, decided, host.name, found, profile)
    check_fits(predictions)
    ranked = [Ranked(prediction=each) for each in predictions]
    if len(found) > 1 and measure:
        ranked = _measured(ranked, measure, job, facts, most, host, say)
    chosen = choose(ranked)
    if chosen.error is not None and abs(chosen.error) > LEAVES:
        forget_profile(path)
    if len(found) == 1:
        plan = replace(decided, reasons=(*decided.reasons, describe(chosen)))
    else:
        plan = decompose(job, facts, division_of(chosen, most), reason(chosen, ranked, most))
    return Decision(
        plan=plan,
        ranked=tuple(sorted(ranked, key=lambda each: each is not chosen)),
        chosen=chosen,
        planning_seconds=time.monotonic() - begun,
    )


def predictions_alone(
    job: Job, plan: Plan, name: str, found: list[Division], profile: JobProfile
) -> list[Prediction]:
    """What a step takes with each number of workers on one host, the best first."""
    host = Host(
        name=name,
        most_workers=found[0].workers,
        memory=machine.available_bytes(),
        profile=profile,
    )
    work, team = work_of(plan), plan.team
    possible = candidates([host], plan.shards, job.workers, team=team)
    return rank([predict(each, [host], work) for each in possible])


def work_of(plan: Plan) -> Work:
    """What of a plan its steps' time depends on."""
    return Work(
        shards=plan.shards,
        samples=plan.batch_size / plan.shards,
        groups=plan.groups,
        compression=plan.compression,
        team=plan.team,
    )


def division_of(ranked: Ranked, like: Division) -> Division:
    """The division of the cores of a candidate on one host."""
    return replace(like, workers=ranked.prediction.candidate.total)


def reason(chosen: Ranked, ranked: list[Ranked], like: Division) -> str:
    """Why a candidate was chosen, in words."""
    division = division_of(chosen, like)
    listed = "; ".join(f"{each.prediction.candidate}: {describe(each)}" for each in ranked[:4])
    more = f"; and {len(ranked) - 4} more" if len(ranked) > 4 else ""
    return f"{division}: fastest of {len(ranked)} ({listed}{more})"


def describe(ranked: Ranked) -> str:
    """What a step takes, in words."""
    if not ranked.prediction.fits:
        return ranked.prediction.reason
    text = f"{ranked.prediction.seconds * 1e3:.3g} ms a step predicted"
    if ranked.measured is not None:
        text += f", {ranked.measured * 1e3:.3g} ms measured"
    return text


def _measured(
    ranked: list[Ranked],
    measure: int,
    job: Job,
    facts: Facts,
    most: Division,
    host: LocalHost,
    say: Callable[[str], object],
) -> list[Ranked]:
    """The same, with the best of them timed: in turn, and again where they are close. The best time
    counts: what disturbs a trial can only slow it. Long steps are not timed: their parts were."""
    begun = time.monotonic()
    for _ in range(MOST_ROUNDS):
        for index, each in enumerate(ranked[:measure]):
            if not each.prediction.fits or each.prediction.seconds * TRIAL_STEPS > TRIALS_SECONDS:
                continue
            say(f"timing {each.prediction.candidate}")
            seconds = time_step(job, facts, division_of(each, most), host)
            if seconds is not None:
                best = seconds if each.measured is None else min(each.measured, seconds)
                ranked[index] = replace(each, measured=best)
        if not close(ranked) or time.monotonic() - begun > TRIALS_SECONDS:
            break
    return ranked

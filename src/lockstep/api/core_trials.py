"""Core trials: candidate core splits timed, each in a forked clone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from lockstep.agent.local_host import LocalHost
from lockstep.agent.observer import NullObserver
from lockstep.coordinator.coordinator import Coordinator
from lockstep.coordinator.open_hosts import ready_alone
from lockstep.coordinator.stop_schedule import StopSchedule
from lockstep.job.job import Job
from lockstep.planning.core_split import Division, Facts, choose, close
from lockstep.planning.plan import Plan, decompose


def decompose_by_trial(
    job: Job, facts: Facts, candidates: Sequence[Division], host: LocalHost
) -> Plan:
    """Stage 1. Candidates for the division of the cores are timed, each in a clone."""
    if len(candidates) == 1:
        return decompose(job, facts, candidates[0])
    rates = dict.fromkeys(candidates, 0.0)
    begun = time.monotonic()
    for trial in range(MOST_TRIALS):
        for division in candidates:
            rates[division] = max(rates[division], _measure(job, facts, division, host))
        if trial + 1 >= TRIALS and not close(list(rates.values())):
            break
        if time.monotonic() - begun > TRIALS_SECONDS:
            break  # long steps: their times vary less
    best, why = choose(list(rates.items()))
    plan = decompose(job, facts, best, why)
    if not rates[best]:
        return plan  # too few steps for a measurement
    return dataclasses.replace(
        plan, predicted_rate=round(rates[best], 2), predicted_by="a trial of some steps"
    )


TRIALS, MOST_TRIALS = 2, 4
"""Of each candidate, in turn; more where it is close. The best one counts: what disturbs a trial
can only slow it."""


TRIAL_SECONDS, WARM_UP_SECONDS = 0.4, 0.15


TRIALS_SECONDS = 5.0
"""When no more trials are begun."""


def _measure(job: Job, facts: Facts, division: Division, host: LocalHost) -> float:
    """Samples per second of a division, in a moment of training that is thrown away."""
    alone = job.replace(
        evaluate=False, purity=0.0, compile=False,
        monitor=None, monitor_mode="min", stop_patience=None, stop_min_delta=0.0,
    )  # fmt: skip
    trial = decompose(alone, facts, division)
    schedule = StopSchedule(
        steps=trial.steps,
        steps_per_epoch=trial.steps_per_epoch,
        seconds=TRIAL_SECONDS,
        ahead_seconds=0.1,
    )
    with host.clone() as clone:
        coordinator = Coordinator(
            ready_alone(clone, trial), schedule, NullObserver(), warm_up=WARM_UP_SECONDS
        )
        coordinator.run()
        return coordinator.throughput

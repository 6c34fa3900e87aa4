"""Core trials: what a step takes with a number of workers, timed in a forked clone."""

from __future__ import annotations

from lockstep.agent.local_host import LocalHost
from lockstep.agent.observer import NullObserver
from lockstep.coordinator.coordinator import Coordinator
from lockstep.coordinator.open_hosts import ready_alone
from lockstep.coordinator.stop_schedule import StopSchedule
from lockstep.job.job import Job
from lockstep.planning.core_split import Division, Facts
from lockstep.planning.plan import Plan, decompose

TRIAL_SECONDS, WARM_UP_SECONDS = 0.4, 0.15


def quick_plan(job: Job, facts: Facts, division: Division) -> Plan:
    """A plan without what is no part of a step, and without what takes long to begin."""
    quick = job.replace(
        evaluate=False, purity=0.0, compile=False, faults=(),
        monitor=None, monitor_mode="min", stop_patience=None, stop_min_delta=0.0,
    )  # fmt: skip
    return decompose(quick, facts, division)


def time_step(job: Job, facts: Facts, division: Division, host: LocalHost) -> float | None:
    """The seconds of a step, in a moment of training that is thrown away; None: the job is too
    short to say."""
    trial = quick_plan(job, facts, division)
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
        rate = coordinator.throughput
    return trial.batch_size / rate if rate > 0 else None

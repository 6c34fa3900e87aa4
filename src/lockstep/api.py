"""The front door: `run`, `plan` and `verify`. A run reads top to bottom as its five stages."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from lockstep import numerics
from lockstep.coordinator import Coordinator, Schedule
from lockstep.errors import RunFolderError
from lockstep.host import Host
from lockstep.job import SETTINGS, Job, Task
from lockstep.planning import Division, Facts, Plan, choose, decompose, divisions
from lockstep.recorder import Recorder
from lockstep.report import write_report
from lockstep.result import Result
from lockstep.runfolder import RunFolder
from lockstep.sink import NullSink
from lockstep.source import Source, source_of

Taskish = Task | str | Job


def run(
    task: Taskish, *, args: Mapping[str, Any] | None = None, quiet: bool = False, **settings: Any
) -> Result:
    """Train a task in lockstep and return its result.

    Args:
        task: a `Task`, the name of one (a recipe, `module:Task`, `file.py:Task`), or a `Job`.
        args: arguments for a named task or recipe.
        quiet: show no progress on stderr.
        settings: the fields of `Job`; they take precedence over a job's own and a recipe's.

    Raises:
        LockstepError: see `lockstep.errors`; no process, file descriptor or shared memory is left.
    """
    begun = time.time()
    job, explicit = _to_job(task, args, settings)
    source = source_of(job)
    _check_free(job.out)
    with Host.start(source, explicit) as host:
        job, facts = _complete(job, explicit, host)
        plan = _decompose(job, facts, host)
        folder = RunFolder.create(job.out, source.label)
        profile = host.set_up(plan)
        manifest = _manifest(source, job, plan, profile, host)
        folder.write_manifest(manifest)
        with Recorder(folder, host, plan, quiet=quiet) as recorder:
            recorder.begin(manifest["digest"])
            coordinator = Coordinator(host, plan, _schedule(job, plan), recorder)
            coordinator.run()
            result = recorder.finish(coordinator.step, coordinator.clock.rate, begun, source)
    write_report(folder.path)
    return result


def plan(task: Taskish, *, args: Mapping[str, Any] | None = None, **settings: Any) -> Plan:
    """What `run` would do with the same arguments, and why. Trains nothing.

    Where the division of the cores is open, the candidates are timed for a moment.
    """
    job, explicit = _to_job(task, args, settings)
    with Host.start(source_of(job), explicit) as host:
        job, facts = _complete(job, explicit, host)
        return _decompose(job, facts, host)


def _to_job(
    task: Taskish, args: Mapping[str, Any] | None, settings: dict[str, Any]
) -> tuple[Job, dict[str, Any]]:
    """The job as far as it is known before the task is loaded, and its explicit settings."""
    job = task if isinstance(task, Job) else Job(task=task, args=dict(args or {}))
    job = job.replace(**settings)
    default = Job(task="")
    explicit = {
        name: getattr(job, name)
        for name in SETTINGS
        if name in settings or getattr(job, name) != getattr(default, name)
    }
    return job, explicit


def _complete(job: Job, explicit: dict[str, Any], host: Host) -> tuple[Job, Facts]:
    """The job with its recipe's settings where it has none of its own, and the facts."""
    loaded = host.loaded()
    settings = {**loaded["settings"], **explicit}
    if "steps" in explicit and "data_epochs" not in explicit:
        settings.pop("data_epochs", None)
    names = {field.name for field in dataclasses.fields(Facts)}
    facts = {name: value for name, value in loaded.items() if name in names}
    return job.replace(**settings), Facts(cores=numerics.cores(), **facts)


def _decompose(job: Job, facts: Facts, host: Host) -> Plan:
    """Stage 1. Candidates for the division of the cores are timed, each in a clone."""
    candidates = divisions(job, facts)
    if len(candidates) == 1:
        return decompose(job, facts, candidates[0])
    rates = [(division, _measure(job, facts, division, host)) for division in candidates]
    best, why = choose(rates)
    return decompose(job, facts, best, why)


TRIAL_SECONDS = 0.9
WARM_UP_SECONDS = 0.3


def _measure(job: Job, facts: Facts, division: Division, host: Host) -> float:
    """Samples per second of a division, in a moment of training that is thrown away."""
    trial = decompose(job.replace(evaluate=False), facts, division)
    schedule = Schedule(
        steps=trial.steps,
        steps_per_epoch=trial.steps_per_epoch,
        seconds=TRIAL_SECONDS,
        ahead_seconds=0.1,
    )
    with host.clone() as clone:
        clone.set_up(trial)
        coordinator = Coordinator(clone, trial, schedule, NullSink(), warm_up=WARM_UP_SECONDS)
        coordinator.run()
        return coordinator.clock.rate


def _schedule(job: Job, plan: Plan) -> Schedule:
    return Schedule(
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        evaluate=plan.eval_samples > 0,
        checkpoint_steps=job.checkpoint_steps,
        checkpoint_seconds=job.checkpoint_seconds,
    )


def _check_free(out: str | None) -> None:
    if out is not None and Path(out).exists():
        raise RunFolderError(
            f"the run folder {out} exists",
            expected="a path where nothing is yet",
            fix="choose another",
        )


IDENTITY = (
    "shards", "threads", "steps", "batch_size", "eval_batch_size", "train_samples", "eval_samples",
    "seed", "clip_grad_norm", "precision", "numerics",
)  # fmt: skip
"""What the plan decides that the numbers depend on."""


def _manifest(
    source: Source, job: Job, plan: Plan, profile: dict[str, Any], host: Host
) -> dict[str, Any]:
    settings = {name: getattr(job, name) for name in SETTINGS}
    message = plan.to_message()
    identity = {
        "task": source.name.rpartition(":")[2] or source.name,
        "args": dict(source.args),
        "code": host.facts["code"],
        **{name: message[name] for name in IDENTITY},
    }
    return {
        "format": 1,
        "name": source.label,
        "source": {
            "name": source.name, "args": dict(source.args), "importable": source.payload is None
        },
        "job": settings,
        "plan": message,
        "profile": profile,
        "probe": host.facts["probe"],
        "code": host.facts["code"],
        "identity": identity,
        "digest": blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        "versions": {"python": platform.python_version(), "torch": profile["torch"]},
    }  # fmt: skip

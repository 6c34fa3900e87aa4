"""The front door: `run`, `start`, `resume` and `plan`. A run reads as its five stages."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lockstep.agent.local_host import LocalHost
from lockstep.api.core_trials import decompose_by_trial
from lockstep.coordinator.coordinator import Coordinator
from lockstep.coordinator.host_group import HostGroup
from lockstep.coordinator.launcher import Launcher
from lockstep.coordinator.open_job import open_hosts, spread
from lockstep.coordinator.run_control import RunControl
from lockstep.coordinator.stop_schedule import StopSchedule
from lockstep.errors import DataLostError, JobError, LockstepError, StoppedError
from lockstep.job.job import SETTINGS, Job
from lockstep.job.task import Task
from lockstep.job.task_source import TaskSource, source_of
from lockstep.planning.core_split import Facts
from lockstep.planning.data_partition import check_same, check_together
from lockstep.planning.plan import Plan
from lockstep.results.checkpoint import list_checkpoints
from lockstep.results.manifest import check_resumed, make_manifest, recorded_source
from lockstep.results.recorder import Recorder
from lockstep.results.report import write_report
from lockstep.results.restart import Restart, find_restart
from lockstep.results.result import Result
from lockstep.results.run_folder import RunFolder
from lockstep.system import machine

Taskish = Task | str | Job


def run(
    task: Taskish,
    *,
    args: Mapping[str, Any] | None = None,
    quiet: bool = False,
    control: RunControl | None = None,
    on: Launcher | None = None,
    **settings: Any,
) -> Result:
    """Train a task in lockstep and return its result.

    Args:
        task: a `Task`, the name of one (a recipe, `module:Task`, `file.py:Task`), or a `Job`.
        args: arguments for a named task or recipe.
        quiet: show no progress on stderr.
        desk: where requests to the running job are left; see `start`.
        on: what brings agents to other hosts; None: this host alone.
        settings: the fields of `Job`; they take precedence over a job's own and a recipe's.

    Raises:
        StoppedError: SIGINT, SIGTERM or a request stopped the run; `resume` goes on with it.
        LockstepError: see `lockstep.errors`; no process, file descriptor or shared memory is left.
    """
    begun = time.time()
    job, explicit = _to_job(task, args, settings)
    source = source_of(job)
    RunFolder.check_free(job.out)
    with LocalHost.start(source, explicit, networked=on is not None) as host, ExitStack() as others:
        job, facts = _complete(job, explicit, host)
        check_together(job.data, alone=on is None)
        hosts = others.enter_context(open_hosts(on, source, job, explicit, host)) if on else None
        plan = decompose_by_trial(job, facts, host) if hosts is None else spread(job, facts, hosts)
        profile = host.set_up(plan) if hosts is None else hosts.set_up(plan, host)
        with RunFolder.create(job.out, source.label) as folder:
            manifest = make_manifest(source, job, plan, profile, host.facts)
            folder.write_manifest(manifest)
            start = Restart(step=0, ledger=None)
            return _train(
                host, hosts, job, plan, folder, source, start, begun, quiet, control or RunControl()
            )


def resume(
    run: str | Path,
    *,
    workers: int | None = None,
    task: Task | None = None,
    quiet: bool = False,
    control: RunControl | None = None,
    on: Launcher | None = None,
) -> Result:
    """Go on with a run from its newest good checkpoint, to the same result.

    Args:
        run: the run folder.
        workers: how many workers go on; default: as many as before.
        task: the task, where the run was given an object and not a name.
        on: what brings agents to other hosts; None: this host alone goes on.

    Raises:
        RunFolderError: the run has finished, or another master is at it.
        LockstepError: as for `run`.
    """
    begun = time.time()
    with RunFolder.open(run) as folder:
        manifest = folder.read_manifest()
        folder.check_unfinished()
        source = recorded_source(manifest, task, folder.path)
        job = Job(task="", **manifest["job"])
        check_together(job.data, alone=on is None)
        plan = Plan.from_message(manifest["plan"]).with_workers(workers)
        settings = manifest["job"]
        with (
            LocalHost.start(source, settings, networked=on is not None) as host,
            ExitStack() as others,
        ):
            check_resumed(run, manifest, host.loaded())
            hosts = (
                others.enter_context(open_hosts(on, source, job, settings, host)) if on else None
            )
            if hosts is None:
                host.set_up(plan)
            else:
                check_same(plan.holdings, hosts.rendezvous.samples)
                plan = plan.with_workers(workers or min(hosts.capacity, plan.shards))
                hosts.set_up(plan, host)
            start = find_restart(folder, host)
            return _train(
                host, hosts, job, plan, folder, source, start, begun, quiet, control or RunControl()
            )


def plan(task: Taskish, *, args: Mapping[str, Any] | None = None, **settings: Any) -> Plan:
    """What `run` would do with the same arguments, and why. Trains nothing.

    Where the division of the cores is open, the candidates are timed for a moment.
    """
    job, explicit = _to_job(task, args, settings)
    with LocalHost.start(source_of(job), explicit) as host:
        job, facts = _complete(job, explicit, host)
        return decompose_by_trial(job, facts, host)


def _train(
    host: LocalHost,
    hosts: HostGroup | None,
    job: Job,
    plan: Plan,
    folder: RunFolder,
    source: TaskSource,
    start: Restart,
    begun: float,
    quiet: bool,
    control: RunControl,
) -> Result:
    """Stages 3 to 5, on a host that is set up: compute, synchronise, aggregate."""
    schedule = StopSchedule(
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        evaluate=plan.eval_samples > 0,
        checkpoint_steps=job.checkpoint_steps,
        checkpoint_seconds=job.checkpoint_seconds,
    )
    try:
        with (
            control,
            Recorder(folder, host, plan, job.keep_checkpoints, start, quiet=quiet) as recorder,
        ):
            control.take_signals()
            control.open(folder.path)
            coordinator = Coordinator(
                host,
                plan if hosts is None else hosts.own_plan,
                schedule,
                recorder,
                start.step,
                requests=control.take,
                hosts=hosts,
            )
            try:
                coordinator.run()
            except StoppedError as error:
                raise StoppedError(error.what, fix=f"lockstep resume {folder.path}") from None
            result = recorder.finish(coordinator.step, coordinator.clock.rate, begun, source)
    except DataLostError as error:  # by now every checkpoint is written
        raise _with_checkpoint(error, folder) from None
    try:
        write_report(folder.path)
    except (LockstepError, OSError) as error:
        recorder.display.note(f"report.html could not be written: {error}")
    return result


def _with_checkpoint(error: DataLostError, folder: RunFolder) -> DataLostError:
    """The error, with where the run goes on when the host is there again."""
    newest = next((path.name for path in list_checkpoints(folder.checkpoints)), "")
    since = f"from checkpoint {newest}" if newest else "from the beginning: there is no checkpoint"
    fix = f"start it again, then: lockstep resume {folder.path} --on ...; it goes on {since}"
    return DataLostError(error.what, expected=error.expected, found=error.found, fix=fix)


def _to_job(
    task: Taskish, args: Mapping[str, Any] | None, settings: dict[str, Any]
) -> tuple[Job, dict[str, Any]]:
    """The job as far as it is known before the task is loaded, and its explicit settings."""
    job = task if isinstance(task, Job) else Job(task=task, args=dict(args or {}))
    job = job.replace(**settings)
    if job.cluster is not None:
        raise JobError(
            "the job describes a cluster, whose processes are started one by one",
            expected="a job without `cluster`",
            found=f"cluster = {dict(job.cluster)}",
            fix="on each host: lockstep rank --task worker:0 JOB; or leave `cluster` out",
        )
    default = Job(task="")
    explicit = {
        name: getattr(job, name)
        for name in SETTINGS
        if name in settings or getattr(job, name) != getattr(default, name)
    }
    return job, explicit


def _complete(job: Job, explicit: dict[str, Any], host: LocalHost) -> tuple[Job, Facts]:
    """The job with its recipe's settings where it has none of its own, and the facts."""
    loaded = host.loaded()
    settings = {**loaded["settings"], **explicit}
    if "steps" in explicit and "data_epochs" not in explicit:
        settings.pop("data_epochs", None)
    if "data_epochs" in explicit and "steps" not in explicit:
        settings.pop("steps", None)
    names = {field.name for field in dataclasses.fields(Facts)}
    facts = {name: value for name, value in loaded.items() if name in names}
    return job.replace(**settings), Facts(cores=machine.cores(), **facts)

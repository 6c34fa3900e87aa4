"""Training: `run`, `resume` and `plan`. A run reads as its five stages."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.api.host_planner import decide_hosts, leave_out
from lockstep.api.planner import MEASURED, Decision, decide_alone
from lockstep.api.tuning import Tried, try_settings
from lockstep.coordinator.coordinator import Coordinator
from lockstep.coordinator.launcher import Launcher
from lockstep.coordinator.open_hosts import OpenHosts, ReadyHosts, open_hosts
from lockstep.coordinator.run_control import RunControl
from lockstep.coordinator.stop_schedule import StopSchedule
from lockstep.errors import DataLostError, LockstepError, StoppedError, TaskError
from lockstep.job.job import Job
from lockstep.job.run_request import RunRequest, Taskish
from lockstep.job.task import Task
from lockstep.planning.core_split import Facts
from lockstep.planning.host_split import computing
from lockstep.planning.plan import Plan
from lockstep.results.callbacks import Callback, check_callbacks
from lockstep.results.checkpoint import list_checkpoints
from lockstep.results.loggers import check_loggers, make_loggers
from lockstep.results.manifest import check_resumed, make_manifest, recorded_source
from lockstep.results.progress import announce
from lockstep.results.recorder import Recorder
from lockstep.results.report import write_report
from lockstep.results.restart import Restart, find_restart
from lockstep.results.result import Result
from lockstep.results.run_folder import RunFolder
from lockstep.system import machine


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A plan, with all that was considered, and other settings that were tried, the best first."""

    decision: Decision
    tried: tuple[Tried, ...] = ()


def run(
    task: Taskish,
    *,
    args: Mapping[str, Any] | None = None,
    on: Launcher | None = None,
    control: RunControl | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    **settings: Any,
) -> Result:
    """Train a task in lockstep and return its result.

    Args:
        task: a `Task`, the name of one (a recipe, `module:Task`, `file.py:Task`), or a `Job`.
        args: arguments for a named task or recipe.
        on: what brings agents to other hosts; None: this host alone.
        control: where requests to the running job are left; see `start`.
        callbacks: observers of the run, see `Callback`.
        quiet: show no progress on stderr.
        settings: the fields of `Job`; they take precedence over a job's own and a recipe's.

    Raises:
        StoppedError: a request stopped the run; `resume` goes on with it.
        RunInterrupted: a signal did, such as Ctrl-C; it is a `KeyboardInterrupt`.
        LockstepError: see `lockstep.errors`; no process, file descriptor or shared memory is left.
    """
    begun = time.time()
    check_callbacks(callbacks)
    request = RunRequest.of(task, args, settings)
    check_loggers(request.job.log)
    RunFolder.check_free(request.job.out)
    announce(f"loading torch and {request.source.label}", quiet=quiet)
    with open_hosts(request, on) as hosts:
        check_loggers(hosts.job.log)  # a recipe may name some, too
        decision = _decompose(hosts, quiet=quiet)  # 1 decompose
        plan = decision.plan
        if hosts.networked:
            leave_out(decision, hosts)
        if plan.compile:
            announce("compiling the loss and its gradient", quiet=quiet)
        announce(f"starting {plan.division}", quiet=quiet)
        ready = hosts.initialise(plan)  # 2 initialise
        _check(ready, plan)
        with RunFolder.create(hosts.job.out, hosts.job.run_name or request.source.label) as folder:
            folder.write_manifest(
                make_manifest(
                    request.source,
                    hosts.job,
                    plan.with_cuts(ready.memory.cuts),
                    ready.memory.profile,
                    hosts.host.facts,
                )
            )
            with _training(
                hosts.job,
                plan,
                ready,
                folder,
                Restart(step=0, ledger=None),
                control,
                callbacks,
                quiet,
            ) as (coordinator, recorder):
                if decision.chosen is not None:
                    recorder.event("plan", **decision.event())
                coordinator.run()  # 3 compute, 4 synchronise
                return recorder.finish(  # 5 aggregate
                    coordinator.step, coordinator.throughput, begun, request.source
                )


def resume(
    run: str | Path,
    *,
    workers: int | None = None,
    device: str | None = None,
    team: int | None = None,
    task: Task | None = None,
    on: Launcher | None = None,
    control: RunControl | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
    trust: bool = False,
) -> Result:
    """Go on with a run from its newest good checkpoint, to the same result.

    Args:
        run: the run folder.
        workers: how many workers go on; default: as many as before.
        device: where they compute, if not where they did; only where that gives the same numbers.
        team: how many of them compute a shard together; default: as before.
        task: the task, where the run was given an object and not a name.
        trust: whether the code that the run folder names may be run though somebody else has made
            the folder.
        on: what brings agents to other hosts; None: this host alone goes on.
        control: where requests to the running job are left; see `start`.
        callbacks: observers of the run, see `Callback`.
        quiet: show no progress on stderr.

    Raises:
        RunFolderError: the run has finished, or another master is at it.
        LockstepError: as for `run`.
    """
    begun = time.time()
    check_callbacks(callbacks)
    with RunFolder.open(run) as folder:
        manifest = folder.read_manifest()
        folder.check_unfinished()
        source = recorded_source(manifest, task, folder.path, trust=trust)
        announce(f"loading torch and {source.label}", quiet=quiet)
        settings = manifest["job"] | ({"device": device} if device is not None else {})
        if team is not None:
            settings |= {"team": team, "workers": None, "max_workers": None}
        with open_hosts(RunRequest.recorded(source, settings), on) as hosts:
            check_loggers(hosts.job.log)
            check_resumed(run, manifest, hosts.host.facts)
            recorded = Plan.from_message(manifest["plan"]).with_device(device)
            plan = _resized(recorded, workers, team, hosts)
            ready = hosts.initialise(plan)
            _check(ready, plan)
            start = find_restart(folder, ready.memory, hosts.host.facts)
            with _training(hosts.job, plan, ready, folder, start, control, callbacks, quiet) as (
                coordinator,
                recorder,
            ):
                coordinator.run()
                return recorder.finish(coordinator.step, coordinator.throughput, begun, source)


def plan(
    task: Taskish,
    *,
    args: Mapping[str, Any] | None = None,
    quiet: bool = True,
    **settings: Any,
) -> Plan:
    """What `run` would do with the same arguments, and why. Trains nothing.

    Where the number of workers is open, what a step takes is predicted for each, and the best two
    are timed for a moment. `quiet`: do not say so on stderr.
    """
    return explain(task, args=args, quiet=quiet, **settings).decision.plan


def explain(
    task: Taskish,
    *,
    args: Mapping[str, Any] | None = None,
    on: Launcher | None = None,
    measure: int = MEASURED,
    tune: bool = False,
    quiet: bool = True,
    **settings: Any,
) -> Explanation:
    """The plan with all that was considered: what `lockstep plan` shows.

    Args:
        on: what brings agents to other hosts; None: this host alone.
        measure: how many of the best are timed, on this host alone.
        tune: whether settings that change the numbers are tried, too, on this host alone.
    """
    request = RunRequest.of(task, args, settings)
    announce(f"loading torch and {request.source.label}", quiet=quiet)
    with open_hosts(request, on) as hosts:
        decision = _decompose(hosts, quiet=quiet, measure=measure, all_sizes=True)
        tried: list[Tried] = []
        if tune and decision.chosen is not None and not hosts.networked:
            tried = try_settings(
                hosts.job, _facts(hosts), hosts.host, decision.chosen,
                say=lambda what: announce(what, quiet=quiet),
            )  # fmt: skip
        if decision.plan.slices > 1:
            cuts = hosts.initialise(decision.plan).memory.cuts
            decision = dataclasses.replace(decision, plan=decision.plan.with_cuts(cuts))
    return Explanation(decision=decision, tried=tuple(tried))


def _decompose(
    hosts: OpenHosts, *, quiet: bool, measure: int = MEASURED, all_sizes: bool = False
) -> Decision:
    """Stage 1, over the hosts that there are."""
    facts = _facts(hosts)

    def say(what: str) -> None:
        announce(what, quiet=quiet)

    if hosts.networked:
        return decide_hosts(hosts, facts, all_sizes=all_sizes, explain=all_sizes, say=say)
    return decide_alone(hosts.job, facts, hosts.host, measure=measure, all_sizes=all_sizes, say=say)


def _facts(hosts: OpenHosts) -> Facts:
    loaded = hosts.host.facts
    return Facts(
        train_samples=loaded["train_samples"],
        eval_samples=loaded["eval_samples"],
        cores=machine.cores(),
        loader_settings=loaded["loader_settings"],
        sample_order=loaded["sample_order"],
    )


def _check(ready: ReadyHosts, plan: Plan) -> None:
    """Refuse a task that remembers, or waits for what does not come, before anything is written."""
    metric = ready.memory.scheduler_metric
    if metric and not plan.eval_samples:
        raise TaskError(
            "Task.scheduler returned a ReduceLROnPlateau, and nothing is evaluated",
            expected=f"a data set from Task.eval_data, and evaluate = true: it waits for {metric}",
            found="no held-out samples",
            fix="define Task.eval_data, or use another schedule",
        )
    if plan.purity > 0.0:
        ready.host.check_purity()


def _resized(plan: Plan, workers: int | None, team: int | None, hosts: OpenHosts) -> Plan:
    """The plan of an earlier run for as many workers as asked, or as the hosts would run, and for
    teams of another size, if that is asked."""
    if workers is None and hosts.networked:
        workers = min(sum(computing(hosts.job, hosts.capacities).values()), plan.shards)
    return plan.resized(workers, team)


@contextlib.contextmanager
def _training(
    job: Job,
    plan: Plan,
    ready: ReadyHosts,
    folder: RunFolder,
    start: Restart,
    control: RunControl | None,
    callbacks: Sequence[Callback],
    quiet: bool,
) -> Iterator[tuple[Coordinator, Recorder]]:
    """A coordinator whose run goes into a folder; the report is written at the end, also where
    somebody has asked to stop.

    Raises:
        StoppedError, RunInterrupted, DataLostError: as the coordinator does, with how to go on.
    """
    schedule = StopSchedule(
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        evaluate=plan.eval_samples > 0,
        checkpoint_steps=job.checkpoint_steps,
        checkpoint_seconds=job.checkpoint_seconds,
        automatic=job.checkpoint_steps is None and job.checkpoint_seconds is None,
    )
    control = control or RunControl()
    callbacks = [*callbacks, *make_loggers(job.log)]
    try:
        with (
            control as requests,
            Recorder(
                folder, ready.memory, plan, job.keep_checkpoints, start, callbacks, quiet=quiet
            ) as recorder,
        ):
            requests.take_signals()
            requests.open(folder.path, ready.own_plan.max_workers)
            yield (
                Coordinator(
                    ready,
                    schedule,
                    recorder,
                    start.step,
                    requests=requests.take,
                    evaluations=start.evaluations,
                    evaluated=recorder.evaluated_at,
                ),
                recorder,
            )
    except StoppedError as error:
        with contextlib.suppress(LockstepError, OSError):
            write_report(folder.path)
        stopped = StoppedError(error.what, fix=f"lockstep resume {folder.path}")
        raise control.stopped(stopped) from None
    except DataLostError as error:  # by now every checkpoint is written
        raise _with_checkpoint(error, folder) from None
    except LockstepError as error:
        error.fix = _how_to_go_on(error.fix, folder)
        raise
    try:
        write_report(folder.path)
    except (LockstepError, OSError) as error:
        recorder.display.note(f"report.html could not be written: {error}")


def _how_to_go_on(fix: str, folder: RunFolder) -> str:
    """What is to be done about an error, and how the run then goes on from what was kept."""
    newest = _newest(folder)
    if not newest:
        return fix
    resumed = f"lockstep resume {folder.path}"
    if not folder.read_manifest()["source"]["importable"]:
        resumed = f"lockstep.resume({str(folder.path)!r}, task=...)"
    for words in ("resume the run from its last checkpoint", "resume the run"):
        if words in fix:
            return f"{fix.replace(words, resumed)}; it goes on from {newest}"
    before = f"{fix}, then" if fix else "mend it, then"
    return f"{before}: {resumed}; it goes on from {newest}"


def _newest(folder: RunFolder) -> str:
    """The name of the newest checkpoint; empty if there is none."""
    return next((path.name for path in list_checkpoints(folder.checkpoints)), "")


def _with_checkpoint(error: DataLostError, folder: RunFolder) -> DataLostError:
    """The error, with where the run goes on when the host is there again."""
    newest = _newest(folder)
    since = f"from checkpoint {newest}" if newest else "from the beginning: there is no checkpoint"
    fix = f"start it again, then: lockstep resume {folder.path} --on ...; it goes on {since}"
    return DataLostError(error.what, expected=error.expected, found=error.found, fix=fix)

"""Jobs besides training, with a run's model: evaluate it anew, or predict from a file of records.

Both are divided among workers and hosts like training, with the same bits for any number of them
and the same tolerance of deaths. Predictions stream into a file in the order of the records, and an
attempt that was cut short is gone on with.
"""

from __future__ import annotations

import dataclasses
import mmap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from lockstep.agent.job_offer import Launcher
from lockstep.agent.local_host import Host
from lockstep.agent.observer import NullSink
from lockstep.coordinator.coordinator import Coordinator, Schedule
from lockstep.coordinator.host_group import Hosts
from lockstep.coordinator.open_job import RecordFile, open_hosts
from lockstep.coordinator.run_control import Desk
from lockstep.errors import IntegrityError, RunFolderError, StoppedError
from lockstep.job.job import Job, Task
from lockstep.job.task_source import Source
from lockstep.planning.data_partition import check_same, check_together
from lockstep.planning.plan import Plan
from lockstep.results.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from lockstep.results.manifest import check_fitted, differences, recorded_source
from lockstep.results.prediction_file import RowFile
from lockstep.results.progress import Progress
from lockstep.results.run_folder import RunFolder

AT_ONCE = 8
"""Batches per worker that are asked for together."""
NOTE_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What `evaluate` found."""

    metrics: dict[str, float]
    baseline: dict[str, float]
    step: int
    """After how many steps the model was taken."""
    samples: int
    workers: int
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What `predict` has done."""

    out: Path
    records: int
    resumed_at: int
    """How many records an earlier attempt had done."""
    step: int
    """After how many steps the model was taken."""
    workers: int
    deaths: int
    """Of workers and of hosts."""
    seconds: float
    notes: tuple[str, ...]


class _Heard(NullSink):
    """Keeps what an evaluation or a prediction says."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.baseline: dict[str, float] = {}
        self.deaths = 0
        self.losses: list[str] = []

    def event(self, name: str, **fields: Any) -> None:
        if name == "baseline":
            self.baseline = fields["metrics"]
        self.deaths += name in ("died", "host_lost")
        if name == "host_lost":
            self.losses.append(f"host {fields['host']} was lost: {fields['why']}")

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics = metrics


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A run's model, as its newest good checkpoint has it."""

    manifest: dict[str, Any]
    checkpoint: Checkpoint
    notes: tuple[str, ...]

    def plan(self, workers: int | None, hosts: Hosts | None, **changes: Any) -> Plan:
        """The run's plan without steps that are left, for so many workers, or as the hosts run."""
        plan = dataclasses.replace(
            Plan.from_message(self.manifest["plan"]),
            steps=self.checkpoint.step, ownership="replicated", servers=(),
            faults=(), audit=0.0, loaders=None, **changes,
        )  # fmt: skip
        count = workers or (plan.workers if hosts is None else hosts.capacity)
        if plan.holdings or plan.groups or plan.local_steps > 1:
            count = min(count, plan.shards)  # the state, or the data, has a part for each shard
        return dataclasses.replace(plan, workers=count, seats=count, shards=max(count, plan.shards))

    def load_into(self, host: Host) -> None:
        assert host.layout is not None
        self.checkpoint.load_into(host.layout, host.state)


def _newest(run: str | Path) -> _Model:
    """The newest good checkpoint of a run.

    Raises:
        RunFolderError: it has none.
    """
    folder = RunFolder.open(run)
    manifest, notes = folder.read_manifest(), []
    for path in list_checkpoints(folder.checkpoints):
        try:
            checkpoint = open_checkpoint(path)
        except IntegrityError as error:
            notes.append(f"{error.what}: passed over")
            continue
        if not folder.result_path.exists():
            notes.append(f"the run has not finished: the model after {path.name} is used")
        return _Model(manifest=manifest, checkpoint=checkpoint, notes=tuple(notes))
    raise RunFolderError(
        f"{run} has no good checkpoint",
        found="; ".join(notes) or "none at all",
        fix=f"lockstep resume {run}",
    )


def evaluate(
    run: str | Path,
    *,
    workers: int | None = None,
    args: Mapping[str, Any] | None = None,
    task: Task | None = None,
    on: Launcher | None = None,
) -> Evaluated:
    """Evaluate a run's model on its task's held-out data.

    Args:
        run: the run folder.
        workers: how many workers; default: as many as the run had, or as the hosts would run. The
            numbers do not depend on it.
        args: arguments of the task to be changed, such as `{"data": path}` where it takes one.
        task: the task, where the run was given an object and not a name.
        on: what brings agents to other hosts; None: this host alone.

    Raises:
        RunFolderError: there is no model.
        LockstepError: the task cannot be evaluated.
    """
    Job(task="", workers=workers)  # refuses what is out of range
    model = _newest(run)
    settings = model.manifest["job"]
    check_together(settings.get("data", "build"), alone=on is None)
    source = recorded_source(model.manifest, task, Path(run))
    source = dataclasses.replace(source, args={**source.args, **(args or {})})
    heard, desk = _Heard(), Desk()
    with desk, _loaded(source, settings, on) as (host, hosts):
        facts = host.facts
        check_fitted(run, model.manifest, facts)
        plan = model.plan(workers, hosts)
        if plan.holdings and hosts is not None:
            check_same(plan.holdings, hosts.roster.samples)
        else:
            plan = dataclasses.replace(plan, eval_samples=facts["eval_samples"])
        if not plan.eval_samples:
            raise RunFolderError(
                f"the task of {run} has no held-out data",
                expected="a data set from Task.eval_data",
                fix="define it, and evaluate with the changed task",
            )
        _set_up(model, plan, host, hosts, heard, desk, evaluate=True).run()
    return Evaluated(
        metrics=heard.metrics,
        baseline=heard.baseline,
        step=model.checkpoint.step,
        samples=plan.eval_samples,
        workers=plan.workers,
        notes=(*model.notes, *heard.losses, *differences(model.manifest, facts)),
    )


def predict(
    run: str | Path,
    data: str | Path,
    *,
    out: str | Path,
    keep: Sequence[str] = (),
    workers: int | None = None,
    batch_size: int | None = None,
    task: Task | None = None,
    quiet: bool = True,
    on: Launcher | None = None,
) -> Predicted:
    """Predict from a file of records with a run's model, into a file of rows in the same order.

    Args:
        run: the run folder. Its task has to define `from_record` and `predict`.
        data: a file of JSON lines, or a Parquet file (`*.parquet`).
        out: the file to be made, JSON lines or Parquet by its name. Where an earlier attempt with
            the same model, data and settings was cut short, its rows are kept and it is gone on.
        keep: columns of the records that go into the rows, before the predictions.
        workers: how many workers; default: as many as the run had, or as the hosts would run. The
            rows do not depend on it.
        batch_size: records at a time; default: the run's `eval_batch_size`.
        task: the task, where the run was given an object and not a name.
        quiet: no progress on stderr.
        on: what brings agents to other hosts, which are sent the records; None: this host alone.

    Raises:
        RunFolderError: there is no model, or `out` exists or cannot be made.
        DataError: a record cannot be used, or the model was fitted to other data.
        StoppedError: somebody asked to stop; the same call goes on.
    """
    begun = time.monotonic()
    Job(task="", workers=workers, batch_size=batch_size)  # refuses what is out of range
    model = _newest(run)
    source = recorded_source(model.manifest, task, Path(run))
    heard, desk = _Heard(), Desk()
    records = {"path": str(Path(data).absolute()), "keep": list(keep)}
    settings = {**model.manifest["job"], "data": "build"}  # the records take the place of its data
    with desk, _loaded(source, settings, on, records) as (host, hosts):
        facts = host.facts
        check_fitted(run, model.manifest, facts)
        size = batch_size or model.manifest["plan"]["eval_batch_size"]
        samples = facts["eval_samples"]
        plan = model.plan(workers, hosts, eval_samples=samples, eval_batch_size=size, holdings=())
        coordinator = _set_up(model, plan, host, hosts, heard, desk)
        identity = {
            "model": model.checkpoint.manifest["fingerprint"],
            "data": blake3().update_mmap(data).hexdigest(),
            "code": facts["code"],
            "batch_size": size,
            "keep": list(keep),
        }
        with (
            RowFile(Path(out), identity) as rows,
            Progress(enabled=not quiet, steps=0, name="predict") as display,
        ):
            first = rows.rows
            try:
                coordinator.run_at_rest(_rounds(coordinator, plan, rows, display))
            except StoppedError as error:
                raise StoppedError(
                    f"{error.what}, after {rows.rows} of {plan.eval_samples} records",
                    fix="the same command goes on from there",
                ) from None
            rows.finish()
    return Predicted(
        out=Path(out),
        records=plan.eval_samples,
        resumed_at=first,
        step=model.checkpoint.step,
        workers=plan.workers,
        deaths=heard.deaths,
        seconds=time.monotonic() - begun,
        notes=(
            *model.notes,
            *heard.losses,
            *differences(model.manifest, {**facts, **_of_run(model)}),
        ),
    )


def _of_run(model: _Model) -> dict[str, Any]:
    """The training set was not loaded, so it cannot be compared."""
    return {"train_samples": model.manifest["plan"]["train_samples"]}


@contextmanager
def _loaded(
    source: Source,
    settings: dict[str, Any],
    on: Launcher | None,
    records: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Host, Hosts | None]]:
    """This host with the task loaded, and the others that there are, if any shall take part."""
    with (
        ExitStack() as stack,
        Host.start(source, settings, records, networked=on is not None) as host,
    ):
        host.loaded()
        if on is None:
            yield host, None
            return
        file = None if records is None else stack.enter_context(_opened(records))
        job = Job(task="", **settings).replace(ownership="replicated", servers=())
        with open_hosts(on, source, job, settings, host, file) as hosts:
            yield host, hosts


@contextmanager
def _opened(records: Mapping[str, Any]) -> Iterator[RecordFile]:
    with (
        open(records["path"], "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        yield RecordFile(request=records, content=view)


def _set_up(
    model: _Model,
    plan: Plan,
    host: Host,
    hosts: Hosts | None,
    sink: _Heard,
    desk: Desk,
    *,
    evaluate: bool = False,
) -> Coordinator:
    """Have all hosts allocate what the plan needs, and this one load the model: others copy it."""
    if hosts is None:
        host.set_up(plan)
    else:
        hosts.set_up(plan, host)
    model.load_into(host)
    desk.take_signals()
    step = model.checkpoint.step
    schedule = Schedule(steps=step, steps_per_epoch=max(step, 1), evaluate=evaluate)
    own = plan if hosts is None else hosts.own_plan
    return Coordinator(host, own, schedule, sink, step, requests=desk.take, hosts=hosts)


def _rounds(
    coordinator: Coordinator, plan: Plan, rows: RowFile, display: Progress
) -> Iterator[None]:
    """Predict the batches that are not in the file yet, some in each round."""
    total = plan.eval_batches
    some = AT_ONCE * plan.workers
    begun = noted = time.monotonic()
    first = rows.rows
    for start in range(rows.rows // plan.eval_batch_size, total, some):
        batches = range(start, min(start + some, total))
        for found in coordinator.evaluation.divide("predict", batches):
            rows.add(found)
        now = time.monotonic()
        if now - noted >= NOTE_SECONDS:
            rate = (rows.rows - first) / (now - begun)
            display.note(f"{rows.rows:,} of {plan.eval_samples:,} records, {rate:,.0f} a second")
            noted = now
        yield

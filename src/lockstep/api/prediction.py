"""Predict: a row for each record of a file, in the order of the records.

Divided among workers and hosts like training, with the same bits for any number of them and the
same tolerance of deaths. Rows stream into a file; the same call continues an attempt that was
interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from lockstep.api.stored_model import (
    EvaluationObserver,
    StoredModel,
    request_of,
    stored_model,
)
from lockstep.coordinator.coordinator import Coordinator
from lockstep.coordinator.launcher import Launcher
from lockstep.coordinator.open_hosts import open_hosts
from lockstep.coordinator.run_control import RunControl
from lockstep.data.records import open_records
from lockstep.errors import StoppedError
from lockstep.job.job import Job
from lockstep.job.task import Task
from lockstep.planning.plan import Plan
from lockstep.results.manifest import check_fitted, differences, recorded_source
from lockstep.results.prediction_file import PredictionFile
from lockstep.results.progress import Progress, announce
from lockstep.system.folders import user_path

AT_ONCE = 8
"""Batches per worker that are asked for together."""
NOTE_SECONDS = 2.0


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
    trust: bool = False,
    checkpoint: str | None = None,
) -> Predicted:
    """Predict from a file of records with a run's model, into a file of rows in the same order.

    Args:
        run: the run folder. Its task has to define `from_record` and `predict`.
        data: a file of JSON lines, or one named `*.csv`, `*.tsv` or `*.parquet`; gzip may have
            packed it. Without records `out` is a file without rows.
        out: the file to be made, JSON lines or Parquet by its name. Where an earlier attempt with
            the same model, data and settings was cut short, its rows are kept and it is gone on.
        keep: columns of the records that go into the rows, before the predictions.
        workers: how many workers; default: as many as the run had, or as the hosts would run. The
            rows do not depend on it.
        batch_size: records at a time; default: the run's `eval_batch_size`.
        task: the task, where the run was given an object and not a name.
        trust: whether the code that the run folder names may be run though somebody else has made
            the folder.
        checkpoint: which state: `"best"` by the run's `monitor`, or the name or step of one of its
            checkpoints; None: the newest good one.
        quiet: no progress on stderr.
        on: what brings agents to other hosts, which are sent the records; None: this host alone.

    Raises:
        RunFolderError: there is no model or no such checkpoint, or `out` exists or cannot be made.
        DataError: a record cannot be used, or the model was fitted to other data.
        RunInterrupted: a signal asked to stop; the same call goes on.
    """
    begun = time.monotonic()
    data, out = user_path(data), user_path(out)
    Job(task="", workers=workers, batch_size=batch_size)  # refuses what is out of range
    model = stored_model(run, checkpoint)
    source = recorded_source(model.manifest, task, Path(run), trust=trust)
    if not len(open_records(data)):
        return _nothing(model, out, time.monotonic() - begun)
    heard, control = EvaluationObserver(), RunControl()
    announce(f"loading torch and {source.label}", quiet=quiet)
    records = {"path": str(data.absolute()), "keep": list(keep)}
    settings = {**model.manifest["job"], "data": "build"}  # the records take the place of its data
    with control, open_hosts(request_of(source, settings), on, records) as hosts:
        facts = hosts.host.facts
        check_fitted(run, model.manifest, facts)
        size = batch_size or model.manifest["plan"]["eval_batch_size"]
        samples = facts["eval_samples"]
        plan = model.plan(workers, hosts, eval_samples=samples, eval_batch_size=size, holdings=())
        coordinator = model.coordinator(plan, hosts, heard, control)
        identity = {
            "model": model.checkpoint.manifest["fingerprint"],
            "data": blake3().update_mmap(data).hexdigest(),
            "code": facts["code"],
            "batch_size": size,
            "keep": list(keep),
        }
        with (
            PredictionFile(out, identity) as rows,
            Progress(enabled=not quiet, steps=0, name="predict") as display,
        ):
            first = rows.rows
            try:
                coordinator.run_at_rest(_rounds(coordinator, plan, rows, display))
            except StoppedError as error:
                stopped = StoppedError(
                    f"{error.what}, after {rows.rows} of {plan.eval_samples} records",
                    fix="the same command goes on from there",
                )
                raise control.stopped(stopped) from None
            rows.finish()
    return Predicted(
        out=out,
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


def _nothing(model: StoredModel, out: Path, seconds: float) -> Predicted:
    """Make a file without rows."""
    with PredictionFile(out, {"model": model.checkpoint.manifest["fingerprint"]}) as rows:
        rows.finish()
    return Predicted(
        out=out, records=0, resumed_at=0, step=model.checkpoint.step, workers=0, deaths=0,
        seconds=seconds, notes=model.notes,
    )  # fmt: skip


def _of_run(model: StoredModel) -> dict[str, Any]:
    """The training set was not loaded, so it cannot be compared."""
    return {"train_samples": model.manifest["plan"]["train_samples"]}


def _rounds(
    coordinator: Coordinator, plan: Plan, rows: PredictionFile, display: Progress
) -> Iterator[None]:
    """Predict the batches that are not in the file yet, some in each round."""
    total = plan.eval_batches
    some = AT_ONCE * plan.workers
    begun = noted = time.monotonic()
    first = rows.rows
    for start in range(rows.rows // plan.eval_batch_size, total, some):
        batches = range(start, min(start + some, total))
        for found in coordinator.rounds.divide("predict", batches):
            rows.add(found)
        now = time.monotonic()
        if now - noted >= NOTE_SECONDS:
            rate = (rows.rows - first) / (now - begun)
            display.note(f"{rows.rows:,} of {plan.eval_samples:,} records, {rate:,.0f} a second")
            noted = now
        yield

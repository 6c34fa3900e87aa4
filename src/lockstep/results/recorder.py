"""Recorder: writes the history of a run into its folder, while it runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, cast

from lockstep.errors import ResourceError, disk_errors
from lockstep.job.task_source import TaskSource
from lockstep.planning.metric_decisions import Evaluation, Monitor
from lockstep.planning.plan import Plan
from lockstep.results.best_checkpoint import best_checkpoint
from lockstep.results.callbacks import Callback, CallbackThreads, RunEnded, RunStarted, frozen
from lockstep.results.checkpoint import (
    list_checkpoints,
    remove_checkpoint,
    write_checkpoint,
    write_model,
)
from lockstep.results.ledger import FIRST, EvaluationRecord, Ledger, StepRecord, read_ledger
from lockstep.results.master_process import describe_end, describe_master
from lockstep.results.metering import Meter
from lockstep.results.progress import Progress
from lockstep.results.recoveries import describe_recovery
from lockstep.results.restart import Restart
from lockstep.results.result import Result
from lockstep.results.run_folder import Events, RunFolder
from lockstep.state.control_segment import Stat
from lockstep.state.fingerprint import fingerprint, tensor_digests
from lockstep.state.host_memory import HostMemory
from lockstep.system.json_files import write_json

FOLDER_SECONDS = 1.0
"""How often it is checked that the run folder is still there."""


class Recorder:
    """Recorder: the observer that writes to the run folder, as a context manager."""

    def __init__(
        self,
        folder: RunFolder,
        memory: HostMemory,
        plan: Plan,
        keep_checkpoints: int,
        start: Restart,
        callbacks: Sequence[Callback] = (),
        *,
        quiet: bool,
    ) -> None:
        self.folder, self.memory, self.plan = folder, memory, plan
        self.layout = memory.layout
        self.keep_checkpoints = keep_checkpoints
        self.ledger = Ledger(folder.ledger_path, start.ledger or FIRST)
        self.events = Events(folder.events_path)
        self.meter = Meter(folder, self.events, start.step)
        self.display = Progress(enabled=not quiet, steps=plan.steps, name=folder.path.name)
        self.history = start.history
        self._monitor = Monitor.of(plan)
        self._decides = self._monitor is not None or bool(memory.scheduler_metric)
        """Whether evaluations decide something, and so are in the ledger."""
        self._evaluations = list(start.evaluations)
        self._stopped_early = ""
        self.recoveries = start.recoveries
        self._start = start
        self._last = start.last
        """The loss of the last step, and what the task has logged beside it."""
        self._recorded = start.step
        """How many steps the ledger has."""
        self._workers: set[int] = set()
        """The workers that this host has had."""
        self._baseline: Any = {}
        self._state: bytes | memoryview = b""
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Any] | None = None
        self._writing_seconds = 0.0
        self._looked = time.monotonic()
        """When the folder was last seen at its place."""
        self._first_step_at: float | None = None
        self._result: Result | None = None
        self._callbacks = CallbackThreads(callbacks)

    def __enter__(self) -> Recorder:
        try:
            self._begin()
        except BaseException as error:
            self._callbacks.end(RunEnded(result=None, error=str(error)))
            raise
        return self

    def _begin(self) -> None:
        self.display.__enter__()
        self._callbacks.start(self._run_started())
        self._add_event("began", **describe_master(self.layout))
        if self._start.ledger is None:
            digests = tensor_digests(self.layout, self.memory.state)
            self.ledger.begin(self.folder.read_manifest()["digest"], fingerprint(digests))
        else:
            self.event("resumed", step=self._start.step)
        for note in self._start.notes:
            self.event("note", text=note)
            self.display.note(note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.shutdown(wait=True)
        what = "" if error is None else str(error) or repr(error)
        with contextlib.suppress(ResourceError):  # a full disk has been reported when it was met
            for note in self._callbacks.end(RunEnded(result=self._result, error=what)):
                self._note_callback(note)
            self._report_failures()
        self.display.__exit__(kind, error, trace)
        with contextlib.suppress(ResourceError):
            self.meter.flush()
            if error is not None:
                self.events.add("ended", step=self._recorded, **describe_end(error))
        self.meter.close()
        for file in (self.ledger, self.events):
            with contextlib.suppress(OSError):  # a full disk has been reported when it was met
                file.close()

    # Callbacks.

    def _run_started(self) -> RunStarted:
        manifest, plan = self.folder.read_manifest(), self.plan.to_message()
        return RunStarted(
            name=self.folder.path.name,
            folder=self.folder.path.absolute(),
            step=self._start.step,
            steps=self.plan.steps,
            settings=frozen(manifest["job"]),
            args=frozen(manifest["source"]["args"]),
            plan=frozen(plan),
        )

    def _report_failures(self) -> None:
        for failure in self._callbacks.failures():
            self._note_callback(f"{failure}: it hears no more")

    def _note_callback(self, note: str) -> None:
        self.events.add("callback", note=note)
        self.display.note(f"callback {note}")

    # Observer.

    def commit(self, record: StepRecord) -> None:
        self.ledger.commit(record)
        self.meter.commit(record)
        self._last = {"loss": record.loss, **record.logged}
        self._recorded = record.step + 1
        self._callbacks.step(record)

    def event(self, name: str, **fields: object) -> None:
        if name == "timed":
            self.meter.timed(fields)
            return
        if name == "first_step":
            self._first_step_at = time.time()
        if name == "baseline":
            self._baseline = fields["metrics"]
        if name == "stopped_early":
            self._stopped_early = str(fields["reason"])
        if name == "spawned" and "host" not in fields:
            self._workers.add(cast(int, fields["worker"]))
        self._add_event(name, **fields)

    def _add_event(self, name: str, **fields: object) -> None:
        self.events.add(name, **fields)
        self._callbacks.event(name, fields)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        if self._decides and not (self._evaluations and self._evaluations[-1].step == step):
            self.ledger.evaluated(EvaluationRecord(step=step, metrics=metrics))
            self._evaluations.append(Evaluation(step=step, metrics=metrics))
        if self.history and self.history[-1]["step"] == step:
            return  # a run resumed at its last step has done so before
        epoch = (step - 1) // self.plan.steps_per_epoch if step else 0
        self.history.append({"step": step, "data_epoch": epoch, "metrics": metrics})
        self._add_event("evaluated", step=step, data_epoch=epoch, metrics=metrics)
        self._callbacks.evaluated(step, epoch, metrics)
        self.display.evaluated(step, metrics)

    @property
    def evaluated_at(self) -> list[int]:
        """The steps whose evaluation is recorded: where it decides something, in the ledger."""
        if self._decides:
            return [each.step for each in self._evaluations]
        return [each["step"] for each in self.history]

    def progress(self, step: int, loss: float, rate: float, workers: int) -> None:
        self._report_failures()
        if time.monotonic() - self._looked > FOLDER_SECONDS:
            self.folder.check_there()
            self._looked = time.monotonic()
        self.meter.look(workers)
        epoch = max(step - 1, 0) // self.plan.steps_per_epoch
        self.display.update(step, loss, rate, workers, epoch)

    def recovered(self, recoveries: list[dict[str, Any]]) -> None:
        self.recoveries += recoveries
        for record in recoveries:
            self.display.note(describe_recovery(record))

    def checkpoint(self, step: int, state: memoryview) -> None:
        """Write in the background, one at a time. A failure is reported, and training goes on."""
        self.settle()
        self.folder.check_there()
        self.ledger.flush()
        self._state = state
        extra = {"ledger": self._hash_at(step)}
        self._writing = self._writer.submit(
            self._write, step, state, extra, tuple(self._evaluations)
        )

    def _hash_at(self, step: int) -> str:
        """The hash of the ledger's line after so many steps: the last, but for a snapshot that is
        older than what is recorded."""
        if step == self._recorded:
            return self.ledger.hash
        lines = read_ledger(self.folder.ledger_path)
        return [line.hash for line in lines if line.after == step][-1]

    def _write(
        self,
        step: int,
        state: memoryview,
        extra: dict[str, Any],
        evaluations: tuple[Evaluation, ...],
    ) -> None:
        """Write a checkpoint, and remove those that are not to be kept: the best one is."""
        begun, computed = time.perf_counter(), time.thread_time()
        try:
            self.ledger.sync()
            path = write_checkpoint(self.folder.checkpoints, step, self.layout, state, extra)
        except ResourceError as error:
            self._add_event("checkpoint_failed", step=step, error=error.what)
            self.display.note(error.what)
            return
        self._writing_seconds = time.thread_time() - computed
        seconds = round(time.perf_counter() - begun, 4)
        self._add_event("checkpoint", step=step, path=path.name, seconds=seconds)
        best = best_checkpoint(self.folder.checkpoints, self._monitor, evaluations)
        for old in list_checkpoints(self.folder.checkpoints)[self.keep_checkpoints :]:
            if best is None or old.name != best["checkpoint"]:
                remove_checkpoint(old)

    def busy(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def writing_seconds(self) -> float:
        return self._writing_seconds

    def settle(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    # The end.

    def finish(self, steps: int, rate: float, begun: float, source: TaskSource) -> Result:
        """Write what remains, from the state at rest, and make the result."""
        self.settle()
        self.folder.check_there()
        state = self._state
        digest = fingerprint(tensor_digests(self.layout, state))
        self.ledger.end(steps, digest)
        with disk_errors("the model"):
            write_model(self.folder.model_path, self.layout, state)
        times = self._times()
        total = sum(sum(row.values()) for row in times.values())
        first = self._first_step_at or time.time()
        result = Result(
            folder=self.folder.path,
            fingerprint=digest,
            steps=steps,
            samples_per_second=round(rate, 2),
            metrics=self._metrics(),
            baseline=self._baseline,
            workers=self.plan.workers,
            shards=self.plan.shards,
            threads=self.plan.threads,
            recoveries=self.recoveries,
            wall_seconds=round(time.time() - begun, 3),
            startup_seconds=round(first - begun, 3),
            data_wait=round(sum(r["data"] for r in times.values()) / total, 4) if total else 0.0,
            times=times,
            history=self.history,
            best=best_checkpoint(self.folder.checkpoints, self._monitor, self._evaluations),
            stopped_early=self._stopped_early,
            checkpoints=sorted(p.name for p in self.folder.checkpoints.glob("step-*")),
            source=source,
        )  # fmt: skip
        if self.plan.faults:
            fired = self.memory.control.fired[: len(self.plan.faults)].tolist()
            self._add_event("faults", fired=fired)
        self.meter.flush()
        self._add_event("finished", steps=steps, fingerprint=digest)
        with disk_errors("the result"):
            write_json(self.folder.result_path, result.to_message())
        self._result = result
        return result

    def _metrics(self) -> dict[str, float]:
        metrics = dict(self.history[-1]["metrics"]) if self.history else {}
        return {**metrics, **{f"train_{name}": value for name, value in self._last.items()}}

    def _times(self) -> dict[str, dict[str, float]]:
        return {
            str(number): {
                stat.name.lower(): round(float(self.memory.control.seconds[number][stat]), 4)
                for stat in Stat
            }
            for number in sorted(self._workers)
        }

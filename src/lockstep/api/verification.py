"""Verify: replay committed steps on any number of workers and compare them with the ledger."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.agent.local_host import LocalHost
from lockstep.agent.observer import NullObserver
from lockstep.coordinator.coordinator import Coordinator
from lockstep.coordinator.open_hosts import ready_alone
from lockstep.coordinator.stop_schedule import StopSchedule
from lockstep.errors import IntegrityError, JobError, LockstepError
from lockstep.job.task import Task
from lockstep.planning.data_partition import check_together
from lockstep.planning.plan import Plan
from lockstep.results.checkpoint import (
    Checkpoint,
    check_model_file,
    open_checkpoints,
)
from lockstep.results.decision_check import check_decisions
from lockstep.results.ledger import (
    EvaluationRecord,
    Line,
    StepRecord,
    evaluations_of,
    read_ledger,
)
from lockstep.results.manifest import (
    check_manifest,
    check_sample_order,
    device_differences,
    differences,
    recorded_source,
)
from lockstep.results.progress import Progress, announce
from lockstep.results.run_folder import Events, RunFolder
from lockstep.state.fingerprint import fingerprint, tensor_digests
from lockstep.state.host_memory import HostMemory

TENSOR_SEARCH_STEPS = 32
"""After a first difference, how many more steps are replayed to name the tensors that differ."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What has been verified."""

    first: int
    last: int
    """Steps `first` to `last`, the last excluded, are as the ledger says."""
    workers: int
    start: str
    """Where the replay began: a checkpoint's name, or `seed`."""
    final: bool
    """Whether the final fingerprint was among what was compared."""
    notes: tuple[str, ...]


class Mismatch(Exception):
    """The replay has seen enough."""


class Comparison(NullObserver):
    """A run observer that compares what the replay commits with the lines of a ledger."""

    def __init__(self, lines: list[Line], display: Progress) -> None:
        self._display = display
        self._lines = {line.content["step"]: line for line in lines if "step" in line.content}
        self._evaluations = {each.step: each for each in evaluations_of(lines)}
        self._end = max((line.after for line in lines), default=0)
        self.first: StepRecord | None = None
        self.tensors: list[str] = []

    def commit(self, record: StepRecord) -> None:
        line = self._lines[record.step]
        recorded = line.content["units"]
        wrong = [name for name, digest in record.units.items() if recorded.get(name) != digest]
        self.tensors += [name for name in wrong if name not in self.tensors]
        if self.first is None and line.body != record.body():
            self.first = record
        if self.first is not None and (
            self.tensors or record.step >= self.first.step + TENSOR_SEARCH_STEPS
        ):
            raise Mismatch

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Compare with the evaluation that the ledger has. It may lack the last, where the run was
        killed in between.

        Raises:
            IntegrityError: it is another.
        """
        recorded = self._evaluations.get(step)
        if self.first is not None or (recorded is None and step >= self._end):
            return
        found = EvaluationRecord(step=step, metrics=metrics).body()
        expected = "" if recorded is None else EvaluationRecord(**vars(recorded)).body()
        if found != expected:
            raise IntegrityError(
                f"the replay's evaluation after step {step} differs from the ledger's",
                expected=f"{dict(recorded.metrics)}" if recorded else "a line for it",
                found=f"{metrics}",
                fix="the code, the held-out data or the recorded state is not the run's",
            )

    def progress(self, step: int, loss: float, rate: float, workers: int) -> None:
        self._display.update(step, loss, rate, workers)

    def error(self, notes: tuple[str, ...]) -> IntegrityError | None:
        """What differs, if anything does."""
        if self.first is None:
            return None
        recorded = float.fromhex(self._lines[self.first.step].content["loss"])
        tensors = ", ".join(self.tensors) or "none of those recorded so far"
        return IntegrityError(
            f"the replay differs from the ledger, first at step {self.first.step}",
            expected=f"loss {recorded!r}",
            found=f"loss {self.first.loss!r}; tensors that differ: {tensors}",
            fix="; ".join(notes) or "the code, the data or the recorded state is not the run's",
        )


def verify(
    run: str | Path,
    *,
    steps: tuple[int | None, int | None] = (None, None),
    workers: int | None = None,
    task: Task | None = None,
    trust: bool = False,
    quiet: bool = True,
) -> Verification:
    """Replay steps `[first, last)` of a run and compare them with its ledger.

    Args:
        run: the run folder.
        steps: which steps; None: from the first, to the last recorded.
        workers: how many workers replay; default: as many as the run had.
        task: the task, where the run was given an object and not a name.
        trust: whether the code that the run folder names may be run though somebody else has made
            the folder.
        quiet: show no progress on stderr.

    Raises:
        IntegrityError: the ledger, a checkpoint or what the code computes is not what was
            recorded; the first step and the tensors that differ are named.
    """
    folder = RunFolder.open(run)
    manifest = folder.read_manifest()
    check_together(manifest["job"].get("data", "build"), alone=True)
    lines = _read_lines(folder, manifest)
    checkpoints = open_checkpoints(folder.checkpoints)
    evaluations = evaluations_of(lines)
    plan = Plan.from_message(manifest["plan"])
    check_decisions(folder, plan, lines)
    planned = plan.steps
    first, last = _span(steps, sum("step" in line.content for line in lines))
    plan = dataclasses.replace(
        plan.with_workers(workers or plan.workers), steps=last, monitor=None, stop_patience=None
    )
    source = recorded_source(manifest, task, Path(run), trust=trust)
    announce(f"loading torch and {source.label}", quiet=quiet)
    with (
        LocalHost.start(source, {**manifest["job"]}) as host,
        Progress(enabled=not quiet, steps=last, name="verify") as display,
    ):
        facts = host.loaded()
        notes = differences(manifest, facts)
        check_sample_order(run, manifest, facts)
        ready = ready_alone(host, plan)
        notes = (*notes, *device_differences(manifest, ready.memory.profile))
        start = _restore(ready.memory, lines[0], checkpoints, first)
        comparison = Comparison(lines, display)
        schedule = StopSchedule(
            steps=last, steps_per_epoch=plan.steps_per_epoch, evaluate=bool(evaluations),
            evaluate_end=last == planned,
        )  # fmt: skip
        step = start.step if start is not None else 0
        before = [each for each in evaluations if each.step <= step]
        coordinator = Coordinator(
            ready, schedule, comparison, step,
            evaluations=before, evaluated=[each.step for each in before],
        )  # fmt: skip
        with contextlib.suppress(Mismatch):
            coordinator.run()
        if (error := comparison.error(notes)) is not None:
            raise error
        final = _compare_end(ready.memory, lines, checkpoints, last, notes)
        if final:
            state = memoryview(ready.memory.state.map)
            check_model_file(folder.model_path, ready.memory.layout, state)
    verification = Verification(
        first=step,
        last=last,
        workers=plan.workers,
        start=start.path.name if start is not None else "seed",
        final=final,
        notes=notes,
    )
    _note(folder, verification)
    return verification


def _note(folder: RunFolder, found: Verification) -> None:
    """Leave in the run's events what has been verified, if the folder can be written to. A folder
    may come from anybody, so nothing is written to where a link leads."""
    with contextlib.suppress(OSError):
        status = folder.events_path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            return
    with contextlib.suppress(LockstepError), contextlib.closing(Events(folder.events_path)) as log:
        log.add(
            "verified", first=found.first, last=found.last, workers=found.workers, final=found.final
        )


def _read_lines(folder: RunFolder, manifest: dict[str, Any]) -> list[Line]:
    """The ledger, if it is whole and that of this manifest and this result.

    Of a run that has not finished, the last line may have been cut off by a crash.

    Raises:
        IntegrityError: it is not.
    """
    finished = folder.result_path.is_file()
    lines: list[Line] = []
    if folder.ledger_path.is_file():
        lines = list(read_ledger(folder.ledger_path, torn_tail=not finished))
    if not lines:
        raise IntegrityError(
            f"{folder.ledger_path} is missing or empty",
            expected="a line for the job, and one for each committed step",
            fix="there is nothing to compare with: the run recorded no step, or its ledger is lost",
        )
    check_manifest(folder.manifest_path, manifest, lines[0].content["job"])
    end = lines[-1].content
    if finished and (found := _result_state(folder.result_path)) != end.get("state"):
        raise IntegrityError(
            f"{folder.result_path} is not that of the ledger",
            expected=f"the ledger's end, with fingerprint {found}",
            found=f"fingerprint {end['state']}" if "end" in end else f"step {end.get('step')}",
            fix="one of them was altered or cut short; use a copy of it",
        )
    return lines


def _result_state(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} is not readable: {error}", fix="use a copy of it") from error


def _span(steps: tuple[int | None, int | None], recorded: int) -> tuple[int, int]:
    first, last = steps[0] or 0, recorded if steps[1] is None else steps[1]
    if not 0 <= first <= last <= recorded:
        raise JobError(
            f"steps {first}:{last} are not all recorded", expected=f"within 0:{recorded}"
        )
    return first, last


def _restore(
    memory: HostMemory, genesis: Line, checkpoints: list[Checkpoint], first: int
) -> Checkpoint | None:
    """Put the newest checkpoint at or before `first` in place; None: the seed's own state."""
    for checkpoint in checkpoints:
        if checkpoint.step <= first:
            checkpoint.load_into(memory.layout, memory.state)
            return checkpoint
    digests = tensor_digests(memory.layout, memory.state)
    if fingerprint(digests) != genesis.content["state"]:
        raise IntegrityError(
            "the replay differs from the ledger before the first step",
            expected=f"initial state {genesis.content['state'][:16]}…",
            found=f"{fingerprint(digests)[:16]}…: the model's initial parameters differ",
            fix="the code that builds the model, or its seed, is not the run's",
        )
    return None


def _compare_end(
    memory: HostMemory,
    lines: list[Line],
    checkpoints: list[Checkpoint],
    last: int,
    notes: tuple[str, ...],
) -> bool:
    """Compare the whole state where the run recorded it; whether it did."""
    digests = tensor_digests(memory.layout, memory.state)
    found = fingerprint(digests)
    for checkpoint in checkpoints:
        if checkpoint.step == last and checkpoint.manifest["fingerprint"] != found:
            recorded = checkpoint.manifest["tensors"]
            wrong = [name for name, digest in digests.items() if recorded.get(name) != digest]
            raise IntegrityError(
                f"the state after step {last} differs from {checkpoint.path.name}",
                expected=f"fingerprint {checkpoint.manifest['fingerprint'][:16]}…",
                found=f"fingerprint {found[:16]}…; tensors: {', '.join(wrong[:5])}",
                fix="; ".join(notes),
            )
    end = lines[-1].content
    if end.get("end") == last and end["state"] != found:
        raise IntegrityError(
            "the final state differs from the ledger's",
            expected=f"fingerprint {end['state'][:16]}…",
            found=f"fingerprint {found[:16]}…",
            fix="; ".join(notes),
        )
    return end.get("end") == last


def parse_steps(text: str) -> tuple[int | None, int | None]:
    """`A:B`, `A:`, `:B` or `A` as a span of steps.

    Raises:
        JobError: the text is none of these.
    """
    left, colon, right = text.partition(":")
    try:
        first = int(left) if left else None
        last = int(right) if right else None
    except ValueError:
        raise JobError(f"{text!r} is not a span of steps", expected="A:B") from None
    if not colon and first is not None:
        last = first + 1
    return first, last


def to_json(verification: Verification) -> str:
    """The verification as one JSON document."""
    return json.dumps(dataclasses.asdict(verification))

"""Restart: the state from which a run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep.errors import IntegrityError, disk_errors
from lockstep.planning.metric_decisions import Evaluation
from lockstep.results.checkpoint import (
    Checkpoint,
    list_checkpoints,
    open_checkpoint,
    remove_partial,
)
from lockstep.results.ledger import Line, evaluations_of, numbers_of, read_ledger
from lockstep.results.manifest import device_differences, differences
from lockstep.results.run_folder import RunFolder
from lockstep.state.host_memory import HostMemory
from lockstep.system.json_files import with_nan


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Restart: the step to resume from, and the recorded history before it."""

    step: int
    ledger: str | None
    """The hash of the ledger's last line; None: the ledger has not begun."""
    last: Mapping[str, float] = field(default_factory=dict)
    """The loss of the step before, and what the task has logged beside it."""
    evaluations: tuple[Evaluation, ...] = ()
    """Those that are in the ledger, since they decide something."""
    history: list[dict[str, Any]] = field(default_factory=list)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_restart(folder: RunFolder, memory: HostMemory, facts: Mapping[str, Any]) -> Restart:
    """Restore the newest good checkpoint that the ledger confirms; without one, begin again.

    The ledger is cut after the checkpoint's step: what was committed later is computed again, to
    the same bits. Checkpoints that are torn or altered are named in the notes.

    Raises:
        IntegrityError: a good checkpoint is not one of this task's; the run is left as it is.
    """
    with disk_errors("the run folder"):
        remove_partial(folder.checkpoints)
    manifest = folder.read_manifest()
    notes = [*differences(manifest, facts), *device_differences(manifest, memory.profile)]
    lines = _readable_lines(folder, notes)
    for path in list_checkpoints(folder.checkpoints):
        try:
            checkpoint = open_checkpoint(path)
            line = _line_of(checkpoint, lines)
        except IntegrityError as error:
            notes.append(f"{error.what}: passed over")
            continue
        checkpoint.load_into(memory.layout, memory.state)
        with disk_errors("the ledger"):
            os.truncate(folder.ledger_path, line.end)
        history, recoveries = _remembered(folder, checkpoint.step)
        before = lines[: lines.index(line) + 1]
        last = next(each for each in reversed(before) if "evaluated" not in each.content)
        return Restart(
            step=checkpoint.step,
            ledger=line.hash,
            last={k: v for k, v in numbers_of(last).items() if k != "norm"},
            evaluations=evaluations_of(before),
            history=history,
            recoveries=recoveries,
            notes=notes,
        )
    with disk_errors("the ledger"):
        folder.ledger_path.unlink(missing_ok=True)
    return Restart(step=0, ledger=None, notes=[*notes, "no checkpoint: from the beginning"])


def _readable_lines(folder: RunFolder, notes: list[str]) -> list[Line]:
    """The ledger's lines up to the first that does not hold."""
    lines: list[Line] = []
    try:
        for line in read_ledger(folder.ledger_path, torn_tail=True):
            lines.append(line)  # noqa: PERF402  # what was read before an error counts
    except (IntegrityError, OSError) as error:
        notes.append(str(error).splitlines()[0])
    return lines


def _line_of(checkpoint: Checkpoint, lines: list[Line]) -> Line:
    """The ledger line of the last step in a checkpoint, or that of its evaluation, if the
    checkpoint was written after that."""
    for line in lines:
        if line.after == checkpoint.step and line.hash == checkpoint.manifest["ledger"]:
            return line
    raise IntegrityError(f"{checkpoint.path} is not confirmed by the ledger")


def _remembered(folder: RunFolder, step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The evaluations and recoveries up to a step, from the events."""
    history: dict[int, dict[str, Any]] = {}
    recoveries = []
    try:
        text = folder.events_path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], []
    for line in text.splitlines():
        try:
            event = json.loads(line)
            event["event"]
        except (ValueError, TypeError, KeyError):
            continue  # torn by the crash
        if event["event"] == "evaluated" and event["step"] <= step:
            history[event["step"]] = {
                "step": event["step"],
                "data_epoch": event["data_epoch"],
                "metrics": with_nan(event["metrics"]),
            }
        elif event["event"] == "recovered" and event["step"] < step:
            recoveries.append({k: v for k, v in event.items() if k not in ("time", "event")})
    return [history[key] for key in sorted(history)], recoveries

"""Best checkpoint: the one of the state with the best value of the metric that a job goes by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.errors import RunFolderError
from lockstep.planning.metric_decisions import Evaluation, Monitor, best_of
from lockstep.planning.plan import Plan
from lockstep.results.checkpoint import list_checkpoints, step_of
from lockstep.results.ledger import evaluations_of, read_ledger
from lockstep.results.run_folder import RunFolder


def best_checkpoint(
    folder: Path, monitor: Monitor | None, evaluations: Sequence[Evaluation]
) -> dict[str, Any] | None:
    """Which of the checkpoints in a folder is the best, as `result.best` says it; None: nobody goes
    by a metric, or there is no checkpoint with a value of it.

    One that could not be written, as on a full disk, does not count.
    """
    if monitor is None:
        return None
    there = {step_of(path): path.name for path in list_checkpoints(folder)}
    best = best_of(evaluations, monitor, there.keys())
    if best is None:
        return None
    return {
        "step": best.step,
        "metric": monitor.metric,
        "value": monitor.value(best),
        "checkpoint": there[best.step],
    }


def named_checkpoint(folder: RunFolder, name: str) -> Path:
    """The path of a run's checkpoint: the `best`, or one by its name or its step.

    Raises:
        RunFolderError: there is none.
        IntegrityError: the ledger, which says which is the best, is damaged.
    """
    there = list_checkpoints(folder.checkpoints)
    if name == "best":
        monitor = Monitor.of(Plan.from_message(folder.read_manifest()["plan"]))
        if monitor is None:
            raise RunFolderError(
                f"{folder.path} has no best checkpoint: the run went by no metric",
                expected="a run with the setting monitor",
                fix="train with --monitor METRIC, or name a checkpoint",
            )
        evaluations = evaluations_of(read_ledger(folder.ledger_path, torn_tail=True))
        best = best_checkpoint(folder.checkpoints, monitor, evaluations)
        name = "" if best is None else best["checkpoint"]
    for path in there:
        if name and name in (path.name, str(step_of(path))):
            return path
    raise RunFolderError(
        f"{folder.path} has no checkpoint {name or 'best'}",
        expected=f"best, or one of {', '.join(path.name for path in there) or 'none'}",
        fix="look into its folder checkpoints/",
    )

"""Evaluate: the held-out metrics of a stored model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.api.stored_model import EvaluationObserver, request_of, stored_model
from lockstep.coordinator.launcher import Launcher
from lockstep.coordinator.open_hosts import open_hosts
from lockstep.coordinator.run_control import RunControl
from lockstep.errors import RunFolderError, StoppedError
from lockstep.job.job import Job
from lockstep.job.task import Task
from lockstep.results.manifest import check_fitted, differences, recorded_source
from lockstep.results.progress import announce


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


def evaluate(
    run: str | Path,
    *,
    workers: int | None = None,
    args: Mapping[str, Any] | None = None,
    task: Task | None = None,
    on: Launcher | None = None,
    trust: bool = False,
    checkpoint: str | None = None,
    quiet: bool = True,
) -> Evaluated:
    """Evaluate a run's model on its task's held-out data.

    Args:
        run: the run folder.
        workers: how many workers; default: as many as the run had, or as the hosts would run. The
            numbers do not depend on it.
        args: arguments of the task to be changed, such as `{"data": path}` where it takes one.
        task: the task, where the run was given an object and not a name.
        trust: whether the code that the run folder names may be run though somebody else has made
            the folder.
        checkpoint: which state: `"best"` by the run's `monitor`, or the name or step of one of its
            checkpoints; None: the newest good one.
        on: what brings agents to other hosts; None: this host alone.
        quiet: show no progress on stderr.

    Raises:
        RunFolderError: there is no model, or no such checkpoint.
        LockstepError: the task cannot be evaluated.
    """
    Job(task="", workers=workers)  # refuses what is out of range
    model = stored_model(run, checkpoint)
    settings = model.manifest["job"]
    source = recorded_source(model.manifest, task, Path(run), trust=trust)
    source = dataclasses.replace(source, args={**source.args, **(args or {})})
    heard, control = EvaluationObserver(), RunControl()
    announce(f"loading torch and {source.label}", quiet=quiet)
    with control, open_hosts(request_of(source, settings), on) as hosts:
        facts = hosts.host.facts
        check_fitted(run, model.manifest, facts)
        plan = model.plan(workers, hosts)
        if not plan.holdings:
            plan = dataclasses.replace(plan, eval_samples=facts["eval_samples"])
        if not plan.eval_samples:
            raise RunFolderError(
                f"the task of {run} has no held-out data",
                expected="a data set from Task.eval_data",
                fix="define it, and evaluate with the changed task",
            )
        announce(
            f"evaluating step {model.checkpoint.step:,}: {plan.eval_samples:,} samples", quiet=quiet
        )
        try:
            model.coordinator(plan, hosts, heard, control, evaluate=True).run()
        except StoppedError as error:
            raise control.stopped(error) from None
    return Evaluated(
        metrics=heard.metrics,
        baseline=heard.baseline,
        step=model.checkpoint.step,
        samples=plan.eval_samples,
        workers=plan.workers,
        notes=(*model.notes, *heard.losses, *differences(model.manifest, facts)),
    )

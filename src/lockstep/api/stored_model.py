"""Stored model: a run's newest good checkpoint, or another, loaded on one host or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.agent.observer import NullObserver
from lockstep.coordinator.coordinator import Coordinator
from lockstep.coordinator.open_hosts import OpenHosts
from lockstep.coordinator.run_control import RunControl
from lockstep.coordinator.stop_schedule import StopSchedule
from lockstep.errors import IntegrityError, RunFolderError
from lockstep.job.run_request import RunRequest
from lockstep.job.task_source import TaskSource
from lockstep.planning.plan import Plan
from lockstep.results.best_checkpoint import named_checkpoint
from lockstep.results.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from lockstep.results.run_folder import RunFolder


class EvaluationObserver(NullObserver):
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
class StoredModel:
    """A run's model, as one of its checkpoints has it."""

    manifest: dict[str, Any]
    checkpoint: Checkpoint
    notes: tuple[str, ...]

    def plan(self, workers: int | None, hosts: OpenHosts, **changes: Any) -> Plan:
        """The run's plan without steps that are left, for so many workers, or as the hosts run."""
        plan = dataclasses.replace(
            Plan.from_message(self.manifest["plan"]),
            steps=self.checkpoint.step, ownership="replicated", servers=(),
            faults=(), audit=0.0, purity=0.0, compile=False, loaders=None,
            monitor=None, stop_patience=None, **changes,
        )  # fmt: skip
        most = sum(hosts.capacities.values()) if hosts.networked else plan.workers
        count = workers or most
        if plan.holdings or plan.groups or plan.local_steps > 1:
            count = min(count, plan.shards)  # the state, or the data, has a part for each shard
        return dataclasses.replace(
            plan, workers=count, max_workers=count, shards=max(count, plan.shards),
            team=1 if hosts.networked else plan.team,
        )  # fmt: skip

    def coordinator(
        self,
        plan: Plan,
        hosts: OpenHosts,
        observer: EvaluationObserver,
        control: RunControl,
        *,
        evaluate: bool = False,
    ) -> Coordinator:
        """Have all hosts allocate what the plan needs, and this one load the model: others copy
        it. What coordinates them, at the checkpoint's step."""
        ready = hosts.initialise(plan)
        self.checkpoint.load_into(ready.memory.layout, ready.memory.state)
        control.take_signals()
        step = self.checkpoint.step
        schedule = StopSchedule(steps=step, steps_per_epoch=max(step, 1), evaluate=evaluate)
        return Coordinator(ready, schedule, observer, step, requests=control.take)


def stored_model(run: str | Path, name: str | None) -> StoredModel:
    """A run's model at a checkpoint, by default the newest good one. It stays while it is in use,
    though the run may go on.

    `name`: `best`, or a checkpoint's name or step; None: the newest.

    Raises:
        RunFolderError: there is no such checkpoint.
        IntegrityError: the one that was asked for is damaged.
    """
    folder = RunFolder.open(run)
    if name is None:
        return _newest(run, folder)
    manifest, path = folder.read_manifest(), named_checkpoint(folder, name)
    return StoredModel(manifest=manifest, checkpoint=open_checkpoint(path), notes=())


def _newest(run: str | Path, folder: RunFolder) -> StoredModel:
    manifest, notes = folder.read_manifest(), []
    paths = list_checkpoints(folder.checkpoints)
    while paths:
        path = paths.pop(0)
        try:
            checkpoint = open_checkpoint(path)
        except IntegrityError as error:
            if path.exists():
                notes.append(f"{error.what}: passed over")
            else:  # the run goes on, and has newer ones by now
                paths, notes = list_checkpoints(folder.checkpoints), []
            continue
        if not folder.result_path.exists():
            notes.append(f"the run has not finished: the model after {path.name} is used")
        return StoredModel(manifest=manifest, checkpoint=checkpoint, notes=tuple(notes))
    raise RunFolderError(
        f"{run} has no good checkpoint",
        found="; ".join(notes) or "none at all",
        fix=f"lockstep resume {run}",
    )


def request_of(source: TaskSource, settings: Mapping[str, Any]) -> RunRequest:
    """The request to load a stored model's task: every host then has the whole state."""
    alone = {"ownership": "replicated", "servers": (), "team": 1}
    if settings.get("team", 1) > 1:  # there may be more workers than shards
        alone |= {"workers": None, "max_workers": None}
    return RunRequest.recorded(source, {**settings, **alone})

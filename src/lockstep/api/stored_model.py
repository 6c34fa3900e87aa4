"""Stored model: the newest good checkpoint of a run, loaded on one host or several."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.agent.local_host import LocalHost
from lockstep.agent.observer import NullObserver
from lockstep.coordinator.coordinator import Coordinator
from lockstep.coordinator.host_group import HostGroup
from lockstep.coordinator.launcher import Launcher
from lockstep.coordinator.open_job import RecordFile, open_hosts
from lockstep.coordinator.run_control import RunControl
from lockstep.coordinator.stop_schedule import StopSchedule
from lockstep.errors import IntegrityError, RunFolderError
from lockstep.job.job import Job
from lockstep.job.task_source import TaskSource
from lockstep.planning.plan import Plan
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
    """A run's model, as its newest good checkpoint has it."""

    manifest: dict[str, Any]
    checkpoint: Checkpoint
    notes: tuple[str, ...]

    def plan(self, workers: int | None, hosts: HostGroup | None, **changes: Any) -> Plan:
        """The run's plan without steps that are left, for so many workers, or as the hosts run."""
        plan = dataclasses.replace(
            Plan.from_message(self.manifest["plan"]),
            steps=self.checkpoint.step, ownership="replicated", servers=(),
            faults=(), audit=0.0, loaders=None, **changes,
        )  # fmt: skip
        count = workers or (plan.workers if hosts is None else hosts.capacity)
        if plan.holdings or plan.groups or plan.local_steps > 1:
            count = min(count, plan.shards)  # the state, or the data, has a part for each shard
        return dataclasses.replace(
            plan, workers=count, max_workers=count, shards=max(count, plan.shards)
        )

    def load_into(self, host: LocalHost) -> None:
        assert host.layout is not None
        self.checkpoint.load_into(host.layout, host.state)


def newest_checkpoint(run: str | Path) -> StoredModel:
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
        return StoredModel(manifest=manifest, checkpoint=checkpoint, notes=tuple(notes))
    raise RunFolderError(
        f"{run} has no good checkpoint",
        found="; ".join(notes) or "none at all",
        fix=f"lockstep resume {run}",
    )


@contextmanager
def load_stored(
    source: TaskSource,
    settings: dict[str, Any],
    on: Launcher | None,
    records: Mapping[str, Any] | None = None,
) -> Iterator[tuple[LocalHost, HostGroup | None]]:
    """This host with the task loaded, and the others that there are, if any shall take part."""
    with (
        ExitStack() as stack,
        LocalHost.start(source, settings, records, networked=on is not None) as host,
    ):
        host.loaded()
        if on is None:
            yield host, None
            return
        file = None if records is None else stack.enter_context(opened(records))
        job = Job(task="", **settings).replace(ownership="replicated", servers=())
        with open_hosts(on, source, job, settings, host, file) as hosts:
            yield host, hosts


@contextmanager
def opened(records: Mapping[str, Any]) -> Iterator[RecordFile]:
    """The file of records, mapped into memory, for hosts to fetch."""
    with (
        open(records["path"], "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        yield RecordFile(request=records, content=view)


def set_up(
    model: StoredModel,
    plan: Plan,
    host: LocalHost,
    hosts: HostGroup | None,
    observer: EvaluationObserver,
    control: RunControl,
    *,
    evaluate: bool = False,
) -> Coordinator:
    """Have all hosts allocate what the plan needs, and this one load the model: others copy it."""
    if hosts is None:
        host.set_up(plan)
    else:
        hosts.set_up(plan, host)
    model.load_into(host)
    control.take_signals()
    step = model.checkpoint.step
    schedule = StopSchedule(steps=step, steps_per_epoch=max(step, 1), evaluate=evaluate)
    own = plan if hosts is None else hosts.own_plan
    return Coordinator(host, own, schedule, observer, step, requests=control.take, hosts=hosts)

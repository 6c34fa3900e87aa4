"""A job on several hosts, before it begins: it is offered, hosts come, and all is planned."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.agent.agent import facts_of
from lockstep.agent.job_offer import RecordsRequest
from lockstep.agent.local_host import LocalHost
from lockstep.coordinator.host_group import HostGroup
from lockstep.coordinator.launcher import Launcher
from lockstep.errors import JobError
from lockstep.job.code_archive import pack
from lockstep.job.job import Job
from lockstep.job.task_source import TaskSource
from lockstep.net.blob_transfer import BlobInfo
from lockstep.planning.core_split import Division, Facts
from lockstep.planning.data_partition import Holdings, divide
from lockstep.planning.ownership import ownership_of
from lockstep.planning.plan import Plan, decompose


def open_hosts(
    launcher: Launcher,
    source: TaskSource,
    job: Job,
    settings: Mapping[str, Any],
    host: LocalHost,
    records: RecordFile | None = None,
) -> HostGroup:
    """Offer a job to other hosts and wait for them. `host` is the master's own, and has loaded.

    `settings` are those that were given, and that hosts need to load the task. `records` are sent
    to them, if there are predictions to be made.

    Raises:
        JobError: the task was handed over as an object, which does not travel.
        LockstepError: a host cannot take part.
    """
    if source.payload is not None:
        raise JobError(
            "a task that is an object cannot be sent to other hosts",
            expected="a name that every host can resolve: a recipe, module:Task or file.py:Task",
            found=source.name,
            fix="put the task into a module or a file of its own",
        )
    task, archive = source.name, None
    if job.ship_code:
        archive = pack(_shippable(source.name))
        task = archive.task
    host.name = launcher.identity.node
    name = f"{source.label}-{secrets.token_hex(8)}"
    samples = host.facts["train_samples"], host.facts["eval_samples"]
    ownership = ownership_of(job.ownership, job.servers, job.compression, job.local_steps)
    hosts = HostGroup(launcher, name, facts_of(host.facts), samples, job.host_seconds, ownership)
    try:
        data = _data_of(host) if records is None else records.content
        if data is not None:
            hosts.blobs.put("data", data)
        if archive is not None:
            hosts.blobs.put("code", archive.data)
        hosts.gather(
            task=task,
            args=dict(source.args),
            settings={**settings, "host_seconds": job.host_seconds},
            code=None if archive is None else BlobInfo.of(archive.data),
            data=None if data is None else BlobInfo.of(data),
            records=None if records is None else RecordsRequest(**records.request),
        )
        hosts.rendezvous.check_servers(job.servers)
    except BaseException:
        hosts.close()
        raise
    return hosts


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """A file of records that other hosts are to have as well."""

    request: Mapping[str, Any]
    """`{"path", "keep"}`, as `LocalHost.start` takes it."""
    content: memoryview
    """The bytes of the file."""


def _data_of(host: LocalHost) -> memoryview | None:
    """The data sets, if they are to be sent."""
    return None if host.data is None else memoryview(host.data.map)[: host.data.nbytes]


def _shippable(task: str) -> str:
    """The name of a task that has code of its own."""
    if ":" not in task:
        raise JobError(
            f"ship_code is set, but {task} is a recipe",
            expected="module:Task or file.py:Task",
            found="a part of Lockstep, which every host has",
            fix="leave out ship_code",
        )
    return task


def spread(job: Job, facts: Facts, hosts: HostGroup) -> Plan:
    """Decompose a job for several hosts: as many workers as they would run, or as asked.

    Raises:
        JobError, DataError: the settings do not fit each other, the data or the hosts.
    """
    capacities = hosts.rendezvous.capacities
    workers = job.workers or hosts.capacity
    division = Division(workers=workers, threads=job.threads or 1, shards=job.shards or workers)
    shares = hosts.rendezvous.share_out(workers)
    listed = ", ".join(f"{name}: {count}" for name, count in shares.items())
    why = f"{division}: on {len(capacities)} hosts, {listed}"
    if job.data == "local":
        holdings = divide(hosts.rendezvous.samples, division.shards)
        plan = decompose(job, _of_all(facts, holdings), division, why)
        return dataclasses.replace(plan, holdings=holdings)
    plan = decompose(job, facts, division, why)
    if plan.groups and plan.groups < len(capacities):
        raise JobError(
            "there are fewer groups than hosts",
            expected=f"at least {len(capacities)} groups",
            found=f"{plan.groups}",
            fix="raise `groups`, and `shards` with it, or use fewer hosts",
        )
    return plan


def _of_all(facts: Facts, holdings: Holdings) -> Facts:
    """The facts about the data of all hosts together."""
    train, held_out = (
        sum(getattr(each, name) for each in holdings) for name in ("train", "held_out")
    )
    return dataclasses.replace(facts, train_samples=train, eval_samples=held_out)

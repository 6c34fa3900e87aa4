"""A job on several hosts, before it begins: it is offered, hosts come, and all is planned."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from lockstep.agent import facts_of
from lockstep.archive import pack
from lockstep.cargo import Bill
from lockstep.errors import JobError
from lockstep.holdings import Holdings, divide
from lockstep.host import Host
from lockstep.hosts import Hosts
from lockstep.job import Job
from lockstep.offer import Launcher
from lockstep.planning import Division, Facts, Plan, decompose, share
from lockstep.source import Source


def open_hosts(
    launcher: Launcher, source: Source, job: Job, settings: Mapping[str, Any], host: Host
) -> Hosts:
    """Offer a job to other hosts and wait for them. `host` is the master's own, and has loaded.

    `settings` are those that were given, and that hosts need to load the task.

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
    hosts = Hosts(launcher, name, facts_of(host.facts), samples, job.host_seconds)
    try:
        sets = None if host.data is None else memoryview(host.data.map)[: host.data.nbytes]
        if sets is not None:
            hosts.cargo.put("data", sets)
        if archive is not None:
            hosts.cargo.put("code", archive.data)
        hosts.gather(
            task=task,
            args=dict(source.args),
            settings={**settings, "host_seconds": job.host_seconds},
            code=None if archive is None else Bill.of(archive.data),
            data=None if sets is None else Bill.of(sets),
        )
    except BaseException:
        hosts.close()
        raise
    return hosts


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


def spread(job: Job, facts: Facts, hosts: Hosts) -> Plan:
    """Decompose a job for several hosts: as many workers as they would run, or as asked.

    Raises:
        JobError, DataError: the settings do not fit each other, the data or the hosts.
    """
    workers = job.workers or hosts.capacity
    division = Division(workers=workers, threads=job.threads or 1, shards=job.shards or workers)
    share(workers, hosts.capacities)
    listed = ", ".join(f"{name}: {count}" for name, count in hosts.capacities.items())
    why = f"{division}: on {len(hosts.capacities)} hosts, {listed}"
    if job.data != "local":
        return decompose(job, facts, division, why)
    holdings = divide(hosts.samples, division.shards)
    plan = decompose(job, _of_all(facts, holdings), division, why)
    return dataclasses.replace(plan, holdings=holdings)


def _of_all(facts: Facts, holdings: Holdings) -> Facts:
    """The facts about the data of all hosts together."""
    train, held_out = (
        sum(getattr(each, name) for each in holdings) for name in ("train", "held_out")
    )
    return dataclasses.replace(facts, train_samples=train, eval_samples=held_out)

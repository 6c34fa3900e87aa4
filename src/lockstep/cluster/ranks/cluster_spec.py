"""Cluster spec: who computes, who has the parameters, and where, from a job file. Pure.

    cluster:
      worker: [10.0.0.1:2222, 10.0.0.2:2222]
      ps: [10.0.0.3:2222]

One process is started for each entry, and told which one it is: `worker:0`, `ps:0`. The first
worker is the master. Entries of `ps` are servers: they update the parameters, and compute nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from lockstep.cluster.ranks.rank_environment import RankInfo
from lockstep.errors import JobError
from lockstep.job.job import Job

Cluster = Mapping[str, Sequence[str]]
EXPECTED = "`worker` and perhaps `ps`, each a list of host:port"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One process of a cluster."""

    task: str
    """Such as `worker:0`."""
    host: str
    port: int


def entries_of(cluster: Cluster) -> list[Entry]:
    """All processes, in the order of their ranks.

    Raises:
        JobError: the description cannot be used.
    """
    unknown = sorted(set(cluster) - {"worker", "ps"})
    if unknown or not cluster.get("worker"):
        found = f"{', '.join(unknown)}" if unknown else "no worker"
        raise JobError("the cluster is not described", expected=EXPECTED, found=found)
    entries = [
        _entry(f"{kind}:{number}", text)
        for kind in ("worker", "ps")
        for number, text in enumerate(cluster.get(kind, ()))
    ]
    addresses = {(entry.host, entry.port) for entry in entries}
    if len(addresses) < len(entries):
        raise JobError("two entries of the cluster are the same", expected="each host:port once")
    return entries


def _entry(task: str, text: object) -> Entry:
    host, colon, port = str(text).rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdecimal():
        raise JobError("an entry of the cluster is none", expected="host:port", found=repr(text))
    return Entry(task=task, host=host, port=int(port))


def rank_in(cluster: Cluster, task: str) -> RankInfo:
    """The rank of the process that is told that it is this entry.

    Raises:
        JobError: there is no such entry, or the description cannot be used.
    """
    entries = entries_of(cluster)
    tasks = [entry.task for entry in entries]
    if task not in tasks:
        raise JobError(
            "the cluster has no such process", expected=f"one of {', '.join(tasks)}", found=task
        )
    described = json.dumps({kind: list(cluster.get(kind, ())) for kind in ("worker", "ps")})
    rank = tasks.index(task)
    return RankInfo(
        rank=rank,
        size=len(entries),
        host=entries[0].host,
        port=entries[0].port,
        job=f"cluster {blake3(described.encode()).hexdigest(8)}",
        own=entries[rank].host,
    )


def on_ranks(job: Job) -> Job:
    """The job of such a cluster, for hosts that are named by their ranks."""
    assert job.cluster is not None
    entries = entries_of(job.cluster)
    servers = [f"rank-{rank}" for rank, entry in enumerate(entries) if entry.task.startswith("ps:")]
    changes = {"ownership": "servers", "servers": servers} if servers else {}
    return job.replace(cluster=None, **changes)

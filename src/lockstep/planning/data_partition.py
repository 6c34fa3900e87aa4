"""Data partition: with `data: local`, which host has how much, and so computes which shards. Pure.

Each host keeps its own part, and with it shards for the job's life: as many of them as its
part is of the whole, at least one. So the numbers depend on who has what, and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.errors import DataLostError, JobError, RefusedError
from lockstep.planning.sampling import Part

Samples = tuple[int, int]
"""How many there are to train with, and held out."""


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """What one host has."""

    host: str
    train: int
    """Samples of its training set."""
    held_out: int
    """Samples of its held-out set."""
    shards: int
    """How many shards are made of its samples: with those of the hosts before it, in order."""


Holdings = tuple[DataPart, ...]
"""Of all hosts, in the order of their shards, the master's first; empty: data is not divided."""


def divide(samples: Mapping[str, Samples], shards: int) -> Holdings:
    """Divide shards among hosts, in this order, by their training samples.

    Raises:
        JobError: there are fewer shards than hosts.
    """
    if shards < len(samples):
        raise JobError(
            "there are fewer shards than hosts, each of which has data of its own",
            expected=f"shards >= {len(samples)}",
            found=f"shards = {shards}",
            fix="set shards",
        )
    total, free = sum(train for train, _ in samples.values()), shards - len(samples)
    found, before = [], 0
    for host, (train, held_out) in samples.items():
        count = 1 + free * (before + train) // total - free * before // total
        found.append(DataPart(host=host, train=train, held_out=held_out, shards=count))
        before += train
    return tuple(found)


def from_message(message: Sequence[Mapping[str, Any]]) -> Holdings:
    """The holdings in a plan's message."""
    return tuple(DataPart(**each) for each in message)


def parts(holdings: Holdings) -> tuple[Part, ...]:
    """The training set's parts, as `Sampling` has them."""
    return tuple((each.train, each.shards) for each in holdings)


def shard_ranges(holdings: Holdings) -> dict[str, range]:
    """By host, the shards that are made of its samples."""
    found, first = {}, 0
    for each in holdings:
        found[each.host] = range(first, first + each.shards)
        first += each.shards
    return found


def held_out_batches(holdings: Holdings, batch_size: int) -> dict[str, range]:
    """By host, the numbers of its held-out batches among those of all."""
    found, first = {}, 0
    for each in holdings:
        count = math.ceil(each.held_out / batch_size)
        found[each.host] = range(first, first + count)
        first += count
    return found


def check_together(data: str, *, alone: bool) -> None:
    """Check that a job has the hosts that its data is on.

    Raises:
        JobError: it is to run on this host alone.
    """
    if data == "local" and alone:
        raise JobError(
            "with data: local every host has a part of the data, but this host is alone",
            expected="the hosts that have the others",
            fix="give --on, or set data to build where all of it is here",
        )


def check_whole(holdings: Holdings, lost: str, why: str) -> None:
    """Check that the job can go on without a host.

    Raises:
        DataLostError: its part of the data is nowhere else.
    """
    if holdings:
        raise DataLostError(
            f"host {lost} is lost, and with it its part of the data",
            expected="every host that began: each has data of its own",
            found=why,
            fix="start it again, then resume the run",
        )


def check_open(holdings: Holdings, name: str) -> None:
    """Check that a host may join a job that is planned.

    Raises:
        RefusedError: its data is not part of the job.
    """
    if holdings:
        raise RefusedError(
            f"host {name} may not join: the data was divided among the hosts that began",
            expected=", ".join(each.host for each in holdings),
            found=f"host {name}, with data that is not in the plan",
            fix="begin anew with it",
        )


def check_same(holdings: Holdings, samples: Mapping[str, Samples]) -> None:
    """Check that the hosts of a run are there again, with what they had.

    Raises:
        JobError: one is missing, is new, or has other data.
    """
    had = {each.host: (each.train, each.held_out) for each in holdings}
    apart = sorted(host for host in {*had, *samples} if had.get(host) != samples.get(host))
    if apart and holdings:
        raise JobError(
            "the run had other hosts, each with data of its own",
            expected=_listed(apart, had),
            found=_listed(apart, samples),
            fix="have the same hosts there, with the same data, and resume the run with --on",
        )


def _listed(hosts: Sequence[str], samples: Mapping[str, Samples]) -> str:
    return "; ".join(
        f"host {host} with {samples[host][0]} training and {samples[host][1]} held-out samples"
        if host in samples
        else f"no host {host}"
        for host in hosts
    )

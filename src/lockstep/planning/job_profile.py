"""Job profile: what a shard, an update and a meeting cost on a machine, and the memory of it all.

Measured by `worker.job_measurement` twice, with one worker (*alone*) and with as many as the cores
allow (*busy*); what lies between is interpolated. Nothing here changes a number of the job.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec

from lockstep.planning.memory_layout import Layout
from lockstep.system.messages import Bytes, Count, Seconds

Signed = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
Rate = Annotated[float, msgspec.Meta(ge=0.0, le=1e15)]
Samples = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers that another host may have sent: they are bounded, and finite."""

    def __post_init__(self) -> None:
        values = (getattr(self, name) for name in self.__struct_fields__)
        if not all(math.isfinite(value) for value in values if isinstance(value, float)):
            raise ValueError("a number that is not finite")


class ShardTime(Costs, frozen=True, kw_only=True):
    """The seconds of a shard of so many samples."""

    samples: Samples
    seconds: Seconds


class Measurement(Costs, frozen=True, kw_only=True):
    """What is measured while so many workers compute side by side."""

    workers: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    shards: Annotated[tuple[ShardTime, ...], msgspec.Meta(min_length=1, max_length=16)]
    """By size, the smallest first, computed the plain way; fetching included."""
    own: ShardTime
    """Of the job's own size, as most of the run's steps have it: traced, where the job is."""
    traced: bool
    sum_seconds: Seconds
    """To add one more slot to the sum of a worker's blocks."""
    optimizer_seconds: Seconds
    """To update a worker's blocks, from one slot."""
    rest_seconds: Signed
    """What a step takes beside: meetings, digests, buffers, the code between. It may be negative
    where shards in a row are quicker than single ones."""
    steps: Count
    """How many whole steps that is measured in; 0: they are too long, and it is a guess."""
    copy_rate: Rate
    """Bytes per second that one worker copies in shared memory."""
    worker_bytes: Bytes
    """Private memory of a worker at its peak: activations, libraries' work space, Python."""


class StateMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The bytes of a job's shared memory on each of its hosts."""

    parameters: Bytes = 0
    """Trainable ones and others."""
    buffers: Bytes = 0
    optimizer: Bytes = 0
    state: Bytes = 0
    """All of these as they lie in memory, with what shards and groups keep of their own."""
    slot: Bytes = 0
    """One slot: the gradients and buffers of a shard."""
    slots: Count = 0

    @staticmethod
    def of(layout: Layout, slots_bytes: int) -> StateMemory:
        """That of a host that is set up, whose slots have so many bytes together."""
        kinds: dict[str, int] = {}
        for entry in layout.entries:
            kinds[entry.kind] = kinds.get(entry.kind, 0) + entry.nbytes
        return StateMemory(
            parameters=kinds.get("param", 0),
            buffers=kinds.get("buffer", 0),
            optimizer=kinds.get("optim", 0),
            state=layout.state_bytes,
            slot=layout.slots_bytes,
            slots=slots_bytes // layout.slots_bytes if layout.slots_bytes else 0,
        )


class JobProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A job's costs on one machine."""

    alone: Measurement
    busy: Measurement
    memory: StateMemory

    def shard_seconds(self, samples: float, workers: int) -> float:
        """The seconds of a shard of so many samples while so many workers compute: piecewise
        linear in the samples, linear in the workers; traced where the job's own size is."""
        return self._between(workers, *(_shard(each, samples) for each in self._both))

    def sum_seconds(self, workers: int) -> float:
        """To add one more slot to the sum of all blocks, by so many workers together."""
        return self._divided(workers, *(each.sum_seconds for each in self._both))

    def optimizer_seconds(self, workers: int) -> float:
        """To update all blocks, by so many workers together."""
        return self._divided(workers, *(each.optimizer_seconds for each in self._both))

    def rest_seconds(self, workers: int) -> float:
        """What a step takes beside computing, summing and updating."""
        return self._between(workers, *(each.rest_seconds for each in self._both))

    @property
    def worker_bytes(self) -> int:
        """Private memory of a worker at its peak."""
        return max(each.worker_bytes for each in self._both)

    @property
    def _both(self) -> tuple[Measurement, Measurement]:
        return self.alone, self.busy

    def _between(self, workers: int, alone: float, busy: float) -> float:
        most = self.busy.workers
        if most <= self.alone.workers:
            return busy
        part = (workers - self.alone.workers) / (most - self.alone.workers)
        return alone + (busy - alone) * min(max(part, 0.0), 1.0)

    def _divided(self, workers: int, alone: float, busy: float) -> float:
        """Seconds of work that workers divide: what each would take for the whole is
        interpolated."""
        whole = self._between(workers, alone * self.alone.workers, busy * self.busy.workers)
        return whole / workers


def _shard(measured: Measurement, samples: float) -> float:
    """The seconds of a shard, by one measurement."""
    plain = interpolate([(each.samples, each.seconds) for each in measured.shards], samples)
    own = interpolate(
        [(each.samples, each.seconds) for each in measured.shards], measured.own.samples
    )
    return plain * (measured.own.seconds / own if own > 0 else 1.0)


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """The piecewise linear function through points, the smallest first. Beyond them it goes on in
    the direction of the nearest two, never below the least value that was measured; one point: in
    proportion."""
    if len(points) == 1:
        (x, y) = points[0]
        return y * at / x if x else y
    index = next((i for i, (x, _) in enumerate(points[1:-1], 1) if at <= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    value = y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return max(value, min(y for _, y in points)) if at > x1 else max(value, 0.0)


def shard_sizes(batch_size: int, shards: int, train_samples: int, local_steps: int) -> list[int]:
    """The sizes of shards to measure: the job's own first, then half and double of it, as far as
    there are so many samples. A shard with local steps has one size."""
    most = max(1, train_samples // shards)
    own = min(math.ceil(batch_size / shards), most)
    others = [] if local_steps > 1 else [max(1, own // 2), min(2 * own, most)]
    return list(dict.fromkeys([own, *others]))

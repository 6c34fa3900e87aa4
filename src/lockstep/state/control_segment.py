"""The control segment: what workers and the master tell each other between messages.

Every word has one writer at a time. Progress words only grow, so a barrier is "everybody's word
has reached this value", and the same word names the step and the phase of a worker that died.
"""

from __future__ import annotations

import enum
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lockstep.job.faults import MAX_FAULTS
from lockstep.planning.digest_sample import PER_STEP
from lockstep.planning.memory_layout import Layout
from lockstep.planning.plan import Plan
from lockstep.planning.step_phases import Stage, exchange_of
from lockstep.system import futex
from lockstep.system.shared_memory import Segment

LINE = 64
"""Bytes: one cache line; words with different writers never share one."""
HEADER = 5
"""Lines before those of the seats: lease, membership epoch, the base's step, exchange, bell."""
RING = 1024
"""Step records kept: the lease never runs further ahead of the ledger than this."""
DIGEST_BYTES = 16


class Stat(enum.IntEnum):
    """Columns of a worker's row of accumulated seconds."""

    COMPUTE = 0
    DATA = 1
    WAIT = 2
    REDUCE = 3
    UPDATE = 4
    EVALUATE = 5


@dataclass(frozen=True, kw_only=True)
class ControlShape:
    """The sizes that fix where everything in the control segment lies."""

    shards: int
    max_workers: int
    """How many workers there can be at one time; a worker's seat is its index here."""
    params: int

    @staticmethod
    def of(plan: Plan, layout: Layout) -> ControlShape:
        """The sizes of a planned run."""
        return ControlShape(
            shards=plan.shards, max_workers=plan.max_workers, params=len(layout.trainable)
        )

    def fields(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Name, element type and shape of each array, in order."""
        words = LINE // 4
        return {
            "header": (np.int32, (HEADER, words)),
            "progress": (np.int32, (self.max_workers, words)),
            "shard_done": (np.int32, (self.shards,)),
            "shard_by": (np.int32, (self.shards,)),
            "has_grad": (np.uint8, (self.shards, max(self.params, 1))),
            "ready": (np.int32, (self.shards, max(self.params, 1))),
            "norms": (np.float64, (max(self.params, 1),)),
            "seconds": (np.float64, (self.max_workers, len(Stat))),
            "losses": (np.float64, (RING, self.shards)),
            "total_norms": (np.float64, (RING,)),
            "times": (np.float64, (RING,)),
            "base_due": (np.uint8, (RING,)),
            "digests": (np.uint8, (RING * PER_STEP * DIGEST_BYTES,)),
            "fired": (np.uint8, (MAX_FAULTS,)),
        }

    def nbytes(self) -> int:
        return sum(_padded(kind, shape) for kind, shape in self.fields().values())


def _padded(kind: Any, shape: tuple[int, ...]) -> int:
    nbytes: int = np.dtype(kind).itemsize * math.prod(shape)
    return math.ceil(nbytes / LINE) * LINE


class ControlSegment:
    """Views of the control segment. Lives as long as its `segment` is mapped."""

    def __init__(self, segment: Segment, shape: ControlShape) -> None:
        self.segment, self.shape = segment, shape
        self.seating = threading.Lock()
        """Held by the threads of an agent while they say who its workers are, or look at what all
        of them have done."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        offset = 0
        for name, (kind, size) in shape.fields().items():
            count = math.prod(size)
            view = np.frombuffer(segment.map, dtype=kind, count=count, offset=offset)
            arrays[name] = view.reshape(size)
            offset += _padded(kind, size)
        self.base: int = arrays["header"].ctypes.data
        self._words = memoryview(segment.map).cast("i")
        self.shard_done = arrays["shard_done"]
        self.shard_by = arrays["shard_by"]
        self.has_grad = arrays["has_grad"]
        self.ready = arrays["ready"]
        """By shard and parameter: the step, plus one, whose gradient is in the slot already."""
        self.norms = arrays["norms"]
        self.seconds = arrays["seconds"]
        # The ring: what is recorded of a step lies at index `step % RING` until it is drained.
        self.losses = arrays["losses"]
        self.total_norms = arrays["total_norms"]
        self.times = arrays["times"]
        self.snapshot_due = arrays["base_due"]
        """Whether the base is brought up to date after a step. Set by the master before it grants
        the step, so that all workers agree."""
        self._digests = arrays["digests"]
        self._digest_bytes = self._digests.data
        self.fired = arrays["fired"]

    # The lease: workers may run every step below it. Written by the master.

    @property
    def lease(self) -> int:
        return self._words[0]

    @lease.setter
    def lease(self, step: int) -> None:
        self._words[0] = step

    # The membership epoch: when it differs from a worker's own, that worker stops at its next
    # barrier and asks the master what to do. Written by the master.

    @property
    def epoch(self) -> int:
        return self._words[LINE // 4]

    # After how many steps the base was taken. Written by rank 0, and by the master at rest.

    @property
    def snapshot_step(self) -> int:
        return self._words[2 * LINE // 4]

    @snapshot_step.setter
    def snapshot_step(self, step: int) -> None:
        self._words[2 * LINE // 4] = step

    # How far the exchange between hosts is. Written by the exchanger.

    @property
    def exchanged(self) -> int:
        return self._words[3 * LINE // 4]

    def set_exchanged(self, step: int, stage: Stage) -> None:
        """Publish how far the exchange is, and wake the workers that wait for it."""
        self._words[3 * LINE // 4] = exchange_of(step, stage)
        futex.wake(self.exchange_address)

    @property
    def exchange_address(self) -> int:
        """The address of that word, for futex waits."""
        return self.base + 3 * LINE

    # The bell: workers ring it for their host's exchanger, which waits on it.

    @property
    def bell(self) -> int:
        return self._words[4 * LINE // 4]

    @property
    def bell_address(self) -> int:
        """The address of that word, for futex waits."""
        return self.base + 4 * LINE

    def ring(self) -> None:
        """Tell the exchanger that there is something new. Of two that ring at once one may not
        count: the other one wakes it as well."""
        word = 4 * LINE // 4
        self._words[word] = (self._words[word] + 1) & 0x7FFFFFFF
        futex.wake(self.bell_address)

    def raise_epoch(self) -> int:
        """Take the next membership epoch and wake every worker that waits at a barrier."""
        raised = self.epoch + 1
        self._words[LINE // 4] = raised
        futex.wake(self.exchange_address)
        for worker_id in range(self.shape.max_workers):
            futex.wake(self.progress_address(worker_id))
        return raised

    def progress(self, worker_id: int) -> int:
        return self._words[(HEADER + worker_id) * LINE // 4]

    def set_progress(self, worker_id: int, value: int) -> None:
        """Publish how far the worker in `worker_id` is. Called by that worker alone while it
        lives."""
        self._words[(HEADER + worker_id) * LINE // 4] = value

    def progress_address(self, worker_id: int) -> int:
        """The address of a seat's progress word, for futex waits."""
        return self.base + (HEADER + worker_id) * LINE

    def shard(self, worker_id: int) -> int:
        """The shard or held-out batch that the worker in `worker_id` is on, or was on last; -1:
        none."""
        return self._words[(HEADER + worker_id) * LINE // 4 + 1]

    def forget_shard(self, worker_id: int) -> None:
        """Say that the worker in `worker_id` is on none. Called by the master before it begins."""
        self._words[(HEADER + worker_id) * LINE // 4 + 1] = -1

    def sign_of_life(self, worker_id: int) -> tuple[int, int, int]:
        """Changes whenever the worker in `worker_id` gets anywhere."""
        word = (HEADER + worker_id) * LINE // 4
        return self._words[word], self._words[word + 1], self._words[word + 2]

    def beat(self, worker_id: int, shard: int) -> None:
        """Say that this worker begins a shard, or a held-out batch. Called by the worker."""
        word = (HEADER + worker_id) * LINE // 4
        self._words[word + 1] = shard
        self._words[word + 2] = (self._words[word + 2] + 1) & 0x7FFFFFFF

    def updating(self, worker_id: int) -> int:
        """The last step whose update the worker in `worker_id` has begun."""
        return self._words[(HEADER + worker_id) * LINE // 4 + 3]

    def set_updating(self, worker_id: int, step: int) -> None:
        """Say that this worker is about to overwrite the state. Called by it before it does, and
        by the master, with -1, when everybody rests."""
        self._words[(HEADER + worker_id) * LINE // 4 + 3] = step

    def asked(self, worker_id: int) -> int:
        """The exchanger's word that the worker in `worker_id` waits for, or has waited for last:
        its own part in what leads there is done."""
        return self._words[(HEADER + worker_id) * LINE // 4 + 4]

    def ask(self, worker_id: int, word: int) -> None:
        """Say that this worker waits for the exchange. Called by it, and by the master, with 0,
        before it begins."""
        self._words[(HEADER + worker_id) * LINE // 4 + 4] = word

    def set_digest(self, step: int, index: int, digest: bytes) -> None:
        """Record the digest of the step's unit of this index."""
        self.digest_place(step, index)[:] = digest

    def digest(self, step: int, index: int) -> str:
        """The digest of the step's unit of this index, in hex."""
        return self.digest_place(step, index).hex()

    def digest_place(self, step: int, index: int) -> memoryview:
        """Where the digest of the step's unit of this index lies."""
        start = ((step % RING) * PER_STEP + index) * DIGEST_BYTES
        return self._digest_bytes[start : start + DIGEST_BYTES]

    def close(self) -> None:
        """Let go of the views, then of the segment."""
        self._words.release()
        self._digest_bytes.release()
        views = [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]
        for name in views:
            delattr(self, name)
        self.segment.close()

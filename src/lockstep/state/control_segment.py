"""Control segment: the words in shared memory by which agent, workers and exchange thread agree.

Every word has one writer at a time. Progress words only grow, so a barrier is "everybody's word
has reached this value", and the same word names the step and the phase of a worker that died.

    header   a cache line for each of its words
    workers  a cache line for each worker, with its words
    arrays   by shard, parameter or step (see `ControlShape.arrays`)
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
LINE_WORDS = LINE // 4
RING = 1024
"""Steps in the ring buffer: the lease never runs further ahead of the ledger than this."""
DIGEST_BYTES = 16
MOST_LOGGED, NAMES_BYTES = 16, 512
"""How many values a task may log beside the loss, and how long their names may be."""
COUNTER_MASK = 0x7FFFFFFF
"""Counters that only have to change wrap here."""


# The words of the header; each has a line of its own. Plain numbers: an enum's are slow to look up.
LEASE, EPOCH, SNAPSHOT_STEP, EXCHANGED, NOTIFICATIONS, MIRROR_STEP = range(6)
HEADER_LINES = 6
# The words of a worker's line.
PROGRESS, SHARD, BEATS, UPDATING, AWAITED, MEMBER = range(6)


VIEWS = (memoryview, np.ndarray)
OUTCOME = np.dtype([("loss", np.float64), ("logged", np.int32), ("names", np.int32)])
"""A shard's loss in a step, and how many values are logged beside it, under how long names."""


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
    """How many workers there can be at one time; their ids are below it."""
    params: int

    @staticmethod
    def of(plan: Plan, layout: Layout) -> ControlShape:
        """The sizes of a planned run."""
        return ControlShape(
            shards=plan.shards, max_workers=plan.max_workers, params=len(layout.trainable)
        )

    @property
    def word_lines(self) -> int:
        """The lines of the words, before the arrays."""
        return HEADER_LINES + self.max_workers

    def arrays(self) -> dict[str, tuple[Any, tuple[int, ...]]]:
        """Name, element type and shape of each array, in order."""
        return {
            "shard_done": (np.int32, (self.shards,)),
            "shard_by": (np.int32, (self.shards,)),
            "has_grad": (np.uint8, (self.shards, max(self.params, 1))),
            "ready": (np.int32, (self.shards, max(self.params, 1))),
            "norms": (np.float64, (max(self.params, 1),)),
            "seconds": (np.float64, (self.max_workers, len(Stat))),
            "outcomes": (OUTCOME, (RING, self.shards)),
            "logged": (np.float64, (RING, self.shards, MOST_LOGGED)),
            "names": (np.uint8, (self.shards, NAMES_BYTES)),
            "names_kept": (np.int32, (self.shards,)),
            "total_norms": (np.float64, (RING,)),
            "times": (np.float64, (RING,)),
            "learning_rates": (np.float64, (RING,)),
            "snapshot_due": (np.uint8, (RING,)),
            "digests": (np.uint8, (RING * PER_STEP * DIGEST_BYTES,)),
            "fired": (np.uint8, (MAX_FAULTS,)),
        }

    def nbytes(self) -> int:
        arrays = sum(_padded(kind, shape) for kind, shape in self.arrays().values())
        return self.word_lines * LINE + arrays


def _padded(kind: Any, shape: tuple[int, ...]) -> int:
    nbytes: int = np.dtype(kind).itemsize * math.prod(shape)
    return math.ceil(nbytes / LINE) * LINE


class ControlSegment:
    """Views of the control segment. Lives as long as its `segment` is mapped."""

    def __init__(self, segment: Segment, shape: ControlShape) -> None:
        self.segment, self.shape = segment, shape
        self.membership_lock = threading.Lock()
        """Held by the threads of an agent while they say who its workers are, or look at what all
        of them have done."""
        whole = np.frombuffer(segment.map, np.uint8)
        self._base: int = whole.ctypes.data
        # Views of one word of each line: indexing them costs less than arithmetic would.
        words = memoryview(segment.map).cast("i")
        header, end = HEADER_LINES * LINE_WORDS, shape.word_lines * LINE_WORDS
        self._header = words[:header:LINE_WORDS]
        self._progress = words[header + PROGRESS : end : LINE_WORDS]
        self._shards = words[header + SHARD : end : LINE_WORDS]
        self._beats = words[header + BEATS : end : LINE_WORDS]
        self._updating = words[header + UPDATING : end : LINE_WORDS]
        self._awaited = words[header + AWAITED : end : LINE_WORDS]
        self._members = words[header + MEMBER : end : LINE_WORDS]
        arrays: dict[str, npt.NDArray[Any]] = {}
        offset = shape.word_lines * LINE
        for name, (kind, size) in shape.arrays().items():
            count = math.prod(size)
            view = np.frombuffer(segment.map, dtype=kind, count=count, offset=offset)
            arrays[name] = view.reshape(size)
            offset += _padded(kind, size)
        self.shard_done = arrays["shard_done"]
        """By shard: the last step that it was computed for."""
        self.shard_by = arrays["shard_by"]
        """By shard: the worker that computed it."""
        self.has_grad = arrays["has_grad"]
        """By shard and parameter: whether there is a gradient (see `slot_map.AGAIN`)."""
        self.ready = arrays["ready"]
        """By shard and parameter: the step, plus one, whose gradient is in the slot already."""
        self.norms = arrays["norms"]
        """By parameter: the norm of its summed gradient."""
        self.seconds = arrays["seconds"]
        """By worker: accumulated seconds (see `Stat`)."""
        # The ring buffer: what is recorded of a step lies at `step % RING` until it is drained.
        self.outcomes = arrays["outcomes"]
        """By step and shard, see `OUTCOME` and `shard_outcomes`."""
        self.losses: npt.NDArray[Any] = self.outcomes["loss"]
        self.logged_counts: npt.NDArray[Any] = self.outcomes["logged"]
        self.names_bytes: npt.NDArray[Any] = self.outcomes["names"]
        self.logged = arrays["logged"]
        """By step and shard: the values that the task logs beside the loss."""
        self.names = arrays["names"]
        """By shard: their names."""
        self.names_kept = arrays["names_kept"]
        """By shard: how long the names are that a worker of this host has found; 0: none yet."""
        self.total_norms = arrays["total_norms"]
        self.times = arrays["times"]
        self.learning_rates = arrays["learning_rates"]
        """That of the optimizer's first group; not a number: it has none, or shards have theirs."""
        self.snapshot_due = arrays["snapshot_due"]
        """Whether the snapshot is brought up to date after a step. Set by the agent before it
        grants the step, so that all workers agree."""
        self._digests = arrays["digests"]
        self._digest_view = self._digests.data
        self.fired = arrays["fired"]
        """By scripted fault: how often it has struck."""

    # The header.

    @property
    def lease(self) -> int:
        """Workers may run every step below it. Written by the agent."""
        return self._header[LEASE]

    @lease.setter
    def lease(self, step: int) -> None:
        self._header[LEASE] = step

    @property
    def epoch(self) -> int:
        """The membership epoch: when it differs from a worker's own, that worker stops at its next
        barrier and asks the agent what to do. Written by the agent."""
        return self._header[EPOCH]

    @property
    def epoch_address(self) -> int:
        """The address of that word."""
        return self._base + EPOCH * LINE

    def raise_epoch(self) -> int:
        """Take the next membership epoch and wake every worker that waits at a barrier."""
        raised = self.epoch + 1
        self._header[EPOCH] = raised
        futex.wake(self.exchange_address)
        for worker_id in range(self.shape.max_workers):
            futex.wake(self.progress_address(worker_id))
        return raised

    @property
    def snapshot_step(self) -> int:
        """After how many steps the snapshot was taken. Written by rank 0, and by the agent at
        rest."""
        return self._header[SNAPSHOT_STEP]

    @snapshot_step.setter
    def snapshot_step(self, step: int) -> None:
        self._header[SNAPSHOT_STEP] = step

    @property
    def mirror_step(self) -> int:
        """After how many steps the state segment had the part of every worker, where these have
        homes of their own: it does as long as nobody has begun to update the next. Written by rank
        0, before it has committed the step, and by the agent at rest."""
        return self._header[MIRROR_STEP]

    @mirror_step.setter
    def mirror_step(self, step: int) -> None:
        self._header[MIRROR_STEP] = step

    @property
    def exchanged(self) -> int:
        """How far the exchange between hosts is. Written by the exchange thread."""
        return self._header[EXCHANGED]

    def set_exchanged(self, step: int, stage: Stage) -> None:
        """Publish how far the exchange is, and wake the workers that wait for it."""
        self._header[EXCHANGED] = exchange_of(step, stage)
        futex.wake(self.exchange_address)

    @property
    def exchange_address(self) -> int:
        """The address of that word, for futex waits."""
        return self._base + EXCHANGED * LINE

    @property
    def notifications(self) -> int:
        """Changes whenever the exchange thread is notified; it waits on it."""
        return self._header[NOTIFICATIONS]

    @property
    def notification_address(self) -> int:
        """The address of that word, for futex waits."""
        return self._base + NOTIFICATIONS * LINE

    def notify(self) -> None:
        """Tell the exchange thread that there is something new. Of two that notify at once one may
        not count: the other one wakes it as well."""
        count = (self._header[NOTIFICATIONS] + 1) & COUNTER_MASK
        self._header[NOTIFICATIONS] = count
        futex.wake(self.notification_address)

    # A worker's line.

    def progress(self, worker_id: int) -> int:
        """How far a worker is: a step and its phase (see `step_phases`)."""
        return self._progress[worker_id]

    def set_progress(self, worker_id: int, value: int) -> None:
        """Publish how far a worker is. Called by that worker alone while it lives."""
        self._progress[worker_id] = value

    def progress_address(self, worker_id: int) -> int:
        """The address of a worker's progress word, for futex waits."""
        return self._base + (HEADER_LINES + worker_id) * LINE

    def shard(self, worker_id: int) -> int:
        """The shard or held-out batch that a worker is on, or was on last; -1: none."""
        return self._shards[worker_id]

    def forget_shard(self, worker_id: int) -> None:
        """Say that a worker is on no shard. Called by the agent before the worker begins."""
        self._shards[worker_id] = -1

    def heartbeat(self, worker_id: int) -> tuple[int, int, int]:
        """Changes whenever a worker gets anywhere."""
        return self._progress[worker_id], self._shards[worker_id], self._beats[worker_id]

    def beat(self, worker_id: int, shard: int) -> None:
        """Say that this worker begins a shard, or a held-out batch. Called by the worker."""
        self._shards[worker_id] = shard
        self._beats[worker_id] = (self._beats[worker_id] + 1) & COUNTER_MASK

    def updating(self, worker_id: int) -> int:
        """The last step whose update a worker has begun."""
        return self._updating[worker_id]

    def set_updating(self, worker_id: int, step: int) -> None:
        """Say that this worker is about to overwrite the state. Called by it before it does, and
        by the agent, with -1, when everybody rests."""
        self._updating[worker_id] = step

    def updating_address(self, worker_id: int) -> int:
        """The address of that word."""
        return self.progress_address(worker_id) + UPDATING * 4

    def awaited_exchange(self, worker_id: int) -> int:
        """The exchange word that a worker waits for, or has waited for last: its own part in what
        leads there is done."""
        return self._awaited[worker_id]

    def await_exchange(self, worker_id: int, word: int) -> None:
        """Say that this worker waits for the exchange. Called by it, and by the agent, with 0,
        before it begins."""
        self._awaited[worker_id] = word

    def awaited_member(self, worker_id: int) -> tuple[int, str] | None:
        """The member of its team that a worker waits for, and in which pass of a shard."""
        word = self._members[worker_id]
        return ((word >> 1) - 1, "backward" if word & 1 else "forward") if word else None

    def await_member(self, worker_id: int, member: int | None, phase: str) -> None:
        """Say that this worker waits for a member of its team, or for none. Called by it, and by
        the agent before it begins."""
        word = 0 if member is None else (member + 1) << 1 | (phase == "backward")
        self._members[worker_id] = word

    # Digests.

    def set_digest(self, step: int, index: int, digest: bytes) -> None:
        """Record the digest of the step's unit of this index."""
        self.digest_bytes(step, index)[:] = digest

    def digest(self, step: int, index: int) -> str:
        """The digest of the step's unit of this index, in hex."""
        return self.digest_bytes(step, index).hex()

    def digest_bytes(self, step: int, index: int) -> memoryview:
        """The memory of the digest of the step's unit of this index."""
        start = ((step % RING) * PER_STEP + index) * DIGEST_BYTES
        return self._digest_view[start : start + DIGEST_BYTES]

    def close(self) -> None:
        """Let go of the views, then of the segment."""
        views = [name for name, value in vars(self).items() if isinstance(value, VIEWS)]
        for name in views:  # nothing here may hold one still when the segment is unmapped
            delattr(self, name)
        self.segment.close()
